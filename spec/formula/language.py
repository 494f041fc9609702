"""The expression language of method files: Python's expression syntax, read with `ast` against a closed list.

`parse` gives a tree of six kinds of node; an `Interpreter` walks the tree over its own kind of value. Nothing here
runs code from a formula: operators and calls become `Call` nodes whose function must stand in `FUNCTIONS`, and
every other construct of Python is refused.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Generic, TypeVar

from peltc.spec.diagnostics import Place, fail, nearest, one_of
from peltc.spec.formula.dims import Dim, simplify
from peltc.spec.formula.functions import FUNCTIONS

MAX_CHARACTERS = 4_000
MAX_NODES = 400
MAX_DEPTH = 40
MAX_INTEGER = 2**31
MAX_EXPONENT = 64
MAX_SYMBOLIC_POWER = 4
MAX_NUMBER = 1e30
MAX_SHOWN = 120


@dataclass(frozen=True)
class Number:
    value: int | float | bool
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Text:
    value: str
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Name:
    id: str
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Items:
    elements: tuple[Expr, ...]
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Conditional:
    """`then if test else other`; the test must be known at compile time."""

    test: Expr
    then: Expr
    other: Expr
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Call:
    """A function or operator of `FUNCTIONS`, or a function that the site offers (`norm`)."""

    function: str
    args: tuple[Expr, ...]
    keywords: tuple[tuple[str, Expr], ...] = ()
    text: str = field(default="", compare=False)


Expr = Number | Text | Name | Items | Conditional | Call

_BINARY = {
    ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide", ast.FloorDiv: "floor_divide",
    ast.Mod: "modulo", ast.Pow: "power", ast.MatMult: "matmul",
}  # fmt: skip
_COMPARE = {
    ast.Eq: "equal", ast.NotEq: "not_equal", ast.Lt: "less", ast.LtE: "less_equal",
    ast.Gt: "greater", ast.GtE: "greater_equal",
}  # fmt: skip

STATIC: dict[str, Callable[..., Any]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "floor_divide": operator.floordiv, "modulo": operator.mod, "power": operator.pow, "negate": operator.neg,
    "equal": operator.eq, "not_equal": operator.ne, "less": operator.lt, "less_equal": operator.le,
    "greater": operator.gt, "greater_equal": operator.ge, "not": operator.not_, "sqrt": lambda x: x**0.5,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "min": min, "max": max,
    "exp": math.exp, "log": math.log, "abs": abs, "floor": math.floor, "length": len,
    "tanh": math.tanh, "sigmoid": lambda x: 0.5 * (1 + math.tanh(x / 2)),
}  # fmt: skip
"""What operators and a few functions mean on values known while the formula is read: options and sizes."""


def parse(text: str | int | float, place: Place | None = None, functions: tuple[str, ...] = ("norm",)) -> Expr:
    """Read a formula.

    Args:
        text: the formula; a bare number is a formula too.
        place: where it stands, for messages.
        functions: names that may be called besides `FUNCTIONS`.

    Raises:
        PeltError: E301 not an expression, E302 forbidden syntax, E303 an unknown function, E304 too large.
    """
    place = place or Place()
    source = str(text)
    if len(source) > MAX_CHARACTERS:
        raise fail("E304", f"the formula has {len(source):,} characters", place, f"at most {MAX_CHARACTERS:,}")
    source = source.strip()
    if not source:
        raise fail("E301", "the formula is empty", place, "one expression")
    try:
        tree = _python(source)
    except (SyntaxError, ValueError) as error:
        detail = getattr(error, "msg", str(error))
        if "too many nested" in detail:
            raise _too_deep(place) from None
        raise fail("E301", f"not an expression: {detail}: '{shown(source)}'", place, "one expression") from None
    except (RecursionError, MemoryError):
        raise _too_deep(place) from None
    return _Reader(source, place, functions).read(tree.body)


def _python(source: str) -> ast.Expression:
    try:
        return ast.parse(_spell_in(source), mode="eval")
    except SyntaxError as error:
        try:
            return ast.parse(source, mode="eval")  # `in` as Python has it: read, so that it is refused by its name
        except SyntaxError:
            raise error from None


def _too_deep(place: Place) -> Exception:
    return fail("E304", "the formula is nested too deeply", place, f"at most {MAX_DEPTH} levels")


def shown(text: str) -> str:
    """A formula's text as messages show it: on one line, without control characters, cut where it is long."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= MAX_SHOWN else line[:MAX_SHOWN] + "..."


