"""Axes that are merged, parted, added and left out, in one step, and by constants.

    x ─► Reshape ─► Unsqueeze ─► Squeeze        x ─► Reshape, or x itself
    x ─► Shape ─► Concat ─► (the sizes of) Reshape        x ─► Reshape by [0, 0, 4, 16]

These operations leave the order of elements as it is, so that any number of them is one: that to the last sizes. A zero
stands for the size that the same axis has before, told by its name; what has another name stays as it is.
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.constants import integers, sizes
from peltc.compiler.lowering.replacing import put_in_place

KINDS = {"Reshape", "Unsqueeze", "Squeeze", "Flatten"}


def regroup(graph: ir.Graph) -> None:
    """Make one step by constants of several, in place; new nodes stand at the end, and what nobody reads stays."""
    for node in list(graph):
        if node.op_type in KINDS and not node.domain:
            _shorten(node, graph)


def _shorten(node: ir.Node, graph: ir.Graph) -> None:
    result, steps = node.outputs[0], 1
    source = node.inputs[0]
    while source is not None and (maker := source.producer()) is not None and maker.op_type in KINDS:
        source, steps = maker.inputs[0], steps + 1
    before, after = sizes(source), sizes(result)
    if source is None or before is None or after is None or source.dtype is None:
        return
    if before == after and not result.is_graph_output():
        result.replace_all_uses_with(source)
        return
    if steps == 1 and (node.op_type != "Reshape" or integers(node.inputs[1]) is not None):
        return
    if (target := _target(before, after)) is None:
        return
    emitter = Emitter(graph, source.dtype, "pelt.layout", node.metadata_props)
    put_in_place(emitter.node("Reshape", [source, emitter.integers(target)]), result)


def _target(before: list[int | str], after: list[int | str]) -> list[int] | None:
    """The sizes that a Reshape is told; None where they are no constants.

    One may be left to be computed, if all others are numbers: it is not where another one may be zero."""
    told = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            told.append(size)
        else:
            told.append(0 if axis < len(before) and before[axis] == size else -1)
    if 0 in (size for size in after if isinstance(size, int)) or told.count(-1) > 1 or (-1 in told and 0 in told):
        return None
    return told
