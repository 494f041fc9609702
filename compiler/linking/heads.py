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
from peltc.compiler.linking.bare import CLOSE, drawn
from peltc.compiler.passes.absent import ABSENT, absent, heads_of
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.diagnostics import Place, fail
from peltc.spec.modes import EXCHANGED

Array = np.ndarray[Any, Any]
Weights = str | Path | Mapping[str, Array]


class Head:
    """An adapter's head, which may have fewer labels than the artifact's.

    Args:
        base: the artifact's base.
        room: the artifact's plan, with room for the most labels.
        axes: along which they lie; see `label_axes`.
        weights: the adapter.
        labels: the names of its labels, where the adapter does not tell them.

    Attributes:
        count: how many labels it has.
        base, plan: those that the adapter is held against, with so many labels.

    Raises:
        PeltError: E216 another number of names; E412 more labels than there is room for.
    """

    def __init__(self, base: Base, room: Plan, axes: Mapping[str, int], weights: Weights, labels: Sequence[str] | None):
        self.room, self.base, self.plan, self.names, self.axes = room, base, room, labels, axes
        most = most_labels(room)
        if isinstance(weights, Mapping):
            self.count = self._told({name: np.shape(array) for name, array in weights.items()})
        elif imports(weights):
            found = labels_in(Path(weights), base, heads_of(room)[0].site.parameters["weight"])
            self.count = len(labels) if found is None and labels is not None else found or most
        else:
            file = Path(weights)
            self.count = self._told({name: tensor.shape for name, tensor in read_header(file).items()})
            said = None if is_profile(file) else read_provenance(file)
            self.names = labels or (said.base.labels if said is not None and said.base.labels else None)
        if not 1 <= self.count <= most:
            raise fail("E412", f"the adapter has {self.count} labels, and the artifact has room for {most}",
                       expected=f"1 to {most} labels", hint="compile with more: `model: {labels: N}`")  # fmt: skip
        if self.count < most:
            self.base, self.plan = base_of_labels(base, room, self.count), of_labels(room, base.anatomy, self.count)
        if self.names is not None:
            written(self.names, self.count)

    def _told(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """How many labels there are by the shapes of tensors by name; as many as there is room for, where they do not
        tell."""
        for name, axis in self.axes.items():
            shape = shapes.get(name, ())
            if len(shape) == len(self.room.tensors[name].shape):
                return int(shape[axis])
        return most_labels(self.room)

    def named(self, most: Sequence[str]) -> Array:
        """The names of its labels as bytes [N]: numbered ones where nobody tells them.

        Args:
            most: the artifact's own.
        """
        own = most if self.count == len(most) else [f"LABEL_{i}" for i in range(self.count)]
        return written(self.names or own, self.count)

    def padded(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Its tensors in those of the artifact, zeros for labels that it does not have, and what hides these."""
        found = {n: _padded(a, self.plan.tensors[n].shape, self.room.tensors[n].shape) for n, a in tensors.items()}
        return {**found, ABSENT: absent(self.count, most_labels(self.room))}


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
    elif most_labels(plan) < 2:
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
    spec = plan.spec.in_modes({claim.attachment: claim.mode for claim in plan.claims})
    return make_plan(spec, _resized(anatomy, plan, labels), plan.fingerprint)


def base_of_labels(base: Base, plan: Plan, labels: int) -> Base:
    """A base without weights, as it is where its head has another number of labels."""
    head, parameters = heads_of(plan)[0].site, dict(base.parameters)
    for name in head.parameters.values():
        if (known := parameters.get(name)) is not None:
            axis = len(known.shape) - 1 if head.transposed else 0
            shape = tuple(labels if i == axis else size for i, size in enumerate(known.shape))
            parameters[name] = replace(known, shape=shape)
    named = {str(i): f"LABEL_{i}" for i in range(labels)}
    return replace(base, anatomy=_resized(base.anatomy, plan, labels), parameters=parameters,
                   config={**base.config, "id2label": named})  # fmt: skip


def _resized(anatomy: Anatomy, plan: Plan, labels: int) -> Anatomy:
    key = heads_of(plan)[0].site.key
    sites = (replace(s, sizes={**s.sizes, "out": labels}) if s.key == key else s for s in anatomy)
    return replace(anatomy, sites=tuple(sites))


def label_axes(plan: Plan, base: Base) -> dict[str, int]:
    """The axis, by tensor, along which a head's labels lie."""
    most = most_labels(plan)
    other, found = of_labels(plan, base.anatomy, most + 1), dict[str, int]()
    for name, tensor in plan.tensors.items():
        for axis, sizes in enumerate(zip(tensor.shape, other.tensors[name].shape, strict=True)):
            if sizes == (most, most + 1):
                found.setdefault(name, axis)
    return found


def most_labels(plan: Plan) -> int:
    """For how many labels there is room."""
    return heads_of(plan)[0].site.sizes["out"]


def sourced_of(small: Plan, known: Mapping[str, Array], given: Container[str]) -> dict[str, Array]:
    """The tensors that no weights file holds, of a plan of other labels: those that are alike, and the head's own."""
    alike = {n: a for n, a in known.items() if n in small.tensors and a.shape == small.tensors[n].shape}
    return alike | sourced(small, {*alike, *(name for name in small.tensors if name in given)})


def _padded(array: Array, own: Sequence[int], room: Sequence[int]) -> Array:
    """An array with zeros behind it along each axis of which there is room for more than its own."""
    return np.pad(array, [(0, most - size) for size, most in zip(own, room, strict=True)])


def _apart(claim: Claim, fewer: Claim, read: Read) -> bool:
    """Whether the labels of a claim with fewer are computed as they are among more, whose others have zeros: it is
    tried, on random values."""
    draw, count, site = np.random.default_rng(0), fewer.site.sizes["out"], claim.site
    many, few = drawn(claim, draw), drawn(fewer, draw)
    for name, value in few.items():
        few[name] = many[name][tuple(slice(0, size) for size in value.shape)] if hasattr(value, "shape") else value
    own = {name: draw.normal(size=tensor.shape).astype(np.float32) for name, tensor in fewer.tensors.items()}
    room = {name: _padded(array, array.shape, claim.tensors[name].shape) for name, array in own.items()}
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
