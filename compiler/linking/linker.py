"""Linking: the tensors of a profile, from an adapter's, on the graph that an artifact keeps for it.

An artifact whose modules are exchanged holds the base's graph without its weights, and the anatomy. The modules are
written into that graph once more, with the adapter's tensors; the constants that come of it are the profile. No weight
of the base is read, and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.identity import BaseRecord, public_name, stored_samples
from peltc.compiler.adapter.mathematics import mathematics
from peltc.compiler.adapter.mismatch import names
from peltc.compiler.adapter.profile import is_profile
from peltc.compiler.adapter.provenance import check_file, other_mathematics
from peltc.compiler.adapter.weights import check_arrays, load_tensors, sourced
from peltc.compiler.base.base import Base
from peltc.compiler.base.opening import read_base
from peltc.compiler.files.checkpoint import Checkpoint, open_checkpoint, read_header
from peltc.compiler.files.labels import LABELS
from peltc.compiler.files.manifest import ADAPTER, LINK, MANIFEST, read_manifest
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.importers.importing import import_adapter, imports
from peltc.compiler.linking.heads import Head, label_axes, sourced_of
from peltc.compiler.linking.lengths import fitted, fitting, said
from peltc.compiler.linking.profiles import DIGITS, EMBEDS, changing, exchanged
from peltc.compiler.linking.uneven import evened
from peltc.compiler.passes.absent import heads_of
from peltc.compiler.passes.offer import STAMP, constants
from peltc.compiler.passes.rewrite import rewritten
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Packed
from peltc.spec.diagnostics import PeltError, Place, fail, wrong_type
from peltc.spec.document import parse
from peltc.spec.foreign import AS_TRAINED
from peltc.spec.specification import build_spec

Array = np.ndarray[Any, Any]
EARLIER = "it was compiled by a version that knew no others"
SAME = 1e-6
"""How far apart two computations of the same may be, as a share of the largest value."""


def _packed(record: Mapping[str, Any] | None) -> Packed | None:
    """Which weights the checkpoint had in whole numbers, by what a manifest says: nothing was folded into them."""
    if not record or not record.get("stored"):
        return None
    weights = frozenset([*record["weights"], *record["left"]])
    return Packed(record["stored"], record["to"], record["block"], weights)


class Linker:
    """Makes profiles for an artifact.

    Args:
        folder: the artifact's.

    Raises:
        PeltError: E603 no artifact; E624 an artifact whose modules cannot be exchanged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        record = manifest.get("profiles")
        if not record:
            raise fail("E624", "the modules of this artifact are fixed in it", Place(str(self.folder)),
                       "an artifact compiled with `mode: swappable` or `mode: bank`")  # fmt: skip
        self.record: dict[str, Any] = record
        imported = manifest.get("imported")
        self.quirks = imported["quirks"]["asked"] if imported else AS_TRAINED
        held = manifest["base"]
        known = {"folder": self.folder, "architecture": held["architecture"], "config": {},
                 "precision": held["precision"], "fingerprint": held["fingerprint"],
                 "checkpoint": self._checkpoint(manifest)}  # fmt: skip
        base, embedded = read_base(self.folder / LINK, variant="ids", **known), self.folder / LINK / EMBEDS
        self.base = replace(base, anatomy=replace(base.anatomy, packed=_packed(manifest.get("quantised"))))
        self.source = read_base(embedded, variant=EMBEDS, **known) if embedded.is_dir() else self.base
        spec = build_spec(parse(manifest["spec"], str(self.folder / MANIFEST)), manifest["spec"])
        modes = {module["attachment"]: module["mode"] for module in manifest["modules"]}  # whoever said them
        self.plan = self._evened(make_plan(spec.in_modes(modes), self.base.anatomy, self.base.fingerprint))
        self.sites = {site.key: site for site in self.source.anatomy}
        self._made: dict[str, Array] = {}

    def _checkpoint(self, manifest: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint in the artifact; nothing of it is there where the base is quantised."""
        return Checkpoint(self.folder, {}) if manifest.get("quantised") else open_checkpoint(self.folder)

    def link(
        self, weights: str | Path | Mapping[str, Array], talk: Talk = logged, labels: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """A profile's tensors by the names of the artifact's inputs; beside them what its labels are called, where
        profiles may have fewer.

        Args:
            weights: an adapter's file, its arrays by tensor name, or a folder that `pelt import` reads.
            labels: the names of its labels; those that the adapter's file tells where absent.

        Raises:
            PeltError: what is wrong with the tensors; E216 labels that do not fit; E408 they are of other modules than
                the artifact's; E411 they differ in what is fixed in it; E412 more labels than there is room for.
        """
        if not isinstance(weights, (str, PathLike, Mapping)):
            raise wrong_type("an adapter", weights, "a file or a folder, or arrays by tensor name")
        if labels is not None and not heads_of(self.plan):
            raise wrong_type("the labels of a profile", labels, "none, for an artifact whose profiles all have the"
                             " model's", "deploy: {fewer_labels: true}")  # fmt: skip
        head = Head(self.base, self.plan, self._axes, weights, labels) if heads_of(self.plan) else None
        base, plan = (self.base, self.plan) if head is None else (head.base, head.plan)
        tensors = self._tensors(weights, base, plan, talk)
        if head is not None:
            tensors = head.padded(tensors)
        whole = self._fitting({name: array.shape for name, array in tensors.items()}, self.plan, self.base)
        made, end = self._written(whole, tensors), f"{STAMP}{self.record['fingerprint'][:DIGITS]}"
        profile = {name: np.ascontiguousarray(fitted(made.pop(name.removesuffix(end)), shape))
                   for name, shape in self.record["inputs"].items()}  # fmt: skip
        self._check_fixed(whole, tensors, made)
        return profile if head is None else {**profile, LABELS: head.named(self.record["labels"]["names"])}

    def _tensors(
        self, weights: str | Path | Mapping[str, Array], base: Base, plan: Plan, talk: Talk
    ) -> dict[str, Array]:
        """An adapter's tensors, held against a plan."""
        source = self._source if plan is self.plan else partial(self._source_of, plan)
        if isinstance(weights, Mapping):
            fit = self._fitting({name: np.shape(array) for name, array in weights.items()}, plan, base)
            return check_arrays(fit, weights, source)
        if imports(weights):
            found = import_adapter(Path(weights), base=base, quirks=self.quirks)
            fit = self._fitting({name: array.shape for name, array in found.tensors.items()}, plan, base)
            theirs, own = mathematics(found.plan), mathematics(fit)
            if theirs.digest != own.digest:
                raise PeltError(other_mathematics(fit, "the adapter", theirs, own))
            return check_arrays(fit, found.tensors, source)
        file = Path(weights)
        fit = plan if is_profile(file) else self._fitting(
            {name: tensor.shape for name, tensor in read_header(file).items()}, plan, base)  # fmt: skip
        here = BaseRecord(self.base.architecture, public_name(str(self.folder)))
        for sentence in check_file(fit, file, here, stored_samples(self.base)):
            talk(f"warning: {sentence}")
        return load_tensors(fit, file, source)

    def _fitting(self, shapes: Mapping[str, Sequence[int]], plan: Plan, base: Base) -> Plan:
        """The plan of an adapter whose tensors have these shapes: with fewer tokens or keys before the text than the
        artifact's, if it has fewer.

        Raises:
            PeltError: E411 it has others, and may not.
        """
        for attachment, options in said(plan, shapes).items():
            own = {claim.attachment: claim.options for claim in plan.claims}[attachment]
            for option, count in options.items():
                why = self.record.get("one_length", EARLIER)
                if count > own[option]:
                    why = why or f"there is room for {own[option]}"
                if why:
                    raise fail("E411", f"the adapter has {count} tokens in '{attachment}', and the artifact's profiles"
                               f" have {own[option]} ({option}): {why}", Place(str(self.folder)),
                               f"an adapter with {own[option]}", f"compile with `{option}: {count}`")  # fmt: skip
        return self._evened(fitting(plan, shapes, base.anatomy))

    def _evened(self, plan: Plan) -> Plan:
        """A plan with all before the text that the artifact has, where it has no input that says how much."""
        return plan if self.record.get("places") else evened(plan)

    @cached_property
    def _held(self) -> dict[str, Array]:
        """The adapter that the artifact was compiled with; read once, however many profiles are linked."""
        return load_tensors(self.plan, self.folder / ADAPTER, self._source)

    @cached_property
    def _axes(self) -> dict[str, int]:
        """Along which labels lie; found once, however many profiles are linked."""
        return label_axes(self.plan, self.base)

    def _source(self, given: Container[str]) -> Mapping[str, Array]:
        """What `sourced` gives: a bank, for instance. It is made once, however many profiles are linked, and not at all
        where adapters bring it."""
        known = {*self._made, *(name for name in self.plan.tensors if name in given)}
        self._made |= sourced(self.plan, known)
        return self._made

    def _source_of(self, plan: Plan, given: Container[str]) -> Mapping[str, Array]:
        """The same of a plan of other labels."""
        return sourced_of(plan, self._source(given), given)

    def _written(self, plan: Plan, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """The constants of the graph with the modules in it, by name."""
        return constants(rewritten(self.source, plan, self.sites, tensors, self.base)[0])

    def _check_fixed(self, plan: Plan, tensors: Mapping[str, Array], made: Mapping[str, Array]) -> None:
        """Whether all that a profile does not bring is as it is in the artifact: tensors in other modes, and what the
        graph has of frozen ones alone. Frozen tensors that are part of what a profile brings may differ.

        Args:
            plan: the adapter's.
            tensors: its tensors.
            made: the constants that come of them, without those of the profile.

        Raises:
            PeltError: E411.
        """
        changed = {tensor.name for claim in changing(self.plan) for tensor in claim.tensors.values()}
        held = self._held
        other = [name for name in held if name not in exchanged(self.plan) and not _equal(tensors[name], held[name])]
        wrong = [name for name in other if name not in changed]
        if other and not wrong:
            own = self._written(plan, {**tensors, **{name: held[name] for name in other}})
            wrong = other if any(not _equal(array, own[name]) for name, array in made.items()) else []
        if wrong:
            raise fail("E411", f"the adapter has other values than the artifact in {names(wrong)}, which profiles do"
                       " not bring", Place(str(self.folder)), "the values that the artifact was compiled with",
                       "compile the artifact with this adapter's weights, or all attachments in a mode of"
                       " profiles")  # fmt: skip


def _equal(one: Array, other: Array) -> bool:
    """Whether two computations of the same may differ so, on whatever machines."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype.kind != "f":
        return np.array_equal(one, other)
    return bool(np.abs(one - other).max(initial=0) <= SAME * np.abs(other).max(initial=0))