def _spell_in(source: str) -> str:
    """`in`, the number of a map's inputs, is a keyword of Python's: spelt `iN` for its parser, which keeps columns."""
    return re.sub(r"('[^']*'|\"[^\"]*\")|\bin\b", lambda m: m.group(1) or "iN", source)


class _Reader:
    def __init__(self, source: str, place: Place, functions: tuple[str, ...]):
        self.source, self.place, self.functions = source, place, functions
        self.nodes = 0

    def read(self, node: ast.expr, depth: int = 0) -> Expr:
        text = ast.get_source_segment(self.source, node) or ""
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            limit = f"at most {MAX_NODES} parts, nested at most {MAX_DEPTH} deep"
            raise fail("E304", "the formula is too large", self.place, limit)

        def sub(child: ast.expr) -> Expr:
            return self.read(child, depth + 1)

        match node:
            case ast.Constant(value=float() as value) if not abs(value) <= MAX_NUMBER:
                raise fail("E304", f"the number {text[:20]} is too large", self.place, f"at most {MAX_NUMBER:g}")
            case ast.Constant(value=bool() | float() as value):
                return Number(value, text)
            case ast.Constant(value=int() as value):
                if abs(value) > MAX_INTEGER:
                    raise fail("E304", f"the number {text[:20]}... is too large", self.place, "below 2**31")
                return Number(value, text)
            case ast.Constant(value=str() as value):
                return Text(value, text)
            case ast.Name(id=name):
                return Name(text or name, text)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return Items(tuple(sub(e) for e in elements), text)
            case ast.IfExp(test=test, body=then, orelse=other):
                return Conditional(sub(test), sub(then), sub(other), text)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return Call(_BINARY[type(op)], (sub(left), sub(right)), (), text)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Call("negate", (sub(operand),), (), text)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Call("not", (sub(operand),), (), text)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return Call(_COMPARE[type(op)], (sub(left), sub(right)), (), text)
            case ast.BoolOp(op=op, values=[first, *rest]):
                result, name = sub(first), "and" if isinstance(op, ast.And) else "or"
                if depth + len(rest) > MAX_DEPTH:  # each operand is a level of the tree made here
                    raise _too_deep(self.place)
                for operand in rest:
                    result = Call(name, (result, sub(operand)), (), text)
                return result
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                known = (*FUNCTIONS, *self.functions)
                if name not in known or name in _OPERATORS:
                    offered = sorted(set(known) - _OPERATORS)
                    raise fail(
                        "E303",
                        f"unknown function '{name}' in '{shown(text)}'",
                        self.place,
                        one_of(offered),
                        nearest(name, offered),
                    )
                if any(k.arg is None for k in keywords) or any(isinstance(a, ast.Starred) for a in args):
                    raise self.forbidden("an unpacked argument", text)
                if len({k.arg for k in keywords}) < len(keywords):
                    raise self.forbidden("an argument given twice", text)
                return Call(
                    name, tuple(sub(a) for a in args), tuple((str(k.arg), sub(k.value)) for k in keywords), text
                )
            case ast.Compare() | ast.BinOp() | ast.UnaryOp():
                raise self.forbidden(_operator(node), text)
            case _:
                what, hint = _FORBIDDEN.get(type(node), (f"'{type(node).__name__}'", ""))
                raise self.forbidden(what, text, hint)

    def forbidden(self, what: str, text: str, hint: str = "") -> Exception:
        return fail(
            "E302",
            f"{what} in a formula: '{shown(text)}'",
            self.place,
            "numbers, names, operators, conditional expressions and calls of the language's functions",
            hint,
        )


def _operator(node: ast.Compare | ast.BinOp | ast.UnaryOp) -> str:
    """What to call an operator that the language lacks."""
    if isinstance(node, ast.Compare) and len(node.ops) > 1:
        return "a chain of comparisons"
    sign = node.ops[0] if isinstance(node, ast.Compare) else node.op
    return f"the operator '{_SIGNS.get(type(sign), type(sign).__name__)}'"


