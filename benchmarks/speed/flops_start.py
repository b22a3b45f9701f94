"""How long `doconv-convert flops small.onnx` takes, whole, against a bare `import onnxruntime`.

    python benchmarks/speed/flops_start.py [--rounds 15]

Both in fresh interpreters, turn by turn, so that other work on the machine slows both; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

COMMAND = "from doconv_convert.cli.app import main; main()"


def small_model(path: Path) -> None:
    """Two convolutions and a product, 50 kB."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "w2": (32, 16, 3, 3), "w3": (32, 10)}
    weights = [numpy_helper.from_array(rng.standard_normal(shape, np.float32), name) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "w3"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 32, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "small", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        small_model(path)
        works = {
            "import onnxruntime": ("import onnxruntime",),
            "flops small.onnx": (COMMAND, "flops", str(path)),
            "import typer, onnx, rich.table": ("import typer, onnx, rich.table",),
        }
        for command in works.values():
            seconds(*command)
        rounds = [{name: seconds(*command) for name, command in works.items()} for _ in range(options.rounds)]
    median = {name: statistics.median(one[name] for one in rounds) for name in works}
    for name, value in median.items():
        print(f"{name:32s} {value:.3f} s  {value / median['import onnxruntime']:.2f}")


if __name__ == "__main__":
    main()
