"""Heads of fewer labels than an artifact has room for: a plan for so many labels, and its tensors in the artifact's."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.profile import is_profile
from peltc.compiler.adapter.provenance import read_provenance
from peltc.compiler.adapter.weights import Read, parameters_of, sourced
from peltc.compiler.base.base import Base
from peltc.compiler.files.checkpoint import read_header
from peltc.compiler.files.labels import written
from peltc.compiler.importers.importing import imports, labels_in
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.compiler.linking.bare import drawn
from peltc.compiler.passes.absent import ABSENT, absent, heads_of
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.spec.diagnostics import Place, fail
from peltc.spec.modes import EXCHANGED

Array = np.ndarray[Any, Any]
CLOSE = 1e-5
"""How far apart two computations of the same may be, as a share of the largest value."""
Weights = str | Path | Mapping[str, Array]


class Head:
    """An adapter's head, which may have fewer labels than the artifact's.

    Args:
        base: the artifact's base.
        room: the artifact's plan, with room for the most labels.
        weights: the adapter.
        labels: the names of its labels, where the adapter does not tell them.

    Attributes:
        count: how many labels it has.
        base, plan: those that the adapter is held against, with so many labels.

    Raises:
        PeltError: E216 another number of names; E412 more labels than there is room for.
    """

    def __init__(self, base: Base, room: Plan, weights: Weights, labels: Sequence[str] | None):
        self.room, self.base, self.plan, self.names = room, base, room, labels
        most = heads_of(room)[0].site.sizes["out"]
        if isinstance(weights, Mapping):
            shapes = {name: np.shape(array) for name, array in weights.items()}
            self.count = count_of(room, base, shapes)
        elif imports(weights):
            found = labels_in(Path(weights), base, heads_of(room)[0].site.parameters["weight"])
            self.count = len(labels) if found is None and labels is not None else found or most
        else:
            file = Path(weights)
            self.count = count_of(room, base, {name: tensor.shape for name, tensor in read_header(file).items()})
            said = None if is_profile(file) else read_provenance(file)
            self.names = labels or (said.base.labels if said is not None and said.base.labels else None)
        if not 1 <= self.count <= most:
            raise fail("E412", f"the adapter has {self.count} labels, and the artifact has room for {most}",
                       expected=f"1 to {most} labels", hint="compile with more: `model: {labels: N}`")  # fmt: skip
        if self.count < most:
            self.base, self.plan = base_of_labels(base, room, self.count), of_labels(room, base.anatomy, self.count)
        if self.names is not None:
            written(self.names, self.count)

    def named(self, most: Sequence[str]) -> Array:
        """The names of its labels as bytes [N]: numbered ones where nobody tells them.

        Args:
            most: the artifact's own.
        """
        own = most if self.count == len(most) else [f"LABEL_{i}" for i in range(self.count)]
        return written(self.names or own, self.count)

    def padded(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Its tensors in those of the artifact, zeros for labels that it does not have, and what hides these."""
        found = {}
        for name, array in tensors.items():
            own, room = self.plan.tensors[name].shape, self.room.tensors[name].shape
            found[name] = np.pad(array, [(0, most - size) for size, most in zip(own, room, strict=True)])
        return {**found, ABSENT: absent(self.count, heads_of(self.room)[0].site.sizes["out"])}


def check_heads(plan: Plan, base: Base) -> None:
    """Whether profiles can have fewer labels than there is room for.

    Raises:
        PeltError: E207 no mode of profiles; E208 no head, or one whose labels are not computed each for itself.
    """
    if not plan.spec.fewer_labels:
        return
    place, heads = plan.spec.places.get("deploy", Place(plan.spec.path)), heads_of(plan)
    if not plan.exchange:
        raise fail("E207", "profiles may have fewer labels, and there are none", place,
                   f"one of the modes {' and '.join(EXCHANGED)}, or no `fewer_labels`")  # fmt: skip
    fixed = next((c for c in plan.claims if c.site.role == "head" and c.mode not in EXCHANGED), None)
    why = ""
    if len({claim.site.key for claim in heads}) != 1:
        why = "no attachment is at the model's head"
    elif fixed is not None:
        why = f"'{fixed.attachment}' at the head is fixed"
    elif plan.spec.generation:
        why = "the head's outputs are tokens"
    elif heads[0].site.sizes["out"] < 2:
        why = "the head has one"
    if why:
        raise fail("E208", f"profiles cannot have fewer labels: {why}", place,
                   "a classifier's head that profiles bring", "method: replace, at: head")  # fmt: skip
    small = of_labels(plan, base.anatomy, 1)
    for claim, fewer in zip(plan.claims, small.claims, strict=True):
        if claim in heads and not _apart(claim, fewer, base.array):
            raise fail("E208", f"profiles cannot have fewer labels: what '{claim.attachment}' makes of one label"
                               " depends on the others", place, "a method whose outputs are apart")  # fmt: skip


