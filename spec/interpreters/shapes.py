"""The shape interpreter: a value is a tensor's shape and what fixed it.

Sizes may be numbers (a model is known) or polynomials over names (`pelt check` without a model). A conflict names
the sub-expression, both shapes, and where each came from. A tensor is never larger than `MAX_ELEMENTS`, so that a
formula cannot fill the memory of whoever opens it.

The batch and the sequence are always names, so that their axes are known wherever a formula moves them. A function that
sums over such an axis, or picks from it, lets one text or one position read another: of texts that is refused, of
positions it is remembered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peltc.spec.formula.dims import Dim, Size, product, same, shape_text, simplify
from peltc.spec.formula.functions import ACTIVATIONS, COMPILE_TIME
from peltc.spec.formula.interpreter import FormulaError, Interpreter

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
        lead: how many positions stand before the text's own; None where the text's are not in one piece.
    """

    dims: Dims
    origin: str = ""
    running: bool = False
    mixed: str = ""
    lead: Size | None = 0

    def __str__(self) -> str:
        return shape_text(self.dims) + (f" ({self.origin})" if self.origin else "")

    @property
    def rank(self) -> int:
        return len(self.dims)


class ShapeInterpreter(Interpreter[Shape]):
    """Evaluates formulas over shapes."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        operands = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
        running = [v for v in operands if isinstance(v, Shape) and v.running]
        if running and name in COMPILE_TIME:
            raise FormulaError(f"'{name}' needs tensors known at compile time, and {running[0]} depends on the input")
        if name in _ELEMENTWISE_BINARY:
            if name == "divide" and isinstance(arguments["b"], (int, float)) and arguments["b"] == 0:
                raise FormulaError("division by zero")
            result = broadcast(tensor(arguments["a"]), tensor(arguments["b"]))
        elif name in _SAME:
            result = _same(name, arguments)
        elif name in _RULES:
            result = _RULES[name](**arguments)
        else:
            raise FormulaError(f"'{name}' works on options and sizes, not on tensors")
        if (elements := math.prod(size for size in result.dims if isinstance(size, int))) > MAX_ELEMENTS:
            raise FormulaError(f"{result} has at least {elements:,} elements; at most {MAX_ELEMENTS:,}")
        if not running:
            return result
        reached = {letter for size in _reached(name, arguments) for letter in named(size)}
        if reached & BATCH:
            raise FormulaError(f"'{name}' would let the texts of a batch read each other")
        mixed = next((v.mixed for v in running if v.mixed), name if reached & POSITIONS else "")
        return replace(result, running=True, mixed=mixed, lead=_lead(name, arguments, running))


def named(size: Size) -> set[str]:
    """The names in a size."""
    return {name for monomial, _ in Dim.of(size).terms for name, _ in monomial}


def _reached(name: str, arguments: Mapping[str, Any]) -> list[Size]:
    """The sizes of the axes along which an element of a function's result reads several of its arguments', or others
    than its own."""
    x, axis = arguments.get("x"), arguments.get("axis")
    if name in ("linear", "layer_norm"):
        return [tensor(x).dims[-1]]
    if name == "matmul":
        return [tensor(arguments["a"]).dims[-1]]
    if name in ("mean_seq", "attend"):
        return [tensor(x if name == "mean_seq" else arguments["k"]).dims[1]]
    if name in ("softmax", "norm2", "mean", "sum", "take", "pick", "put", "slice"):
        return [tensor(x).dims[axis_index(tensor(x), axis)]]
    if name == "einsum":
        left, right = arguments["equation"].replace(" ", "").split("->")
        sizes = zip(left.replace(",", ""), (s for o in arguments["operands"] for s in tensor(o).dims), strict=True)
        return [size for letter, size in sizes if letter not in right]
    return []


def _lead(name: str, arguments: Mapping[str, Any], running: list[Shape]) -> Size | None:
    """The positions before the text's own in a function's result."""
    parts = [tensor(v) for v in arguments["tensors"]] if name == "concat" else []
    along = [named(part.dims[arguments["axis"]]) & POSITIONS for part in parts]
    if any(along):
        place = next(i for i, letters in enumerate(along) if letters)
        if sum(map(bool, along)) > 1 or parts[place].lead is None:
            return None
        before: Size = parts[place].lead or 0
        for part in parts[:place]:
            before = simplify(Dim.of(before) + part.dims[arguments["axis"]])
        return before
    leads = [shape.lead for shape in running if any(named(size) & POSITIONS for size in shape.dims)]
    if any(lead is None or not same(lead, leads[0] or 0) for lead in leads):
        return None
    return leads[0] if leads else 0


def tensor(value: Any) -> Shape:
    """A value as a tensor's shape; a number is one without axes.

    Raises:
        FormulaError: the value is neither.
    """
    if isinstance(value, (int, float, Dim)) and not isinstance(value, bool):
        return Shape((), f"the number {value}")
    return _array(value)


def _array(value: Any) -> Shape:
    """A tensor. Only sums and products take numbers beside tensors."""
    if isinstance(value, Shape):
        return value
    raise FormulaError(f"expected a tensor, found {value!r:.60}")


def _size(value: Any, what: str) -> Size:
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


def _same(name: str, arguments: dict[str, Any]) -> Shape:
    """Functions that keep the shape."""
    x = _array(arguments["x"])
    if name == "activation" and arguments["name"] not in ACTIVATIONS:
        raise FormulaError(f"unknown activation '{arguments['name']}'; one of {', '.join(ACTIVATIONS)}")
    if name == "softmax":
        axis_index(x, arguments["axis"])
    if name == "dropout" and not (isinstance(arguments["p"], (int, float)) and 0 <= arguments["p"] < 1):
        raise FormulaError(f"expected a probability below 1, found {arguments['p']}")
    return Shape(x.dims, x.origin)


def _linear(x: Any, weight: Any, bias: Any) -> Shape:
    x, weight = _array(x), _array(weight)
    if weight.rank != 2 or x.rank < 1:
        raise FormulaError(f"linear needs x [..., I] and a weight [O, I], found x {x} and weight {weight}")
    if not same(x.dims[-1], weight.dims[1]):
        raise FormulaError(
            f"linear needs x [..., I] and a weight [O, I]: x is {x}, the weight is {weight}: "
            f"{x.dims[-1]} is not {weight.dims[1]}"
        )
    if bias is not None:
        bias = _array(bias)
        if bias.rank != 1 or not same(bias.dims[0], weight.dims[0]):
            raise FormulaError(f"linear needs a bias [O] for its weight [O, I]: bias {bias}, weight {weight}")
    return Shape((*x.dims[:-1], weight.dims[0]))


def _matmul(a: Any, b: Any) -> Shape:
    a, b = _array(a), _array(b)
    if a.rank < 2 or b.rank < 2 or not same(a.dims[-1], b.dims[-2]):
        raise FormulaError(f"the shapes {a} and {b} do not fit: matmul needs [..., M, K] and [..., K, N]")
    lead = broadcast(Shape(a.dims[:-2]), Shape(b.dims[:-2]))
    return Shape((*lead.dims, a.dims[-2], b.dims[-1]))


def _layer_norm(x: Any, gain: Any, bias: Any) -> Shape:
    x = _array(x)
    for vector in (gain, bias):
        if vector is not None and not _equal(_array(vector).dims, x.dims[-1:]):
            raise FormulaError(f"layer_norm needs a gain and a bias like the last axis of its x: {vector}, x {x}")
    return Shape(x.dims, x.origin)


def _attend(q: Any, k: Any, v: Any, mask: Any, causal: Any) -> Shape:
    q, k, v = _array(q), _array(k), _array(v)
    if not q.rank == k.rank == v.rank == 3 or not same(q.dims[-1], k.dims[-1]) or not same(k.dims[1], v.dims[1]):
        raise FormulaError(f"attend needs q [B, S, E], k [B, T, E] and v [B, T, F], found {q}, {k} and {v}")
    if mask is not None and not _equal(_array(mask).dims, k.dims[:2]):
        raise FormulaError(f"attend needs a mask [B, T] for its k [B, T, E]: mask {mask}, k {k}")
    return Shape((*q.dims[:-1], v.dims[-1]))


def _einsum(operands: list[Any], equation: Any) -> Shape:
    shapes = [_array(o) for o in operands]
    if not isinstance(equation, str) or not re.fullmatch(r"[A-Za-z, ]+->[A-Za-z ]*", equation):
        raise FormulaError(f"einsum needs an equation such as 'ij,jk->ik', found {equation!r}")
    left, right = equation.replace(" ", "").split("->")
    if len(set(right)) < len(right):
        raise FormulaError(f"einsum {equation!r} repeats a letter in its result")
    terms = left.split(",")
    if len(terms) != len(shapes):
        raise FormulaError(f"einsum {equation!r} names {len(terms)} tensors, {len(shapes)} are given")
    sizes: dict[str, tuple[Size, Shape]] = {}
    for letters, shape in zip(terms, shapes, strict=True):
        if len(letters) != shape.rank:
            raise FormulaError(f"einsum {equation!r}: '{letters}' has {len(letters)} letters, the tensor is {shape}")
        for letter, size in zip(letters, shape.dims, strict=True):
            if letter in sizes and not same(sizes[letter][0], size):
                raise FormulaError(f"einsum {equation!r}: '{letter}' is {sizes[letter][0]} in {sizes[letter][1]}"
                                   f" and {size} in {shape}")  # fmt: skip
            sizes.setdefault(letter, (size, shape))
    if unknown := set(right) - set(sizes):
        raise FormulaError(f"einsum {equation!r}: no tensor has the letters {sorted(unknown)}")
    return Shape(tuple(sizes[letter][0] for letter in right))


def _kron(a: Any, b: Any) -> Shape:
    a, b = _array(a), _array(b)
    if a.rank != 2 or b.rank != 2:
        raise FormulaError(f"kron needs two matrices, found {a} and {b}")
    return Shape(tuple(simplify(Dim.of(p) * q) for p, q in zip(a.dims, b.dims, strict=True)))


def _inverse(x: Any) -> Shape:
    x = _array(x)
    if x.rank < 2 or not same(x.dims[-1], x.dims[-2]):
        raise FormulaError(f"inverse needs square matrices, found {x}")
    return Shape(x.dims, x.origin)


def _skew(x: Any, n: Any) -> Shape:
    x, n = _array(x), _size(n, "the matrices' size n")
    if x.rank < 1:
        raise FormulaError(f"skew needs [..., n(n-1)/2], found {x}")
    expected = simplify(Dim.of(n) * (Dim.of(n) - 1) // 2)
    if not same(x.dims[-1], expected) and all(isinstance(v, int) for v in (x.dims[-1], expected)):
        raise FormulaError(f"skew needs n(n-1)/2 = {expected} entries for n = {n}, found {x}")
    return Shape((*x.dims[:-1], n, n))


def _block_diagonal(x: Any) -> Shape:
    x = _array(x)
    if x.rank != 3:
        raise FormulaError(f"block_diagonal needs [K, A, B], found {x}")
    k, a, b = x.dims
    return Shape((simplify(Dim.of(k) * a), simplify(Dim.of(k) * b)))


def _reduce(x: Any, axis: Any) -> Shape:
    x = _array(x)
    index = axis_index(x, axis)
    return Shape((*x.dims[:index], 1, *x.dims[index + 1 :]))


def _mean_seq(x: Any, mask: Any) -> Shape:
    x = _array(x)
    if x.rank < 3:
        raise FormulaError(f"mean_seq needs [B, S, ...], found {x}")
    if mask is not None and not _equal(_array(mask).dims, x.dims[:2]):
        raise FormulaError(f"mean_seq needs a mask [B, S] for its x [B, S, ...]: mask {mask}, x {x}")
    return Shape((x.dims[0], 1, *x.dims[2:]))


def _reshape(x: Any, shape: Any) -> Shape:
    x = _array(x)
    dims = _sizes(shape)
    before, after = product(x.dims), product(dims)
    if isinstance(before, int) and isinstance(after, int) and before != after:
        raise FormulaError(f"{x} has {before} elements, {shape_text(dims)} has {after}")
    return Shape(dims)


def _equal(a: Dims, b: Dims) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def _sizes(shape: Any) -> Dims:
    if not isinstance(shape, list):
        raise FormulaError(f"expected a list of sizes, found {shape}")
    for size in shape:
        _size(size, "a size")
        if isinstance(size, int) and size < 1:
            raise FormulaError(f"sizes are positive, found {size}")
    return tuple(simplify(s) for s in shape)


def _transpose(x: Any) -> Shape:
    x = _array(x)
    if x.rank < 2:
        raise FormulaError(f"transpose needs at least two axes, found {x}")
    return Shape((*x.dims[:-2], x.dims[-1], x.dims[-2]), x.origin)


def _permute(x: Any, axes: Any) -> Shape:
    x = _array(x)
    if not isinstance(axes, list) or not all(isinstance(a, int) for a in axes) or sorted(axes) != [*range(x.rank)]:
        raise FormulaError(f"permute needs each axis of {x} once, counted from 0, found {axes}")
    return Shape(tuple(x.dims[a] for a in axes), x.origin)


def _concat(tensors: list[Any], axis: Any) -> Shape:
    shapes = [_array(t) for t in tensors]
    rank = max(s.rank for s in shapes)
    if not isinstance(axis, int) or not -min(s.rank for s in shapes) <= axis < 0:
        raise FormulaError(f"concat joins along an axis counted from the end, found {axis}")
    total: Size = 0
    first = next(s for s in shapes if s.rank == rank)
    for shape in shapes:
        total = simplify(Dim.of(total) + shape.dims[axis])
        for i in range(-shape.rank, 0):
            if i != axis and not same(shape.dims[i], first.dims[i]):
                raise FormulaError(f"the shapes {first} and {shape} do not join along axis {axis}:"
                                   f" {first.dims[i]} is not {shape.dims[i]}")  # fmt: skip
    dims = list(first.dims)
    dims[axis] = total
    return Shape(tuple(dims))


def _take(x: Any, index: Any, axis: Any) -> Shape:
    x = _array(x)
    place = axis_index(x, axis)
    size, index = x.dims[place], _size(index, "an index")
    if isinstance(index, int) and isinstance(size, int) and not -size <= index < size:
        raise FormulaError(f"{x} has no index {index} along axis {axis}")
    return Shape((*x.dims[:place], *x.dims[place + 1 :]))


def _indices(index: Any, shape: Shape, place: int) -> list[int]:
    """Different indices along an axis."""
    if not isinstance(index, list) or not index or not all(type(i) is int and i >= 0 for i in index):
        raise FormulaError(f"expected a list of indices, found {index}")
    if len({*index}) < len(index):
        raise FormulaError("an index stands twice in the list")
    size = shape.dims[place]
    if isinstance(size, int) and max(index) >= size:
        raise FormulaError(f"{shape} has no index {max(index)} along axis {place}")
    return index


def _pick(x: Any, index: Any, axis: Any) -> Shape:
    x = _array(x)
    place = axis_index(x, axis)
    return Shape((*x.dims[:place], len(_indices(index, x, place)), *x.dims[place + 1 :]))


def _put(x: Any, values: Any, index: Any, axis: Any) -> Shape:
    x, values = _array(x), _array(values)
    wanted = _pick(x, index, axis)
    if not _equal(values.dims, wanted.dims):
        raise FormulaError(f"put needs values {shape_text(wanted.dims)} for its x {x}, found {values}")
    return Shape(x.dims, x.origin)


def _slice(x: Any, start: Any, stop: Any, axis: Any) -> Shape:
    x = _array(x)
    place = axis_index(x, axis)
    size, start, stop = x.dims[place], _size(start, "a start"), _size(stop, "a stop")
    known = [v for v in (0, start, stop, size) if isinstance(v, int)]
    if known != sorted(known) or same(start, stop):
        raise FormulaError(f"no range {start}:{stop} along axis {axis} of {x}")
    return Shape((*x.dims[:place], simplify(Dim.of(stop) - start), *x.dims[place + 1 :]))


def _unsqueeze(x: Any, axis: Any) -> Shape:
    x = _array(x)
    place = axis_index(Shape((*x.dims, 1)), axis)
    return Shape((*x.dims[:place], 1, *x.dims[place:]))


def _top_k_mask(z: Any, k: Any) -> Shape:
    z, k = _array(z), _size(k, "how many are the largest")
    if z.rank < 1 or (isinstance(k, int) and isinstance(z.dims[-1], int) and not 1 <= k <= z.dims[-1]):
        raise FormulaError(f"{z} has no {k} largest along its last axis")
    return Shape(z.dims, z.origin)


def _choose(stack: Any, draw: Any) -> Shape:
    stack = _array(stack)
    if stack.rank < 1:
        raise FormulaError("choose needs a stack, found a number")
    return Shape(stack.dims[1:])


def _eye(n: Any) -> Shape:
    return Shape(tuple(_sizes([n, n])))


_ELEMENTWISE_BINARY = {"add", "subtract", "multiply", "divide", "power"}
_SAME = {
    "negate", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "exp", "log", "sqrt", "abs", "identity",
    "activation", "softmax", "dropout", "detach",
}  # fmt: skip

_RULES: dict[str, Callable[..., Shape]] = {
    "linear": _linear, "matmul": _matmul, "einsum": _einsum, "kron": _kron, "inverse": _inverse, "eye": _eye,
    "skew": _skew, "block_diagonal": _block_diagonal, "norm2": _reduce, "mean": _reduce, "sum": _reduce,
    "mean_seq": _mean_seq, "reshape": _reshape, "transpose": _transpose, "permute": _permute, "concat": _concat,
    "take": _take, "pick": _pick, "put": _put, "slice": _slice, "unsqueeze": _unsqueeze, "choose": _choose,
    "zeros": lambda shape: Shape(_sizes(shape)), "ones": lambda shape: Shape(_sizes(shape)),
    "top_k_mask": _top_k_mask, "layer_norm": _layer_norm, "attend": _attend,
}  # fmt: skip
