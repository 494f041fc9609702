"""The numpy interpreter: what formulas are worth where everything is known. Constant folding runs on it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from peltc.spec.formula.interpreter import FormulaError, Interpreter
from peltc.spec.formula.syntax import Expr, Number
from peltc.spec.method import initialiser

Array = np.ndarray[Any, Any]


EPSILON = 1e-5
"""Of `layer_norm`."""
HIDDEN = -1e4
"""The score of a key that a mask hides; float16 holds it."""


@dataclass(frozen=True, eq=False)
class OneHot:
    """One-hot vectors [..., I], told by their ids [...], as what a table reads: x Wᵀ is a choice of W's columns.

    Attributes:
        ids: integers of whichever interpreter; None for every id in order, so that x Wᵀ is Wᵀ itself.
        size: I, the number of rows of the table.
        padding: an id that is not trained, as `nn.Embedding` has it.
    """

    ids: Any
    size: int
    padding: int | None = None


def looked_up(name: str, arguments: dict[str, Any], rows: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """What a function of one-hot vectors is: rows of a matrix [I, O], and a bias to add.

    Args:
        rows: what picks rows of a matrix by ids.

    Raises:
        FormulaError: the function would need the vectors themselves.
    """
    x, matrix = arguments.get("x", arguments.get("a")), arguments.get("b")
    if name == "linear" and isinstance(x, OneHot):
        matrix = arguments["weight"].swapaxes(-1, -2)
    if name not in ("linear", "matmul") or not isinstance(x, OneHot) or isinstance(matrix, OneHot):
        raise FormulaError(f"'{name}' cannot take the input of a table, whose ids pick rows of matrices and no more")
    return matrix if x.ids is None else rows(matrix, x.ids), arguments.get("bias")


PASSING = ("identity", "detach", "dropout")
"""Functions that leave their input as it is, in deployment."""


class NumericInterpreter(Interpreter[Any]):
    """Evaluates formulas over numpy arrays, in float32 or better."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        if any(isinstance(value, OneHot) for value in arguments.values()):
            if name in PASSING:
                return arguments["x"]
            found, bias = looked_up(name, arguments, lambda matrix, ids: matrix[ids])
            return found if bias is None else found + bias
        if name not in _MEANING:
            raise FormulaError(f"'{name}' works on options and sizes, not on tensors")
        return _MEANING[name](**arguments)


def _erf(x: Array) -> Array:
    """The error function, by the standard library's, in float64."""
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x)).astype(x.dtype)


def gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + _erf(x / np.sqrt(2).astype(x.dtype))))


def gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


ACTIVATION: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "identity": lambda x: x,
}


def _apply(function: Callable[[Array], Array], x: Array) -> Array:
    return function(x)


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    y: Array = x @ weight.T
    return y if bias is None else np.asarray(y + bias)


def norm2(x: Array, axis: int) -> Array:
    """Summed in float64: a norm over thousands of squares is where float32 loses digits."""
    return np.asarray(np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=axis, keepdims=True)), x.dtype)


def skew(x: Array, n: int) -> Array:
    rows, columns = np.triu_indices(n, 1)
    matrix = np.zeros((*x.shape[:-1], n, n), x.dtype)
    matrix[..., rows, columns] = x
    return np.asarray(matrix - matrix.swapaxes(-1, -2))


def block_diagonal(x: Array) -> Array:
    count, a, b = x.shape
    matrix = np.zeros((count, a, count, b), x.dtype)
    matrix[np.arange(count), :, np.arange(count)] = x
    return matrix.reshape(count * a, count * b)


def butterfly(x: Array) -> Array:
    product = np.eye(x.shape[1] * x.shape[2], dtype=x.dtype)
    for level, blocks in enumerate(x):
        order = butterfly_order(len(product), x.shape[2], level)
        product = block_diagonal(blocks)[np.ix_(order, order)] @ product
    return product


def butterfly_order(size: int, block: int, level: int) -> Array:
    """Which row of a block-diagonal matrix each row of a factor of a butterfly product is: of the 2 · 2ˡ halves in
    a row, those with even numbers come first."""
    if not level:
        return np.arange(size)
    return np.arange(size).reshape(-1, 2**level, 2, block // 2).swapaxes(1, 2).reshape(-1)


def orthonormal(x: Array) -> Array:
    """In float64: columns that are nearly parallel lose digits."""
    q, r = np.linalg.qr(x.astype(np.float64))
    signs = np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return np.asarray(q * signs[..., None, :], x.dtype)


def circulant(x: Array) -> Array:
    index = np.arange(x.shape[-1])
    return np.asarray(x[..., (index[None, :] - index[:, None]) % len(index)])


def scatter(values: Array, places: Array, shape: list[int]) -> Array:
    whole = places.astype(np.int64)
    if (whole != places).any() or (whole < 0).any() or (whole >= shape).any():
        raise FormulaError(f"the places are not all rows and columns of a matrix {shape}")
    matrix = np.zeros(shape, values.dtype)
    matrix[whole[:, 0], whole[:, 1]] = values
    return matrix


def inverse_fourier(x: Array) -> Array:
    return np.asarray(np.fft.ifft2(x).real, x.dtype)


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True))


def layer_norm(x: Array, gain: Array | None, bias: Array | None) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
    y = y if gain is None else y * gain
    return np.asarray(y if bias is None else y + bias)


def attend(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None] > 0, scores, HIDDEN)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, HIDDEN)
    return np.asarray(softmax(scores, -1) @ v)


