"""Formulas told by what they compute: a claim's definitions, settled, held against forms with names for what varies.

s * linear(linear(x, A), B)        fits   2 * linear(linear(x, down), up)        with s = 2, A = down, B = up
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peltc.compiler.adapter.canonical import Settler
from peltc.compiler.plan.claims import Claim
from peltc.spec.formula.reader import parse
from peltc.spec.formula.syntax import Call, Conditional, Expr, Items, Name, Number, walk
from peltc.spec.method import RUNTIME_NAMES

MAX_PARTS = 500
"""How many parts a formula may have once its bindings are put in; a form has about twenty."""


def computed(claim: Claim) -> dict[str, Expr] | None:
    """What a claim's definitions compute, options, sizes and bindings put in; None where that is too long for any form.
    A definition that leaves a value as it is counts for nothing."""
    settler, bindings = Settler(claim.constants), dict(claim.method.let)
    found: dict[str, Expr] = {}
    for effect, expr in claim.effects.items():
        whole = settler.settle(expr)
        while (bound := {n.id for n in walk(whole) if isinstance(n, Name)} & set(bindings)) and _short(whole):
            whole = _put({name: settler.settle(bindings[name]) for name in bound}, whole)
        if not _short(whole):
            return None
        if whole != Name(SAME.get(effect, "")):
            found[effect] = settler.settle(whole)
    return found


SAME = {"input": "x", "output": "y", "weight": "W", "bias": "b"}
"""What a definition stands for before it is changed."""


def fits(forms: Mapping[str, str], found: Mapping[str, Expr], claim: Claim) -> dict[str, Any] | None:
    """What the names in forms stand for in a claim's formulas: numbers, and the claim's own names of tensors.

    Args:
        forms: a formula for each definition that there must be.
        found: the claim's, as `computed` gives them.

    Returns:
        None where the formulas are others.
    """
    if set(forms) != set(found):
        return None
    bound: dict[str, Any] = {}
    for effect, text in forms.items():
        if not _fits(parse(text), found[effect], bound, claim):
            return None
    return bound if set(claim.tensors) <= set(bound.values()) else None


def _fits(form: Expr, expr: Expr, bound: dict[str, Any], claim: Claim) -> bool:
    match form, expr:
        case Name(id=name), _ if name in RUNTIME_NAMES or name in ("W", "b"):
            return expr == form
        case Name(id=name), Number(value=value):
            return bool(bound.setdefault(name, value) == value)
        case Name(id=name), Name(id=own) if own in claim.tensors:
            return bool(bound.setdefault(name, own) == own)
        case Call(), Call():
            return (
                form.function == expr.function
                and len(form.args) == len(expr.args)
                and form.keywords == expr.keywords
                and all(_fits(a, b, bound, claim) for a, b in zip(form.args, expr.args, strict=True))
            )
    return False


def _short(expr: Expr) -> bool:
    return sum(1 for _, _ in zip(walk(expr), range(MAX_PARTS + 1), strict=False)) <= MAX_PARTS


def _put(values: Mapping[str, Expr], expr: Expr) -> Expr:
    """An expression with others in the place of names."""
    match expr:
        case Name(id=name):
            return values.get(name, expr)
        case Items(elements=parts):
            return Items(tuple(_put(values, part) for part in parts))
        case Conditional(test=test, then=then, other=other):
            return Conditional(_put(values, test), _put(values, then), _put(values, other))
        case Call():
            return Call(
                expr.function,
                tuple(_put(values, part) for part in expr.args),
                tuple((key, _put(values, part)) for key, part in expr.keywords),
            )
    return expr
