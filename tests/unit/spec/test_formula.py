"""The expression language: what it reads, what it refuses, and what operators on known numbers mean."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peltc.spec.diagnostics import PeltError, Place
from peltc.spec.formula.dims import Dim
from peltc.spec.formula.functions import FUNCTIONS
from peltc.spec.formula.interpreter import (
    MAX_EXPONENT,
    STATIC,
    Deferred,
    EvaluationError,
    Interpreter,
    Undecided,
    is_static,
)
from peltc.spec.formula.reader import MAX_CHARACTERS, MAX_DEPTH, MAX_NODES, parse
from peltc.spec.formula.syntax import MAX_SHOWN, Call, Conditional, Items, Name, Number, Text, calls, names, shown, walk


def refusal(text: str, *functions: str) -> str:
    with pytest.raises(PeltError) as caught:
        parse(text, Place("f", 1, 2, "delta"), functions)
    found = caught.value.diagnostics[0]
    assert found.place == Place("f", 1, 2, "delta") and found.expected
    return f"{found.code} {found.message}"


class Known(Interpreter[Any]):
    """Evaluates what is known without tensors."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        return name, arguments


def value(text: str, **scope: Any) -> Any:
    return Known().evaluate(parse(text), scope)


# Reading.


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("1", Number(1)),
        (1, Number(1)),
        (0.5, Number(0.5)),
        ("1e-5", Number(1e-5)),
        ("True", Number(True)),
        ("'a'", Text("a")),
        ("x", Name("x")),
        ("in", Name("in")),
        ("in // 2", Call("floor_divide", (Name("in"), Number(2)))),
        ("[in, 'in']", Items((Name("in"), Text("in")))),
        ("(1, x)", Items((Number(1), Name("x")))),
        ("-x", Call("negate", (Name("x"),))),
        ("not x", Call("not", (Name("x"),))),
        ("a @ b", Call("matmul", (Name("a"), Name("b")))),
        ("a + b * c", Call("add", (Name("a"), Call("multiply", (Name("b"), Name("c")))))),
        ("a ** -b", Call("power", (Name("a"), Call("negate", (Name("b"),))))),
        ("a == 'b'", Call("equal", (Name("a"), Text("b")))),
        ("a and b and c", Call("and", (Call("and", (Name("a"), Name("b"))), Name("c")))),
        ("x if a else y", Conditional(Name("a"), Name("x"), Name("y"))),
        ("linear(x, A)", Call("linear", (Name("x"), Name("A")))),
        ("softmax(x, axis=-2)", Call("softmax", (Name("x"),), (("axis", Call("negate", (Number(2),))),))),
        ("  x  ", Name("x")),
        ("relu(\n  x\n)", Call("relu", (Name("x"),))),
    ],
)
def test_read(text: Any, tree: Any) -> None:
    assert parse(text) == tree


def test_every_part_keeps_its_text() -> None:
    tree = parse("alpha / r * linear(linear(x, A), in)")
    assert [part.text for part in walk(tree)] == [
        "alpha / r * linear(linear(x, A), in)",
        "alpha / r", "alpha", "r",
        "linear(linear(x, A), in)", "linear(x, A)", "x", "A", "in",
    ]  # fmt: skip


def test_names_and_calls() -> None:
    tree = parse("softmax(x + y, axis=n) if flag else [norm(r)]")
    assert names(tree) == {"x", "y", "n", "flag", "r"}
    assert calls(tree) == {"softmax", "add", "norm"}


