"""What a file holds of each module of the model, and how a spec says it: the adapter's own tensors there, rows of its
table, and parameters of the model itself that were trained beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.base.base import Base
from peltc.compiler.files.checkpoint import is_float
from peltc.compiler.importers.formats import Array, Entry, Format, own_rows
from peltc.compiler.importers.peft.folder import Folder
from peltc.compiler.importers.peft.methods.beside import COPY, ORIGINAL, ROWS, SINGLE_ROWS, WHOLE, WRAPPED
from peltc.compiler.importers.peft.ties import tied_sites
from peltc.compiler.importers.peft.wrapped import key_of, sites_named
from peltc.compiler.importers.quirks import Config, Quirks
from peltc.compiler.survey.anatomy import Rows, Site
from peltc.spec.diagnostics import Place, fail

ADAPTER, OWN, TOKENS = "adapter", "own", "tokens"
"""What a part is: tensors of the method, parameters of the model itself, or single rows of a table."""
Values = Callable[[Mapping[str, Array], Site], dict[str, Array]]
"""Our parameters at a site, by the tensors of a part."""


@dataclass(frozen=True)
class Part:
    """What a file holds of one module.

    Attributes:
        module: the module's name in the file.
        role: ADAPTER, OWN or TOKENS.
        tensors: what each tensor is there → its name in the file.
    """

    module: str
    role: str
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Placed:
    """A part at its sites in the model.

    Attributes:
        part: the part.
        sites: the sites that its module is, several of a fused map.
        entry: how a spec says it.
        values: the sites' parameters by its tensors.
        shared: parameters that all modules share, of which the leading part counts that the sites need.
    """

    part: Part
    sites: list[Site]
    entry: Entry
    values: Values
    shared: frozenset[str] = frozenset()


def parts_of(folder: Folder, known: Format) -> list[Part]:
    """A file's tensors by module.

    A method of the whole model is carried by a part whose module has no name.

    Raises:
        PeltError: E430 a tensor of another type; E433 tensors that are neither the method's nor parameters, or that the
            method lacks.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    left = []
    for name, tensor in folder.tensors.items():
        suffix = next((s for s in known.tensors if name.endswith(f".{s}")), "")
        module, _, leaf = name.rpartition(".")
        if not is_float(tensor.dtype) and (suffix not in known.integers or tensor.dtype.kind not in "iu"):
            raise fail("E430", f"the tensor '{name[:120]}' is of the type {tensor.dtype}", Place(str(folder.path)),
                       "floating-point values")  # fmt: skip
        if name in known.shared:
            continue
        if known.sites is not None and name in known.tensors:
            found.setdefault(("", ADAPTER), {})[known.tensors[name]] = name
        elif suffix and known.sites is None:
            found.setdefault((name.removesuffix(f".{suffix}"), ADAPTER), {})[known.tensors[suffix]] = name
        elif name.endswith(ROWS):
            found.setdefault((name.removesuffix(ROWS), TOKENS), {})["values"] = name
        elif module and leaf in ("weight", "bias"):
            own = module.removesuffix(WRAPPED).removesuffix(COPY)
            if module.endswith(ORIGINAL) or (module.endswith(COPY) and f"{own}.{leaf}" in folder.tensors):
                continue
            found.setdefault((own, OWN), {})[leaf] = name
        else:
            left.append(name)
    if left:
        message = f"{len(left)} of the {len(folder.tensors)} tensors are no part of {folder.kind}: {names(left)}"
        raise fail("E433", message, Place(str(folder.path)), "a file each of whose tensors is used once")
    lacking = [name for name in known.tensors if known.sites is not None and name not in folder.tensors]
    if lacking:
        raise fail("E433", f"the file has no tensor '{lacking[0]}', which {folder.kind} is made of",
                   Place(str(folder.path)))  # fmt: skip
    return [Part(module, role, tensors) for (module, role), tensors in found.items()]


