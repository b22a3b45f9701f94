"""This package's version, and those of the libraries that decide what a command finds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "safetensors", "numpy")


def library_versions() -> dict[str, str]:
    """Those of LIBRARIES that are installed, and their versions; none of them is imported."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
