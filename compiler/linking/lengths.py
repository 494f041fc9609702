"""Adapters that put another number of tokens or keys before the text than an artifact's own: the plan that they are of,
and their part in the artifact's arrays, which have room for more.

    [n, ...]    becomes    [P, ...], of which the last n are theirs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peltc.compiler.linking.uneven import before
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.formula.syntax import Name

Array = np.ndarray[Any, Any]


def number(claim: Claim) -> int:
    """How many tokens or keys a claim puts before the text."""
    if "prepend" in claim.effects:
        return int(str(claim.shape("prepend").dims[0]))
    return max(claim.added(effect)[0] for effect in ("keys", "values") if effect in claim.effects)


def said(plan: Plan, shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[str, int]]:
    """The options, by attachment, by which tensors have these shapes, where they say another number of tokens."""
    found: dict[str, dict[str, int]] = {}
    for claim in filter(before, plan.claims):
        for option, count in _differing(claim, shapes):
            if claim.options.get(option) == number(claim):
                found.setdefault(claim.attachment, {})[option] = count
    return found


def _differing(claim: Claim, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, int]]:
    """The options that stand for sizes of a claim's tensors, and the sizes where these are others."""
    declared = {parameter.name: parameter.shape for parameter in claim.method.parameters}
    for name, tensor in claim.tensors.items():
        given = shapes.get(tensor.name, tensor.shape)
        if len(given) == len(tensor.shape) == len(declared[name]):
            for size, own, other in zip(declared[name], tensor.shape, given, strict=True):
                if own != other and isinstance(size, Name):
                    yield size.id, int(other)


def fitting(plan: Plan, shapes: Mapping[str, Sequence[int]], anatomy: Anatomy) -> Plan:
    """The plan with as many tokens and keys before the text as tensors of these shapes have; itself where they have as
    many as its own, or where it is something else that differs.

    Raises:
        PeltError: what is wrong with that plan.
    """
    changes = said(plan, shapes)
    if not changes:
        return plan
    attach = []
    for entry in plan.spec.attach:
        own = changes.get(entry.name, {})
        if any(not isinstance(entry.options[option], int) for option in own):
            return plan  # one number for each layer
        attach.append(replace(entry, options={**entry.options, **own}))
    return make_plan(replace(plan.spec, attach=tuple(attach)), anatomy, plan.fingerprint)


def fitted(array: Array, shape: Sequence[int]) -> Array:
    """An array at the end of a larger one of zeros; itself where there is no room to fill, or too little."""
    if array.ndim != len(shape) or any(own > room for own, room in zip(array.shape, shape, strict=True)):
        return array
    return np.pad(array, [(room - own, 0) for own, room in zip(array.shape, shape, strict=True)])