def placed(
    part: Part, module: str, folder: Folder, known: Format, base: Base, quirks: Quirks, weight: str = ""
) -> list[Placed]:
    """A part at its sites, by what a spec says of them; nothing where it holds what the base holds already.

    Args:
        module: the module's name in the model.
        quirks: what becomes of them; those of the part are noted.
        weight: the parameter that a part of the method is about, where the config means it by its own name.

    Raises:
        PeltError: E431 a part whose config does not say what it is; E432 a module that is no site; E433 parameters
            that cannot be replaced; E437 a quirk that cannot be fixed.
    """
    if part.role == ADAPTER and known.sites is not None:
        sites = list(known.sites(folder.config, base.anatomy))
        config = quirks.read(known.quirks, folder.config, "", _shapes(part, folder), folder.place)
        return [Placed(part, sites, known.entry(config, ""), partial(_evaluated, known, config))]
    if part.role == ADAPTER:
        if weight:
            sites = sites_named(base, weight)
        else:
            sites = tied_sites(base, module) if known.tied else sites_of(base, module, known.kinds)
        check_tied(folder, sites)
        called = key_of(part.module, weight) if weight else part.module
        return _adapter(part, sites, folder, known, base, called, quirks)
    if part.role == TOKENS:
        sites = sites_of(base, module, ("linear", "table"))
        rows = rows_of(folder, part.module)
        return [Placed(part, sites, Entry(SINGLE_ROWS, (("rows", rows), *together(sites))), _as_they_are)]
    own = _own(part, module, folder, base)
    return [own] if own is not None else []


def _shapes(part: Part, folder: Folder) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's tensors."""
    return {parameter: folder.tensors[name].shape for parameter, name in part.tensors.items()}


def _adapter(
    part: Part, sites: list[Site], folder: Folder, known: Format, base: Base, called: str, quirks: Quirks
) -> list[Placed]:
    """Tensors of the method at the sites of a module, which the config's patterns know as it is `called`."""
    shared = frozenset(known.shared.values())
    shapes = _shapes(part, folder)
    config = quirks.read(known.quirks, folder.config, called, shapes, folder.place)

    def values(stored: Mapping[str, Array], site: Site) -> dict[str, Array]:
        common = {ours: folder.values(theirs) for theirs, ours in known.shared.items() if theirs in folder.tensors}
        found = known.parameters({**common, **stored}, site)
        return known.completed(found, config, site, outputs(base, site))

    stated = known.entry(config, called)
    groups: dict[tuple[str, Rows | None], tuple[Entry, list[Site]]] = {}
    for site in sites:
        entry = replace(stated, options=(*stated.options, *known.measured(shapes, site).items()))
        rows = site.rows if known.spans or shared else None
        groups.setdefault((repr(entry), rows), (entry, []))[1].append(site)
    return [
        Placed(part, some, spanning(base, entry, some[0]) if known.spans else entry, values, shared)
        for entry, some in groups.values()
    ]


def spanning(base: Base, entry: Entry, site: Site) -> Entry:
    """How a module is said at a site that has some rows of its map."""
    if site.rows is None:
        return entry
    rows = [f"{a}-{b - 1}" if b - a > 1 else a for a, b in site.rows]
    return replace(entry, options=(*entry.options, ("whole", outputs(base, site)), ("rows", rows)))


def outputs(base: Base, site: Site) -> int:
    """How many outputs the map has that a site is or is part of."""
    if site.kind in ("table", "norm"):
        return site.sizes["out" if site.kind == "table" else "d"]
    return int(base.parameters[site.parameters["weight"]].shape[-1 if site.transposed else -2])


