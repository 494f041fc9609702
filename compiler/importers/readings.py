"""How the names in an adapter become those of a model: an adapter may have been saved on an inner or an outer model,
whose names are one prefix shorter or longer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

Reading = Callable[[str], str]
"""From a name in the adapter to the name in the model."""


def _without(stem: str, name: str) -> str:
    return name.removeprefix(stem)


def readings(modules: Iterable[str], held: Iterable[str]) -> list[Reading]:
    """The ways to read an adapter's names: as they are, with a first name of the model's put before, and with a first
    name taken off that all of them share.

    Args:
        modules: names in the adapter.
        held: names in the model.
    """
    names = list(modules)
    found: list[Reading] = [str]
    found += [stem.__add__ for stem in sorted({f"{name.partition('.')[0]}." for name in held})]
    first = {f"{name.partition('.')[0]}." for name in names if "." in name}
    if len(first) == 1 and all("." in name for name in names):
        found.append(partial(_without, first.pop()))
    return found
