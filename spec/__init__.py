"""The language: what a spec says and what it means. Imports neither torch nor onnx."""
