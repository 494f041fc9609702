"""From a spec and a model to an ONNX graph: base, survey, plan, passes, artifact. Imports neither torch nor a runtime
at load time."""
