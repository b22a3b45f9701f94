"""What `fold MODEL.onnx --merge` gains: nodes, and onnxruntime's time before and after, as a ratio.

    python benchmarks/evidence/folded_files.py BEFORE.onnx AFTER.onnx [--rounds 15]

Both files run in one process on one thread, turn by turn; the medians' ratio counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import onnx

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import

import onnxruntime


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs=2, type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    sessions = [session(path) for path in given.files]
    (port,) = sessions[0].get_inputs()
    x = np.random.default_rng(0).standard_normal([d if isinstance(d, int) else 1 for d in port.shape])
    feed = {port.name: x.astype(np.float32)}
    times: list[list[float]] = [[], []]
    for turn in range(given.rounds + 2):
        for one, seconds in zip(sessions, times, strict=True):
            start = time.perf_counter()
            one.run(None, feed)
            if turn >= 2:  # the first ones make plans and warm up
                seconds.append(time.perf_counter() - start)
    before, after = map(statistics.median, times)
    nodes = [len(onnx.load(path, load_external_data=False).graph.node) for path in given.files]
    milliseconds = f"{before * 1e3:.1f} to {after * 1e3:.1f} ms"
    print(f"{nodes[0]} nodes to {nodes[1]}, {milliseconds}: {before / after:.2f} times as fast")


if __name__ == "__main__":
    main()
