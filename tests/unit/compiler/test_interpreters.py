"""One formula, four meanings: numpy, torch, ONNX Runtime and shapes agree, and all agree with plain mathematics.

Every function of the language that has a meaning on tensors is tried, in the graph with each set of its arguments as
inputs at run time; what has no graph form is refused there in words.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.compiler.interpreters.onnx import OnnxInterpreter
from peltc.runtime.training.interpreter import TorchInterpreter
from peltc.spec.formula.functions import ACTIVATIONS, COMPILE_TIME, FUNCTIONS
from peltc.spec.formula.interpreter import EvaluationError
from peltc.spec.formula.reader import parse
from peltc.spec.formula.syntax import calls
from peltc.spec.interpreters.shape import Shape
from peltc.spec.interpreters.shapes import ShapeInterpreter

Array = np.ndarray[Any, Any]
TOLERANCE = 1e-6
"""Of the largest value: a few roundings of float32."""

STATIC_ONLY = {"floor_divide", "modulo", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "and",
               "or", "not", "min", "max"}  # fmt: skip
"""Functions of known numbers."""


def gelu(x: Array) -> Array:
    return np.vectorize(lambda v: v * 0.5 * math.erfc(-v / math.sqrt(2)))(x)


def gelu_tanh(x: Array) -> Array:
    return np.vectorize(lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))))(x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def skew(x: Array, n: int) -> Array:
    result = np.zeros((*x.shape[:-1], n, n))
    for index in np.ndindex(*x.shape[:-1]):
        for value, (i, j) in zip(x[index], itertools.combinations(range(n), 2), strict=True):
            result[(*index, i, j)], result[(*index, j, i)] = value, -value
    return result


def block_diagonal(x: Array) -> Array:
    k, a, b = x.shape
    return np.block([[x[i] if i == j else np.zeros((a, b)) for j in range(k)] for i in range(k)])


def butterfly(x: Array) -> Array:
    """By permutation matrices, as they are defined: in each run of 2^level blocks, halves with even numbers first."""
    count, size = x.shape[1], x.shape[2]
    product = np.identity(count * size)
    for level, blocks in enumerate(x):
        run = size * 2**level
        order = list(range(count * size))
        if level:
            halves = [[[start + h * size // 2 + i for i in range(size // 2)] for h in range(2 * run // size)]
                      for start in range(0, count * size, run)]  # fmt: skip
            order = [i for run_ in halves for half in (*run_[::2], *run_[1::2]) for i in half]
        permutation = np.identity(count * size)[order]
        product = permutation @ block_diagonal(blocks) @ permutation.T @ product
    return product


def gram_schmidt(x: Array) -> Array:
    columns: list[Array] = []
    for column in x.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / np.sqrt(column @ column))
    return np.stack(columns, -1)


def scatter(values: Array, places: Array) -> Array:
    result = np.zeros((5, 7))
    for value, (row, column) in zip(values, places, strict=True):
        result[int(row), int(column)] = value
    return result


def inverse_fourier(x: Array) -> Array:
    """By the definition: a sum over all frequencies at each place."""
    m, n = x.shape[-2:]
    angles = [[np.add.outer(i * np.arange(m) / m, j * np.arange(n) / n) for j in range(n)] for i in range(m)]
    return np.einsum("...uv,ijuv->...ij", x, np.cos(2 * np.pi * np.array(angles))) / (m * n)


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x)
    return e / e.sum(axis, keepdims=True)


def masked_mean(x: Array, mask: Array) -> Array:
    rows = [np.mean([x[i, j] for j in range(x.shape[1]) if mask[i, j]], axis=0) for i in range(x.shape[0])]
    return np.stack(rows)[:, None]


def top_k(z: Array, k: int) -> Array:
    """1 at the k largest of each row, the first among equals."""
    result = np.zeros_like(z)
    for index in np.ndindex(*z.shape[:-1]):
        for place in sorted(range(z.shape[-1]), key=lambda j: (-z[(*index, j)], j))[:k]:
            result[(*index, place)] = 1
    return result


def tiled(t: Array, *lead: int) -> Array:
    return np.tile(t, (*lead, *[1] * t.ndim))


def normal(x: Array) -> Array:
    """Each row with mean 0 and variance 1, but for the small number that keeps a division possible."""
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5))


def attention(q: Array, k: Array, v: Array, mask: Array | None = None, causal: bool = False) -> Array:
    """Token by token: the mean of the values that are seen, weighted by exp(q k / √E)."""
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for b, s in np.ndindex(q.shape[:2]):
        seen = [t for t in range(k.shape[1]) if (mask is None or mask[b, t]) and (t <= s or not causal)]
        weights = np.exp([q[b, s] @ k[b, t] / math.sqrt(q.shape[2]) for t in seen])
        out[b, s] = weights @ v[b, seen] / weights.sum()
    return out


ACTIVATION: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.where(x > 0, x, 0), "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh, "sigmoid": sigmoid, "identity": lambda x: x,
}  # fmt: skip

X, V, W, M, K = (2, 5, 4), (4,), (3, 4), (2, 5), (2, 3, 5, 4)
CASES: list[tuple[str, dict[str, tuple[int, ...]], Callable[..., Array]]] = [
    ("x + v", {"x": X, "v": V}, lambda x, v: x + v),
    ("2 + x", {"x": X}, lambda x: 2 + x),
    ("x + 0", {"x": X}, lambda x: x),
    ("x - v", {"x": X, "v": V}, lambda x, v: x - v),
    ("1 - x", {"x": X}, lambda x: 1 - x),
    ("x * v", {"x": X, "v": V}, lambda x, v: x * v),
    ("1 * x", {"x": X}, lambda x: x),
    ("x / p", {"x": X, "p": V}, lambda x, p: x / p),
    ("1 / p", {"p": X}, lambda p: 1 / p),
    ("x / 3", {"x": X}, lambda x: x / 3),
    ("x ** 2", {"x": X}, lambda x: x**2),
    ("2 ** x", {"x": X}, lambda x: 2**x),
    ("p ** x", {"p": X, "x": V}, lambda p, x: p**x),
    ("-x", {"x": X}, lambda x: -x),
    ("x @ a", {"x": X, "a": (4, 3)}, lambda x, a: x @ a),
    ("a @ b", {"a": (2, 3, 4), "b": (2, 4, 5)}, lambda a, b: a @ b),
    ("linear(x, w)", {"x": X, "w": W}, lambda x, w: x @ w.T),
    ("linear(x, w, b)", {"x": X, "w": W, "b": (3,)}, lambda x, w, b: x @ w.T + b),
    ("linear(x, w, b) * c + 1", {"x": X, "w": W, "b": (3,), "c": (3,)}, lambda x, w, b, c: (x @ w.T + b) * c + 1),
    ("linear(linear(x, w), transpose(w))", {"x": X, "w": W}, lambda x, w: x @ w.T @ w),
    ("einsum('bsi,oi->bso', x, w)", {"x": X, "w": W}, lambda x, w: x @ w.T),
    ("einsum('nij,nkl->ikjl', a, b)", {"a": (2, 3, 3), "b": (2, 4, 5)}, lambda a, b: sum(
        np.multiply.outer(a[n], b[n]).transpose(0, 2, 1, 3) for n in range(2))),
    ("kron(a, b)", {"a": (2, 3), "b": (4, 5)}, lambda a, b: np.block([[v * b for v in row] for row in a])),
    ("inverse(q)", {"q": (3, 4, 4)}, lambda q: np.linalg.inv(q)),
    ("x * 0 + eye(4)", {"x": (4, 4)}, lambda x: np.identity(4)),
    ("skew(a, 4)", {"a": (2, 6)}, lambda a: skew(a, 4)),
    ("block_diagonal(a)", {"a": (3, 2, 4)}, block_diagonal),
    ("butterfly(a)", {"a": (3, 4, 2, 2)}, butterfly),
    ("butterfly(a)", {"a": (1, 3, 3, 3)}, butterfly),
    ("butterfly(a)", {"a": (2, 2, 4, 4)}, butterfly),
    ("upper(a)", {"a": (2, 4, 4)}, lambda a: np.array([[[v if j > i else 0 for j, v in enumerate(row)]
                                                        for i, row in enumerate(m)] for m in a])),
    ("orthonormal(a)", {"a": (6, 3)}, gram_schmidt),
    ("orthonormal(a)", {"a": (2, 4, 4)}, lambda a: np.stack([gram_schmidt(m) for m in a])),
    ("circulant(a)", {"a": (2, 3, 5)}, lambda a: np.stack([np.roll(a, i, -1) for i in range(5)], -2)),
    ("scatter(v, places, [5, 7])", {"v": (6,), "places": (6, 2)}, scatter),
    ("inverse_fourier(a)", {"a": (2, 5, 4)}, inverse_fourier),
    ("norm2(x)", {"x": X}, lambda x: np.sqrt((x * x).sum(-1, keepdims=True))),
    ("norm2(x, axis=0)", {"x": X}, lambda x: np.sqrt((x * x).sum(0, keepdims=True))),
    *((f"{name}(x)", {"x": X}, ACTIVATION[name]) for name in ACTIVATION),
    *((f"activation(x, '{name}')", {"x": X}, ACTIVATION[name]) for name in ACTIVATIONS),
    ("exp(x)", {"x": X}, np.exp),
    ("log(p)", {"p": X}, np.log),
    ("sqrt(p)", {"p": X}, np.sqrt),
    ("abs(x)", {"x": X}, np.abs),
    ("cos(x)", {"x": X}, np.cos),
    ("sin(x)", {"x": X}, np.sin),
    ("softmax(x)", {"x": X}, lambda x: softmax(x, -1)),
    ("softmax(x, axis=1)", {"x": X}, lambda x: softmax(x, 1)),
    ("detach(x)", {"x": X}, lambda x: x),
    ("dropout(x, 0.5)", {"x": X}, lambda x: x),
    ("mean(x)", {"x": X}, lambda x: x.mean(-1, keepdims=True)),
    ("mean(x, axis=0)", {"x": X}, lambda x: x.mean(0, keepdims=True)),
    ("sum(x, axis=-2)", {"x": X}, lambda x: x.sum(-2, keepdims=True)),
    ("running_sum(x)", {"x": X}, lambda x: np.cumsum(x, -1)),
    ("running_sum(mask, axis=1)", {"mask": M}, lambda mask: np.cumsum(mask, 1)),
    ("mean_seq(x)", {"x": X}, lambda x: x.mean(1, keepdims=True)),
    ("mean_seq(x, mask)", {"x": X, "mask": M}, masked_mean),
    ("mean_seq(k, mask)", {"k": (2, 5, 3, 4), "mask": M}, masked_mean),
    ("reshape(a, [2, 6, 2])", {"a": (4, 6)}, lambda a: np.array(a.ravel().tolist()).reshape(2, 6, 2)),
    ("transpose(x)", {"x": X}, lambda x: np.moveaxis(x, 1, 2)),
    ("transpose(x + 1)", {"x": X}, lambda x: np.moveaxis(x, 1, 2) + 1),
    ("transpose(linear(x, w))", {"x": X, "w": W}, lambda x, w: np.moveaxis(x @ w.T, 1, 2)),
    ("permute(x, [2, 0, 1])", {"x": X}, lambda x: np.moveaxis(x, 2, 0)),
    ("concat(x, y)", {"x": X, "y": X}, lambda x, y: np.concatenate([x, y], 2)),
    ("concat(k, h, axis=-2)", {"k": (3, 2, 4), "h": K}, lambda k, h: np.concatenate([tiled(k, 2), h], 2)),
    ("concat(v, x, 2 * v)", {"x": X, "v": V}, lambda x, v: np.concatenate([tiled(v, 2, 5), x, 2 * tiled(v, 2, 5)], 2)),
    ("concat(x + 1, y, axis=-3)", {"x": X, "y": X}, lambda x, y: np.concatenate([x + 1, y], 0)),
    ("take(x, 3, axis=-1)", {"x": X}, lambda x: x[..., 3]),
    ("take(x, -1)", {"x": X}, lambda x: x[-1]),
    ("slice(x, 1, 3)", {"x": X}, lambda x: x[..., 1:3]),
    ("slice(x, 0, 4, axis=1)", {"x": X}, lambda x: x[:, :4]),
    ("pick(x, [3, 0], axis=-1)", {"x": X}, lambda x: np.stack([x[..., 3], x[..., 0]], -1)),
    ("pick(a, [2, 1])", {"a": (4, 6)}, lambda a: np.array([a[2], a[1]])),
    ("put(a, b, [2, 0])", {"a": (4, 6), "b": (2, 6)}, lambda a, b: np.array([b[1], a[1], b[0], a[3]])),
    ("put(a, b, [5, 1], axis=1)", {"a": (4, 6), "b": (4, 2)},
     lambda a, b: np.stack([a[:, 0], b[:, 1], *a[:, 2:5].T, b[:, 0]], 1)),
    ("x * length([1, 2, 3])", {"x": X}, lambda x: 3 * x),
    ("unsqueeze(x)", {"x": X}, lambda x: x[..., None]),
    ("unsqueeze(x, axis=1)", {"x": X}, lambda x: x[:, None]),
    ("x * 0 + zeros([5, 4])", {"x": X}, lambda x: np.zeros(X)),
    ("x * ones([4])", {"x": X}, lambda x: x),
    ("layer_norm(x)", {"x": X}, normal),
    ("layer_norm(x, v, u)", {"x": X, "v": V, "u": V}, lambda x, v, u: normal(x) * v + u),
    ("attend(x, y, k)", {"x": X, "y": X, "k": (*X[:2], 3)}, attention),
    ("attend(x, y, x, mask)", {"x": X, "y": X, "mask": M}, lambda x, y, mask: attention(x, y, x, mask)),
    ("attend(x, x, x, mask, causal=True)", {"x": X, "mask": M},
     lambda x, mask: attention(x, x, x, mask, True)),
    ("choose(a)", {"a": (3, 2, 4)}, lambda a: sum(a) / 3),
    ("top_k_mask(a, 2)", {"a": (3, 6)}, lambda a: top_k(a, 2)),
    ("top_k_mask(ties, 3)", {"ties": (4, 6)}, lambda ties: top_k(ties, 3)),
    ("x * floor(2.7)", {"x": X}, lambda x: 2 * x),
    ("exp(2) * log(3) * abs(-4) * x", {"x": X}, lambda x: x * math.exp(2) * math.log(3) * 4),
]  # fmt: skip
IDS = [text for text, _, _ in CASES]


def values(text: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Random arguments, the same in every run. `p` is positive, `mask` of ones and zeros, `q` has an inverse, `ties`
    has equal values, `places` are different rows and columns."""
    random = np.random.default_rng(zlib.crc32(text.encode()))
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in made.items():
        if name == "p":
            made[name] = np.abs(array) + np.float32(0.5)
        if name == "mask":
            made[name] = (np.arange(array.shape[1]) < [[5], [2]]).astype(np.float32)
        if name == "places":
            made[name] = np.array([[i % 5, 3 * i % 7] for i in range(len(array))], np.float32)
        if name == "q":
            made[name] = array + 4 * np.eye(array.shape[-1], dtype=np.float32)
        if name == "ties":
            made[name] = np.round(array)
    return made


