"""What a rotation of positions is, read from the sum that ends it.

    x · cosine + turned · sine

`turned` is x, its features exchanged in pairs and one of each negated: halves, (−b, a), or neighbours, (−odd, even).
The cosine and the sine have each number twice, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from peltc.compiler.lowering.constants import integers, sizes, span
from peltc.compiler.lowering.layout import made_of, rank

UNIFORM = {"Cos", "Sin", "Mul", "Div", "Cast", "Unsqueeze", "Identity"}
"""Steps after which numbers are the same that were the same."""
Part = tuple[ir.Value, int, int]


@dataclass(frozen=True, eq=False)
class Rotation:
    """What a sum rotates.

    Attributes:
        x: of four axes, texts first and features last.
        cosine, sine: by which, each number twice.
        interleaved: whether neighbours are pairs, rather than halves.
        heads: the axis of heads, 1 or 2.
    """

    x: ir.Value
    cosine: ir.Value
    sine: ir.Value
    interleaved: bool
    heads: int


def read_rotation(node: ir.Node) -> Rotation | None:
    """What a sum rotates; None where it is no rotation."""
    if len(node.inputs) != 2 or None in node.inputs:
        return None
    for first, second in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        one, other = _product(first), _product(second)
        if one is None or other is None:
            return None
        for x, cosine in (one, one[::-1]):
            for turned, sine in (other, other[::-1]):
                for interleaved, turn in ((False, _half_turned), (True, _neighbours_turned)):
                    if turn(turned) is not x:
                        continue
                    agree = _pairs_agree if interleaved else _halves_agree
                    heads = _axis_of_heads(cosine, sine, x)
                    if heads and agree(cosine) and agree(sine):
                        return Rotation(x, cosine, sine, interleaved, heads)
    return None


def unrotated(node: ir.Node, found: Rotation) -> tuple[ir.Value, ir.Value] | None:
    """The value whose first features are rotated, and the one in which the others are put behind them again; None where
    all are rotated."""
    result, uses = node.outputs[0], tuple(node.outputs[0].uses())
    joining = uses[0].node if len(uses) == 1 and not result.is_graph_output() else None
    part = _part(found.x)
    if joining is None or part is None or joining.op_type != "Concat" or list(joining.inputs[:1]) != [result]:
        return None
    whole, start, width = part
    rest = _part(joining.inputs[1]) if len(joining.inputs) == 2 else None
    if start != 0 or rest is None or rest[0] is not whole or rest[1] != width or not _last(joining, result):
        return None
    assert whole.shape is not None
    return (whole, joining.outputs[0]) if rest[2] == whole.shape[3] else None


def doubled(value: ir.Value) -> ir.Value | None:
    """The value whose every number stands twice in another, one behind the other."""
    joined = made_of(value, "Reshape")
    maker = None if joined is None else joined.producer()
    if joined is None or maker is None or value.shape is None or maker.inputs[0] is None:
        return None
    if maker.op_type == "Tile":
        times = integers(maker.inputs[1])
        apart = maker.inputs[0] if times is not None and times[-1] == 2 and set(times[:-1]) <= {1} else None
    elif maker.op_type == "Concat" and len(maker.inputs) == 2 and maker.inputs[0] is maker.inputs[1]:
        apart = maker.inputs[0] if _last(maker, joined) else None
    else:
        return None
    return _before_a_last_axis(apart, value)


def _before_a_last_axis(apart: ir.Value | None, value: ir.Value) -> ir.Value | None:
    """What a value [..., D, 1] is by layout alone, where there is one [..., D] of half the features of another."""
    found, wanted = sizes(apart), sizes(value)
    if apart is None or found is None or wanted is None or not isinstance(wanted[-1], int) or found[-1] != 1:
        return None
    halved = [*wanted[:-1], wanted[-1] // 2]
    if [size for size in found if size != 1] != [size for size in halved if size != 1]:
        return None
    current: ir.Value | None = apart
    while current is not None and (node := current.producer()) is not None and node.op_type in ("Unsqueeze", "Reshape"):
        current = node.inputs[0]
        if current is not None and current.shape is not None and current.shape[-1] == halved[-1] != 1:
            return current
    return None


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The two values that are multiplied, of four axes each."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return None
    first, second = node.inputs
    return (first, second) if first is not None and second is not None and rank(first) == rank(second) == 4 else None


def _axis_of_heads(cosine: ir.Value, sine: ir.Value, x: ir.Value) -> int:
    """The axis along which a rotation is the same, 1 or 2, where one is; 0 where none is."""
    found, same = sizes(cosine), sizes(sine)
    if found is None or found != same or x.shape is None or not isinstance(x.shape[3], int) or found[3] != x.shape[3]:
        return 0
    alike = [axis for axis in (1, 2) if found[axis] == 1]
    if len(alike) == 2:  # one token, or one head: heads are the axis whose size is a number
        alike = [axis for axis in alike if isinstance(x.shape[axis], int)]
    return alike[0] if alike == [1] or (alike == [2] and isinstance(x.shape[2], int)) else 0


def _half_turned(value: ir.Value) -> ir.Value | None:
    """The x of (−b, a), where x = (a, b)."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or not _last(node, value):
        return None
    upper, lower = _part(made_of(node.inputs[0], "Neg")), _part(node.inputs[1])
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    x = upper[0]
    width = x.shape[3] if x.shape is not None else None
    if not isinstance(width, int) or width % 2 or (lower[1:], upper[1:]) != ((0, width // 2), (width // 2, width)):
        return None
    return x


def _neighbours_turned(value: ir.Value) -> ir.Value | None:
    """The x of (−odd, even), each beside the other."""
    joined = made_of(value, "Reshape")
    node = None if joined is None else joined.producer()
    if joined is None or node is None or node.op_type != "Concat" or len(node.inputs) != 2 or not _last(node, joined):
        return None
    first, second = (made_of(v, "Unsqueeze") for v in node.inputs)
    odd, even = _each_second(made_of(first, "Neg")), _each_second(second)
    if odd is None or even is None or odd[0] is not even[0] or (even[1], odd[1]) != (0, 1):
        return None
    x = odd[0]
    alike = sizes(x) is not None and sizes(x) == sizes(value) and (rank(joined) or 0) == 5
    return x if alike and joined.shape is not None and joined.shape[4] == 2 else None


def _each_second(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """What each second feature of which value it is, and the first of them."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Slice" or len(node.inputs) != 5 or rank(node.inputs[0]) != 4:
        return None
    source = node.inputs[0]
    start, stop, axis, step = (integers(v) for v in node.inputs[1:])
    width = source.shape[3] if source is not None and source.shape is not None else None
    if source is None or not isinstance(width, int) or width % 2 or start not in ([0], [1]) or step != [2]:
        return None
    return (source, start[0]) if axis in ([3], [-1]) and stop is not None and stop[0] >= width else None


def _last(node: ir.Node, value: ir.Value) -> bool:
    axis = node.attributes.get_int("axis", 0)
    return axis in (-1, (rank(value) or 0) - 1)


def _part(value: ir.Value | None) -> Part | None:
    """What features [start, stop) of which value it is."""
    node = None if value is None else value.producer()
    if node is None or node.inputs[0] is None or rank(node.inputs[0]) != 4 or value is None:
        return None
    source = node.inputs[0]
    if (cut := span(node)) is not None:
        return (source, *cut[1:]) if cut[0] == 3 else None
    width = source.shape[3] if source.shape is not None else None
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) in (3, -1) and isinstance(width, int):
        parts = len(node.outputs)
        widths = integers(node.inputs[1]) if len(node.inputs) > 1 else [width // parts] * parts
        if widths is None or len(widths) != parts or sum(widths) != width:
            return None
        at = node.outputs.index(value)
        return source, sum(widths[:at]), sum(widths[: at + 1])
    return None


def _steps(value: ir.Value) -> Iterator[ir.Value]:
    """A value and those behind it that have the same numbers in the same places of the last axis."""
    current: ir.Value | None = value
    while current is not None:
        yield current
        node = current.producer()
        if node is None or node.op_type not in UNIFORM:
            return
        inner = [v for v in node.inputs if v is not None and (v.const_value is None or v.const_value.size != 1)]
        if node.op_type in ("Mul", "Div") and (
            len(inner) != 1 or (node.op_type == "Div" and inner[0] is not node.inputs[0])
        ):
            return
        if node.op_type == "Unsqueeze" and {-1, (rank(current) or 0) - 1} & set(integers(node.inputs[1]) or [-1]):
            return
        current = inner[0] if node.op_type in ("Mul", "Div") else node.inputs[0]


def _halves_agree(value: ir.Value) -> bool:
    """Whether a value has the same numbers in both halves of its last axis."""
    for current in _steps(value):
        node = current.producer()
        if node is not None and node.op_type == "Concat":
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and _last(node, current)
    return False


def _pairs_agree(value: ir.Value) -> bool:
    """Whether each number of a value stands beside itself in its last axis."""
    return any(doubled(current) is not None for current in _steps(value))
