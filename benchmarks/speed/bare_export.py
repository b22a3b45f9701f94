"""What anybody would write by hand: build, export once, open a session, run. The peer of `fold --onnx`."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import

import onnxruntime
import torch
import torchvision


def main(name: str, path: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    sample = torch.randn(2, 3, 224, 224)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model, (sample,), path, dynamo=True, dynamic_shapes=({0: batch},), external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: sample.numpy()})
    print(outputs[0].shape)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
