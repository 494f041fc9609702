"""Attention cores: a product of queries and keys, a softmax over it, and its product with values.

    x ─► query ─► … ─► q ─┐
    x ─► key ───► … ─► k ─┴► scores ─► softmax ─┐
    x ─► value ─► … ─► v ────────────────────────┴► context ─► … ─► output

Queries, keys and values are the linear maps behind the three operands, those whose features the operands are made of;
the output projection is the linear map nearest after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from peltc.compiler.graphs.flow import Flow, Linear
from peltc.compiler.survey.anatomy import Rows
from peltc.compiler.survey.owned import bends, holder, owned_features
from peltc.compiler.survey.probe import Probe, Unprobed, ranges

THROUGH_SCORES = {
    "Add",
    "Mul",
    "Div",
    "Cast",
    "Where",
    "Reshape",
    "Sub",
    "Identity",
    "Tanh",
    "Transpose",
    "Clip",
    "Max",
    "Concat",
}
LAYOUT_STEPS = {
    "Mul",
    "Div",
    "Transpose",
    "Reshape",
    "Expand",
    "Unsqueeze",
    "Identity",
    "Concat",
    "Squeeze",
    "Cast",
    "Tile",
}
THROUGH_WEIGHTS = {"Cast", "Identity", "Where", "Mul", "Reshape", "Transpose", "Slice", "Expand"}
COMPARISONS = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
PRODUCTS = {"MatMul", "Einsum"}
OPERANDS = ("query", "key", "value")


@dataclass(eq=False)
class Core:
    """An attention core found in the graph: the two products, and the operands by role.

    Attributes:
        scores, context: queries times keys; softmax times values.
        query, key, value: the operands; keys as the product reads them, [..., Dh, T].
        mask: what is added to the scores; `sum` the scores with it.
        linears: the maps behind the operands, by role; an operand that several maps or none make up has none.
        rows, slices: the features of a fused map that an operand owns, and the value that holds just these.
        output: the map after the context.
        heads: numbers of heads, of key and value heads, and features of a head.
        written, read: keys and values, laid out [B, H, T, Dh] with all heads, and before heads are repeated.
        cross: whether keys come from another sequence; `causal` whether the mask compares positions.
    """

    scores: ir.Node
    context: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    sum: ir.Value | None
    linears: dict[str, Linear] = field(default_factory=dict)
    rows: dict[str, Rows | None] = field(default_factory=dict)
    slices: dict[str, ir.Value] = field(default_factory=dict)
    output: Linear | None = None
    heads: tuple[int, int, int] = (0, 0, 0)
    written: tuple[ir.Value | None, ir.Value | None] = (None, None)
    read: tuple[ir.Value | None, ir.Value | None] = (None, None)
    cross: bool = False
    causal: bool = False

    @property
    def asked(self) -> ir.Value:
        """Queries as the model hands them to its attention. The attention multiplies both sides of the product by the
        square root of its scale: a change that keys get too is therefore the attention's, not the model's."""
        scaled = [_scaled(value) for value in (self.query, self.key)]
        if scaled[0] is None or scaled[1] is None or scaled[0][1] != scaled[1][1]:
            return self.query
        return scaled[0][0]


def _scaled(value: ir.Value) -> tuple[ir.Value, float] | None:
    """What a value is a multiple of, and the factor."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return None
    for inner, factor in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        if inner is not None and factor is not None and factor.const_value is not None and factor.const_value.size == 1:
            return inner, float(factor.const_value.numpy().reshape(()))
    return None


def find_cores(flow: Flow) -> list[Core]:
    """Every attention core of a graph, in order."""
    finder = _Finder(flow)
    return [core for node in flow.nodes if (core := finder.core(node)) is not None]


