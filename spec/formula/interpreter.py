"""What all interpreters of formulas share: evaluation by structure, and what is known before there are tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, Generic, TypeVar

from peltc.spec.formula.dims import Dim, simplify
from peltc.spec.formula.functions import FUNCTIONS
from peltc.spec.formula.syntax import COMPARE, Call, Conditional, Expr, Items, Name, Number, Text, shown

MAX_EXPONENT = 64
MAX_SYMBOLIC_POWER = 4
MAX_NUMBER = 1e30
STATIC: dict[str, Callable[..., Any]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "floor_divide": operator.floordiv, "modulo": operator.mod, "power": operator.pow, "negate": operator.neg,
    "equal": operator.eq, "not_equal": operator.ne, "less": operator.lt, "less_equal": operator.le,
    "greater": operator.gt, "greater_equal": operator.ge, "not": operator.not_, "sqrt": lambda x: x**0.5,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "min": min, "max": max,
    "exp": math.exp, "log": math.log, "abs": abs, "floor": math.floor, "length": len,
    "cos": math.cos, "sin": math.sin,
    "tanh": math.tanh, "sigmoid": lambda x: 0.5 * (1 + math.tanh(x / 2)),
}  # fmt: skip
"""What operators and a few functions mean on values known while the formula is read: options and sizes."""


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


class Interpreter(Generic[V]):
    """Evaluates expressions over one kind of value.

    Subclasses supply `call`, the meaning of each function on their values. Values that are plain Python numbers,
    strings and lists of them (options, sizes) are computed here, the same way for every interpreter.

    Attributes:
        held: expressions whose values are not just computed, with what gives a value in its place from a function that
            computes it; None where there are none.
    """

    held: Mapping[Expr, Callable[[Callable[[], Any]], Any]] | None = None

    def evaluate(self, expr: Expr, scope: Mapping[str, Any]) -> Any:
        """The value of `expr` where names mean what `scope` says.

        Raises:
            EvaluationError: naming the innermost sub-expression that has no value here.
        """
        try:
            if self.held and expr in self.held:
                return self.held[expr](partial(self._evaluate, expr, scope))
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
    if name in COMPARE.values():
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
