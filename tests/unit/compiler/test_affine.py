"""Affine formulas become the maps that numpy computes, and others are refused with the sub-expression at fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peltc.compiler.interpreters.affine import Affine, AffineInterpreter, Map, NotAffine
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.spec.formula.functions import FUNCTIONS
from peltc.spec.formula.interpreter import EvaluationError
from peltc.spec.formula.reader import parse

Array = np.ndarray[Any, Any]
INPUTS, OUTPUTS, RANK = 5, 7, 2
TOLERANCE = 1e-5
"""Of the largest value met on the way: float32, in two orders of computation."""


def constants() -> dict[str, Array]:
    """Vectors `v5`, positive `p5`, weights `w75` [7, 5], and a batch's worth of the same vector `t5`, by size."""
    random = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for n in (INPUTS, OUTPUTS, RANK):
        made[f"v{n}"] = random.normal(size=n)
        made[f"p{n}"] = np.abs(random.normal(size=n)) + 0.5
        made[f"t{n}"] = random.normal(size=(1, 1, n))
        made |= {f"w{m}{n}": random.normal(size=(m, n)) / n for m in (INPUTS, OUTPUTS, RANK)}
    return {name: array.astype(np.float32) for name, array in made.items()}


CONSTANTS = constants()
IDENTITIES = {"x": Affine.identity("x"), "y": Affine.identity("y")}
SIZES = st.sampled_from([INPUTS, OUTPUTS, RANK])


@st.composite
def affine(draw: Callable[..., Any], size: int, depth: int = 3) -> str:
    """An affine formula of x [5] and y [7] with `size` features; every sub-expression is in parentheses."""
    leaves = {INPUTS: ["x"], OUTPUTS: ["y"], RANK: [f"linear(x, w{RANK}{INPUTS})", f"linear(y, w{RANK}{OUTPUTS})"]}
    if depth == 0:
        return f"({draw(st.sampled_from(leaves[size]))})"
    inner = draw(affine(size, depth - 1))
    other = draw(SIZES)
    forms = [
        lambda: f"{inner} + {draw(affine(size, depth - 1))}",
        lambda: f"{inner} - {draw(affine(size, depth - 1))}",
        lambda: f"{inner} + v{size}",
        lambda: f"t{size} - {inner}",
        lambda: f"{inner} + 2",
        lambda: f"{inner} * v{size}",
        lambda: f"relu(v{size}) * {inner}",
        lambda: f"{inner} * t{size}",
        lambda: f"0.5 * {inner}",
        lambda: f"{inner} / p{size}",
        lambda: f"{inner} / 4",
        lambda: f"-{inner}",
        lambda: f"linear({draw(affine(other, depth - 1))}, w{size}{other})",
        lambda: f"linear({draw(affine(other, depth - 1))}, w{size}{other}, v{size})",
        lambda: f"{draw(affine(other, depth - 1))} @ w{other}{size}",
        lambda: f"linear({inner}, w{size}{RANK} @ w{RANK}{size})",
        lambda: f"linear(linear({inner}, w{RANK}{size}), w{size}{RANK})",
        lambda: f"dropout(detach(identity({inner})), 0.5)",
        lambda: f"activation({inner}, 'identity')",
        lambda: f"({inner} if 1 < 2 else relu(x))",
    ]
    return f"({draw(st.sampled_from(forms))()})"


def evaluate(text: str) -> Affine:
    found = AffineInterpreter().evaluate(parse(text), {**CONSTANTS, **IDENTITIES})
    assert isinstance(found, Affine)
    return found


def applied(found: Affine, values: dict[str, Array], how: str = "apply") -> Array:
    """An affine map's value: by its own application, or by its matrices."""
    total: Array = np.zeros((), np.float64)
    for source, m in found.maps.items():
        vector = values[source]
        dense = np.diag(np.broadcast_to(m.diagonal, vector.shape)) if m.diagonal is not None else m.dense()
        total = total + (m.apply(vector) if how == "apply" else dense.astype(np.float64) @ vector)
    return total if found.offset is None else total + found.offset


@given(st.data(), SIZES, st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("how", ["apply", "dense"])
def test_maps_are_what_numpy_computes(how: str, data: Any, size: int, seed: int) -> None:
    text = data.draw(affine(size))
    random = np.random.default_rng(seed)
    values = {"x": random.normal(size=INPUTS), "y": random.normal(size=OUTPUTS)}
    single = {name: value.astype(np.float32) for name, value in values.items()}
    expected = NumericInterpreter().evaluate(parse(text), {**CONSTANTS, **single})
    found = applied(evaluate(text), single, how)
    expected, found = np.broadcast_to(np.squeeze(expected), size), np.broadcast_to(found, size)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale)


@given(st.data(), SIZES)
def test_the_same_map_for_every_token(data: Any, size: int) -> None:
    """What was read off a formula once holds for a whole batch [B, S, N]."""
    text = data.draw(affine(size, 2))
    random = np.random.default_rng(1)
    batch = {n: random.normal(size=(2, 3, f)).astype(np.float32) for n, f in (("x", INPUTS), ("y", OUTPUTS))}
    expected = NumericInterpreter().evaluate(parse(text), {**CONSTANTS, **batch})
    found = evaluate(text)
    for b, s in np.ndindex(2, 3):
        token = np.broadcast_to(applied(found, {name: array[b, s] for name, array in batch.items()}), size)
        np.testing.assert_allclose(token, expected[b, s], rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max()))


