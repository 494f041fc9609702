"""Attention on heads that lie side by side, [B, S, H Dh], as maps write and read them.

    before   map ─► Reshape ─► Transpose ─► [rotation] ─► Attention ─► Transpose ─► Reshape ─► map
    after    map ─► [rotation] ─► Attention ─► map

`Attention` and `RotaryEmbedding` part the heads themselves. A cache [B, K, P, Dh] that is joined with new keys becomes
the operation's own past, and what it joins its own present. It applies where queries, keys and values are all
transposed from side by side, and the cache is read for both keys and values, or for none.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.attention import OPERATION
from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.rotations import OPERATION as ROTATION

HEADS_FIRST = [0, 2, 1, 3]
Operand = tuple[ir.Value, ir.Value | None]
"""New keys or values side by side, and the past that they are joined with."""


class SideBySide:
    """Lets attentions of a graph read and write heads side by side."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self.made: dict[Hashable, ir.Value] = {}

    def run(self) -> None:
        """Change every attention that can be, in place; new nodes stand at the end, and what nobody reads stays."""
        for node in list(self.graph):
            if node.op_type == OPERATION and len(node.outputs) == 1 and all(rank(v) in (4, None) for v in node.inputs):
                self._change(node)

    def _change(self, node: ir.Node) -> None:
        query, key, value = node.inputs[:3]
        assert query is not None and key is not None and value is not None
        sizes = [_sizes(v) for v in (query, key, value)]
        if None in sizes or not self._flattens(query):
            return
        joined = [self._joined(v, node) for v in (key, value)]
        if (joined[0] is None) != (joined[1] is None):
            return
        new = [v if j is None else j[1] for v, j in zip((key, value), joined, strict=True)]
        if not all(map(self._flattens, new)):
            return
        emitter = self._emitter(node)
        (heads, _), (groups, _), (_, width) = sizes  # type: ignore[misc]
        pasts = [j[0] for j in joined if j is not None]
        inputs = [self._flat(v) for v in (query, *new)]
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        attributes = {a.name: a.value for a in node.attributes.values()}
        attributes |= {"q_num_heads": heads, "kv_num_heads": groups}
        out = emitter.node(OPERATION, [*inputs, *([mask] if mask is not None or pasts else []), *pasts], attributes)
        attention = out.producer()
        assert attention is not None
        out.shape, out.type = ir.Shape([*_lead(query), heads * width]), query.type
        if pasts:
            attention.resize_outputs(3)
            for j, present in zip(joined, attention.outputs[1:], strict=True):
                assert j is not None
                whole = j[2]
                present.shape, present.type = whole.shape, whole.type
                whole.replace_all_uses_with(present, replace_graph_outputs=True)
                present.name, whole.name = whole.name, f"{whole.name}.joined"
        self._hand_on(node.outputs[0], out, heads, width, emitter)

    def _emitter(self, node: ir.Node) -> Emitter:
        kind = node.inputs[0].dtype if node.inputs[0] is not None else None
        return Emitter(self.graph, kind or ir.DataType.FLOAT, "pelt.heads", node.metadata_props)

    def _joined(self, value: ir.Value, reader: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
        """The past, the new and the whole, where a value is a cache with what is new behind it."""
        node = value.producer()
        if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
            return None
        past, new = node.inputs
        alone = all(use.node is reader for use in value.uses()) and value.is_graph_output()
        if node.attributes.get_int("axis", 0) not in (2, -2) or past is None or new is None or not alone:
            return None
        return (past, new, value) if past.is_graph_input() else None

    def _flattens(self, value: ir.Value) -> bool:
        """Whether a value [B, H, S, D] is one whose heads lie side by side."""
        node = value.producer()
        if node is None or _sizes(value) is None:
            return False
        if node.op_type == ROTATION and node.inputs[0] is not None:
            return self._flattens(node.inputs[0])
        return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == HEADS_FIRST

    def _flat(self, value: ir.Value) -> ir.Value:
        """[B, H, S, D] → [B, S, H D], of a value that flattens."""
        if value not in self.made:
            node, (heads, width) = value.producer(), _sizes(value) or (0, 0)
            assert node is not None and node.inputs[0] is not None
            emitter = self._emitter(node)
            if node.op_type == ROTATION:
                attributes = {a.name: a.value for a in node.attributes.values()} | {"num_heads": heads}
                flat = emitter.node(ROTATION, [self._flat(node.inputs[0]), *node.inputs[1:]], attributes)
            else:
                source = node.inputs[0]
                maker = source.producer()
                whole = None if maker is None or maker.op_type != "Reshape" else maker.inputs[0]
                if (
                    whole is not None
                    and rank(whole) == 3
                    and whole.shape is not None
                    and whole.shape[2] == heads * width
                ):
                    self.made[value] = whole
                    return whole
                flat = emitter.node("Reshape", [source, emitter.integers([0, 0, heads * width])])
            flat.shape, flat.type = ir.Shape([*_lead(value), heads * width]), value.type
            self.made[value] = flat
        return self.made[value]

    def _hand_on(self, before: ir.Value, flat: ir.Value, heads: int, width: int, emitter: Emitter) -> None:
        """Let what reads a result [B, H, S, Dv] read it side by side."""
        for use in tuple(before.uses()):
            node, out = use.node, use.node.outputs[0]
            if node.op_type == "Where" and (found := self._hidden(node, before, flat, emitter)) is not None:
                self._hand_on(out, found, heads, width, emitter)
            elif node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == HEADS_FIRST:
                self._laid_out(out, flat, heads, width, emitter)
            else:
                parted = emitter.node("Reshape", [flat, emitter.integers([0, 0, heads, width])])
                back = emitter.node("Transpose", [parted], {"perm": HEADS_FIRST})
                back.shape, back.type = before.shape, before.type
                node.replace_input_with(use.idx, back)
        if before.is_graph_output():
            parted = emitter.node("Reshape", [flat, emitter.integers([0, 0, heads, width])])
            back = emitter.node("Transpose", [parted], {"perm": HEADS_FIRST})
            back.shape, back.type = before.shape, before.type
            before.replace_all_uses_with(back, replace_graph_outputs=True)

    def _laid_out(self, before: ir.Value, flat: ir.Value, heads: int, width: int, emitter: Emitter) -> None:
        """Let what reads a result [B, S, H, Dv] read it side by side."""
        for use in tuple(before.uses()):
            out = use.node.outputs[0]
            if use.node.op_type == "Reshape" and use.idx == 0:
                if rank(out) == 3 and out.shape is not None and out.shape[2] == heads * width:
                    out.replace_all_uses_with(flat, replace_graph_outputs=True)
                else:
                    use.node.replace_input_with(0, flat)
            else:
                parted = emitter.node("Reshape", [flat, emitter.integers([0, 0, heads, width])])
                parted.shape, parted.type = before.shape, before.type
                use.node.replace_input_with(use.idx, parted)

    def _hidden(self, node: ir.Node, value: ir.Value, flat: ir.Value, emitter: Emitter) -> ir.Value | None:
        """A choice by rows, [B, 1, S, 1], between a value and a number, made side by side."""
        condition, *pair = node.inputs
        if condition is None or condition is value or rank(condition) != 4 or condition.shape is None:
            return None
        others = [v for v in pair if v is not value]
        if condition.shape[1] != 1 or condition.shape[3] != 1 or len(others) != 1 or others[0] is None:
            return None
        if others[0].const_value is None or others[0].const_value.size != 1 or node.outputs[0].is_graph_output():
            return None
        if condition not in self.made:
            self.made[condition] = emitter.node("Squeeze", [condition, emitter.integers([1])])
            self.made[condition].shape = ir.Shape([condition.shape[0], condition.shape[2], 1])
        chosen = emitter.node("Where", [self.made[condition], *(flat if v is value else v for v in pair)])
        chosen.shape, chosen.type = flat.shape, flat.type
        return chosen


def _sizes(value: ir.Value) -> tuple[int, int] | None:
    """Heads and features of a head."""
    if rank(value) != 4 or value.shape is None:
        return None
    heads, width = value.shape[1], value.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None


def _lead(value: ir.Value) -> list[int | str | None]:
    """The sizes of texts and tokens."""
    assert value.shape is not None
    found = [value.shape[axis] for axis in (0, 2)]
    return [size if isinstance(size, int) else size.value for size in found]
