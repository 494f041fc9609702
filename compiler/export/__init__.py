"""From a torch model to ONNX graphs, by the exporter of `transformers`."""
