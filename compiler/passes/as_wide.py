"""Norms of what is wider than their gain, which ONNX Runtime's CPU has no kernel for: they compute as wide.

    before   RMSNormalization(x float32; g float16)            → y float16
    after    RMSNormalization(x; float32(g)) ─► Cast           → y float16

The result is rounded once. A model has such norms where a part of its residual stream is in float32, as T5's is behind
its feed-forward networks.
"""

from __future__ import annotations

import onnx_ir as ir

NORM = "RMSNormalization"
WIDE = ".as_wide"
"""Behind a value's name: the same in the type of what is normalised."""


def put_as_wide(graph: ir.Graph) -> int:
    """Let such norms compute in the type of what they normalise, in place; returns how many."""
    done = 0
    for node in [node for node in graph if node.op_type == NORM and not node.domain]:
        x, gain = node.inputs[:2]
        if x is None or gain is None or x.dtype is None or gain.dtype is None or x.dtype == gain.dtype:
            continue
        wide, result = _cast(gain, x.dtype, f"{gain.name}{WIDE}.{node.name or done}", node), node.outputs[0]
        graph.insert_before(node, wide)
        node.replace_input_with(1, wide.outputs[0])
        narrow = _cast(result, gain.dtype, result.name or "", node)
        result.replace_all_uses_with(narrow.outputs[0], replace_graph_outputs=True)
        narrow.replace_input_with(0, result)
        result.name, result.type = f"{result.name}{WIDE}", ir.TensorType(x.dtype)
        graph.insert_after(node, narrow)
        done += 1
    return done


def _cast(value: ir.Value, kind: ir.DataType, name: str, owner: ir.Node) -> ir.Node:
    """A Cast that is a part of what a node is a part of; not yet in the graph."""
    cast = ir.node("Cast", [value], {"to": kind.value}, name=f"{name}.cast")
    cast.metadata_props.update(owner.metadata_props)
    result = cast.outputs[0]
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(kind)
    return cast
