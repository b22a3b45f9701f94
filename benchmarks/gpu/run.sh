#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under 8 minutes: tests, then measurements, the most important first.
#
#     benchmarks/gpu/run.sh [--dry] [--only STEP ...]
#
# Each step leaves a JSON file in $OUT (default: gpu_results/), run.json says what became of every step, and
# `python docs/make/gpu_page.py` makes docs/gpu.md of them. --dry runs the same steps on a CPU with tiny sizes: it
# shows that they run to their end, and measures nothing. Nothing is installed or downloaded. $FASHION_MNIST names a
# folder with that data set's four files (default: shared/fashion-mnist), without which the study leaves it out. A
# step that is run alone has all of the call's time: `--only study` for the study in its GPU size.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT="${OUT:-$PWD/gpu_results}"
export PYTHONPATH="$PWD:$PWD/benchmarks:$PWD/benchmarks/speed:$PWD/benchmarks/gpu:$PWD/examples/study${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu/run.py "$@"