def of_labels(plan: Plan, anatomy: Anatomy, labels: int) -> Plan:
    """The plan on a model whose head has another number of labels."""
    key, modes = (
        heads_of(plan)[0].site.key,
        {claim.attachment: claim.mode for claim in plan.claims},
    )  # whoever said them
    sites = tuple(_with(site, labels) if site.key == key else site for site in anatomy)
    spec = replace(plan.spec, attach=tuple(replace(entry, mode=modes.get(entry.name)) for entry in plan.spec.attach))
    return make_plan(spec, replace(anatomy, sites=sites), plan.fingerprint)


def base_of_labels(base: Base, plan: Plan, labels: int) -> Base:
    """A base without weights, as it is where its head has another number of labels."""
    head, parameters = heads_of(plan)[0].site, dict(base.parameters)
    sites = tuple(_with(site, labels) if site.key == head.key else site for site in base.anatomy)
    for name in head.parameters.values():
        if (known := parameters.get(name)) is not None:
            axis = len(known.shape) - 1 if head.transposed else 0
            shape = tuple(labels if i == axis else size for i, size in enumerate(known.shape))
            parameters[name] = replace(known, shape=shape)
    named = {str(i): f"LABEL_{i}" for i in range(labels)}
    return replace(base, anatomy=replace(base.anatomy, sites=sites), parameters=parameters,
                   config={**base.config, "id2label": named})  # fmt: skip


def _with(site: Site, labels: int) -> Site:
    return replace(site, sizes={**site.sizes, "out": labels})


def count_of(plan: Plan, base: Base, shapes: Mapping[str, Sequence[int]]) -> int:
    """How many labels an adapter's head has, by the shapes of its tensors by name; as many as there is room for, where
    they do not tell."""
    most = heads_of(plan)[0].site.sizes["out"]
    other = of_labels(plan, base.anatomy, most + 1)
    for name, tensor in plan.tensors.items():
        shape = shapes.get(name, ())
        for axis, (size, more) in enumerate(zip(tensor.shape, other.tensors[name].shape, strict=True)):
            if (size, more) == (most, most + 1) and len(shape) == len(tensor.shape):
                return int(shape[axis])
    return most


def sourced_of(small: Plan, known: Mapping[str, Array], given: Container[str]) -> dict[str, Array]:
    """The tensors that no weights file holds, of a plan of other labels: those that are alike, and the head's own."""
    alike = {n: a for n, a in known.items() if n in small.tensors and a.shape == small.tensors[n].shape}
    return alike | sourced(small, {*alike, *(name for name in small.tensors if name in given)})


def _apart(claim: Claim, fewer: Claim, read: Read) -> bool:
    """Whether the labels of a claim with fewer are computed as they are among more, whose others have zeros: it is
    tried, on random values."""
    draw, count, site = np.random.default_rng(0), fewer.site.sizes["out"], claim.site
    many, few = drawn(claim, draw), drawn(fewer, draw)
    for name, value in few.items():
        few[name] = many[name][tuple(slice(0, size) for size in value.shape)] if hasattr(value, "shape") else value
    own = {name: draw.normal(size=tensor.shape).astype(np.float32) for name, tensor in fewer.tensors.items()}
    room = {n: np.pad(a, [(0, most - size) for size, most in zip(a.shape, claim.tensors[n].shape, strict=True)])
            for n, a in own.items()}  # fmt: skip
    held = parameters_of(site, read)
    bias = held["b"]() if "bias" in site.parameters else np.zeros(site.sizes["out"], np.float32)
    weights = {"W": held["W"](), "b": bias}
    one, other = NumericInterpreter(), NumericInterpreter()
    for effect in claim.effects:
        large = np.asarray(one.evaluate(claim.effects[effect], claim.scope({**many, **weights, **room}, one)))
        cut = {name: array[:count] for name, array in weights.items()}
        small = np.asarray(other.evaluate(fewer.effects[effect], fewer.scope({**few, **cut, **own}, other)))
        axis = 0 if effect in ("weight", "bias") else -1
        large = large if effect == "input" else np.take(large, np.arange(small.shape[axis]), axis)
        if not np.abs(large - small).max(initial=0) <= CLOSE * max(np.abs(small).max(initial=0), 1):
            return False
    return True
