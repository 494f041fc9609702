"""The interpreter that follows values through a formula, for a method's place in PEFT-Ref."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

from peltc.spec.formula.functions import ACTIVATIONS
from peltc.spec.formula.interpreter import EvaluationError, Interpreter, Undecided, is_static
from peltc.spec.formula.syntax import Conditional, Expr, Number
from peltc.spec.interpreters.flows import Flow, Part, Way, flow, merged, scaled_by
from peltc.spec.method import Parameter

CURVES = {*ACTIVATIONS} - {"identity"}
UNEVEN = {"exp", "log", "sqrt", "abs", "cos", "sin", "power", "norm2", "orthonormal"}
UNCHANGED = {
    "identity", "detach", "dropout", "reshape", "transpose", "permute", "take", "slice", "unsqueeze", "negate", "upper",
}  # fmt: skip
MAPS = {"linear": ("x", "weight"), "matmul": ("a", "b"), "kron": ("a", "b")}
PARTS = {
    "top_k_mask": Part.MASK, "choose": Part.EXPERTS, "block_diagonal": Part.BLOCKS, "butterfly": Part.BLOCKS,
    "circulant": Part.BLOCKS,
}  # fmt: skip


class TypologyInterpreter(Interpreter[Flow]):
    """Evaluates formulas over histories.

    Args:
        parameters: the method's, by name.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = parameters

    def _evaluate(self, expr: Expr, scope: Mapping[str, Any]) -> Any:
        """As everywhere; but where only a model decides a condition, both branches count."""
        if not isinstance(expr, Conditional):
            return super()._evaluate(expr, scope)
        try:
            chosen = self.evaluate(expr.test, scope)
        except EvaluationError as error:
            if not isinstance(error.__cause__, Undecided):
                raise
            both = self.evaluate(expr.then, scope), self.evaluate(expr.other, scope)
            return both[0] if all(map(is_static, both)) else merged(map(flow, both))
        return self.evaluate(expr.then if chosen else expr.other, scope)

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        given = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
        flows = [v for v in given if isinstance(v, Flow)]
        if name == "activation":
            name = arguments["name"]
        if name in ("multiply", "divide"):
            return self.elementwise(name, **arguments)
        if name in MAPS or name == "einsum":
            return self.matrices(name, arguments, flows)
        both = merged(flows)
        if name in UNCHANGED:
            return both
        if name in ("add", "subtract", "concat"):
            return both if len(flows) == 1 else replace(both, gate="")
        if name in PARTS:
            return both.being(PARTS[name])
        if not both.running:
            return both.being(Part.MASK) if name == "softmax" else replace(both, bent=both.bent or name in CURVES)
        if name in ("sigmoid", "softmax"):
            return both.through(Way.CURVE, gate="token")
        if name == "mean_seq":
            return both.through(Way.TOKENS, gate="sample" if both.gate else "")
        if name == "running_sum":
            return both.through(Way.TOKENS)
        ways = {"attend": (Way.ATTENTION, Way.TOKENS), "layer_norm": (Way.NORM,)}
        return both.through(*ways.get(name, (Way.CURVE,) if name in CURVES | UNEVEN else ()))

    def elementwise(self, name: str, a: Any, b: Any) -> Flow:
        """`a * b` and `a / b`."""
        left, right = flow(a), flow(b)
        both = merged((left, right))
        numbers = [v for v in (a, b) if is_static(v)]
        if not both.running:
            return replace(both, scaled=both.scaled or numbers != [1]) if numbers else self.constant(left, right)
        if left.running and right.running:
            if name == "multiply" and (left.gate or right.gate):
                gate, value = (left, right) if left.gate else (right, left)
                return replace(scaled_by(value, Flow()), gates=value.gates | {gate.gate})
            return both.through(Way.CURVE)
        if name == "divide" and right.running:
            return both.through(Way.CURVE)
        value, factor = (left, right) if left.running else (right, left)
        if value.gate:  # times what is learned it is that which the gate scales
            return replace(factor, gates=factor.gates | {value.gate}) if factor.own else value
        return value if numbers == [1] else scaled_by(value, factor)

    def matrices(self, name: str, arguments: Mapping[str, Any], flows: list[Flow]) -> Flow:
        """Products of matrices in all spellings."""
        both = merged(flows)
        factors = flows if name == "einsum" else [flow(arguments[key]) for key in MAPS[name]]
        running = [f for f in factors if f.running]
        constant = merged(f for f in factors if not f.running)
        if len(running) > 1:
            return both.through(Way.ATTENTION, Way.TOKENS)
        if running:
            value = running[0]
            if name == "einsum" and not _summed(arguments["equation"], factors.index(value)):
                return scaled_by(value, constant)
            ways = [Way.MAP] if constant.own else []
            return both.through(*ways, gate="" if constant.own else value.gate, scaled=constant.scaled)
        if name != "einsum" and factors[0].bent and not factors[1].bent:  # two that networks wrote make a product
            return replace(both.being(Part.NETWORK), went=both.went - {Way.MAP})
        if name == "kron" or (name == "einsum" and _outer(arguments["equation"])):
            both = both.being(Part.KRONECKER)
        went = both.went | {Way.MAP} if name != "einsum" and both.own else both.went
        return replace(merged((both, reduce(self.constant, factors))), went=went, scaled=False)

    def constant(self, a: Flow, b: Flow) -> Flow:
        """The product of two things known at compile time: one may choose or weigh what the other is."""
        parts: set[tuple[Part, str]] = set()
        for factor, thing in ((a, b), (b, a)):
            frozen = {name for name in thing.own if self.parameters[name].frozen}
            if self.weighs(factor) and frozen:
                parts |= {(Part.COEFFICIENT, name) for name in factor.own} | {(Part.BANK, name) for name in frozen}
            elif self.weighs(factor) and factor.what(Part.MASK):
                parts |= {(Part.PROTOTYPE, name) for name in thing.own}
        both = merged((a, b))
        return replace(both, parts=both.parts | parts)

    def weighs(self, factor: Flow) -> bool:
        """Whether all that is in a factor are masks, and trained vectors."""
        trained = [self.parameters[name] for name in factor.own]
        masks = factor.what(Part.MASK)
        return bool(trained) and all(p.name in masks or (not p.frozen and axes_of(p) <= 1) for p in trained)


def axes_of(parameter: Parameter) -> int:
    """How many axes have more than one element."""
    return sum(axis != Number(1) for axis in parameter.shape)


def _terms(equation: str) -> tuple[list[str], str]:
    left, right = equation.replace(" ", "").split("->")
    return left.split(","), right


def _summed(equation: str, running: int) -> bool:
    """Whether a letter that the running operand and another have is summed over."""
    terms, result = _terms(equation)
    others = set("".join(term for i, term in enumerate(terms) if i != running))
    return bool(set(terms[running]) & others - set(result))


def _outer(equation: str) -> bool:
    """Whether each of two matrices keeps two axes of its own, as in a Kronecker product."""
    terms, result = _terms(equation)
    return len(terms) == 2 and all(
        len(set(mine) & set(result) - set(other)) >= 2 for mine, other in (terms, reversed(terms))
    )