NOT_AFFINE = [
    "relu({0})", "gelu({0})", "gelu_tanh({0})", "silu({0})", "tanh({0})", "sigmoid({0})", "exp({0})", "log({0})",
    "sqrt({0})", "abs({0})", "activation({0}, 'silu')", "softmax({0})", "norm2({0})", "mean({0})", "sum({0})",
    "running_sum({0}, axis=0)",
    "mean_seq({0})", "{0} ** 2", "2 ** {0}", "{0} * {1}", "1 / {0}", "{0} / {1}", "concat({0}, {1})",
    "slice({0}, 0, 1)", "take({0}, 0)", "unsqueeze({0})", "transpose({0})", "permute({0}, [0])", "{0} @ {1}",
    "linear(v7, {0})", "linear({0}, {1})", "einsum('i,ji->j', {0}, w77)", "reshape({0}, [7])", "kron({0}, {1})",
    "{0} * m34", "{0} + m34", "inverse({0})", "block_diagonal({0})", "butterfly({0})", "upper({0})", "orthonormal({0})",
    "skew({0}, 7)", "choose({0})", "circulant({0})", "inverse_fourier({0})", "scatter({0}, v7, [1, 7])", "cos({0})",
    "sin({0})",
    "pick({0}, [0])", "put({0}, {1}, [0])", "put(v7, {0}, [0])", "top_k_mask({0}, 1)",
    "layer_norm({0})", "attend({0}, {0}, {0})",
]  # fmt: skip


@given(st.data(), st.sampled_from(NOT_AFFINE))
def test_what_is_not_affine_is_refused_by_name(data: Any, form: str) -> None:
    """The innermost sub-expression at fault is named, however it is wrapped in what is affine."""
    culprit = form.format(data.draw(affine(OUTPUTS, 1)), data.draw(affine(OUTPUTS, 1)))
    text = data.draw(st.sampled_from(["{0}", "y + v7 * ({0})", "linear(-({0}), w57) + x", "0.5 * (y - ({0}))"]))
    scope = {**CONSTANTS, **IDENTITIES, "m34": np.ones((3, 4), np.float32)}
    with pytest.raises(EvaluationError) as caught:
        AffineInterpreter().evaluate(parse(text.format(culprit)), scope)
    assert caught.value.expr.text == culprit
    assert isinstance(caught.value.__cause__, NotAffine)
    assert "affine" in caught.value.reason or "for every token" in caught.value.reason


def test_every_function_of_tensors_is_tried() -> None:
    """As affine, or as not: none is left out."""
    affine_ones = {"add", "subtract", "multiply", "divide", "negate", "linear", "matmul", "identity", "detach",
                   "dropout", "activation"}  # fmt: skip
    refused = {name for name in FUNCTIONS for form in NOT_AFFINE if form.startswith(f"{name}(")}
    known = {"floor_divide", "modulo", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "and",
             "or", "not", "min", "max", "floor", "length", "eye", "zeros", "ones"}  # fmt: skip
    assert affine_ones | refused | known | {"power"} == set(FUNCTIONS)


def test_what_reads_no_input_stays_a_number_or_an_array() -> None:
    interpreter = AffineInterpreter()
    assert interpreter.evaluate(parse("relu(2 * v5)"), CONSTANTS).shape == (5,)
    assert interpreter.evaluate(parse("3 * 4"), {}) == 12


# Cheap forms.


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("x", "diagonal"),
        ("2 * x * v5", "diagonal"),
        ("x - x / p5", "diagonal"),
        ("linear(x, w75)", "matrix"),
        ("linear(x, w75) * v7", "matrix"),
        ("x + linear(x, w55)", "matrix"),
        ("linear(linear(x, w25), w72)", "factors"),
        ("v7 * linear(linear(x, w25) * v2, w72)", "factors"),
        ("linear(linear(linear(x, w25), w72), w77)", "factors"),
    ],
)
def test_a_map_keeps_its_cheapest_form(text: str, form: str) -> None:
    m = evaluate(text).maps["x"]
    assert [name for name in ("diagonal", "matrix", "factors") if getattr(m, name) is not None] == [form]


def test_arithmetic_changes_no_operand() -> None:
    """Sums are made in place of their own copy, never of a weight."""
    before = {name: array.copy() for name, array in CONSTANTS.items()}
    evaluate("x + linear(x, w55) - 2 * linear(x, w55) + linear(linear(x, w25), w52) + linear(x, w55)")
    assert all(np.array_equal(before[name], array) for name, array in CONSTANTS.items())


maps = st.sampled_from(["diagonal", "number", "matrix", "factors"])


@given(maps, maps, st.integers(0, 99))
def test_maps_compose_and_add(one: str, two: str, seed: int) -> None:
    random = np.random.default_rng(seed)

    def make(kind: str) -> Map:
        if kind == "factors":
            return Map(factors=(random.normal(size=(6, 1)), random.normal(size=(1, 6))))
        if kind == "matrix":
            return Map(matrix=random.normal(size=(6, 6)))
        return Map(diagonal=random.normal(size=6 if kind == "diagonal" else ()))

    a, b, vector, factor = make(one), make(two), random.normal(size=6), random.normal(size=6)
    np.testing.assert_allclose(a.plus(b).apply(vector), a.apply(vector) + b.apply(vector), atol=1e-12)
    np.testing.assert_allclose(a.composed(b).apply(vector), b.apply(a.apply(vector)), atol=1e-12)
    np.testing.assert_allclose(a.scaled(factor).apply(vector), factor * a.apply(vector), atol=1e-12)