class _Finder:
    def __init__(self, flow: Flow):
        self.flow = flow

    def core(self, node: ir.Node) -> Core | None:
        """The core around a softmax node."""
        if node.op_type != "Softmax" or node.inputs[0] is None:
            return None
        context = self._product_after(node.outputs[0])
        found = self._product_before(node.inputs[0])
        if context is None or found is None:
            return None
        scores, mask, total = found
        query, key = scores.inputs
        if scores.op_type == "Einsum":  # the last axis of the scores, over which the softmax goes, is the keys'
            first, _, out = scores.attributes.get_string("equation", "").replace(" ", "").replace("->", ",").split(",")
            query, key = (key, query) if out[-1] in first else (query, key)
        value = next((v for v in context.inputs if v and not self.flow.depends(v, node.outputs[0])), None)
        if query is None or key is None or value is None:
            return None
        core = Core(scores, context, query, key, value, mask, total)
        for role, operand in zip(OPERANDS, (query, key, value), strict=True):
            self._operand(core, role, operand)
        self._disjoint(core)
        table = self.flow.linear_of
        made = any(v in table or v.producer() in self.flow.stacked for v in self.flow.behind(key, lambda v: v in table))
        if not core.linears or (set(core.linears) == {"query"} and made):  # keys may come from another graph
            return None
        core.output = self._after(context.outputs[0])
        self._heads(core)
        core.causal = any(self._orders(m) for m in (mask, *self._conditions(node.inputs[0])) if m is not None)
        return core

    def _operand(self, core: Core, role: str, operand: ir.Value) -> None:
        """The map that makes up most of an operand's features, nearest first. Where features cannot be followed, the
        only map there is."""
        table = self.flow.linear_of
        behind = list(self.flow.behind(operand, lambda v: v in table or v.producer() in self.flow.stacked))
        maps = list(dict.fromkeys(table[v] for v in behind if v in table))
        alone = len(maps) == 1 and not any(v.producer() in self.flow.stacked for v in behind)
        most = 0
        for linear in maps:
            owned = owned_features(self.flow, linear, operand)
            if owned is None:
                owned = np.arange(linear.outputs) if alone else np.zeros(0, np.int64)
            if len(owned) > most and not (most and bends(self.flow, operand, linear)):
                most, whole = len(owned), len(owned) == linear.outputs
                core.linears[role] = linear
                core.rows[role] = None if whole else ranges(owned.tolist())
                core.slices[role] = linear.y if whole else holder(self.flow, linear, operand, owned)

    def _disjoint(self, core: Core) -> None:
        """Forget maps of which two operands would claim the same features: one was not followed to its part."""
        for role, other in (("query", "key"), ("query", "value"), ("key", "value")):
            first, second = core.linears.get(role), core.linears.get(other)
            if first is not None and first is second:
                rows = [set(_indices(core.rows[r], first)) for r in (role, other)]
                if rows[0] & rows[1]:
                    core.linears = {r: m for r, m in core.linears.items() if m is not first}

    def _product_after(self, value: ir.Value) -> ir.Node | None:
        pending, seen = [value], set()
        while pending:
            current = pending.pop(0)
            for reader in self.flow.readers(current):
                if reader in seen:
                    continue
                seen.add(reader)
                if self._product(reader) and (reader.op_type == "Einsum" or reader.inputs[0] is current):
                    return reader
                if reader.op_type in THROUGH_WEIGHTS:
                    pending.extend(reader.outputs)
        return None

    def _product_before(self, value: ir.Value) -> tuple[ir.Node, ir.Value | None, ir.Value | None] | None:
        """The product behind a softmax, and the last thing added on the way."""
        mask: ir.Value | None = None
        total: ir.Value | None = None
        current: ir.Value | None = value
        while current is not None:
            node = current.producer()
            if node is None:
                return None
            if node.op_type in PRODUCTS:
                return (node, mask, total) if self._product(node) else None
            if node.op_type not in THROUGH_SCORES:
                return None
            candidates = [v for v in node.inputs if v is not None and self._reaches_product(v)]
            if len(candidates) != 1:
                return None
            if node.op_type == "Add" and mask is None:
                mask, total = next(v for v in node.inputs if v is not candidates[0]), node.outputs[0]
                if mask is not None and self.flow.scalar(mask) is not None:
                    mask = total = None
            current = candidates[0]
        return None

    def _conditions(self, value: ir.Value) -> Iterator[ir.Value | None]:
        """What decides, between the product and the softmax, which scores stay."""
        for found in self.flow.behind(value, lambda v: (n := v.producer()) is None or n.op_type in PRODUCTS):
            node = found.producer()
            if node is not None and node.op_type == "Where":
                yield node.inputs[0]

    def _reaches_product(self, value: ir.Value, limit: int = 24) -> bool:
        pending = [value]
        for _ in range(limit):
            if not pending:
                return False
            node = pending.pop().producer()
            if node is None:
                continue
            if node.op_type in PRODUCTS:
                if self._product(node) and all(self.flow.parameter(v) is None for v in node.inputs):
                    return True
            elif node.op_type in THROUGH_SCORES:
                pending.extend(v for v in node.inputs if v is not None and v in self.flow.hidden)
        return False

    def _product(self, node: ir.Node) -> bool:
        """Whether a node multiplies two things that flow through the model."""
        return node.op_type in PRODUCTS and len(node.inputs) == 2 and all(v in self.flow.hidden for v in node.inputs)

    def _after(self, value: ir.Value) -> Linear | None:
        """The nearest linear map that reads a value, through anything that is not one."""
        readers = {id(linear.node): linear for linear in self.flow.linears}
        pending, seen = [value], {value}
        while pending:
            current = pending.pop(0)
            for reader in self.flow.readers(current):
                if id(reader) in readers:
                    return readers[id(reader)]
                if reader in self.flow.stacked:
                    return None
                for output in reader.outputs:
                    if output in self.flow.hidden and output not in seen and reader.op_type != "Softmax":
                        seen.add(output)
                        pending.append(output)
        return None

    def _heads(self, core: Core) -> None:
        """Numbers of heads, and the keys and values before and after they are repeated for groups of heads."""
        try:
            shape = {role: self._layout(core, role) for role in ("key", "value")}
        except Unprobed:
            return
        if shape["key"] is None or shape["value"] is None:
            return
        (heads, kv_heads, head_dim, k_read, k_written) = shape["key"]
        (_, _, _, v_read, v_written) = shape["value"]
        core.heads = (heads, kv_heads, head_dim)
        core.read, core.written = (k_read, v_read), (k_written, v_written)

    def _layout(self, core: Core, role: str) -> tuple[int, int, int, ir.Value, ir.Value] | None:
        """Walk from a product's operand back to the value laid out [B, H, T, Dh] that layout alone turns into it: once
        with all heads (`written`), once with the key/value heads (`read`)."""
        operand = core.key if role == "key" else core.value
        read = written = None
        heads = kv_heads = head_dim = 0
        current: ir.Value | None = operand
        while current is not None:
            try:
                shape = Probe({}).shape(current)
            except Unprobed:
                shape = ()
            if len(shape) == 4:
                indices = np.arange(int(np.prod(shape))).reshape(shape)
                arrived = Probe({current: indices}).track(operand)
                if arrived is not None and arrived.ndim == 4:
                    if role == "key":
                        arrived = arrived.swapaxes(-1, -2)
                    repeats = arrived.shape[1] // shape[1] if shape[1] else 0
                    expected = np.repeat(indices, max(repeats, 1), axis=1)
                    if arrived.shape == expected.shape and (arrived == expected).all():
                        if written is None and repeats == 1:
                            written, heads, head_dim = current, shape[1], shape[3]
                        if written is not None:
                            read, kv_heads = current, shape[1]
            node = current.producer()
            if node is None or node.op_type not in LAYOUT_STEPS:
                break
            hidden = [v for v in dict.fromkeys(node.inputs) if v is not None and v in self.flow.hidden]
            if len(hidden) != 1:
                break
            current = hidden[0]
        if read is None or written is None:
            return None
        return heads, kv_heads, head_dim, read, written

    def _orders(self, mask: ir.Value) -> bool:
        """Whether a mask compares positions with positions: what a causal mask does."""
        seen, pending = {mask}, [mask]
        while pending:
            node = pending.pop().producer()
            if node is None:
                continue
            if node.op_type == "Trilu":
                return True
            inputs = [v for v in node.inputs if v is not None]
            if node.op_type in COMPARISONS and all(self._position(v) for v in inputs):
                return True
            for source in inputs:
                if source not in seen and source not in self.flow.hidden:
                    seen.add(source)
                    pending.append(source)
        return False

    def _position(self, value: ir.Value) -> bool:
        """Whether a value is a range of positions, reshaped."""
        current: ir.Value | None = value
        while current is not None:
            node = current.producer()
            if node is None:
                return False
            if node.op_type == "Range":
                return True
            if node.op_type not in ("Unsqueeze", "Reshape", "Cast", "Expand", "Identity", "Transpose", "Slice", "Add"):
                return False
            current = node.inputs[0]
        return False


def _indices(rows: Rows | None, linear: Linear) -> list[int]:
    return list(range(linear.outputs)) if rows is None else [i for a, b in rows for i in range(a, b)]
