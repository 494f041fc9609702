"""The shape that each function of the language gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from peltc.spec.formula.dims import Dim, Size, product, same, shape_text, simplify
from peltc.spec.formula.functions import ACTIVATIONS, SCOPES
from peltc.spec.formula.interpreter import FormulaError
from peltc.spec.interpreters.shape import Shape, as_array, as_size, axis_index, broadcast, equal_dims, sizes_of


def same_shape(name: str, arguments: dict[str, Any]) -> Shape:
    """Functions that keep the shape."""
    x = as_array(arguments["x"])
    if name == "activation" and arguments["name"] not in ACTIVATIONS:
        raise FormulaError(f"unknown activation '{arguments['name']}'; one of {', '.join(ACTIVATIONS)}")
    if name == "softmax":
        axis_index(x, arguments["axis"])
    if name == "dropout" and not (isinstance(arguments["p"], (int, float)) and 0 <= arguments["p"] < 1):
        raise FormulaError(f"expected a probability below 1, found {arguments['p']}")
    return Shape(x.dims, x.origin)


def _linear(x: Any, weight: Any, bias: Any) -> Shape:
    x, weight = as_array(x), as_array(weight)
    if weight.rank != 2 or x.rank < 1:
        raise FormulaError(f"linear needs x [..., I] and a weight [O, I], found x {x} and weight {weight}")
    if not same(x.dims[-1], weight.dims[1]):
        raise FormulaError(
            f"linear needs x [..., I] and a weight [O, I]: x is {x}, the weight is {weight}: "
            f"{x.dims[-1]} is not {weight.dims[1]}"
        )
    if bias is not None:
        bias = as_array(bias)
        if bias.rank != 1 or not same(bias.dims[0], weight.dims[0]):
            raise FormulaError(f"linear needs a bias [O] for its weight [O, I]: bias {bias}, weight {weight}")
    return Shape((*x.dims[:-1], weight.dims[0]))


def _matmul(a: Any, b: Any) -> Shape:
    a, b = as_array(a), as_array(b)
    if a.rank < 2 or b.rank < 2 or not same(a.dims[-1], b.dims[-2]):
        raise FormulaError(f"the shapes {a} and {b} do not fit: matmul needs [..., M, K] and [..., K, N]")
    lead = broadcast(Shape(a.dims[:-2]), Shape(b.dims[:-2]))
    return Shape((*lead.dims, a.dims[-2], b.dims[-1]))


def _layer_norm(x: Any, gain: Any, bias: Any) -> Shape:
    x = as_array(x)
    for vector in (gain, bias):
        if vector is not None and not equal_dims(as_array(vector).dims, x.dims[-1:]):
            raise FormulaError(f"layer_norm needs a gain and a bias like the last axis of its x: {vector}, x {x}")
    return Shape(x.dims, x.origin)


def _attend(q: Any, k: Any, v: Any, mask: Any, causal: Any) -> Shape:
    q, k, v = as_array(q), as_array(k), as_array(v)
    if not q.rank == k.rank == v.rank == 3 or not same(q.dims[-1], k.dims[-1]) or not same(k.dims[1], v.dims[1]):
        raise FormulaError(f"attend needs q [B, S, E], k [B, T, E] and v [B, T, F], found {q}, {k} and {v}")
    if mask is not None and not equal_dims(as_array(mask).dims, k.dims[:2]):
        raise FormulaError(f"attend needs a mask [B, T] for its k [B, T, E]: mask {mask}, k {k}")
    return Shape((*q.dims[:-1], v.dims[-1]))


def _einsum(operands: list[Any], equation: Any) -> Shape:
    shapes = [as_array(o) for o in operands]
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
    a, b = as_array(a), as_array(b)
    if a.rank != 2 or b.rank != 2:
        raise FormulaError(f"kron needs two matrices, found {a} and {b}")
    return Shape(tuple(simplify(Dim.of(p) * q) for p, q in zip(a.dims, b.dims, strict=True)))


def _inverse(x: Any) -> Shape:
    x = as_array(x)
    if x.rank < 2 or not same(x.dims[-1], x.dims[-2]):
        raise FormulaError(f"inverse needs square matrices, found {x}")
    return Shape(x.dims, x.origin)


def _skew(x: Any, n: Any) -> Shape:
    x, n = as_array(x), as_size(n, "the matrices' size n")
    if x.rank < 1:
        raise FormulaError(f"skew needs [..., n(n-1)/2], found {x}")
    expected = simplify(Dim.of(n) * (Dim.of(n) - 1) // 2)
    if not same(x.dims[-1], expected) and all(isinstance(v, int) for v in (x.dims[-1], expected)):
        raise FormulaError(f"skew needs n(n-1)/2 = {expected} entries for n = {n}, found {x}")
    return Shape((*x.dims[:-1], n, n))


def _block_diagonal(x: Any) -> Shape:
    x = as_array(x)
    if x.rank != 3:
        raise FormulaError(f"block_diagonal needs [K, A, B], found {x}")
    k, a, b = x.dims
    return Shape((simplify(Dim.of(k) * a), simplify(Dim.of(k) * b)))


def _butterfly(x: Any) -> Shape:
    x = as_array(x)
    if x.rank != 4 or not same(x.dims[2], x.dims[3]):
        raise FormulaError(f"butterfly needs [M, K, A, A], found {x}")
    factors, blocks, size, _ = x.dims
    if isinstance(factors, int) and factors > 1:
        if isinstance(blocks, int) and blocks % 2 ** (factors - 1):
            raise FormulaError(f"butterfly needs a number of blocks that {2 ** (factors - 1)} divides for {factors}"
                               f" factors, found {x}")  # fmt: skip
        if isinstance(size, int) and size % 2:
            raise FormulaError(f"butterfly needs blocks of an even size for {factors} factors, found {x}")
    side = simplify(Dim.of(blocks) * size)
    return Shape((side, side))


def _orthonormal(x: Any) -> Shape:
    x = as_array(x)
    sizes = [size for size in x.dims[-2:] if isinstance(size, int)]
    if x.rank < 2 or (len(sizes) == 2 and sizes[0] < sizes[1]):
        raise FormulaError(f"orthonormal needs [..., M, N] with M at least N, found {x}")
    return Shape(x.dims, x.origin)


def _upper(x: Any) -> Shape:
    x = as_array(x)
    if x.rank < 2 or not same(x.dims[-1], x.dims[-2]):
        raise FormulaError(f"upper needs square matrices, found {x}")
    return Shape(x.dims, x.origin)


def _circulant(x: Any) -> Shape:
    x = as_array(x)
    if x.rank < 1:
        raise FormulaError(f"circulant needs vectors [..., N], found {x}")
    return Shape((*x.dims, x.dims[-1]))


def _scatter(values: Any, places: Any, shape: Any) -> Shape:
    values, places, dims = as_array(values), as_array(places), sizes_of(shape)
    if values.rank != 1 or not equal_dims(places.dims, (*values.dims, 2)) or len(dims) != 2:
        raise FormulaError(f"scatter needs values [n], places [n, 2] and the shape of a matrix, found {values},"
                           f" {places} and {shape_text(dims)}")  # fmt: skip
    count, room = values.dims[0], product(dims)
    if isinstance(count, int) and isinstance(room, int) and count > room:
        raise FormulaError(f"a matrix {shape_text(dims)} has no {count} places")
    return Shape(dims)


def _inverse_fourier(x: Any) -> Shape:
    x = as_array(x)
    if x.rank < 2:
        raise FormulaError(f"inverse_fourier needs at least two axes, found {x}")
    return Shape(x.dims, x.origin)


def _reduce(x: Any, axis: Any) -> Shape:
    x = as_array(x)
    index = axis_index(x, axis)
    return Shape((*x.dims[:index], 1, *x.dims[index + 1 :]))


def _running_sum(x: Any, axis: Any) -> Shape:
    x = as_array(x)
    axis_index(x, axis)
    return Shape(x.dims)


def _mean_seq(x: Any, mask: Any) -> Shape:
    x = as_array(x)
    if x.rank < 3:
        raise FormulaError(f"mean_seq needs [B, S, ...], found {x}")
    if mask is not None and not equal_dims(as_array(mask).dims, x.dims[:2]):
        raise FormulaError(f"mean_seq needs a mask [B, S] for its x [B, S, ...]: mask {mask}, x {x}")
    return Shape((x.dims[0], 1, *x.dims[2:]))


def _reshape(x: Any, shape: Any) -> Shape:
    x = as_array(x)
    dims = sizes_of(shape)
    before, after = product(x.dims), product(dims)
    if isinstance(before, int) and isinstance(after, int) and before != after:
        raise FormulaError(f"{x} has {before} elements, {shape_text(dims)} has {after}")
    return Shape(dims)


def _transpose(x: Any) -> Shape:
    x = as_array(x)
    if x.rank < 2:
        raise FormulaError(f"transpose needs at least two axes, found {x}")
    return Shape((*x.dims[:-2], x.dims[-1], x.dims[-2]), x.origin)


def _permute(x: Any, axes: Any) -> Shape:
    x = as_array(x)
    if not isinstance(axes, list) or not all(isinstance(a, int) for a in axes) or sorted(axes) != [*range(x.rank)]:
        raise FormulaError(f"permute needs each axis of {x} once, counted from 0, found {axes}")
    return Shape(tuple(x.dims[a] for a in axes), x.origin)


def _concat(tensors: list[Any], axis: Any) -> Shape:
    shapes = [as_array(t) for t in tensors]
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
    x = as_array(x)
    place = axis_index(x, axis)
    size, index = x.dims[place], as_size(index, "an index")
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
    x = as_array(x)
    place = axis_index(x, axis)
    return Shape((*x.dims[:place], len(_indices(index, x, place)), *x.dims[place + 1 :]))


def _put(x: Any, values: Any, index: Any, axis: Any) -> Shape:
    x, values = as_array(x), as_array(values)
    wanted = _pick(x, index, axis)
    if not equal_dims(values.dims, wanted.dims):
        raise FormulaError(f"put needs values {shape_text(wanted.dims)} for its x {x}, found {values}")
    return Shape(x.dims, x.origin)


def _slice(x: Any, start: Any, stop: Any, axis: Any) -> Shape:
    x = as_array(x)
    place = axis_index(x, axis)
    size, start, stop = x.dims[place], as_size(start, "a start"), as_size(stop, "a stop")
    known = [v for v in (0, start, stop, size) if isinstance(v, int)]
    if known != sorted(known) or same(start, stop):
        raise FormulaError(f"no range {start}:{stop} along axis {axis} of {x}")
    return Shape((*x.dims[:place], simplify(Dim.of(stop) - start), *x.dims[place + 1 :]))


def _unsqueeze(x: Any, axis: Any) -> Shape:
    x = as_array(x)
    place = axis_index(Shape((*x.dims, 1)), axis)
    return Shape((*x.dims[:place], 1, *x.dims[place:]))


def _top_k_mask(z: Any, k: Any) -> Shape:
    z, k = as_array(z), as_size(k, "how many are the largest")
    if z.rank < 1 or (isinstance(k, int) and isinstance(z.dims[-1], int) and not 1 <= k <= z.dims[-1]):
        raise FormulaError(f"{z} has no {k} largest along its last axis")
    return Shape(z.dims, z.origin)


def _choose(stack: Any, draw: Any, scope: Any) -> Shape:
    stack = as_array(stack)
    if scope not in SCOPES:
        raise FormulaError(f"one draw is for a {' or a '.join(SCOPES)}, found {scope!r}")
    if stack.rank < 1:
        raise FormulaError("choose needs a stack, found a number")
    return Shape(stack.dims[1:])


def _eye(n: Any) -> Shape:
    return Shape(tuple(sizes_of([n, n])))


ELEMENTWISE_BINARY = {"add", "subtract", "multiply", "divide", "power"}
SAME = {
    "negate", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "exp", "log", "sqrt", "abs", "cos", "sin",
    "identity", "activation", "softmax", "dropout", "detach",
}  # fmt: skip
RULES: dict[str, Callable[..., Shape]] = {
    "linear": _linear, "matmul": _matmul, "einsum": _einsum, "kron": _kron, "inverse": _inverse, "eye": _eye,
    "running_sum": _running_sum,
    "skew": _skew, "block_diagonal": _block_diagonal, "butterfly": _butterfly, "orthonormal": _orthonormal,
    "upper": _upper, "circulant": _circulant, "scatter": _scatter, "inverse_fourier": _inverse_fourier,
    "norm2": _reduce, "mean": _reduce, "sum": _reduce,
    "mean_seq": _mean_seq, "reshape": _reshape, "transpose": _transpose, "permute": _permute, "concat": _concat,
    "take": _take, "pick": _pick, "put": _put, "slice": _slice, "unsqueeze": _unsqueeze, "choose": _choose,
    "zeros": lambda shape: Shape(sizes_of(shape)), "ones": lambda shape: Shape(sizes_of(shape)),
    "top_k_mask": _top_k_mask, "layer_norm": _layer_norm, "attend": _attend,
}  # fmt: skip
