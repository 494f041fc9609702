"""A rotation of positions as one operation of ONNX: `RotaryEmbedding`, of opset 23.

    y = (a cos − b sin, b cos + a sin), where x = (a, b) are the halves of a head's first features

It is read from the sum that ends it: one part is x times a cosine, the other the same x, its halves exchanged and one
of them negated, times the sine of the same angle. What the angle is does not matter: a cosine whose two halves are one
and the same is cut to one half, once for all layers.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.replacing import put_in_place

OPERATION = "RotaryEmbedding"
UNIFORM = {"Cos", "Sin", "Mul", "Div", "Cast", "Unsqueeze", "Identity"}
"""Steps after which the halves of a value are the same where they were the same."""


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
            if node.op_type == "Add" and (found := _read(node)) is not None:
                self._put(node, *found)
                count += 1
        return count

    def _put(self, node: ir.Node, x: ir.Value, cosine: ir.Value, sine: ir.Value) -> None:
        emitter = Emitter(self.graph, x.dtype or ir.DataType.FLOAT, "pelt.rotation", node.metadata_props)
        caches = [self._cache(value, x, emitter) for value in (cosine, sine)]
        heads = x.shape[1] if x.shape is not None else 0
        out = emitter.node(OPERATION, [x, *caches], {"num_heads": heads if isinstance(heads, int) else 0})
        put_in_place(out, node.outputs[0])

    def _cache(self, value: ir.Value, x: ir.Value, emitter: Emitter) -> ir.Value:
        """One half of a cosine or a sine [B or 1, 1, S, 2 D], as [B, S, D]."""
        if value not in self.made:
            assert value.shape is not None
            width = value.shape[3]
            assert isinstance(width, int)
            flat = emitter.node("Squeeze", [value, emitter.integers([1])])
            flat.shape = ir.Shape([value.shape[0], value.shape[2], width])
            bounds = ([0], [width // 2], [2])
            half = emitter.node("Slice", [flat, *(emitter.integers(list(part)) for part in bounds)])
            half.shape = ir.Shape([value.shape[0], value.shape[2], width // 2])
            if str(value.shape[0]) == "1":
                batch = emitter.node("Shape", [x], {"start": 0, "end": 1})
                shape = emitter.node("Concat", [batch, emitter.integers([1, 1])], {"axis": 0})
                half = emitter.node("Expand", [half, shape])
            self.made[value] = half
        return self.made[value]


def _read(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """What a sum rotates, by which cosine and which sine; None where it is no rotation."""
    if len(node.inputs) != 2 or None in node.inputs:
        return None
    for first, second in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        one, other = _product(first), _product(second)
        if one is None or other is None:
            return None
        for x, cosine in (one, one[::-1]):
            for turned, sine in (other, other[::-1]):
                if _half_turned(turned) is x and _halves_agree(cosine) and _halves_agree(sine):
                    return x, cosine, sine
    return None


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The two values that are multiplied, of four axes each."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return None
    first, second = node.inputs
    return (first, second) if first is not None and second is not None and rank(first) == rank(second) == 4 else None


def _half_turned(value: ir.Value) -> ir.Value | None:
    """The x of (−b, a), where x = (a, b)."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or not _last(node, value):
        return None
    negated = node.inputs[0].producer() if node.inputs[0] is not None else None
    if negated is None or negated.op_type != "Neg":
        return None
    upper, lower = _part(negated.inputs[0]), _part(node.inputs[1])
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    x = upper[0]
    width = x.shape[3] if x.shape is not None else None
    if not isinstance(width, int) or width % 2 or (lower[1:], upper[1:]) != ((0, width // 2), (width // 2, width)):
        return None
    return x


def _last(node: ir.Node, value: ir.Value) -> bool:
    axis = node.attributes.get_int("axis", 0)
    return axis in (-1, (rank(value) or 0) - 1)


def _part(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """What features [start, stop) of which value it is."""
    node = None if value is None else value.producer()
    if node is None or node.inputs[0] is None or rank(node.inputs[0]) != 4 or value is None:
        return None
    source = node.inputs[0]
    width = source.shape[3] if source.shape is not None else None
    if not isinstance(width, int):
        return None
    if node.op_type == "Slice":
        numbers = [_integers(v) for v in node.inputs[1:]]
        numbers += [[3], [1]][len(numbers) - 2 :] if len(numbers) > 2 else [[0], [1]]
        if any(n is None or len(n) != 1 for n in numbers) or numbers[2][0] not in (3, -1) or numbers[3][0] != 1:  # type: ignore[index]
            return None
        start, stop = (n[0] + width if n[0] < 0 else min(n[0], width) for n in numbers[:2])  # type: ignore[index]
        return source, start, stop
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) in (3, -1) and len(node.outputs) == 2:
        sizes = _integers(node.inputs[1]) if len(node.inputs) > 1 else [width // 2] * 2
        if sizes is None or len(sizes) != 2:
            return None
        return (source, 0, sizes[0]) if value is node.outputs[0] else (source, sizes[0], width)
    return None


def _integers(value: ir.Value | None) -> list[int] | None:
    """The numbers in a constant."""
    if value is None or value.const_value is None or value.const_value.size > 8:
        return None
    return [int(n) for n in value.const_value.numpy().reshape(-1)]


def _halves_agree(value: ir.Value) -> bool:
    """Whether a value [B or 1, 1, S, 2 D] has the same numbers in both halves of its last axis."""
    if value.shape is None or len(value.shape) != 4 or value.shape[1] != 1 or not isinstance(value.shape[3], int):
        return False
    current: ir.Value | None = value
    while current is not None and (node := current.producer()) is not None:
        if node.op_type == "Concat":
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and _last(node, current)
        if node.op_type not in UNIFORM:
            return False
        if node.op_type in ("Mul", "Div"):
            if any(v is None or (v.const_value is not None and v.const_value.size == 1) for v in node.inputs[:1]):
                current = node.inputs[1]
                continue
            factor = node.inputs[1]
            if factor is None or factor.const_value is None or factor.const_value.size != 1:
                return False
        current = node.inputs[0]
    return False
