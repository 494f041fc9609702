"""A rotation of positions as one operation of ONNX: `RotaryEmbedding`, of opset 23.

    y = (a cos − b sin, b cos + a sin, z), where x = (a, b, z)

a and b are the halves of a head's first features, or those with even and with odd numbers; z is what is not rotated,
where there is something. What the angle is does not matter, and heads may stand before tokens or behind them. A cosine
that has each number twice, for a and for b, is made with each number once, from where it was doubled on.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.constants import integers
from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.replacing import put_in_place
from peltc.compiler.lowering.turning import Rotation, doubled, read_rotation, unrotated

OPERATION = "RotaryEmbedding"
ALONG = {"Cos", "Sin", "Cast", "Identity"}
"""What makes of each number one."""


class RotationLowering:
    """Puts `RotaryEmbedding` in the place of rotations; the halves of cosines and sines are made once."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self.made: dict[Hashable, ir.Value] = {}

    def run(self) -> int:
        """Replace every rotation that is found, in place; the nodes stand at the end of the graph, and what nobody
        reads any more stays.

        Returns:
            How many there were.
        """
        count = 0
        for node in list(self.graph):
            if node.op_type == "Add" and (found := read_rotation(node)) is not None:
                self._put(node, found)
                count += 1
        return count

    def _put(self, node: ir.Node, found: Rotation) -> None:
        self.emitter = Emitter(self.graph, found.x.dtype or ir.DataType.FLOAT, "pelt.rotation", node.metadata_props)
        x, result, whole = found.x, node.outputs[0], unrotated(node, found)
        attributes = {"interleaved": 1} if found.interleaved else {}
        if whole is not None:
            assert x.shape is not None
            attributes["rotary_embedding_dim"] = int(x.shape[3])  # type: ignore[arg-type]
            x, result = whole
        caches = [self._cache(value, x, found) for value in (found.cosine, found.sine)]
        heads, width = (x.shape[axis] if x.shape is not None else 0 for axis in (found.heads, 3))
        attributes["num_heads"] = heads if isinstance(heads, int) else 0
        if found.heads == 1:
            put_in_place(self.emitter.node(OPERATION, [x, *caches], attributes), result)
            return
        assert isinstance(heads, int) and isinstance(width, int) and x.shape is not None
        flat = self.emitter.node("Reshape", [x, self.emitter.integers([0, 0, heads * width])])
        flat.shape = ir.Shape([x.shape[0], x.shape[1], heads * width])
        turned = self.emitter.node(OPERATION, [flat, *caches], attributes)
        turned.shape = flat.shape
        put_in_place(self.emitter.node("Reshape", [turned, self.emitter.integers([0, 0, heads, width])]), result)

    def _cache(self, value: ir.Value, x: ir.Value, found: Rotation) -> ir.Value:
        """A cosine or a sine, each number once, as [B, S, D]."""
        where = (value, found.interleaved, found.heads)
        if where not in self.made:
            half = self._half(value, found.interleaved)
            assert half.shape is not None and value.shape is not None
            tokens = 3 - found.heads
            lead = [value.shape[0], value.shape[tokens]]
            if len(half.shape) == 4:
                flat = self.emitter.node("Squeeze", [half, self.emitter.integers([found.heads])])
                flat.shape = ir.Shape([*lead, half.shape[3]])
                half = flat
            self.made[where] = self._for_all(half, x) if str(value.shape[0]) == "1" else half
        return self.made[where]

    def _half(self, value: ir.Value, interleaved: bool) -> ir.Value:
        """A value that has each number twice, with each once."""
        assert value.shape is not None
        width = value.shape[-1]
        assert isinstance(width, int)
        if not interleaved:
            return self._first(value, width // 2)
        node = value.producer()
        assert node is not None
        if (source := doubled(value)) is None:
            return self._copy(node, self._half(self._inner(node), True), width // 2)
        return self._first(source, width // 2)

    def _first(self, value: ir.Value, width: int) -> ir.Value:
        """The first features of a value, cut off as early as can be."""
        if value.shape is not None and value.shape[-1] == width:
            node = value.producer()
            if node is None or node.op_type not in ("Slice", *ALONG, "Unsqueeze"):
                return value
        if (where := (value, width)) not in self.made:
            self.made[where] = self._cut(value, width)
        return self.made[where]

    def _cut(self, value: ir.Value, width: int) -> ir.Value:
        node = value.producer()
        source = None if node is None or not node.inputs else node.inputs[0]
        if node is not None and source is not None and rank(source) is not None:
            if node.op_type == "Concat" and source.shape is not None and source.shape[-1] == width and _last(node):
                return source
            if node.op_type == "Slice" and _from_the_first(node):
                return self._first(source, width)
            if node.op_type in ALONG or (node.op_type == "Unsqueeze" and _keeps_last(node)):
                return self._copy(node, self._first(source, width), width)
        if value.shape is not None and value.shape[-1] == width:
            return value
        axis = (rank(value) or 0) - 1
        bounds = ([0], [width], [axis])
        cut = self.emitter.node("Slice", [value, *(self.emitter.integers(list(part)) for part in bounds)])
        cut.shape = None if value.shape is None else ir.Shape([*value.shape[:-1], width])
        return cut

    def _inner(self, node: ir.Node) -> ir.Value:
        """What a step reads that is no number."""
        return next(v for v in node.inputs if v is not None and v.const_value is None)

    def _copy(self, node: ir.Node, source: ir.Value, width: int) -> ir.Value:
        """A step on the way, of fewer features."""
        before = self._inner(node)
        if source is before:
            return node.outputs[0]
        inputs = [source if v is before else v for v in node.inputs]
        attributes = {a.name: a.value for a in node.attributes.values()}
        made = self.emitter.node(node.op_type, inputs, attributes)
        old = node.outputs[0]
        made.shape, made.type = None if old.shape is None else ir.Shape([*old.shape[:-1], width]), old.type
        return made

    def _for_all(self, half: ir.Value, x: ir.Value) -> ir.Value:
        """[1, S, D] → [B, S, D], of an angle where there is one, which cosine and sine share."""
        node = half.producer()
        if node is not None and node.op_type in ("Cos", "Sin") and rank(node.inputs[0]) == 3:
            angle = node.inputs[0]
            assert angle is not None
            made = self.emitter.node(node.op_type, [self._repeated(angle, x)])
            made.shape = None
            return made
        return self._repeated(half, x)

    def _repeated(self, value: ir.Value, x: ir.Value) -> ir.Value:
        if (where := (value, "repeated")) not in self.made:
            batch = self.emitter.node("Shape", [x], {"start": 0, "end": 1})
            shape = self.emitter.node("Concat", [batch, self.emitter.integers([1, 1])], {"axis": 0})
            self.made[where] = self.emitter.node("Expand", [value, shape])
            self.made[where].shape = None
        return self.made[where]


def _last(node: ir.Node) -> bool:
    return node.attributes.get_int("axis", 0) in (-1, (rank(node.outputs[0]) or 0) - 1)


def _keeps_last(node: ir.Node) -> bool:
    """Whether added axes stand before the last."""
    axes, ranks = integers(node.inputs[1]), rank(node.outputs[0])
    return axes is not None and ranks is not None and not {-1, ranks - 1} & set(axes)


def _from_the_first(node: ir.Node) -> bool:
    """Whether a cut leaves the first features of the last axis, and all else."""
    numbers = [integers(v) for v in node.inputs[1:]]
    ranks = rank(node.outputs[0]) or 0
    axis = numbers[2] if len(numbers) > 2 else [0]
    return numbers[0] == [0] and axis in ([-1], [ranks - 1]) and (len(numbers) < 4 or numbers[3] == [1])
