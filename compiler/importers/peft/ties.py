"""Modules whose weights are one tensor in the model, as a head's and a table's: an adapter may hold its values once for
each of them, and they are read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from peltc.compiler.base.base import Base
from peltc.compiler.importers.peft.folder import Folder
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Place, fail

Modules = Mapping[str, Mapping[str, str]]
"""Names of tensors, by module and what they are there."""


def owner(base: Base, module: str) -> str:
    """The name under which the checkpoint holds a module's weight: one for all modules that are tied."""
    found = base.parameters.get(f"{module}.weight")
    return found.stored.removesuffix(".weight") if found is not None and found.stored else module


def owners(base: Base) -> set[str]:
    """The names of the weights that are several parameters, which the graph itself may not know."""
    count = Counter(parameter.stored for parameter in base.parameters.values() if parameter.stored)
    return {stored.removesuffix(".weight") for stored, parameters in count.items() if parameters > 1}


def kept(modules: Modules, read: Callable[[str], str], base: Base, folder: Folder) -> set[str]:
    """Of modules that are tied, the one whose tensors are read: a table where one of them is.

    Args:
        read: from a module's name in the adapter to its name in the model.

    Raises:
        PeltError: E433 modules that are tied and have different values.
    """
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(owner(base, read(module)), []).append(module)
    maps = {site.parameters["weight"] for site in base.anatomy if site.kind == "linear"}
    found = set()
    for group in groups.values():
        one = next((module for module in group if f"{read(module)}.weight" not in maps), group[0])
        found.add(one)
        for module in group:
            if _values(folder, modules[module]) != _values(folder, modules[one]):
                raise fail("E433", f"'{module}' and '{one}' are one tensor in the model, and have different values",
                           Place(str(folder.path)), "the same values for all that is tied")  # fmt: skip
    return found


def _values(folder: Folder, tensors: Mapping[str, str]) -> dict[str, bytes]:
    return {parameter: folder.tensors[name].array().tobytes() for parameter, name in tensors.items()}


def tied_sites(base: Base, module: str) -> list[Site]:
    """The tables that a module's weight is; where it is none, the map that it is.

    Raises:
        PeltError: E431 a map with a bias, which would have to follow the rows.
    """
    weight, name = f"{module}.weight", owner(base, module)
    same = [site for site in base.anatomy if site.kind in ("table", "linear")
            and owner(base, site.parameters["weight"].removesuffix(".weight")) == name]  # fmt: skip
    own = [site for site in same if site.kind == "linear" and site.parameters["weight"] == weight]
    for site in own or same:
        if "bias" in site.parameters:
            raise fail("E431", f"PEFT leaves out the bias '{site.parameters['bias']}' once single rows of"
                       f" '{site.parameters['weight']}' are trained", expected="a map without a bias")  # fmt: skip
    return own or [site for site in same if site.kind == "table"]