def check_equal(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape
    scale = max(float(np.abs(expected).max()), 1e-30)
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=0, atol=TOLERANCE * scale)


def run_graph(text: str, arguments: dict[str, Array], running: set[str]) -> Array:
    """A formula in a graph of its own, with some of the arguments as inputs of open sizes and the others constants."""
    inputs = [
        ir.Value(name=name, shape=ir.Shape([None] * arguments[name].ndim), type=ir.TensorType(ir.DataType.FLOAT))
        for name in sorted(running)
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 20}, name="formula")
    emitter = Emitter(graph, ir.DataType.FLOAT, "formula", {"pelt.method": "test"})
    interpreter = OnnxInterpreter(emitter)
    scope = {**arguments, **{value.name: value for value in inputs}}
    result = interpreter.value(interpreter.evaluate(parse(text), scope))
    assert all(node.metadata_props["pelt.method"] == "test" for node in emitter.added), "every node is marked"
    graph.outputs.append(emitter.node("Identity", [result]))
    graph.sort()
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: arguments[name] for name in running})[0])


def subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    for size in range(1, len(names) + 1):
        yield from itertools.combinations(names, size)


def graph_cases() -> Iterator[Any]:
    for text, shapes, _ in CASES:
        for running in subsets(list(shapes)):
            yield pytest.param(text, set(running), id=f"{text} of {' '.join(running)}")


