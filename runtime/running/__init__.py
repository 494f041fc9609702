"""An artifact on ONNX Runtime."""
