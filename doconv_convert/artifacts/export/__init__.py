"""The export to ONNX, in a child process or in this one."""