EXPECTED = {text: (shapes, oracle) for text, shapes, oracle in CASES}


def oracle_of(text: str) -> tuple[dict[str, Array], Array]:
    """A formula's arguments and, by plain mathematics in float64, its value."""
    shapes, oracle = EXPECTED[text]
    arguments = values(text, shapes)
    return arguments, np.asarray(oracle(*(a.astype(np.float64) for a in arguments.values())))


def test_every_function_is_tried() -> None:
    tried = {name for text, _, _ in CASES for name in calls(parse(text))}
    assert tried == set(FUNCTIONS) - STATIC_ONLY


@pytest.mark.parametrize("text", IDS)
def test_numpy(text: str) -> None:
    arguments, expected = oracle_of(text)
    found = NumericInterpreter().evaluate(parse(text), arguments)
    assert found.dtype == np.float32
    check_equal(found, expected)


@pytest.mark.parametrize("text", IDS)
def test_torch(text: str) -> None:
    arguments, expected = oracle_of(text)
    tensors = {name: torch.from_numpy(array) for name, array in arguments.items()}
    found = TorchInterpreter(like=next(iter(tensors.values()))).evaluate(parse(text), tensors)
    assert found.dtype == torch.float32
    check_equal(found.numpy(), expected)


@pytest.mark.parametrize("text", IDS)
def test_shapes(text: str) -> None:
    shapes, _ = EXPECTED[text]
    scope = {name: Shape(shape) for name, shape in shapes.items()}
    assert ShapeInterpreter().evaluate(parse(text), scope).dims == oracle_of(text)[1].shape


