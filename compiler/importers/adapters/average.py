"""An average of adapters of the `adapters` library: what each of them makes, times its weight. The weights' sum is one.

    y + Σᵢ wᵢ sᵢ Bᵢ Aᵢ x        of low-rank changes: one attachment for each, the weight in B
    (Σᵢ wᵢ lᵢ) ⊙ y              of vectors: one vector
    y + Σᵢ wᵢ upᵢ(f(downᵢ(z)))   of bottlenecks: one that is as wide as all of them together

The library divides by the number of adapters once more. A bottleneck's residual connection is within what is divided,
which no method here does, so that bottlenecks are read where that is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.importers.adapters.bottleneck import MAPS, PLAIN, plain
from peltc.compiler.importers.formats import Array, Entry
from peltc.compiler.importers.modules import Module
from peltc.compiler.importers.quirks import Quirk, Quirks
from peltc.spec.diagnostics import PeltError, Place, fail

TWICE = Quirk(
    "average_divided_twice", "what weights of sum one average is divided by the number of adapters as well",
    "it is not", "the library's documentation of `Average`: a weighted average of what the adapters make",
)  # fmt: skip
MOST = 1e12
"""How large weights may be, alone and beside their sum."""


def shares(weights: Any, count: int, place: Place) -> list[float]:
    """The weights of a setup's adapters, whose sum is one; equal where nothing is said.

    Raises:
        PeltError: E430 not a number for each, or a sum of zero.
    """
    given = [1.0] * count if weights is None else weights
    fine = isinstance(given, list) and len(given) == count and all(type(one) in (int, float) for one in given)
    fine = fine and all(abs(one) < MOST for one in given)  # which what is no number is not
    total = float(sum(given)) if fine else 0.0
    if not fine or max(map(abs, given)) >= MOST * abs(total):
        raise fail("E430", f"the weights of the average are {weights!r:.60}", place, f"{count} numbers with a sum")
    return [one / total for one in given]


def averaged(each: Sequence[Sequence[Module]], weights: Sequence[float], quirks: Quirks, path: Path) -> list[Module]:
    """The modules of an average.

    Args:
        each: those of each adapter.
        weights: the adapters' shares.

    Raises:
        PeltError: E431 adapters that cannot be averaged here; E432 adapters at different places.
    """
    place = Place(str(path))
    methods = {module.entry.method for modules in each for module in modules}
    if len(methods) != 1 or not methods <= COMBINED.keys():
        raise fail("E431", f"an average of {', '.join(sorted(methods))} is not known here", place,
                   "low-rank changes, vectors, or plain bottlenecks")  # fmt: skip
    by_site = [{module.site.key: module for module in modules} for modules in each]
    if any(
        sites.keys() != by_site[0].keys() or len(sites) != len(own) for sites, own in zip(by_site, each, strict=True)
    ):
        raise fail("E432", "the adapters of the average are not at the same places", place, "adapters of the same maps")
    method = methods.pop()
    again = len(each) > 1 and not quirks.fixes(TWICE, place)
    if again and method == "bottleneck":
        raise fail("E431", "an average of bottlenecks: the library divides their residual connection as well, which no"
                   " method here does", place, "low-rank changes or vectors",
                   "`--quirks fixed` reads it as the average that the library's documentation means")  # fmt: skip
    factors = [weight / (len(each) if again else 1) for weight in weights]
    found = []
    for key in by_site[0]:
        found += COMBINED[method]([sites[key] for sites in by_site], factors, place)
    return found


def _changes(own: Sequence[Module], factors: Sequence[float], place: Place) -> list[Module]:
    """Low-rank changes, one after the other."""
    return [
        replace(module, values={**module.values, "B": _times(factor, module.values["B"])}, group=str(number))
        for number, (module, factor) in enumerate(zip(own, factors, strict=True))
    ]


def _vectors(own: Sequence[Module], factors: Sequence[float], place: Place) -> list[Module]:
    """Vectors as one."""
    if any(module.entry.options for module in own):
        raise _differ(own[0], place)
    total = sum(factor * module.values["l"].astype(np.float64) for module, factor in zip(own, factors, strict=True))
    return [replace(own[0], values={"l": np.asarray(total, np.float32)})]


def _bottlenecks(own: Sequence[Module], factors: Sequence[float], place: Place) -> list[Module]:
    """Bottlenecks as one."""
    options = [dict(module.entry.options) for module in own]
    if len({(one["activation"], one.get("reads")) for one in options}) > 1 or any(o.keys() - PLAIN for o in options):
        raise _differ(own[0], place)
    maps = [plain(module) for module in own]
    scaled = [{n: _times(f, a) if n.startswith("up") else a for n, a in one.items()}
              for one, f in zip(maps, factors, strict=True)]  # fmt: skip
    down, down_bias, up = (np.concatenate([one[name] for one in scaled], axis=int(name == "up")) for name in MAPS[:3])
    said = {name: options[0][name] for name in ("activation", "reads") if name in options[0]}
    up_bias = np.sum([one["up_bias"] for one in scaled], axis=0)
    values = {"down": down, "down_bias": down_bias, "up": up, "up_bias": up_bias}
    entry = Entry("bottleneck", (("size", len(down)), *said.items()))
    return [Module(own[0].site, entry, values, own[0].source)]


COMBINED = {"lora": _changes, "ia3": _vectors, "bottleneck": _bottlenecks}


def _times(factor: float, array: Array) -> Array:
    return np.asarray(factor * array.astype(np.float64), np.float32)


def _differ(module: Module, place: Place) -> PeltError:
    return fail("E431", f"the adapters at {module.site.name} have gates, or differ in what they read", place,
                "plain adapters of one kind")  # fmt: skip
