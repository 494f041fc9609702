"""A condition that becomes numbers to be added, in one step.

cast(not b) · c  =  0 where b, else c
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.constants import scalar
from peltc.compiler.lowering.layout import made_of
from peltc.compiler.lowering.replacing import put_in_place


def put_conditions(graph: ir.Graph) -> None:
    """Choose by the condition, in place; new nodes stand at the end, and what nobody reads any more stays."""
    zeros: dict[ir.DataType, ir.Value] = {}
    for node in list(graph):
        kind = node.outputs[0].dtype
        if node.op_type != "Mul" or node.domain or kind is None:
            continue
        for turned, number in (tuple(node.inputs), tuple(node.inputs)[::-1]):
            shown = made_of(made_of(turned, "Cast"), "Not")
            if shown is None or number is None or scalar(number) is None or number.dtype != kind:
                continue
            emitter = Emitter(graph, kind, "pelt.condition", node.metadata_props)
            if kind not in zeros:
                zeros[kind] = emitter.constant(0.0, "zero")
            put_in_place(emitter.node("Where", [shown, zeros[kind], number]), node.outputs[0])
            break