@pytest.mark.parametrize(("text", "running"), list(graph_cases()))
def test_onnx(text: str, running: set[str]) -> None:
    """Equal where there is a graph form, whatever is an input; refused where there is none."""
    arguments, expected = oracle_of(text)
    if calls(parse(text)) & COMPILE_TIME - {"reshape"}:
        with pytest.raises(EvaluationError, match="has no graph form for a value that depends on the input"):
            run_graph(text, arguments, running)
    else:
        check_equal(run_graph(text, arguments, running), expected)


@pytest.mark.parametrize("text", IDS)
def test_constants_leave_no_nodes(text: str) -> None:
    """What reads no input at run time is computed when the graph is made."""
    arguments, expected = oracle_of(text)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20})
    found = OnnxInterpreter(Emitter(graph, ir.DataType.FLOAT, "f", {})).evaluate(parse(text), arguments)
    assert len(graph) == 0
    check_equal(np.asarray(found), expected)


@pytest.mark.parametrize("name", sorted(STATIC_ONLY))
def test_functions_of_known_numbers_take_no_tensors(name: str) -> None:
    text = {"min": "min(x, 1)", "max": "max(x, 1)", "not": "not x", "and": "x and 1", "or": "x or 1"}.get(name)
    signs = {"floor_divide": "//", "modulo": "%", "equal": "==", "not_equal": "!=", "less": "<", "less_equal": "<=",
             "greater": ">", "greater_equal": ">="}  # fmt: skip
    expr = parse(text or f"x {signs[name]} 1")
    for interpreter, x in (
        (NumericInterpreter(), np.ones(3, np.float32)),
        (TorchInterpreter(), torch.ones(3)),
        (ShapeInterpreter(), Shape((3,))),
    ):
        with pytest.raises(EvaluationError, match="works on options and sizes, not on tensors"):
            interpreter.evaluate(expr, {"x": x})


