"""The shape interpreter: for each function a shape that is right and shapes that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peltc.spec.formula.dims import Dim, shape_text
from peltc.spec.formula.functions import COMPILE_TIME, FUNCTIONS
from peltc.spec.formula.interpreter import EvaluationError, FormulaError
from peltc.spec.formula.reader import OPERATORS, parse
from peltc.spec.formula.syntax import calls
from peltc.spec.interpreters.shape import MAX_ELEMENTS, Shape, axis_index, broadcast, tensor
from peltc.spec.interpreters.shapes import ShapeInterpreter, Summaries

B, S, D = Dim.of("B"), Dim.of("S"), Dim.of("d")
SCOPE: dict[str, Any] = {
    "x": Shape((B, S, 6), "the input", True),
    "k": Shape((B, 2, S, 3), "keys", True),
    "mask": Shape((B, S), "the mask", True),
    "A": Shape((4, 6), "parameter A [r, in]"),
    "C": Shape((6, 4)),
    "Q": Shape((5, 3, 3)),
    "T": Shape((2, 4, 6)),
    "K": Shape((2, 10, 3)),
    "F": Shape((2, 6, 4, 4)),
    "v": Shape((6,), "a vector"),
    "w": Shape((4,)),
    "s": Shape((), "a number"),
    "M": Shape((D, 2 * D)),
    "n": 3,
    "d": D,
    "word": "relu",
}


def shape(text: str, **more: Any) -> Any:
    return ShapeInterpreter().evaluate(parse(text), SCOPE | more)


RIGHT = {
    "add": [("x + v", (B, S, 6)), ("v + x", (B, S, 6)), ("x + 1", (B, S, 6)), ("A + s", (4, 6)), ("M + M", (D, 2 * D))],
    "subtract": [("x - unsqueeze(mask)", (B, S, 6)), ("1 - v", (6,))],
    "multiply": [("x * v", (B, S, 6)), ("unsqueeze(w) * A", (4, 6)), ("d * v", (6,))],
    "divide": [("x / v", (B, S, 6)), ("1 / s", ()), ("v / d", (6,))],
    "power": [("x ** 2", (B, S, 6)), ("2 ** v", (6,))],
    "negate": [("-x", (B, S, 6))],
    "matmul": [("A @ C", (4, 4)), ("x @ C", (B, S, 4)), ("Q @ Q", (5, 3, 3)), ("M @ transpose(M)", (D, D))],
    "linear": [("linear(x, A)", (B, S, 4)), ("linear(x, A, w)", (B, S, 4)), ("linear(v, A)", (4,))],
    "einsum": [
        ("einsum('ij,jk->ik', A, C)", (4, 4)),
        ("einsum('bsi, oi -> bso', x, A)", (B, S, 4)),
        ("einsum('kii->ki', Q)", (5, 3)),
        ("einsum('ij->', A)", ()),
    ],
    "kron": [("kron(A, C)", (24, 24)), ("kron(M, A)", (4 * D, 12 * D))],
    "inverse": [("inverse(Q)", (5, 3, 3))],
    "eye": [("eye(3)", (3, 3)), ("eye(d)", (D, D))],
    "skew": [("skew(v, 4)", (4, 4)), ("skew(take(A, 0), 4)", (4, 4)), ("skew(Q, 3)", (5, 3, 3, 3))],
    "block_diagonal": [("block_diagonal(T)", (8, 12))],
    "butterfly": [
        ("butterfly(F)", (24, 24)),
        ("butterfly(unsqueeze(Q, 0))", (15, 15)),
        ("butterfly(reshape(M, [1, 2, d, d]))", (2 * D, 2 * D)),
    ],
    "upper": [("upper(Q)", (5, 3, 3)), ("upper(A @ C)", (4, 4))],
    "orthonormal": [
        ("orthonormal(C)", (6, 4)),
        ("orthonormal(transpose(M))", (2 * D, D)),
        ("orthonormal(Q)", (5, 3, 3)),
    ],
    "circulant": [("circulant(A)", (4, 6, 6)), ("circulant(M)", (D, 2 * D, 2 * D))],
    "scatter": [("scatter(w, ones([4, 2]), [3, 5])", (3, 5)), ("scatter(w, ones([4, 2]), [d, 1])", (D, 1))],
    "inverse_fourier": [("inverse_fourier(T)", (2, 4, 6)), ("inverse_fourier(M)", (D, 2 * D))],
    "norm2": [("norm2(A)", (4, 1)), ("norm2(x, axis=1)", (B, 1, 6))],
    "mean": [("mean(x)", (B, S, 1)), ("mean(A, axis=0)", (1, 6))],
    "sum": [("sum(x, axis=-2)", (B, 1, 6))],
    "running_sum": [("running_sum(x)", (B, S, 6)), ("running_sum(x, axis=1)", (B, S, 6))],
    "softmax": [("softmax(x)", (B, S, 6)), ("softmax(x, axis=1)", (B, S, 6))],
    "mean_seq": [("mean_seq(x)", (B, 1, 6)), ("mean_seq(x, mask)", (B, 1, 6)), ("mean_seq(k)", (B, 1, S, 3))],
    "reshape": [("reshape(A, [6, 2, 2])", (6, 2, 2)), ("reshape(M, [2, d, d])", (2, D, D)), ("reshape(s, [])", ())],
    "transpose": [("transpose(A)", (6, 4)), ("transpose(x)", (B, 6, S))],
    "permute": [("permute(T, [2, 0, 1])", (6, 2, 4)), ("permute(x, [1, 0, 2])", (S, B, 6))],
    "concat": [
        ("concat(A, A)", (4, 12)),
        ("concat(A, A, axis=-2)", (8, 6)),
        ("concat(K, k, axis=-2)", (B, 2, S + 10, 3)),
        ("concat(v, x, axis=-1)", (B, S, 12)),
        ("concat(M, M)", (D, 4 * D)),
    ],
    "take": [("take(A, 0)", (6,)), ("take(T, -1, axis=-2)", (2, 6)), ("take(x, 5, axis=-1)", (B, S))],
    "slice": [("slice(A, 1, 3)", (4, 2)), ("slice(A, 0, 4, axis=0)", (4, 6)), ("slice(M, 0, d)", (D, D))],
    "pick": [("pick(A, [3, 0])", (2, 6)), ("pick(x, [5], axis=-1)", (B, S, 1))],
    "put": [("put(A, pick(A, [0, 1]), [3, 2])", (4, 6)), ("put(A, ones([4, 1]), [5], axis=1)", (4, 6))],
    "unsqueeze": [("unsqueeze(mask)", (B, S, 1)), ("unsqueeze(v, 0)", (1, 6)), ("unsqueeze(v, axis=-2)", (1, 6))],
    "zeros": [("zeros([2, d])", (2, D)), ("zeros([])", ())],
    "ones": [("ones([3])", (3,))],
    "choose": [("choose(T)", (4, 6)), ("choose(w, 1)", ()), ("choose(T, 1, 'layer')", (4, 6))],
    "layer_norm": [("layer_norm(x)", (B, S, 6)), ("layer_norm(x, v, v)", (B, S, 6))],
    "attend": [("attend(x, x, x)", (B, S, 6)), ("attend(x, x, linear(x, A), mask, True)", (B, S, 4))],
    "top_k_mask": [("top_k_mask(A, 6)", (4, 6)), ("top_k_mask(M, 3)", (D, 2 * D))],
    "activation": [("activation(x, word)", (B, S, 6)), ("activation(x, 'identity')", (B, S, 6))],
    "dropout": [("dropout(x, 0)", (B, S, 6)), ("dropout(x, 0.5)", (B, S, 6))],
    **{
        name: [(f"{name}(x)", (B, S, 6)), (f"{name}(s)", ())]
        for name in (
            "relu",
            "gelu",
            "gelu_tanh",
            "silu",
            "tanh",
            "sigmoid",
            "exp",
            "log",
            "sqrt",
            "abs",
            "cos",
            "sin",
            "identity",
            "detach",
        )
    },
}

WRONG = {
    "add": [
        ("x + w", "[B, S, 6] (the input) and [4]"),
        ("x + 'a'", "expected a tensor, found 'a'"),
        ("M + A", "d is not 4"),
    ],
    "subtract": [("A - C", "4 is not 6"), ("x - True", "expected a tensor, found True")],
    "multiply": [("x * mask", "S is not B"), ("x * [1]", "expected a tensor, found [1]")],
    "divide": [("x / w", "6 is not 4"), ("x / 0", "division by zero"), ("x / 0.0", "division by zero")],
    "power": [("x ** w", "6 is not 4")],
    "negate": [("-word + x", "expected a number")],
    "matmul": [
        ("A @ A", "matmul needs [..., M, K] and [..., K, N]"),
        ("x @ v", "matmul needs"),
        ("A @ 2", "expected a tensor, found 2"),
    ],
    "linear": [
        ("linear(x, C)", "x is [B, S, 6] (the input), the weight is [6, 4]: 6 is not 4"),
        ("linear(x, v)", "linear needs x [..., I] and a weight [O, I]"),
        ("linear(s, A)", "linear needs x [..., I]"),
        ("linear(x, A, v)", "linear needs a bias [O]"),
        ("linear(x, A, 1)", "expected a tensor, found 1"),
        ("linear(x, 2)", "expected a tensor, found 2"),
    ],
    "einsum": [
        ("einsum('ij,jk->ik', A, A)", "'j' is 6 in [4, 6] (parameter A [r, in]) and 4"),
        ("einsum('ij->ij', x)", "'ij' has 2 letters"),
        ("einsum('ij,jk->ik', A)", "names 2 tensors, 1 are given"),
        ("einsum('ij->ik', A)", "no tensor has the letters ['k']"),
        ("einsum('ij->ii', A)", "repeats a letter"),
        ("einsum('...i->...', A)", "an equation such as 'ij,jk->ik'"),
        ("einsum('ij', A)", "an equation such as"),
        ("einsum('i1->i', A)", "an equation such as"),
        ("einsum(1, A)", "an equation such as"),
    ],
    "kron": [("kron(A, v)", "kron needs two matrices"), ("kron(T, A)", "kron needs two matrices")],
    "inverse": [("inverse(A)", "inverse needs square matrices"), ("inverse(v)", "inverse needs square matrices")],
    "eye": [("eye(0)", "sizes are positive"), ("eye(1.5)", "expected a size"), ("eye(A)", "expected a size")],
    "skew": [
        ("skew(v, 3)", "skew needs n(n-1)/2 = 3 entries for n = 3"),
        ("skew(v, A)", "size n"),
        ("skew(s, 2)", "skew needs"),
    ],
    "block_diagonal": [("block_diagonal(A)", "needs [K, A, B]")],
    "butterfly": [
        ("butterfly(Q)", "needs [M, K, A, A]"),
        ("butterfly(unsqueeze(T, 0))", "needs [M, K, A, A]"),
        ("butterfly(zeros([3, 6, 4, 4]))", "a number of blocks that 4 divides for 3 factors"),
        ("butterfly(zeros([2, 4, 3, 3]))", "blocks of an even size for 2 factors"),
    ],
    "upper": [("upper(A)", "upper needs square matrices"), ("upper(v)", "upper needs square matrices")],
    "orthonormal": [("orthonormal(A)", "with M at least N"), ("orthonormal(v)", "orthonormal needs [..., M, N]")],
    "circulant": [("circulant(s)", "circulant needs vectors"), ("circulant(x)", "known at compile time")],
    "scatter": [
        ("scatter(w, A, [3, 5])", "scatter needs values [n], places [n, 2]"),
        ("scatter(A, ones([4, 2]), [3, 5])", "scatter needs values [n], places [n, 2]"),
        ("scatter(w, ones([4, 2]), [3])", "the shape of a matrix"),
        ("scatter(w, ones([4, 2]), [3, 1])", "a matrix [3, 1] has no 4 places"),
        ("scatter(w, ones([4, 2]), v)", "expected a list of sizes"),
    ],
    "inverse_fourier": [("inverse_fourier(v)", "at least two axes"), ("inverse_fourier(x)", "known at compile time")],
    "norm2": [("norm2(A, axis=2)", "has no axis 2"), ("norm2(s)", "has no axis -1")],
    "mean": [("mean(A, axis=-3)", "has no axis -3"), ("mean(A, axis=True)", "has no axis True")],
    "sum": [("sum(A, axis=1.0)", "has no axis 1.0"), ("sum('a')", "expected a tensor")],
    "running_sum": [
        ("running_sum(x, axis=3)", "has no axis 3"),
        ("running_sum(x, axis=0)", "would let the texts of a batch read each other"),
    ],
    "softmax": [
        ("softmax(x, axis=3)", "has no axis 3"),
        ("softmax(s)", "has no axis -1"),
        ("softmax(x, axis=0)", "would let the texts of a batch read each other"),
    ],
    "mean_seq": [
        ("mean_seq(A)", "mean_seq needs [B, S, ...]"),
        ("mean_seq(x, x)", "a mask [B, S]"),
        ("mean_seq(x, A)", "a mask [B, S]"),
        ("mean_seq(x, 1)", "expected a tensor, found 1"),
    ],
    "reshape": [
        ("reshape(A, [5, 5])", "has 24 elements, [5, 5] has 25"),
        ("reshape(A, [-1])", "sizes are positive"),
        ("reshape(A, 24)", "expected a list of sizes"),
        ("reshape(A, [24.0])", "expected a size"),
        ("reshape(A, [True, 24])", "expected a size"),
    ],
    "transpose": [("transpose(v)", "at least two axes")],
    "permute": [
        ("permute(T, [0, 1])", "each axis of [2, 4, 6] once"),
        ("permute(T, [0, 1, 1])", "each axis"),
        ("permute(T, [0, 1, -1])", "each axis"),
        ("permute(T, 1)", "each axis"),
        ("permute(T, ['a', 1, 2])", "each axis"),
    ],
    "concat": [
        ("concat(A, C)", "[4, 6] (parameter A [r, in]) and [6, 4] do not join along axis -1: 4 is not 6"),
        ("concat(A, A, axis=0)", "counted from the end"),
        ("concat(A, v, axis=-2)", "counted from the end"),
        ("concat(A, A, axis='a')", "counted from the end"),
        ("concat(s, s)", "counted from the end"),
        ("concat(A, 'a')", "expected a tensor"),
    ],
    "take": [
        ("take(A, 4)", "has no index 4 along axis 0"),
        ("take(A, 0, axis=2)", "has no axis 2"),
        ("take(A, 1.5)", "expected an index"),
        ("take(A, w)", "expected an index"),
    ],
    "slice": [
        ("slice(A, 2, 2)", "no range 2:2"),
        ("slice(A, 0, 7)", "no range 0:7 along axis -1"),
        ("slice(A, -2, 3)", "no range -2:3"),
        ("slice(M, 0, 0)", "no range 0:0"),
        ("slice(A, 0, 2, axis=5)", "has no axis 5"),
        ("slice(A, 0.5, 2)", "expected a start"),
        ("slice(A, 0, w)", "expected a stop"),
    ],
    "pick": [
        ("pick(A, [4])", "no index 4"),
        ("pick(A, [])", "expected a list of indices"),
        ("pick(A, [1, 1])", "stands twice"),
        ("pick(A, [-1])", "expected a list of indices"),
        ("pick(A, 1)", "expected a list of indices"),
        ("pick(A, [0], axis=2)", "has no axis 2"),
    ],
    "put": [
        ("put(A, A, [0])", "put needs values [1, 6]"),
        ("put(A, v, [0])", "put needs values [1, 6]"),
        ("put(A, ones([1, 6]), [9])", "no index 9"),
    ],
    "length": [("length(A)", "not on tensors"), ("length('word')", "expected a list")],
    "unsqueeze": [("unsqueeze(v, 2)", "has no axis 2"), ("unsqueeze(v, 'a')", "has no axis a")],
    "zeros": [
        ("zeros(3)", "expected a list of sizes"),
        ("zeros([0])", "sizes are positive"),
        ("zeros([v])", "expected a size"),
    ],
    "ones": [("ones(['a'])", "expected a size"), ("ones([-1])", "sizes are positive")],
    "choose": [
        ("choose(s)", "choose needs a stack"),
        ("choose('a')", "expected a tensor"),
        ("choose(s, 0, 'model')", "one draw is for a site or a layer, found 'model'"),
    ],
    "floor": [("floor(A)", "works on options and sizes")],
    "layer_norm": [
        ("layer_norm(x, w)", "a gain and a bias like the last axis"),
        ("layer_norm(2)", "expected a tensor"),
    ],
    "attend": [
        ("attend(x, linear(x, A), x)", "attend needs q [B, S, E]"),
        ("attend(x, x, x, v)", "attend needs a mask [B, T]"),
    ],
    "top_k_mask": [
        ("top_k_mask(A, 7)", "no 7 largest"),
        ("top_k_mask(A, 0)", "no 0 largest"),
        ("top_k_mask(A, 1.5)", "found 1.5"),
    ],
    "activation": [
        ("activation(x, 'rleu')", "unknown activation 'rleu'; one of relu"),
        ("activation(x, 1)", "unknown activation '1'"),
    ],
    "dropout": [
        ("dropout(x, 1)", "a probability below 1"),
        ("dropout(x, -0.1)", "a probability"),
        ("dropout(x, word)", "a probability"),
    ],
    **{
        name: [(f"{name}('a')", "expected a tensor, found 'a'"), (f"{name}(3)", "expected a tensor, found 3")]
        for name in ("relu", "gelu", "gelu_tanh", "silu", "identity", "detach")
    },
    **{
        name: [(f"{name}('a')", "expected a number, found 'a'"), (f"{name}([A])", "expected a tensor")]
        for name in ("tanh", "sigmoid", "exp", "log", "abs", "sqrt", "cos", "sin")
    },
    **{
        name: [(text, f"'{name}' works on options and sizes, not on tensors")]
        for name, text in {
            "floor_divide": "x // 2",
            "modulo": "x % 2",
            "equal": "x == x",
            "not_equal": "x != 1",
            "less": "x < 1",
            "less_equal": "x <= 1",
            "greater": "x > v",
            "greater_equal": "x >= v",
            "and": "x and x",
            "or": "x or 1",
            "not": "not x",
            "min": "min(x, 1)",
            "max": "max(x, x)",
        }.items()
    },
}


@pytest.mark.parametrize(("text", "dims"), [item for items in RIGHT.values() for item in items])
def test_right(text: str, dims: tuple[Any, ...]) -> None:
    found = tensor(shape(text))
    assert shape_text(found.dims) == shape_text(dims) and found.dims == dims


@pytest.mark.parametrize(("text", "words"), [item for items in WRONG.values() for item in items])
def test_wrong(text: str, words: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        shape(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "mixed"),
    [
        ("x * 2", ""), ("mean(x)", ""), ("softmax(x)", ""), ("transpose(x)", ""), ("x @ transpose(x)", ""),
        ("mean(x, axis=1)", "mean"), ("relu(sum(x, axis=-2)) + x", "sum"), ("softmax(x, axis=1)", "softmax"),
        ("mean(transpose(x))", "mean"), ("take(x, 0, axis=1) * 2", "take"), ("mean_seq(x)", "mean_seq"),
        ("running_sum(x, axis=1)", "running_sum"), ("running_sum(x)", ""),
        ("einsum('bsd,btd->bsd', x, x)", "einsum"), ("einsum('bsd,btd->bst', x, x)", ""),
        ("x @ transpose(x) @ x", "matmul"), ("attend(x, x, x)", "attend"),
    ],
)  # fmt: skip
def test_whether_positions_read_each_other(text: str, mixed: str) -> None:
    """A property of the expression, wherever it moves the sequence's axis."""
    assert tensor(shape(text)).mixed == mixed