def _own(part: Part, module: str, folder: Folder, base: Base) -> Placed | None:
    """Parameters of the model itself in place of the base's. A tied head keeps the base's weight where the table was
    named as a module to save, for PEFT trains a copy of it then."""
    parameters = {leaf: f"{module}.{leaf}" for leaf in part.tensors}
    sites = [
        site
        for site in base.anatomy
        if site.kind in WHOLE and any(site.parameters.get(leaf) == name for leaf, name in parameters.items())
    ]
    saved = is_saved(part.module, folder)
    if not saved and all(
        name in base.parameters and not base.lacks(name) and _same(folder, part.tensors[leaf], base.whole(name))
        for leaf, name in parameters.items()
    ):
        return None
    if not sites:
        raise fail("E433", f"the file holds {names(sorted(part.tensors.values()))}, with other values than the base,"
                           " and nothing here replaces them", Place(str(folder.path)),
                   "weights and biases of linear maps, tables and norms")  # fmt: skip
    whole = WHOLE[sites[0].kind]
    left = tuple(whole.without[leaf] for leaf in sites[0].parameters if leaf in whole.called and leaf not in parameters)
    check_tied(folder, sites)
    tied = () if saved else together(sites)

    def values(stored: Mapping[str, Array], site: Site) -> dict[str, Array]:
        return {whole.called[leaf]: array for leaf, array in replaced(site, stored).items()}

    return Placed(part, sites, Entry(whole.method, (*left, *tied)), values)


def _evaluated(known: Format, config: Config, stored: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """A site's parameters of what the config makes of the tensors."""
    whole = stored if known.evaluated is None else known.evaluated(config, stored)
    return known.parameters(whole, site)


def _as_they_are(stored: Mapping[str, Array], site: Site) -> dict[str, Array]:
    return dict(stored)


def _same(folder: Folder, name: str, held: Array) -> bool:
    tensor = folder.tensors[name]
    return tuple(tensor.shape) == held.shape and np.array_equal(
        np.asarray(tensor.array(), np.float32), np.asarray(held, np.float32)
    )


def is_saved(module: str, folder: Folder) -> bool:
    """Whether a module is one of `modules_to_save`, or lies in one."""
    return any(name in module.split(".") or module.endswith(f".{name}") or module == name
               for name in folder.config.get("modules_to_save") or ())  # fmt: skip


def together(sites: list[Site]) -> tuple[tuple[str, Any], ...]:
    """What says that a head which is the same tensor as a table follows it."""
    return (("tied", "together"),) if any(site.kind == "table" and site.ties for site in sites) else ()


def check_tied(folder: Folder, sites: list[Site]) -> None:
    """Whether it is plain what a head does that is the same tensor as a table.

    Raises:
        PeltError: E431 it is not.
    """
    if folder.config.get("ensure_weight_tying") and together(sites):
        raise fail("E431", "'ensure_weight_tying' is True, and the head is the same tensor as the table that was"
                           " trained: PEFT lets it follow in training, and not when the folder is loaded again",
                   Place(folder.place.path, key="ensure_weight_tying"), "the key left out",
                   "leave it out for what a reload computes, or write a spec with `tied: together`")  # fmt: skip


def rows_of(folder: Folder, module: str) -> list[int]:
    """Which rows of a table are trained, as `trainable_token_indices` says: a list, or lists by the table's name.

    Raises:
        PeltError: E431 it says nothing of this table.
    """
    given = folder.config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((rows for name, rows in given.items() if module == name or module.endswith(f".{name}")), None)
    if not given:
        raise fail("E431", f"the file holds rows of '{module}', and the config does not say which", folder.place,
                   "`trainable_token_indices` with the numbers of the rows")  # fmt: skip
    return list(given)


NOUNS = {"linear": "linear map", "table": "table", "norm": "norm"}
"""What a kind of site is called."""


def sites_of(base: Base, module: str, kinds: Sequence[str]) -> list[Site]:
    """The sites of some kinds whose weight a torch module owns; of a fused map, all.

    Raises:
        PeltError: E432 the module is no such site.
    """
    found = [s for s in base.anatomy if s.kind in kinds and s.parameters.get("weight") == f"{module}.weight"]
    if not found:
        what = " or ".join(NOUNS[kind] for kind in kinds)
        raise fail("E432", f"'{module}' is no {what} that modules attach to", expected=f"a {what} of the model")
    return found


def replaced(site: Site, stored: Mapping[str, Array]) -> dict[str, Array]:
    """A site's own weight [O, I] and bias [O] of a module's; of a fused map, its own rows. A table, whose ids pick
    rows, is stored the other way round."""
    turn = site.transposed or site.kind == "table"
    turned = {n: array.T if n == "weight" and turn else array for n, array in stored.items()}
    return {name: own_rows(array, site) for name, array in turned.items()}
