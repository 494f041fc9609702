"""Which weights a spec quantises: those of linear maps and of words, unless a selector spares them; why others stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.spec.diagnostics import Diagnostic, Place, nearest, one_of
from peltc.spec.quantising import BITS, COMPUTED, SPARED, Quantise

READ = "weight"
"""The role of the parameter that is quantised."""
WORDS = "embedding.word"
"""What the roles of tables of words begin with; others are small."""


@dataclass(frozen=True)
class Quantised:
    """What becomes of the base's weights.

    Attributes:
        how: as the spec says it.
        weights: those of maps and tables that are quantised, in order.
        left: those that stay as they are, and why.
        tied: how many of the first are one tensor with another of them.
        stored: the method whose numbers the checkpoint holds already; empty where they are made.
    """

    how: Quantise
    weights: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)
    tied: int = 0
    stored: str = ""

    @property
    def note(self) -> str:
        """The decision in a sentence."""
        reasons = dict.fromkeys(self.left.values())
        stay = "; ".join(f"{sum(r == why for r in self.left.values())} stay, {why}" for why in reasons)
        count = len(self.weights) - self.tied
        if self.stored:
            return f"{count} weights of the base are {self.how.to}, as {self.stored} has them in the checkpoint"
        found = f"{count} weights of the base become {self.how.to}, once what folds into them is inside"
        return found + (f"; {stay}" if stay else "")


def quantised(how: Quantise | None, anatomy: Anatomy) -> Quantised | None:
    """Decide it; None where nothing is quantised. The graph has the last word: a weight that something else reads as
    well, a module say, stays. Of a checkpoint that is quantised already, its own numbers are taken."""
    if (packed := anatomy.packed) is not None:
        uneven = packed.to not in BITS  # levels have no zero points, and inputs are read as they are
        compute = COMPUTED[-1] if uneven else how.compute if how else COMPUTED[0]
        own = dict.fromkeys(s.parameters[READ] for s in anatomy if s.parameters.get(READ) in packed.weights)
        return Quantised(Quantise(packed.to, packed.block, not uneven, compute, ()), tuple(own), stored=packed.method)
    if how is None:
        return None
    paths = {site.path: site for site in anatomy if site.kind in ("linear", "table")}
    spared = {site.parameters[READ]: site for site in paths.values()
              if any(site.matches(selector) for selector in how.spared)}  # fmt: skip
    weights: list[str] = []
    left: dict[str, str] = {}
    tied = 0
    for site in anatomy:
        name = site.parameters.get(READ, "")
        if site.kind not in ("linear", "table", "experts") or name in left or name in weights:
            continue
        same = [paths[path] for path in site.ties if path in paths]
        if (why := _stays(site, same, spared)) is not None:
            left[name] = why
        else:
            tied += any(other.parameters[READ] in weights for other in same)
            weights.append(name)
    return Quantised(how, tuple(weights), left, tied)


def _stays(site: Site, same: list[Site], spared: dict[str, Site]) -> str | None:
    """Why the weight of a site stays as it is.

    Args:
        same: sites whose weight is the same tensor.
        spared: by weight, the sites that the spec spares.
    """
    if site.kind == "experts":
        return "stacked weights of experts"
    if site.parameters[READ] in spared:
        return "spared by the spec"
    if site.kind == "table" and not site.role.startswith(WORDS):
        return "a table of few rows"
    kept = next((other for other in same if other.parameters[READ] in spared), None)
    return None if kept is None else f"one tensor with {kept.name}, which is spared by the spec"


def unmatched(how: Quantise, anatomy: Anatomy, path: str) -> Iterator[Diagnostic]:
    """The findings about what is to be quantised in a model: selectors that spare nothing, and what is quantised."""
    if (packed := anatomy.packed) is not None:
        if how != Quantise(packed.to, compute=how.compute):
            said = f"the checkpoint is quantised already ({packed.method}, {packed.to})"
            most = f"`to: {packed.to}` and `compute`" if packed.to in BITS else "no `quantise`"
            yield Diagnostic("E208", said, Place(path, key="deploy.quantise"), most,
                             "the other options are the checkpoint's own; leave them out")  # fmt: skip
        return
    maps = [site for site in anatomy if site.kind in ("linear", "experts", "table")]
    roles = sorted({site.role for site in maps if site.path})
    place = Place(path, key="deploy.quantise.except")
    for selector in how.spared:
        if selector not in SPARED and not any(site.matches(selector) for site in maps):
            yield Diagnostic("E203", f"no map or table '{selector}' in this model", place, one_of(roles),
                             nearest(selector, roles))  # fmt: skip
