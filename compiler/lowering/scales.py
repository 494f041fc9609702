"""A number that queries or keys are multiplied by: a part of the attention's own scale.

    softmax(s (c q) kᵀ)  =  softmax(s c q kᵀ)

exact but for rounding, rotations in between included, which are linear. Keys that a cache keeps stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.lowering.attention import OPERATION
from peltc.compiler.lowering.constants import scalar, sizes
from peltc.compiler.lowering.rotations import OPERATION as ROTATION


def put_scales(graph: ir.Graph) -> None:
    """Let attentions scale what is read by nothing else, in place; what nobody reads any more stays."""
    for node in list(graph):
        if node.op_type == OPERATION and "scale" in node.attributes:
            for index in (0, 1) if len(node.outputs) == 1 else (0,):
                while (factor := _unscaled(node, index)) is not None:
                    scale = node.attributes["scale"].as_float() * factor
                    node.attributes["scale"] = ir.AttrFloat32("scale", scale)


def _unscaled(reader: ir.Node, index: int) -> float | None:
    """The number that an operand is multiplied by, which its reader then reads without; None where there is none."""
    value = reader.inputs[index]
    node = None if value is None else value.producer()
    if node is None or value is None or len(tuple(value.uses())) != 1 or value.is_graph_output():
        return None
    if node.op_type == ROTATION:
        return _unscaled(node, 0)
    if node.op_type not in ("Mul", "Div") or node.domain:
        return None
    first, second = node.inputs
    for source, other in ((first, second), (second, first)) if node.op_type == "Mul" else ((first, second),):
        number = scalar(other)
        if source is not None and number and number > 0 and sizes(source) == sizes(value) is not None:
            reader.replace_input_with(index, source)
            return number if node.op_type == "Mul" else 1 / number
    return None