def test_functions_that_a_place_offers() -> None:
    assert parse("normal(0.1)", functions=("normal",)) == Call("normal", (Number(0.1),))
    assert refusal("normal(0.1)", "norm").startswith("E303 unknown function 'normal'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "E301 the formula is empty"),
        ("x +", "E301 not an expression"),
        ("x = 1", "E301 not an expression"),
        ("linear(x in", "E301 not an expression: '(' was never closed: 'linear(x in'"),
        ("x.T", "E302 attribute access in a formula: 'x.T'"),
        ("x[0]", "E302 an index in a formula: 'x[0]'"),
        ("f(x)(y)", "E302 a call of something that is not a name"),
        ("[a for a in x]", "E302 a comprehension in a formula: '[a for a in x]'"),
        ("{a for a in x}", "E302 a comprehension"),
        ("{a: b for a in x}", "E302 a comprehension"),
        ("sum(a for a in x)", "E302 a comprehension"),
        ("lambda: x", "E302 a lambda"),
        ("(x := 1)", "E302 an assignment"),
        ("f'{x}'", "E302 an f-string"),
        ("[*x]", "E302 an unpacked value"),
        ("concat(*x)", "E302 an unpacked argument"),
        ("softmax(x, **y)", "E302 an unpacked argument"),
        ("softmax(x, axis=0, axis=1)", "E302 an argument given twice"),
        ("{}", "E302 a dictionary"),
        ("{1}", "E302 a set"),
        ("await x", "E302 a coroutine or generator"),
        ("(yield)", "E302 a coroutine or generator"),
        ("x if a in [1] else y", "E302 the operator 'in' in a formula: 'a in [1]'"),
        ("x if a not in [1] else y", "E302 the operator 'not in'"),
        ("x is y", "E302 the operator 'is'"),
        ("1 < x < 2", "E302 a chain of comparisons"),
        ("x | y", "E302 the operator '|'"),
        ("~x", "E302 the operator '~'"),
        ("+x", "E302 the operator '+'"),
        ("None", "E302 a constant that is no number"),
        ("...", "E302 a constant that is no number"),
        ("b'a'", "E302 a constant that is no number"),
        ("1j", "E302 a constant that is no number"),
        ("liner(x, A)", "E303 unknown function 'liner' in 'liner(x, A)'"),
        ("add(x, y)", "E303 unknown function 'add'"),
        ("print('x')", "E303 unknown function 'print'"),
        ("x * 2147483649", "E304 the number 2147483649... is too large"),
        ("1e31", "E304 the number 1e31 is too large"),
        ("1e999", "E304 the number 1e999 is too large"),
        ("(" * 300 + "x" + ")" * 300, "E304 the formula is nested too deeply"),
        ("-" * (MAX_DEPTH + 1) + "x", "E304 the formula is too large"),
        (" or ".join("x" * (MAX_DEPTH + 2)), "E304 the formula is nested too deeply"),
        ("[" + "x, " * MAX_NODES + "]", "E304 the formula is too large"),
        ("x" + " " * MAX_CHARACTERS, f"E304 the formula has {MAX_CHARACTERS + 1:,} characters"),
    ],
)
def test_refused(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


@given(st.text("xyA0123456789.,+-*/%@<>=!()[]{}'\"\\ \n:_jeinfortldamb", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but a tree of the six kinds of node comes out, whatever goes in."""
    try:
        tree = parse(text)
    except PeltError as error:
        assert error.diagnostics[0].code in ("E301", "E302", "E303", "E304")
        return
    for node in walk(tree):
        assert isinstance(node, (Number, Text, Name, Items, Conditional, Call))
        assert not isinstance(node, Call) or node.function in {*FUNCTIONS, "norm"}


def test_long_texts_are_cut_in_messages() -> None:
    assert shown("a\n  b\tc\x00") == "a b c?"
    assert len(shown("x" * 999)) == MAX_SHOWN + 3
    assert len(refusal("x." + "y" * 3000)) < 300


# Evaluation of what is known.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2 + 3 * 4", 14),
        ("7 // 2 - 7 % 2", 2),
        ("2 ** 10 / 4", 256.0),
        ("-(3 - 5)", 2),
        ("sqrt(16)", 4.0),
        ("min(r, 3) + max(r, 3)", 11),
        ("max(b=1, a=2) + sqrt(x=9)", 5.0),
        ("exp(0) + abs(-3) + log(1) + tanh(0) + sigmoid(0)", 4.5),
        ("1 if kind == 'a' else 2", 1),
        ("1 if kind != 'a' or not flag else 2", 2),
        ("r > 3 and r >= 8 and 1 < 2 and 1 <= 1", True),
        ("[r, r // 2]", [8, 4]),
        ("late + 1", 2),
    ],
)
def test_known_values(text: str, found: Any) -> None:
    assert value(text, r=8, kind="a", flag=True, late=Deferred(lambda: 1)) == found


def test_the_branch_not_taken_is_not_evaluated() -> None:
    assert value("1 / r if r else 0", r=0) == 0


def test_deferred_values_are_computed_once_if_at_all() -> None:
    calls_ = []
    late = Deferred(lambda: calls_.append(1) or 5)
    assert value("1", late=late) == 1 and calls_ == []
    assert value("late * late", late=late) == 25 and calls_ == [1]


@pytest.mark.parametrize(
    ("text", "part", "reason"),
    [
        ("1 + zzz", "zzz", "unknown name 'zzz'"),
        ("2 * (1 / 0)", "1 / 0", "division by zero"),
        (f"2 ** {MAX_EXPONENT + 1}", f"2 ** {MAX_EXPONENT + 1}", "too large"),
        ("9 ** 9 ** 9", "9 ** 9 ** 9", "the exponent 387420489 is too large"),
        ("2 ** -9 ** 9", "2 ** -9 ** 9", "too large"),
        ("10 ** 20 * 10 ** 20", "10 ** 20 * 10 ** 20", "out of bounds"),
        ("(2 ** 64) ** 64", "(2 ** 64) ** 64", "out of bounds"),
        ("(-2) ** 0.5", "(-2) ** 0.5", "no real number"),
        ("'a' + 'b'", "'a' + 'b'", "expected a number, found 'a'"),
        ("'a' * 1000000000", "'a' * 1000000000", "expected a number"),
        ("[1] * 1000000000", "[1] * 1000000000", "expected a number, found [1]"),
        ("'%999999999d' % 1", "'%999999999d' % 1", "expected a number"),
        ("-'a'", "-'a'", "expected a number"),
        ("'a' < 'b'", "'a' < 'b'", "expected a number"),
        ("min('a', 1)", "min('a', 1)", "expected a number"),
        ("1 if t else 2", "1 if t else 2", "not known at compile time"),
        ("norm(1)", "norm(1)", "this site offers no function 'norm'"),
        ("linear(t)", "linear(t)", "lacks its argument 'weight'"),
        ("linear(t, t, t, t)", "linear(t, t, t, t)", "at most 3 arguments"),
        ("softmax(t, foo=1)", "softmax(t, foo=1)", "no argument 'foo'"),
        ("softmax(t, x=1)", "softmax(t, x=1)", "no argument 'x'"),
        ("concat()", "concat()", "at least one tensor"),
        ("max(1)", "max(1)", "max(a, b) lacks its argument 'b'"),
        ("max(1, 2, 3)", "max(1, 2, 3)", "max(a, b) takes at most 2 arguments"),
        ("sqrt()", "sqrt()", "sqrt(x) lacks its argument 'x'"),
    ],
)
def test_evaluation_error_names_the_part(text: str, part: str, reason: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        value(text, t=object())
    assert caught.value.expr.text == part
    assert reason in caught.value.reason
    assert str(caught.value) == f"in '{part}': {caught.value.reason}"


@pytest.mark.parametrize("call", ["norm()", "norm(1, 2)", "norm(x=1)"])
def test_functions_of_the_site_take_one_tensor(call: str) -> None:
    with pytest.raises(EvaluationError, match="'norm' takes one tensor"):
        Known().evaluate(parse(call), {"norm": lambda z: z})
    assert Known().evaluate(parse("norm(1)"), {"norm": lambda z: z}) == 1


def test_a_binding_is_no_function() -> None:
    with pytest.raises(EvaluationError, match="offers no function"):
        Known().evaluate(parse("norm(1)"), {"norm": Deferred(lambda: 1)})


SINGLE = {"length", "not", "negate", "sqrt", "exp", "log", "abs", "floor", "tanh", "sigmoid", "cos", "sin"}


@given(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from(sorted(set(STATIC) - SINGLE)))
def test_operators_are_pythons(a: int, b: int, name: str) -> None:
    signs = {
        "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "floor_divide": "//", "modulo": "%",
        "power": "**", "equal": "==", "not_equal": "!=", "less": "<", "less_equal": "<=", "greater": ">",
        "greater_equal": ">=", "and": "and", "or": "or",
    }  # fmt: skip
    text = f"{name}(a, b)" if name in ("min", "max") else f"a {signs[name]} b"
    try:
        expected = eval(text, {}, {"a": a, "b": b})
    except ZeroDivisionError:
        with pytest.raises(EvaluationError):
            value(text, a=a, b=b)
    else:
        assert value(text, a=a, b=b) == expected


# Sizes that are symbols.


def test_lists_are_counted() -> None:
    assert value("length([3, 5, 7])") == 3
    assert value("length(rows)", rows=(1, 2)) == 2, "an option that is a list itself"
    with pytest.raises(EvaluationError, match="expected a list"):
        value("length(3)")


def test_sizes_stay_polynomials() -> None:
    d = Dim.of("d")
    assert value("2 * d + 1", d=d) == 2 * d + 1
    assert value("d // 4 * 4", d=d) == d
    assert value("d ** 2", d=d) == d * d
    assert value("d - d", d=d) == 0 and isinstance(value("d - d", d=d), int)


@pytest.mark.parametrize(
    "text", ["sqrt(d)", "1 / d", "d * 0.5", "d % 2", "d ** n", "min(d, 4)", "d // (d + 1)", "-0.5 * d"]
)
def test_other_numbers_from_sizes_are_symbols(text: str) -> None:
    """A number that is no size still has a value in a model: it is a symbol of its own, equal to itself alone."""
    found = value(text, d=Dim.of("d"), n=Dim.of("n"))
    assert isinstance(found, Dim) and found.constant is None
    assert found == value(text, d=Dim.of("d"), n=Dim.of("n")) != value(text, d=Dim.of("e"), n=Dim.of("n"))


def test_comparisons_of_sizes_wait_for_a_model() -> None:
    d, e = Dim.of("d"), Dim.of("e")
    assert value("d == d", d=d) is True and value("d != d", d=d) is False
    assert value("d == d + 1", d=d) is False
    assert value("d == 'raw'", d=d) is False and value("d != 'raw'", d=d) is True
    for text in ("d == e", "d != e", "d < e", "d >= 4", "d == 4.5"):
        with pytest.raises(EvaluationError) as caught:
            value(f"1 if {text} else 2", d=d, e=e)
        assert isinstance(caught.value.__cause__, Undecided)


def test_what_is_static() -> None:
    assert all(map(is_static, [1, 1.5, True, "a", None, Dim.of("d"), [1, [Dim.of("d")]]]))
    assert not is_static(object()) and not is_static([object()])


# The table of functions.


def test_signatures() -> None:
    assert FUNCTIONS["linear"].signature == "linear(x, weight, bias=None)"
    assert FUNCTIONS["einsum"].signature == "einsum(equation, *operands)"
    assert FUNCTIONS["concat"].signature == "concat(*tensors, axis=-1)"


def test_bind() -> None:
    assert FUNCTIONS["linear"].bind([1, 2], {}) == {"x": 1, "weight": 2, "bias": None}
    assert FUNCTIONS["einsum"].bind(["ij->i", 1, 2], {}) == {"equation": "ij->i", "operands": [1, 2]}
    assert FUNCTIONS["concat"].bind([1, 2], {"axis": -2}) == {"tensors": [1, 2], "axis": -2}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=lambda f: f.name)
def test_every_function_is_documented(function: Any) -> None:
    assert function.doc and function.name in FUNCTIONS
