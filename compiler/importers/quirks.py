"""Quirks: where a library computes something else with an adapter than the method's paper, or its own documentation,
says. The file of each method of a library has those of the method.

An adapter is read as it was trained, quirks included, unless their fixed forms are asked for: what the method says, of
the tensors that the folder has. What a library does wrong only where it merges an adapter is none, for an adapter is
read as it computes unmerged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peltc.spec.diagnostics import Place, fail, one_of
from peltc.spec.foreign import AS_TRAINED, FIXED, QUIRKS

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a module's tensors, by what its method calls them."""


@dataclass(frozen=True)
class Quirk:
    """What a library computes, and what the method says.

    Attributes:
        name: what manifests and specs call it.
        trained: what the library computes.
        fixed: what is computed in its place; "" where nothing in the folder tells.
        source: where the method says so, or why it cannot be had.
    """

    name: str
    trained: str
    fixed: str
    source: str


@dataclass(frozen=True)
class Misread:
    """A quirk that the config of a module tells of, and another config repairs.

    Attributes:
        quirk: which.
        has: whether a module has it, by the config, the module's name, and the shapes of its tensors.
        fixed: the config that the library would have to be given at this module to compute what the method says.
    """

    quirk: Quirk
    has: Callable[[Config, str, Shapes], bool]
    fixed: Callable[[Config, str], Config] = lambda config, module: config


class Quirks:
    """The quirks that one adapter has, as they are met while it is read.

    Args:
        asked: what becomes of them, one of `QUIRKS`.

    Raises:
        PeltError: E437 there is no such choice.
    """

    def __init__(self, asked: str = AS_TRAINED):
        if asked not in QUIRKS:
            raise fail("E437", f"there is no choice {asked!r:.40} of what becomes of quirks", expected=one_of(QUIRKS))
        self.asked = asked
        self._met: dict[str, Quirk] = {}

    @property
    def names(self) -> list[str]:
        """What was met, in the order of the names."""
        return sorted(self._met)

    def fixes(self, quirk: Quirk, place: Place, cannot: str = "") -> bool:
        """Note that the adapter has a quirk; whether its fixed form is asked for.

        Args:
            place: where the adapter says so.
            cannot: why this adapter's has no fixed form, though others' have.

        Raises:
            PeltError: E437 the fixed form is asked for, and there is none.
        """
        self._met[quirk.name] = quirk
        if self.asked != FIXED:
            return False
        if cannot or not quirk.fixed:
            raise fail("E437", f"the quirk '{quirk.name}' has no fixed form: {cannot or quirk.source}", place,
                       f"`{AS_TRAINED}`: {quirk.trained}")  # fmt: skip
        return True

    def read(self, misread: Iterable[Misread], config: Config, module: str, shapes: Shapes, place: Place) -> Config:
        """The config that a module is read by.

        Raises:
            PeltError: E437 as `fixes`.
        """
        for one in misread:
            if one.has(config, module, shapes) and self.fixes(one.quirk, place):
                config = one.fixed(config, module)
        return config

    def told(self) -> str:
        """What was met and what became of it, in words."""
        if not self._met:
            return "no quirks"
        how = "fixed" if self.asked == FIXED else "as trained"
        return f"quirks {how}: {', '.join(self.names)}"
