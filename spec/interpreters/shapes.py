"""The shape interpreter: a value is a tensor's shape and what fixed it.

Sizes may be numbers (a model is known) or polynomials over names (`pelt check` without a model). A conflict names
the sub-expression, both shapes, and where each came from. A tensor is never larger than `MAX_ELEMENTS`, so that a
formula cannot fill the memory of whoever opens it.

The batch and the sequence are always names, so that their axes are known wherever a formula moves them. A function that
sums over such an axis, or picks from it, lets one text or one position read another: of texts that is refused, of
positions it is remembered, and where one value for the whole text comes of it, that is a summary of the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peltc.spec.formula.dims import Dim, Size, same, simplify
from peltc.spec.formula.functions import COMPILE_TIME
from peltc.spec.formula.interpreter import FormulaError, Interpreter
from peltc.spec.formula.syntax import Call, Expr
from peltc.spec.interpreters.shape import (
    BATCH,
    MAX_ELEMENTS,
    POSITIONS,
    Shape,
    along,
    axis_index,
    broadcast,
    named,
    tensor,
    whole,
)
from peltc.spec.interpreters.shape_rules import ELEMENTWISE_BINARY, RULES, SAME, same_shape


class ShapeInterpreter(Interpreter[Shape]):
    """Evaluates formulas over shapes."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        operands = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
        running = [v for v in operands if isinstance(v, Shape) and v.running]
        if running and name in COMPILE_TIME:
            raise FormulaError(f"'{name}' needs tensors known at compile time, and {running[0]} depends on the input")
        if name in ELEMENTWISE_BINARY:
            if name == "divide" and isinstance(arguments["b"], (int, float)) and arguments["b"] == 0:
                raise FormulaError("division by zero")
            result = broadcast(tensor(arguments["a"]), tensor(arguments["b"]))
        elif name in SAME:
            result = same_shape(name, arguments)
        elif name in RULES:
            result = RULES[name](**arguments)
        else:
            raise FormulaError(f"'{name}' works on options and sizes, not on tensors")
        if (elements := math.prod(size for size in result.dims if isinstance(size, int))) > MAX_ELEMENTS:
            raise FormulaError(f"{result} has at least {elements:,} elements; at most {MAX_ELEMENTS:,}")
        if not running:
            return result
        reached = {letter for size in _reached(name, arguments) for letter in named(size)}
        if reached & BATCH:
            raise FormulaError(f"'{name}' would let the texts of a batch read each other")
        mixed = next((v.mixed for v in running if v.mixed), name if reached & POSITIONS else "")
        open_ = "" if whole(result) else next((v.open for v in running if v.open), name if reached & POSITIONS else "")
        return replace(result, running=True, mixed=mixed, open=open_, lead=_lead(name, arguments, running))


class Summaries(ShapeInterpreter):
    """Evaluates formulas over shapes, and notes what they read a whole text by.

    Attributes:
        found: expressions that make one value for a text, [B, ...], of what has its positions; the first such ones, not
            what is made of them in turn.
    """

    def __init__(self) -> None:
        self.found: dict[Expr, Shape] = {}
        self.read = False

    def _evaluate(self, expr: Expr, scope: Mapping[str, Any]) -> Any:
        before, self.read = self.read, False
        value = super()._evaluate(expr, scope)
        if isinstance(expr, Call) and self.read and isinstance(value, Shape) and value.mixed and whole(value):
            self.found.setdefault(expr, value)
        self.read = before or along(value)
        return value


def _reached(name: str, arguments: Mapping[str, Any]) -> list[Size]:
    """The sizes of the axes along which an element of a function's result reads several of its arguments', or others
    than its own."""
    x, axis = arguments.get("x"), arguments.get("axis")
    if name in ("linear", "layer_norm"):
        return [tensor(x).dims[-1]]
    if name == "matmul":
        return [tensor(arguments["a"]).dims[-1]]
    if name in ("mean_seq", "attend"):
        return [tensor(x if name == "mean_seq" else arguments["k"]).dims[1]]
    if name in ("softmax", "norm2", "mean", "sum", "running_sum", "take", "pick", "put", "slice"):
        return [tensor(x).dims[axis_index(tensor(x), axis)]]
    if name == "einsum":
        left, right = arguments["equation"].replace(" ", "").split("->")
        sizes = zip(left.replace(",", ""), (s for o in arguments["operands"] for s in tensor(o).dims), strict=True)
        return [size for letter, size in sizes if letter not in right]
    return []


def _lead(name: str, arguments: Mapping[str, Any], running: list[Shape]) -> Size | None:
    """The positions before the text's own in a function's result."""
    parts = [tensor(v) for v in arguments["tensors"]] if name == "concat" else []
    along = [named(part.dims[arguments["axis"]]) & POSITIONS for part in parts]
    if any(along):
        place = next(i for i, letters in enumerate(along) if letters)
        if sum(map(bool, along)) > 1 or parts[place].lead is None:
            return None
        before: Size = parts[place].lead or 0
        for part in parts[:place]:
            before = simplify(Dim.of(before) + part.dims[arguments["axis"]])
        return before
    leads = [shape.lead for shape in running if any(named(size) & POSITIONS for size in shape.dims)]
    if any(lead is None or not same(lead, leads[0] or 0) for lead in leads):
        return None
    return leads[0] if leads else 0
