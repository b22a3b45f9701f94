"""ONNX files read and compared; nothing is run."""
