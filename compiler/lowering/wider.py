"""Operations that CUDA has no kernel for in half precision, computed in float32 between two Casts.

    y = op(x)        y = half(op(float32(x)))

The result is rounded once, as that of a kernel in half precision is.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from peltc.compiler.graphs.wide import HALF, cast_of
from peltc.compiler.lowering.kernels import fits_in_float32, place

WIDE = ".in_float32"
"""Behind a value's name: the same in float32."""


def put_wider(model: ir.Model) -> int:
    """Put Casts around what lacks a kernel in half precision and has one in float32, in place; returns how many."""
    placed, done = place(model), 0
    for node, types in placed.lacking.items():
        if fits_in_float32(node, types):
            _widen(node, placed.types)
            done += 1
    return done


def _widen(node: ir.Node, types: Mapping[ir.Value, str]) -> None:
    """Compute a node in float32."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    halves = {kind.name.lower(): kind for kind in HALF}
    for i, value in enumerate(node.inputs):
        if value is not None and types.get(value) in halves:
            graph.insert_before(
                node, cast := cast_of(value, ir.DataType.FLOAT, f"{value.name}{WIDE}.{node.name}.{i}", node)
            )
            node.replace_input_with(i, cast.outputs[0])
    for value in node.outputs:
        if (half := halves.get(types.get(value, ""))) is not None:
            name, value.name = value.name, f"{value.name}{WIDE}"
            graph.insert_after(node, cast := cast_of(value, half, name or "", node))
            result, value.type = cast.outputs[0], ir.TensorType(ir.DataType.FLOAT)
            for use in tuple(value.uses()):
                if use.node is not cast:
                    use.node.replace_input_with(use.idx, result)
            for i, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[i] = result
