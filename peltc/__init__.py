"""peltc: parameter-efficient fine-tuning modules, compiled into ONNX deployments."""
