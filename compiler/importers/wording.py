"""How an adapter is said in a spec: modules with equal options are one attachment, or as few as say all their sites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peltc.compiler.base.base import Base
from peltc.compiler.base.source import read_config, vocabulary_of
from peltc.compiler.importers.folder import Folder
from peltc.compiler.importers.formats import CLASSIFIERS, Entry
from peltc.compiler.importers.parts import OWN, Placed
from peltc.compiler.importers.selectors import selections
from peltc.compiler.survey.anatomy import Site


def spec_content(folder: Folder, base: Base, found: Sequence[Placed]) -> dict[str, Any]:
    """The spec as plain data."""
    model: dict[str, Any] = {}
    if base.changed:
        model["architecture"] = base.architecture
        labels = base.config.get("id2label")
        if labels and folder.config.get("task_type") in CLASSIFIERS and any(h.part.role == OWN for h in found):
            model["labels"] = len(labels)
        if (rows := vocabulary_of(base.config)) != vocabulary_of(read_config(base.folder)):
            model["vocabulary"] = rows
    chosen = {"model": model} if model else {}
    return {"pelt": 1, "name": name_of(folder.path), **chosen, "attach": attachments(base, found)}


def attachments(base: Base, found: Sequence[Placed]) -> list[dict[str, Any]]:
    """The attachments. Where a parameter of the model's own was trained beside a method on the same map, the method
    follows it: what it adds, it adds to the map as it was trained. Parts of a fused map are apart where modules share
    tensors, of which each part has its own rows."""
    carrying = {site.key for here in found if here.part.role != OWN for site in here.sites}
    met = {here.part.module for here in found if here.part.role == OWN for site in here.sites if site.key in carrying}
    groups: dict[tuple[Any, ...], tuple[Entry, list[Site]]] = {}
    for here in sorted(found, key=lambda here: here.part.module not in met or here.part.role != OWN):
        first = here.part.role == OWN and here.part.module in met
        rows = here.sites[0].rows if here.shared else None
        key = here.entry.method, repr(here.entry.options), rows, first
        groups.setdefault(key, (here.entry, []))[1].extend(here.sites)
    attach: list[dict[str, Any]] = []
    named: dict[str, list[str]] = {}
    for (*_, first), (entry, sites) in groups.items():
        for selection in selections(sites, base.anatomy):
            count = sum(other["method"] == entry.method for other in attach)
            name = f"{entry.method}_{count + 1}" if count else entry.method
            meant = {"method": entry.method, **({"name": name} if count else {}), **selection, **dict(entry.options)}
            after = sorted({before for site in sites for before in named.get(site.key, ())})
            attach.append({**meant, **({"after": after} if after else {})})
            if first:
                for site in sites:
                    named.setdefault(site.key, []).append(name)
    return attach


def name_of(path: Path) -> str:
    """A spec's name, from that of the adapter's folder."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in path.resolve().name)
    return kept.strip("_-")[:60] or "imported"
