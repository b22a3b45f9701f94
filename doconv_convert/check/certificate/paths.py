"""Where a model's certificate and its side file stand. Importing this imports nothing else."""

from __future__ import annotations

from pathlib import Path


def certificate_path(onnx: Path) -> Path:
    return onnx.with_name(f"{onnx.stem}.certificate.json")


def reference_path(onnx: Path) -> Path:
    return onnx.with_name(f"{onnx.stem}.reference.npz")
