"""The only place that imports onnx and the runtimes."""
