"""An attention core as one operation of ONNX: `Attention`, of opset 23.

    Attention(q, k, v, m; s, c) = softmax(c tanh(s q kᵀ / c) + m) v

The operation groups query heads over the key heads that there are, so that keys and values are read as they lie in a
cache. ONNX Runtime has it on the CPU and on CUDA, in float32 and in half precision; on the CPU it takes less time than
the pieces do, most of all where a text grows.

It applies where a core is read as such a formula; see `reading` for what is not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.reading import Reading, Term
from peltc.compiler.lowering.replacing import put_in_place

OPERATION = "Attention"
HIDDEN = {ir.DataType.FLOAT: -3.4028234663852886e38, ir.DataType.FLOAT16: -65504.0, ir.DataType.BFLOAT16: -3.38e38}
"""What is added to a score that a condition hides: the lowest number, so that a row that is hidden whole is finite."""


class AttentionLowering:
    """Puts `Attention` in the place of cores; masks that cores share are made once."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self.made: dict[Hashable, ir.Value] = {}

    def put(self, core: Reading) -> None:
        """Replace a core's result by that of one operation, in place. The nodes stand at the end of the graph, and what
        nobody reads any more stays."""
        self.kind = core.query.dtype or ir.DataType.FLOAT
        self.emitter = Emitter(self.graph, self.kind, "pelt.attention", core.context.metadata_props)
        query, key, value = core.query, core.key, core.value
        if core.turned:
            axes = list(range(core.rank))
            key = self.emitter.node("Transpose", [key], {"perm": [*axes[:-2], axes[-1], axes[-2]]})
        mask = self.mask(core, query, key)
        if core.sink is not None:
            mask = self.with_sink(mask, core.sink, query, key)
            key, value = self.with_zero(key), self.with_zero(value)
        if core.rank == 3:  # heads are texts: each by itself with one head
            query, key, value = (self.unsqueezed(v) for v in (query, key, value))
            mask = None if mask is None else self.unsqueezed(mask)
        attributes: dict[str, Any] = {"scale": core.scale} | ({"softcap": core.cap} if core.cap else {})
        if core.wide and self.kind != ir.DataType.FLOAT:
            attributes["softmax_precision"] = ir.DataType.FLOAT.value
        out = self.emitter.node(OPERATION, [query, key, value, *([] if mask is None else [mask])], attributes)
        result = core.context.outputs[0]
        if core.rank == 3:
            out.shape = None
            out = self.emitter.node("Squeeze", [out, self.emitter.integers([1])])
        elif rank(result) == 3:  # [B, H, S, Dv] → [N, S, Dv]
            out.shape = _result(query, value)
            sizes = self.emitter.node("Shape", [out], {"start": 2})
            shape = self.emitter.node("Concat", [self.emitter.integers([-1]), sizes], {"axis": 0})
            out = self.emitter.node("Reshape", [out, shape])
        put_in_place(out, result)

    def mask(self, core: Reading, query: ir.Value, key: ir.Value) -> ir.Value | None:
        """What is added to the scores, for every query and every key."""
        total: ir.Value | None = None
        for term in core.terms:
            one = self.added(term)
            one = self.parted(one, query) if term.flat and core.rank == 4 else one
            total = one if total is None else self.shared("Add", [total, one])
        return None if total is None else self.whole(total, query, key, core.rank)

    def with_sink(self, mask: ir.Value | None, sink: ir.Value, query: ir.Value, key: ir.Value) -> ir.Value:
        """A mask [B, H, S, T + 1] whose last key is the sink: its own score is zero, so that the mask is all of it."""
        emitter = self.emitter
        lead = emitter.node("Shape", [query], {"start": 0, "end": 3})
        last = emitter.node("Shape", [key], {"start": 2, "end": 3})
        whole = emitter.node("Concat", [lead, last], {"axis": 0})
        one = emitter.node("Concat", [lead, emitter.integers([1])], {"axis": 0})
        parts = [emitter.node("Expand", [v, size]) for v, size in ((mask or self.number(0.0), whole), (sink, one))]
        joined = emitter.node("Concat", parts, {"axis": -1})
        joined.shape = None
        return joined

    def with_zero(self, value: ir.Value) -> ir.Value:
        """[B, K, T, D] → [B, K, T + 1, D], the last of which is zero."""
        emitter, width = self.emitter, value.shape[3] if value.shape is not None else None
        last = emitter.integers([width]) if isinstance(width, int) else emitter.node("Shape", [value], {"start": 3})
        lead = emitter.node("Shape", [value], {"start": 0, "end": 2})
        size = emitter.node("Concat", [lead, emitter.integers([1]), last], {"axis": 0})
        joined = emitter.node("Concat", [value, emitter.node("Expand", [self.number(0.0), size])], {"axis": 2})
        joined.shape = None if value.shape is None else ir.Shape([*value.shape[:2], None, value.shape[3]])
        return joined

    def added(self, term: Term) -> ir.Value:
        """A term as numbers to add to scores."""
        value = term.value
        if term.shows is not None:
            hidden, shown = self.number(HIDDEN[self.kind]), self.number(0.0)
            return self.shared("Where", [value, *([shown, hidden] if term.shows else [hidden, shown])])
        if value.dtype is not None and value.dtype != self.kind:
            value = self.shared("Cast", [value], {"to": self.kind.value})
        return value if term.factor == 1.0 else self.shared("Mul", [value, self.number(term.factor)])

    def parted(self, term: ir.Value, query: ir.Value) -> ir.Value:
        """[N, S, T] → [B, H, S, T]"""
        if rank(term) != 3 or (term.shape is not None and term.shape[0] == 1):
            return term  # one for all texts and heads
        if (where := (term, "parted")) not in self.made:
            sizes = [self.emitter.node("Shape", [query], {"start": 0, "end": 2}),
                     self.emitter.node("Shape", [term], {"start": 1})]  # fmt: skip
            self.made[where] = self.emitter.node("Reshape", [term, self.emitter.node("Concat", sizes, {"axis": 0})])
        return self.made[where]

    def whole(self, mask: ir.Value, query: ir.Value, key: ir.Value, axes: int) -> ir.Value:
        """A mask with all queries and keys: the operation itself repeats it for texts and heads alone."""
        needed = [_length(query), _length(key)]
        has = [None, None] if mask.shape is None else [*mask.shape[-2:]]
        if len(has) == 2 and all(n is not None and str(h) == n for h, n in zip(has, needed, strict=True)):
            return mask
        where = (mask, *(n if n is not None else v for n, v in zip(needed, (query, key), strict=True)))
        if where not in self.made:
            maker = mask.producer()  # what is made of a module's mask belongs to the module
            emitter = Emitter(self.graph, self.kind, "pelt.mask", {} if maker is None else maker.metadata_props)
            sizes = [emitter.node("Shape", [v], {"start": axes - 2, "end": axes - 1}) for v in (query, key)]
            shape = emitter.node("Concat", [emitter.integers([1] * (axes - 2)), *sizes], {"axis": 0})
            self.made[where] = emitter.node("Expand", [mask, shape])
        return self.made[where]

    def unsqueezed(self, value: ir.Value) -> ir.Value:
        """[N, S, D] → [N, 1, S, D]"""
        return self.shared("Unsqueeze", [value, self.emitter.integers([1])])

    def shared(self, kind: str, inputs: list[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Value:
        """A node that all cores share which read the same."""
        where = (kind, *inputs, *(attributes or {}).values())
        if where not in self.made:
            self.made[where] = self.emitter.node(kind, inputs, attributes)
            self.made[where].shape = None if kind == "Unsqueeze" else _joint(inputs)
        return self.made[where]

    def number(self, number: float) -> ir.Value:
        """A constant of one number."""
        if (where := (number, self.kind)) not in self.made:
            self.made[where] = self.emitter.constant(np.array(number, np.float32), "number")
        return self.made[where]


def _result(query: ir.Value, value: ir.Value) -> ir.Shape | None:
    """The shape [B, H, S, Dv] of a result, where it is known."""
    if query.shape is None or value.shape is None:
        return None
    return ir.Shape([*query.shape[:3], value.shape[3]])


def _length(value: ir.Value) -> str | None:
    """The size of the axis before the last, where it has a name or a number."""
    size = None if value.shape is None else value.shape[-2]
    return None if size is None or (not isinstance(size, int) and size.value is None) else str(size)


def _joint(values: list[ir.Value]) -> ir.Shape | None:
    """The shape of values that are joined element by element; sizes that are told apart by nothing have no name."""
    if any(v.shape is None for v in values):
        return None
    longest = max(len(v.shape) for v in values)  # type: ignore[arg-type]
    sizes: list[Any] = []
    for axis in range(-longest, 0):
        found = {str(v.shape[axis]): v.shape[axis] for v in values if v.shape is not None and len(v.shape) >= -axis}
        wide = [size for name, size in found.items() if name != "1"]
        sizes.append(1 if not wide else wide[0] if len(wide) == 1 else None)
    return ir.Shape(sizes)
