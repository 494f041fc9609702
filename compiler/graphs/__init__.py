"""What is asked of any ONNX graph, whatever model it is of."""
