"""Sizes as polynomials: they compute as integers do, whatever numbers the names stand for."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peltc.spec.formula.dims import Dim, product, same, shape_text, simplify

NAMES = ("a", "b", "c")
values = st.fixed_dictionaries({name: st.integers(1, 12) for name in NAMES})
terms = st.integers(-6, 6) | st.sampled_from(NAMES)
expressions = st.recursive(terms, lambda inner: st.tuples(st.sampled_from(["+", "-", "*"]), inner, inner), max_leaves=8)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def compute(expression: Any, names: dict[str, Any]) -> Any:
    if isinstance(expression, tuple):
        sign, left, right = expression
        return OPERATORS[sign](compute(left, names), compute(right, names))
    return names[expression] if isinstance(expression, str) else expression


def symbolic(expression: Any) -> Dim:
    return Dim.of(compute(expression, {name: Dim.of(name) for name in NAMES}))


def number(size: Any, names: dict[str, int]) -> Any:
    """A size's value, read off its text: so the text is right as well."""
    return eval(str(size), {}, names)


@given(expressions, values)
def test_arithmetic_agrees_with_integers(expression: Any, names: dict[str, int]) -> None:
    assert number(symbolic(expression), names) == compute(expression, names)


@given(expressions, expressions)
def test_equal_polynomials_are_equal_values(left: Any, right: Any) -> None:
    """Equal where the difference is nothing, and then with equal hashes."""
    a, b = symbolic(left), symbolic(right)
    assert (a == b) == (simplify(a - b) == 0)
    assert a != b or hash(a) == hash(b)
    assert a + b == b + a and a * b == b * a


@given(expressions, st.integers(1, 6), st.sampled_from([*NAMES, None]))
def test_division_undoes_multiplication(expression: Any, factor: int, name: str | None) -> None:
    size, divisor = symbolic(expression), Dim.of(factor) * (Dim.of(name) if name else 1)
    assert (size * divisor) // divisor == size


@given(values, st.integers(1, 6), st.integers(1, 6), st.integers(-20, 20))
def test_division_agrees_where_sizes_divide(names: dict[str, int], m: int, n: int, rest: int) -> None:
    """Names are taken to divide; a number beside them is rounded down, as integers are."""
    names = {name: value * m * n for name, value in names.items()}
    a, b = Dim.of("a"), Dim.of("b")
    assert number(a // m // n, names) == names["a"] // m // n
    assert number(a // (m * n) + b // m, names) == names["a"] // (m * n) + names["b"] // m
    assert number((a * b + rest) // m, names) == (names["a"] * names["b"] + rest) // m
    assert number(m * (a // m), names) == names["a"]


def test_division_is_exact() -> None:
    d, n = Dim.of("d"), Dim.of("n")
    assert n * (d // n) == d
    assert 4 * (d // 4) == d
    assert d // 2 + d // 2 == d
    assert str(d // 4 // n) == "d//(4*n)"
    assert Dim.of(7) // 2 == Dim.of(3)
    assert 12 // Dim.of(5) == Dim.of(2)


@pytest.mark.parametrize("divisor", [0, Dim.of("a") + 1, Dim.of("a") - Dim.of("a")])
def test_division_by_a_sum_or_nothing_is_refused(divisor: Any) -> None:
    with pytest.raises(ValueError, match="cannot divide"):
        Dim.of("a") // divisor


@pytest.mark.parametrize("value", [1.5, 2.0, None, [1]])
def test_a_size_is_no_fraction(value: Any) -> None:
    with pytest.raises(TypeError):
        Dim.of(value)
    with pytest.raises(TypeError):
        Dim.of("a") * value


def test_constants() -> None:
    a = Dim.of("a")
    assert simplify(a - a) == 0 and simplify(a - a + 3) == 3 and simplify(a) is a
    assert (a - a).constant == 0 and a.constant is None and (a // 2).constant is None
    assert same(a * 2, a + a) and same(3, Dim.of(3)) and not same(a, Dim.of("b"))


def test_texts() -> None:
    a, b = Dim.of("a"), Dim.of("b")
    assert [str(x) for x in (a, 2 * a, a * b, a + 1, a - a, -a, a * a)] == [
        "a", "2*a", "a*b", "1 + a", "0", "-1*a", "a*a",
    ]  # fmt: skip
    assert shape_text((a, 2, a // b)) == "[a, 2, a//b]"


def test_product() -> None:
    assert product(()) == 1
    assert product((2, 3, 4)) == 24
    assert product((Dim.of("a"), 2)) == 2 * Dim.of("a")
