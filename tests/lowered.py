"""Small graphs in ONNX's own text, what they compute, and what closed forms of it are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from peltc.runtime.verification.verify import TOLERANCE

HEAD = 'ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]'
Array = np.ndarray[Any, Any]


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model_of(inputs: str, outputs: str, body: str) -> ir.Model:
    """A graph in ONNX's own text; sizes that are words are symbolic. Every value gets its shape."""
    read = onnx.parser.parse_model(f"<{HEAD}> g ({inputs}) => ({outputs}) {{ {body} }}")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(read, data_prop=True))
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)  # as exporters write them
    return model


def with_weights(model: ir.Model, weights: dict[str, Array]) -> ir.Model:
    """A graph some of whose inputs are weights, as in a model."""
    for name, array in weights.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return model


def run(model: ir.Model, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def near(found: Array, wanted: Array) -> bool:
    return bool(np.abs(found - wanted).max() <= TOLERANCE["float32"] * np.abs(wanted).max())


def number(name: str, value: float) -> str:
    return f"{name} = Constant <value = float {{{value}}}> ()"


def whole(name: str, *values: int) -> str:
    listed = ", ".join(map(str, values))
    return f"{name} = Constant <value = int64[{len(values)}] {{{listed}}}> ()"
