"""Multiply-accumulates of an ONNX graph, as exact integers."""