# Meanings that training has of its own.


def test_gradients_where_there_are_none() -> None:
    x = torch.randn(4, requires_grad=True)
    TorchInterpreter().evaluate(parse("sum(x * detach(x), axis=0)"), {"x": x}).backward()
    torch.testing.assert_close(x.grad, x.detach())


def test_top_k_mask_is_straight_through_in_training() -> None:
    z = torch.tensor([0.3, -1.0, 2.0, 0.5], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = TorchInterpreter(training=True).evaluate(parse("top_k_mask(z, 2)"), {"z": z})
    assert found.tolist() == [0, 0, 1, 1]
    (found * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_choose_takes_one_of_the_stack_in_training() -> None:
    torch.manual_seed(0)
    stack = torch.arange(12.0).reshape(3, 4)
    drawn = {
        tuple(TorchInterpreter(training=True).evaluate(parse("choose(s)"), {"s": stack}).tolist()) for _ in range(40)
    }
    assert drawn == {tuple(row.tolist()) for row in stack}


def test_dropout_in_training() -> None:
    torch.manual_seed(0)
    found = TorchInterpreter(training=True).evaluate(parse("dropout(x, 0.25)"), {"x": torch.ones(10_000)})
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert 0.2 < float((found == 0).float().mean()) < 0.3
