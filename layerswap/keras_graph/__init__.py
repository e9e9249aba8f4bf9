"""The only place that imports tensorflow, tf_keras and tf2onnx."""
