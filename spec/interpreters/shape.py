"""The shape of a value in a formula, known or symbolic, and what broadcasting makes of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peltc.spec.formula.dims import Dim, Size, same, shape_text, simplify
from peltc.spec.formula.interpreter import FormulaError

MAX_ELEMENTS = 2**31
BATCH, POSITIONS = frozenset("B"), frozenset("ST")
"""Names of the sizes that a model's input alone decides: texts, and positions of a text."""
Dims = tuple[Size, ...]


@dataclass(frozen=True)
class Shape:
    """A tensor's shape.

    Attributes:
        origin: what fixed it ("parameter A [r, in]").
        running: whether the tensor exists only while the model runs.
        mixed: the function by which one position reads another; "" where each reads itself alone.
        open: the same, where the positions are still there, each with a value of its own; "" where what was read is one
            value for the whole text, a summary of it.
        lead: how many positions stand before the text's own; None where the text's are not in one piece.
    """

    dims: Dims
    origin: str = ""
    running: bool = False
    mixed: str = ""
    open: str = ""
    lead: Size | None = 0

    def __str__(self) -> str:
        return shape_text(self.dims) + (f" ({self.origin})" if self.origin else "")

    @property
    def rank(self) -> int:
        return len(self.dims)


def along(value: Any) -> bool:
    """Whether a value, or one of several, has positions of a text."""
    if isinstance(value, list):
        return any(map(along, value))
    return isinstance(value, Shape) and value.running and any(named(size) & POSITIONS for size in value.dims)


def whole(shape: Shape) -> bool:
    """Whether a tensor has one value for each text, [B, ...], and its other sizes are no input's."""
    first, *others = shape.dims or (1,)
    return same(first, Dim.of("B")) and not any(named(size) & (BATCH | POSITIONS) for size in others)


def named(size: Size) -> set[str]:
    """The names in a size."""
    return {name for monomial, _ in Dim.of(size).terms for name, _ in monomial}


def tensor(value: Any) -> Shape:
    """A value as a tensor's shape; a number is one without axes.

    Raises:
        FormulaError: the value is neither.
    """
    if isinstance(value, (int, float, Dim)) and not isinstance(value, bool):
        return Shape((), f"the number {value}")
    return as_array(value)


def as_array(value: Any) -> Shape:
    """A tensor. Only sums and products take numbers beside tensors."""
    if isinstance(value, Shape):
        return value
    raise FormulaError(f"expected a tensor, found {value!r:.60}")


def as_size(value: Any, what: str) -> Size:
    """A whole number or a symbol."""
    if isinstance(value, (int, Dim)) and not isinstance(value, bool):
        return value
    raise FormulaError(f"expected {what}, found {value}")


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an elementwise operation.

    Raises:
        FormulaError: the shapes do not broadcast.
    """
    rank = max(a.rank, b.rank)
    left, right = (1,) * (rank - a.rank) + a.dims, (1,) * (rank - b.rank) + b.dims
    out: list[Size] = []
    for p, q in zip(left, right, strict=True):
        if same(p, q) or same(q, 1):
            out.append(p)
        elif same(p, 1):
            out.append(q)
        else:
            raise FormulaError(f"the shapes {a} and {b} do not fit: {p} is not {q}")
    origin = a.origin if tuple(out) == a.dims else b.origin if tuple(out) == b.dims else ""
    return Shape(tuple(out), origin)


def axis_index(shape: Shape, axis: Any) -> int:
    """A non-negative axis.

    Raises:
        FormulaError: the tensor has no such axis.
    """
    if not isinstance(axis, int) or isinstance(axis, bool) or not -shape.rank <= axis < shape.rank:
        raise FormulaError(f"{shape} has no axis {axis}")
    return axis % shape.rank


def equal_dims(a: Dims, b: Dims) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def sizes_of(shape: Any) -> Dims:
    if not isinstance(shape, list):
        raise FormulaError(f"expected a list of sizes, found {shape}")
    for size in shape:
        as_size(size, "a size")
        if isinstance(size, int) and size < 1:
            raise FormulaError(f"sizes are positive, found {size}")
    return tuple(simplify(s) for s in shape)