_SIGNS: dict[type[ast.AST], str] = {
    ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not", ast.BitAnd: "&", ast.BitOr: "|",
    ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>", ast.Invert: "~", ast.UAdd: "+",
}  # fmt: skip
_FORBIDDEN: dict[type[ast.AST], tuple[str, str]] = {
    ast.Attribute: ("attribute access", ""),
    ast.Subscript: ("an index", "`take` and `slice` reach into tensors"),
    ast.Call: ("a call of something that is not a name", ""),
    ast.Constant: ("a constant that is no number, text or truth value", ""),
    ast.Lambda: ("a lambda", ""),
    ast.NamedExpr: ("an assignment", "give it a name under `let:`"),
    ast.JoinedStr: ("an f-string", ""),
    ast.Starred: ("an unpacked value", ""),
    ast.Dict: ("a dictionary", ""),
    ast.Set: ("a set", ""),
    **{kind: ("a comprehension", "") for kind in (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)},
    **{kind: ("a coroutine or generator", "") for kind in (ast.Await, ast.Yield, ast.YieldFrom)},
}
_OPERATORS = {*_BINARY.values(), *_COMPARE.values(), "negate", "not", "and", "or"}


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything in it."""
    yield expr
    match expr:
        case Items(elements=parts):
            children: tuple[Expr, ...] = parts
        case Conditional(test=test, then=then, other=other):
            children = (test, then, other)
        case Call(args=args, keywords=keywords):
            children = (*args, *(value for _, value in keywords))
        case _:
            children = ()
    for child in children:
        yield from walk(child)


def names(expr: Expr) -> set[str]:
    """The names that an expression reads, functions apart."""
    return {node.id for node in walk(expr) if isinstance(node, Name)}


def calls(expr: Expr) -> set[str]:
    """The functions that an expression calls, operators included."""
    return {node.function for node in walk(expr) if isinstance(node, Call)}


class FormulaError(Exception):
    """Raised by an interpreter's function; `Interpreter.evaluate` adds which sub-expression it was."""


class Undecided(FormulaError):
    """A comparison of sizes that are symbols: a model would decide it."""


class EvaluationError(Exception):
    """An expression that an interpreter could not evaluate: the sub-expression, and why."""

    def __init__(self, expr: Expr, reason: str):
        super().__init__(f"in '{shown(expr.text)}': {reason}")
        self.expr, self.reason = expr, reason


V = TypeVar("V")
Static = (bool, int, float, str, list)


class Interpreter(Generic[V]):
    """Evaluates expressions over one kind of value.

    Subclasses supply `call`, the meaning of each function on their values. Values that are plain Python numbers,
    strings and lists of them (options, sizes) are computed here, the same way for every interpreter.
    """

    def evaluate(self, expr: Expr, scope: Mapping[str, Any]) -> Any:
        """The value of `expr` where names mean what `scope` says.

        Raises:
            EvaluationError: naming the innermost sub-expression that has no value here.
        """
        try:
            return self._evaluate(expr, scope)
        except FormulaError as error:
            raise EvaluationError(expr, str(error)) from error
        except (TypeError, ZeroDivisionError, OverflowError, ValueError) as error:
            raise EvaluationError(expr, str(error)) from error

    def _evaluate(self, expr: Expr, scope: Mapping[str, Any]) -> Any:
        match expr:
            case Number(value=value):
                return value
            case Text(value=text):
                return text
            case Name(id=name):
                if name not in scope:
                    raise FormulaError(f"unknown name '{name}'; in scope: {', '.join(sorted(scope))}")
                value = scope[name]
                if isinstance(value, tuple):  # an option that is a list itself
                    return list(value)
                return value() if isinstance(value, Deferred) else value
            case Items(elements=elements):
                return [self.evaluate(e, scope) for e in elements]
            case Conditional(test=test, then=then, other=other):
                chosen = self.evaluate(test, scope)
                if not is_static(chosen):
                    raise FormulaError("the condition is not known at compile time")
                return self.evaluate(then if chosen else other, scope)
            case Call(function=name, args=args, keywords=keywords):
                values = [self.evaluate(a, scope) for a in args]
                options = {key: self.evaluate(value, scope) for key, value in keywords}
                if name not in FUNCTIONS:
                    if not callable(scope.get(name)) or isinstance(scope[name], Deferred):
                        raise FormulaError(f"this site offers no function '{name}'")
                    if len(values) != 1 or options:
                        raise FormulaError(f"'{name}' takes one tensor and nothing else")
                    return scope[name](*values)
                bound = FUNCTIONS[name].bind(values, options)
                if name in STATIC and all(map(is_static, bound.values())):
                    return static_call(name, [bound[parameter] for parameter, _ in FUNCTIONS[name].parameters])
                return self.call(name, bound)

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """The function's value; raises `FormulaError` where it has none."""
        raise NotImplementedError