@pytest.mark.parametrize(
    ("text", "summaries", "open_"),
    [
        ("x * 2", [], ""), ("softmax(x, axis=1)", [], "softmax"), ("attend(x, x, x)", [], "attend"),
        ("mean_seq(x) * x", ["mean_seq(x)"], ""), ("mean_seq(x, mask) + x", ["mean_seq(x, mask)"], ""),
        ("sum(softmax(x, axis=1) * x, axis=1)", ["sum(softmax(x, axis=1) * x, axis=1)"], ""),
        ("relu(sum(x, axis=1)) + slice(x, 0, 1, axis=1) * x", ["sum(x, axis=1)", "slice(x, 0, 1, axis=1)"], ""),
        ("mean_seq(x) + running_sum(x, axis=1)", ["mean_seq(x)"], "running_sum"),
        ("einsum('bsd->bd', x)", ["einsum('bsd->bd', x)"], ""), ("einsum('bsd->db', x)", [], "einsum"),
        ("mean(transpose(x)) * 2", ["mean(transpose(x))"], ""), ("mean(x)", [], ""),
    ],
)  # fmt: skip
def test_what_is_made_of_a_text_as_a_whole(text: str, summaries: list[str], open_: str) -> None:
    """What has one value for a text, and what has a value of others for each position."""
    shapes = Summaries()
    found = shapes.evaluate(parse(text), SCOPE)
    assert [expr.text for expr in shapes.found] == summaries
    assert tensor(found).open == open_


