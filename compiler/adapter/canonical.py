"""Formulas as what they compute: options and sizes put in, decided branches chosen, what acts in training alone left
out. Two formulas with one text compute one thing, however a spec came to say it.

(alpha / (sqrt(r) if rank_stabilised else r)) * linear(linear(dropout(x, dropout), A), B)
    alpha 16, r 8  →  2 * linear(linear(x, A), B)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peltc.spec.formula.functions import FUNCTIONS, REQUIRED
from peltc.spec.formula.interpreter import STATIC, FormulaError, static_call
from peltc.spec.formula.syntax import Call, Conditional, Expr, Items, Name, Number, Text

PLACES = ("index", "count", "layer", "layers", "role", "roles")
"""Constants that number an attachment's sites; they stay names, for the sites decide them."""

PASSES = {"dropout": "x", "detach": "x", "identity": "x"}
"""Functions whose result in deployment is one of their arguments."""

DRAWS = {"choose": ("draw", "scope")}
"""Arguments that mean something in training alone."""

SIGNS = {
    "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "floor_divide": "//", "modulo": "%", "power": "**",
    "matmul": "@", "equal": "==", "not_equal": "!=", "less": "<", "less_equal": "<=", "greater": ">",
    "greater_equal": ">=", "and": "and", "or": "or",
}  # fmt: skip
_ERRORS = (FormulaError, TypeError, ValueError, ZeroDivisionError, OverflowError)


class Settler:
    """Puts constants into formulas.

    Attributes:
        constants: what is known at compile time, by name.
        read: the constants that had a say so far; those of branches not taken had none.
    """

    def __init__(self, constants: Mapping[str, Any]):
        self.constants = {name: value for name, value in constants.items() if name not in PLACES}
        self.read: set[str] = set()

    def settle(self, expr: Expr) -> Expr:
        """A formula with constants in the place of their names, and everything computed that they decide."""
        match expr:
            case Name(id=name) if name in self.constants:
                self.read.add(name)
                return _known(self.constants[name], expr)
            case Items(elements=elements):
                return Items(tuple(map(self.settle, elements)))
            case Conditional(test=test, then=then, other=other):
                decided = self.settle(test)
                if isinstance(decided, Number | Text):
                    return self.settle(then if decided.value else other)
                return Conditional(decided, self.settle(then), self.settle(other))
            case Call():
                return self.call(expr)
        return expr

    def call(self, expr: Call) -> Expr:
        function = FUNCTIONS.get(expr.function)
        if function is None:
            return Call(expr.function, tuple(map(self.settle, expr.args)))
        try:
            bound = function.bind(list(expr.args), dict(expr.keywords))
        except TypeError:  # it is refused elsewhere
            return expr
        if expr.function in PASSES:
            return self.settle(bound[PASSES[expr.function]])
        defaults = dict(function.parameters)
        settled = {name: self.argument(value) for name, value in bound.items()
                   if name not in DRAWS.get(expr.function, ()) and value is not defaults[name]}  # fmt: skip
        values = list(settled.values())
        static = [value.value for value in values if isinstance(value, Number | Text)]
        if expr.function in STATIC and len(static) == len(values):
            try:
                return _known(static_call(expr.function, static), expr)
            except _ERRORS:
                pass
        if expr.function == "activation" and isinstance(name := settled["name"], Text):  # tanh(x), by its own name
            return settled["x"] if name.value in PASSES else Call(name.value, (settled["x"],))
        plain = tuple(value for name, value in settled.items() if defaults[name] is REQUIRED)
        extra = tuple((n, value) for n, value in sorted(settled.items())
                      if defaults[n] is not REQUIRED and not _same(value, defaults[n]))  # fmt: skip
        return Call(expr.function, plain, extra)

    def argument(self, value: Any) -> Expr:
        """An argument; those that a function takes any number of come as a list."""
        return Items(tuple(map(self.settle, value))) if isinstance(value, list) else self.settle(value)


def _same(value: Expr, default: Any) -> bool:
    return isinstance(value, Number | Text) and value.value == default


def _known(value: Any, otherwise: Expr) -> Expr:
    """A value as an expression."""
    if isinstance(value, bool | int | float):
        return Number(value)
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, list):
        return Items(tuple(_known(part, otherwise) for part in value))
    return otherwise


def text(expr: Expr) -> str:
    """A formula's text, which says the whole of it: that which a combinator gives its own formulas is for reading."""
    match expr:
        case Number(value=value):
            return format(value, ".12g") if isinstance(value, float) else str(value)
        case Text(value=word):
            return repr(word)
        case Name(id=name):
            return name
        case Items(elements=elements):
            return f"[{', '.join(map(text, elements))}]"
        case Conditional(test=test, then=then, other=other):
            return f"({text(then)} if {text(test)} else {text(other)})"
        case Call(function=name, args=(a, b)) if name in SIGNS:
            return f"({text(a)} {SIGNS[name]} {text(b)})"
    arguments = [*map(text, expr.args), *(f"{key}={text(value)}" for key, value in expr.keywords)]
    return f"{expr.function}({', '.join(arguments)})"