def mean_seq(x: Array, mask: Array | None) -> Array:
    if mask is None:
        return np.asarray(x.mean(axis=1, keepdims=True))
    weights = mask.reshape(*mask.shape, *[1] * (x.ndim - 2)).astype(x.dtype)
    return np.asarray((x * weights).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True))


def concat(tensors: list[Array], axis: int) -> Array:
    rank = max(t.ndim for t in tensors)
    lead = np.broadcast_shapes(*(t.shape[: rank + axis] for t in tensors if t.ndim == rank))
    full = [t if t.ndim == rank else np.broadcast_to(t, (*lead[: rank - t.ndim], *t.shape)) for t in tensors]
    return np.concatenate(full, axis)


def slice_axis(x: Array, start: int, stop: int, axis: int) -> Array:
    index: list[Any] = [slice(None)] * x.ndim
    index[axis] = slice(start, stop)
    return np.asarray(x[tuple(index)])


def put(x: Array, values: Array, index: list[int], axis: int) -> Array:
    """A copy with other slices at some places along an axis."""
    result = np.array(x)
    place: list[Any] = [slice(None)] * x.ndim
    place[axis] = index
    result[tuple(place)] = values
    return result


def top_k_mask(z: Array, k: int) -> Array:
    order = np.argsort(-z, axis=-1, kind="stable")[..., :k]
    mask = np.zeros_like(z)
    np.put_along_axis(mask, order, 1, axis=-1)
    return mask


_MEANING: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b, "power": lambda a, b: a**b, "negate": lambda x: -x,
    "matmul": lambda a, b: a @ b, "linear": linear,
    "einsum": lambda operands, equation: np.einsum(equation, *operands, optimize=True),
    "kron": lambda a, b: np.kron(a, b), "inverse": lambda x: np.linalg.inv(x),
    "eye": lambda n: np.eye(n, dtype=np.float32),
    "skew": skew, "block_diagonal": block_diagonal, "norm2": norm2,
    "butterfly": butterfly, "orthonormal": orthonormal, "upper": lambda x: np.triu(x, 1),
    "circulant": circulant, "scatter": scatter, "inverse_fourier": inverse_fourier,
    **{name: partial(_apply, f) for name, f in ACTIVATION.items()},
    "activation": lambda x, name: ACTIVATION[name](x),
    "exp": lambda x: np.exp(x), "log": lambda x: np.log(x), "sqrt": lambda x: np.sqrt(x),
    "abs": lambda x: np.abs(x), "cos": lambda x: np.cos(x), "sin": lambda x: np.sin(x),
    "softmax": softmax, "layer_norm": layer_norm, "attend": attend, "detach": lambda x: x, "dropout": lambda x, p: x,
    "mean": lambda x, axis: x.mean(axis=axis, keepdims=True), "sum": lambda x, axis: x.sum(axis=axis, keepdims=True),
    "running_sum": lambda x, axis: np.cumsum(x, axis),
    "mean_seq": mean_seq, "reshape": lambda x, shape: x.reshape(shape), "transpose": lambda x: x.swapaxes(-1, -2),
    "permute": lambda x, axes: x.transpose(axes), "concat": concat,
    "take": lambda x, index, axis: np.take(x, index, axis), "slice": slice_axis,
    "unsqueeze": lambda x, axis: np.expand_dims(x, axis), "put": put,
    "pick": lambda x, index, axis: np.take(x, index, axis),
    "zeros": lambda shape: np.zeros(shape, np.float32), "ones": lambda shape: np.ones(shape, np.float32),
    "choose": lambda stack, draw, scope: stack.mean(axis=0), "top_k_mask": top_k_mask,
}  # fmt: skip


def places(random: np.random.Generator, shape: tuple[int, ...], matrix: list[int]) -> Array:
    """Different places of a matrix, drawn at random: a row and a column for each."""
    if len(matrix) != 2 or len(shape) != 2 or shape[1] != 2 or shape[0] > matrix[0] * matrix[1]:
        raise FormulaError(f"{list(shape)} are no different places of a matrix {matrix}")
    drawn = random.choice(matrix[0] * matrix[1], shape[0], replace=False)
    return np.stack(np.divmod(drawn, matrix[1]), -1).astype(np.float32)


def start_value(name: str, shape: tuple[int, ...], init: Expr, scope: Mapping[str, Any], seed: int) -> Array:
    """A parameter's start value, float32.

    Random values depend on the seed and the tensor's name alone, so they are the same in training and in the
    compiler, whatever else a spec contains.

    Args:
        scope: options and sizes, `W` and `b` of the site where the formula reads them.

    Raises:
        EvaluationError: the formula has no value.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    interpreter = NumericInterpreter()
    named = initialiser(init)
    if named is not None:
        kind, arguments = named
        values = [float(interpreter.evaluate(a, scope)) for a in arguments]
        if kind == "zeros":
            return np.zeros(shape, np.float32)
        if kind == "ones":
            return np.ones(shape, np.float32)
        if kind == "normal":
            return random.normal(0.0, values[0] if values else 1.0, shape).astype(np.float32)
        if kind == "places":
            return places(random, shape, [int(value) for value in values])
        bound = values[0] if values else 1.0 / math.sqrt(shape[-1] if shape else 1)
        if kind == "paired":
            halves = random.uniform(-bound, bound, (*shape[:-1], (shape[-1] + 1) // 2))
            return np.repeat(halves, 2, -1)[..., : shape[-1]].astype(np.float32)
        return random.uniform(-bound, bound, shape).astype(np.float32)
    value = init.value if isinstance(init, Number) else interpreter.evaluate(init, scope)
    return np.ascontiguousarray(np.broadcast_to(np.asarray(value, np.float32), shape))
