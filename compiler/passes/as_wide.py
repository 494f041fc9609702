"""Norms of what is wider than their gain, which ONNX Runtime's CPU has no kernel for: they compute as wide.

    before   RMSNormalization(x float32; g float16)            → y float16
    after    RMSNormalization(x; float32(g)) ─► Cast           → y float16

The result is rounded once. A model has such norms where a part of its residual stream is in float32, as T5's is behind
its feed-forward networks.
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.graphs.wide import cast_of

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
        wide, result = cast_of(gain, x.dtype, f"{gain.name}{WIDE}.{node.name or done}", node), node.outputs[0]
        graph.insert_before(node, wide)
        node.replace_input_with(1, wide.outputs[0])
        narrow = cast_of(result, gain.dtype, result.name or "", node)
        result.replace_all_uses_with(narrow.outputs[0], replace_graph_outputs=True)
        narrow.replace_input_with(0, result)
        result.name, result.type = f"{result.name}{WIDE}", ir.TensorType(x.dtype)
        graph.insert_after(node, narrow)
        done += 1
    return done
