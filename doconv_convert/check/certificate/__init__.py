"""Certificates: written beside an ONNX file, checked again without torch."""
