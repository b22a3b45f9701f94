"""Outputs of a file in onnxruntime against the reference run."""