class Deferred:
    """A scope entry computed when, and only when, a formula reads it."""

    def __init__(self, compute: Callable[[], Any]):
        self.compute = compute
        self.value: list[Any] = []

    def __call__(self) -> Any:
        if not self.value:
            self.value.append(self.compute())
        return self.value[0]


def is_static(value: object) -> bool:
    """Whether a value is known without any tensor: an option, a size, or a list of such."""
    if isinstance(value, (list, tuple)):
        return all(map(is_static, value))
    return value is None or isinstance(value, (bool, int, float, str, Dim))


def static_call(name: str, values: list[Any]) -> Any:
    """An operator on static values. Powers are bounded, and text and lists are compared only, never multiplied.

    Raises:
        FormulaError: the operator does not apply, or the result is out of bounds.
    """
    numbers = [isinstance(value, (int, float, Dim)) for value in values]
    if name == "length" and not isinstance(values[0], list):
        raise FormulaError(f"expected a list, found {values[0]!r:.60}")
    if name not in _ANYTHING and not all(numbers):
        raise FormulaError(f"expected a number, found {values[numbers.index(False)]!r:.60}")
    if name not in _LOGIC and all(numbers) and any(isinstance(value, Dim) for value in values):
        return _symbolic(name, values)
    if name == "power" and abs(values[1]) > MAX_EXPONENT:
        raise FormulaError(f"the exponent {values[1]} is too large; at most {MAX_EXPONENT}")
    result = STATIC[name](*values)
    if isinstance(result, complex):
        raise FormulaError("the result is no real number")
    if isinstance(result, (int, float)) and not abs(result) <= MAX_NUMBER:
        raise FormulaError(f"the number {str(result)[:24]} is out of bounds")
    return result


_LOGIC = {"and", "or", "not"}
_ANYTHING = {"equal", "not_equal", "length", *_LOGIC}
_POLYNOMIAL = {"add", "subtract", "multiply", "negate", "floor_divide"}
_INFIX = {
    "divide": "/", "floor_divide": "//", "modulo": "%", "power": "**", "add": "+", "subtract": "-", "multiply": "*",
}  # fmt: skip


def _symbolic(name: str, values: list[Any]) -> Any:
    """An operator on sizes that are symbols: a polynomial where the result is one, else a symbol of its own.

    Raises:
        Undecided: a comparison that depends on the sizes.
    """
    whole = all(isinstance(v, (int, Dim)) for v in values)
    if name in ("divide", "floor_divide", "modulo") and values[1] == 0:
        raise FormulaError("division by zero")
    if name in _COMPARE.values():
        difference = simplify(Dim.of(values[0]) - values[1]) if whole else None
        if name in ("equal", "not_equal") and isinstance(difference, int):
            return (difference == 0) == (name == "equal")
        raise Undecided(f"how {values[0]} and {values[1]} compare depends on the model")
    if name == "power" and isinstance(values[1], int) and 0 < values[1] <= MAX_SYMBOLIC_POWER:
        return reduce(operator.mul, [values[0]] * values[1])
    if name in _POLYNOMIAL and whole:
        try:
            return simplify(STATIC[name](*values))
        except ValueError:
            pass
    if name in _INFIX:
        return Dim.of(f"({values[0]} {_INFIX[name]} {values[1]})")
    return Dim.of(f"{name}({', '.join(map(str, values))})")
