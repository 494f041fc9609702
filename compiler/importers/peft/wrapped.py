"""Which parameter a part of an adapter is of: its module's weight, or one that the config means by its own name.

PEFT wraps a module once for each of its parameters that `target_parameters` means, in the order in which the module
has them, and stores what belongs to the first under the most `.base_layer`:

    mlp.experts.base_layer.lora_A.weight     of mlp.experts.gate_up_proj
    mlp.experts.lora_A.weight                of mlp.experts.down_proj
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.base.base import Base
from peltc.compiler.importers.peft.folder import Folder
from peltc.compiler.importers.peft.methods.beside import WRAPPED
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail

MOST = 8
"""How often a module may be wrapped."""


def unwrapped(module: str) -> str:
    """A module's own name, without what its wrappers add."""
    for _ in range(MOST):
        module = module.removesuffix(WRAPPED)
    return module


def means(wanted: Any, parameter: str) -> bool:
    """Whether `target_parameters` means a parameter: by its name, or an ending of it."""
    return any(parameter == name or parameter.endswith(f".{name}") for name in wanted or ())


def named_owners(config: Mapping[str, Any], parameters: Iterable[str]) -> dict[str, list[str]]:
    """The parameters that `target_parameters` means, by the module that has them, in the module's order."""
    found: dict[str, list[str]] = {}
    for name in parameters:
        if means(config.get("target_parameters"), name):
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def sites_named(base: Base, weight: str) -> list[Site]:
    """The sites of a parameter that `target_parameters` means; of a fused map, all.

    Raises:
        PeltError: E432 it is that of no linear map.
    """
    found = [s for s in base.anatomy if s.kind != "table" and s.takes("linear") and s.parameters["weight"] == weight]
    if not found:
        raise fail("E432", f"'{weight}' is no weight of linear maps that modules attach to",
                   expected="a linear map of the model, or experts'")  # fmt: skip
    return found


def key_of(module: str, weight: str) -> str:
    """What a config's patterns are held against where `target_parameters` means a parameter, in the adapter's names."""
    return f"{unwrapped(module)}.{weight.rpartition('.')[2]}"


def named_weights(
    folder: Folder, parameters: Iterable[str], modules: Iterable[str], read: Callable[[str], str]
) -> dict[str, str]:
    """The parameter that an adapter's tensors are about, by the name of their module in the file, where
    `target_parameters` means it; elsewhere it is the module's weight.

    Args:
        parameters: the model's, in its order.
        modules: names in the adapter.
        read: from a name in the adapter to the model's.

    Raises:
        PeltError: E432 the file has other parts for a module than its config means, or this means parameters that the
            model does not have.
    """
    known = list(parameters)
    if nothing := [n for n in folder.config.get("target_parameters") or () if not any(means([n], p) for p in known)]:
        raise fail("E432", f"the adapter's config means parameters that the model does not have: {names(nothing)}",
                   folder.place, "`target_parameters` that the model has")  # fmt: skip
    held: dict[str, list[str]] = {}
    for name in modules:
        held.setdefault(read(unwrapped(name)), []).append(name)
    found: dict[str, str] = {}
    for own, wanted in named_owners(folder.config, known).items():
        parts = sorted(held.get(own, ()), key=len, reverse=True)
        depths = [(len(name) - len(unwrapped(name))) // len(WRAPPED) for name in parts]
        if depths != list(range(len(wanted)))[::-1]:
            raise fail("E432", f"the adapter has {len(parts)} parts for the {len(wanted)} parameters of '{own}' that"
                               f" its config means: {names(wanted)}", folder.place,
                       "a part for each of `target_parameters`")  # fmt: skip
        found |= dict(zip(parts, wanted, strict=True))
    return found
