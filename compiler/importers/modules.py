"""Modules of another library's adapter, each with the site that it is at and its values by our names, and the spec and
the tensors that they come to.

The spec is written from what the modules are; then it is planned like any other, and each tensor of the plan is filled
from the module that its site and its attachment are. So a module that the spec does not say, or says wrongly, does not
fit the plan.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.adapter.weights import sound
from peltc.compiler.base.base import Base
from peltc.compiler.importers.formats import Array, Entry
from peltc.compiler.importers.selectors import selections
from peltc.compiler.plan.claims import Plan
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Place, fail


@dataclass(frozen=True, eq=False)
class Module:
    """One module of an adapter.

    Attributes:
        site: where it is.
        entry: the method and the options that say it in a spec.
        values: our parameters by name.
        source: what the adapter calls it.
        group: modules of different groups are different attachments, even where their options are equal.
        first: whether what else is at its site takes effect after it: a parameter of the model's own that was trained
            beside.
        shared: parameters that all modules have in common, of which the leading part counts that a site needs.
    """

    site: Site
    entry: Entry
    values: Mapping[str, Array]
    source: str
    group: str = ""
    first: bool = False
    shared: frozenset[str] = frozenset()

    @property
    def kin(self) -> str:
        """What modules of one attachment have in common."""
        return json.dumps([self.group, self.first, self.entry.method, self.entry.options])


@dataclass(frozen=True, eq=False)
class Read:
    """An adapter whose modules are known.

    Attributes:
        modules: all of them.
        base: the model that they are for.
        named: the model that the adapter says it is for, or "".
        given: the model's folder or hub id.
        origin: where the adapter is from, in words.
        place: its folder.
        model: the spec's `model:`, where the base's config does not say it.
    """

    modules: tuple[Module, ...]
    base: Base
    named: str
    given: str
    origin: str
    place: Place
    model: Mapping[str, Any] = field(default_factory=dict)


Owners = Mapping[tuple[str, str], Module]
"""The modules by the attachment and the site that they are."""


def attachments(modules: Sequence[Module], base: Base) -> tuple[list[dict[str, Any]], Owners]:
    """The entries of `attach:`, and which module is meant where: modules of one kin are one attachment, or as few as
    say all of their sites. What an entry says it comes after is a method, of which all attachments are meant."""
    kin: dict[str, list[Module]] = {}
    for module in sorted(modules, key=lambda module: not module.first):
        kin.setdefault(module.kin, []).append(module)
    attach: list[dict[str, Any]] = []
    owners: dict[tuple[str, str], Module] = {}
    leading: dict[str, list[str]] = {}
    for group in kin.values():
        entry, sites = group[0].entry, [module.site for module in group]
        behind = dict(entry.options).get("after")
        for selection in selections(sites, base.anatomy):
            count = sum(other["method"] == entry.method for other in attach)
            called = f"{entry.method}_{count + 1}" if count else entry.method
            named = {"name": called} if count else {}
            options = {key: value for key, value in entry.options if key != "after"}
            after = {name for site in sites for name in leading.get(site.key, ())}
            after |= {str(other.get("name", behind)) for other in attach if behind and other["method"] == behind}
            said = {"after": sorted(after)} if after else {}
            attach.append({"method": entry.method, **named, **selection, **options, **said})
            owners |= {(called, str(module.site.key)): module for module in group}
            for module in group if group[0].first else ():
                leading.setdefault(module.site.key, []).append(called)
    return attach, owners


def fill(plan: Plan, owners: Owners, modules: Iterable[Module], place: Place) -> dict[str, Array]:
    """The plan's tensors, from the modules that its claims are.

    Raises:
        PeltError: E433 a module that the plan does not have, or values that do not fit it; E404 values that are no
            numbers.
    """
    tensors: dict[str, Array] = {}
    met: set[int] = set()
    for claim in plan.claims:
        module = owners.get((claim.attachment, str(claim.site.key)))
        if module is None:
            if claim.mirrors is not None or claim.follows:  # it has the tensors of another
                continue
            raise fail("E433", f"the spec that was made of it means {claim.site.name}, which it does not have", place,
                       hint="please report this")  # fmt: skip
        met.add(id(module))
        left = dict(module.values)
        for parameter, tensor in claim.tensors.items():
            value = left.pop(parameter, None)
            if value is not None and parameter in module.shared and value.ndim == len(tensor.shape):
                value = value[tuple(map(slice, tensor.shape))]
            if value is None or value.shape != tensor.shape:
                what = "is missing" if value is None else f"has the shape {list(value.shape)}"
                raise fail("E433", f"'{parameter}' of '{module.source}' {what}", place,
                           f"the shape {list(tensor.shape)}")  # fmt: skip
            value = np.ascontiguousarray(value, np.float32)
            if not np.array_equal(tensors.setdefault(tensor.name, value), value):
                raise fail("E433", f"'{parameter}' of '{module.source}' differs from that of other modules, which share"
                                   " it", place, "the same values")  # fmt: skip
        if left:
            raise fail("E433", f"'{next(iter(left))}' of '{module.source}' has no counterpart at {claim.site.name}",
                       place)  # fmt: skip
    lost = sorted({module.source for module in modules if id(module) not in met})
    if lost:
        raise fail("E433", f"the spec that was made of it leaves out {names(lost)}", place, hint="please report this")
    return sound(plan, tensors, place)


def name_of(path: Path) -> str:
    """A spec's name, from that of the adapter's folder."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in path.resolve().name)
    return kept.strip("_-")[:60] or "imported"