def test_every_function_is_tried() -> None:
    """The tables name each function of the language, and a formula under a name calls it."""
    assert set(WRONG) == set(FUNCTIONS)
    known = {"floor_divide", "modulo", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
             "and", "or", "not", "min", "max", "floor", "length"}  # fmt: skip
    assert set(RIGHT) == set(FUNCTIONS) - known
    assert all(name in calls(parse(text)) for table in (RIGHT, WRONG) for name in table for text, _ in table[name])


def test_a_conflict_says_what_fixed_each_shape() -> None:
    with pytest.raises(EvaluationError) as caught:
        shape("1 + relu(linear(x, transpose(A)))")
    assert str(caught.value) == (
        "in 'linear(x, transpose(A))': linear needs x [..., I] and a weight [O, I]: x is [B, S, 6] (the input),"
        " the weight is [6, 4] (parameter A [r, in]): 6 is not 4"
    )


# What depends on the input, and how large a tensor may be.


def test_what_depends_on_the_input() -> None:
    assert shape("x + 1").running and shape("linear(1 + x, A)").running and shape("concat(x, x)").running
    assert not shape("A @ C").running and not shape("zeros([3])").running


@pytest.mark.parametrize("name", sorted(COMPILE_TIME))
def test_functions_of_compile_time(name: str) -> None:
    """What no graph can compute is refused for a value that depends on the input, in words that say so."""
    text = RIGHT[name][0][0]
    running = {key: Shape(v.dims, v.origin, True) for key, v in SCOPE.items() if isinstance(v, Shape)}
    with pytest.raises(EvaluationError, match=f"'{name}' needs tensors known at compile time, and .* depends on"):
        shape(text, **running)


@pytest.mark.parametrize(
    "text",
    ["zeros([1000000, 1000000])", "eye(100000)", "kron(kron(T5, T5), kron(T5, T5))", "unsqueeze(H) * unsqueeze(H, 0)"],
)
def test_no_tensor_is_larger_than_the_bound(text: str) -> None:
    with pytest.raises(EvaluationError, match=f"elements; at most {MAX_ELEMENTS:,}"):
        shape(text, T5=Shape((500, 500)), H=Shape((100_000,)))


def test_the_bound_is_inclusive() -> None:
    assert shape(f"zeros([{MAX_ELEMENTS // 4}, 4])").dims == (MAX_ELEMENTS // 4, 4)
    with pytest.raises(EvaluationError):
        shape(f"zeros([{MAX_ELEMENTS // 4}, 5])")


# Parts.


def test_broadcast_keeps_the_origin_of_the_larger() -> None:
    large, small = Shape((2, 3), "large"), Shape((3,), "small")
    assert broadcast(large, small).origin == broadcast(small, large).origin == "large"
    assert broadcast(Shape((2, 1), "a"), Shape((1, 3), "b")) == Shape((2, 3))


def test_axes() -> None:
    assert [axis_index(Shape((2, 3)), a) for a in (0, 1, -1, -2)] == [0, 1, 1, 0]
    for axis in (2, -3, 0.0, True, "a", None):
        with pytest.raises(FormulaError, match="has no axis"):
            axis_index(Shape((2, 3)), axis)


def test_tensors() -> None:
    assert tensor(3) == Shape((), "the number 3") and tensor(D).rank == 0
    assert str(Shape((2, D), "a thing")) == "[2, d] (a thing)"
    for value in (True, "a", None, [1], object()):
        with pytest.raises(FormulaError, match="expected a tensor"):
            tensor(value)


arguments = st.sampled_from(
    ["x", "k", "mask", "A", "C", "Q", "T", "v", "w", "s", "M", "n", "d", "0", "1", "-1", "7", "0.5", "True", "word",
     "'ij,jk->ik'", "[1, 0]", "[4, 6]", "[d, 'a']", "[]", "eye(3)", "sqrt(d)"]
)  # fmt: skip
named = sorted(name for name, f in FUNCTIONS.items() if f.parameters and name not in OPERATORS)


@given(st.sampled_from(named), st.lists(arguments, max_size=4))
def test_any_call_has_a_shape_or_an_explanation(name: str, values: list[str]) -> None:
    try:
        found = shape(f"{name}({', '.join(values)})")
    except EvaluationError as error:
        assert error.reason and "object" not in error.reason
    else:
        assert isinstance(found, (Shape, int, float, Dim))
