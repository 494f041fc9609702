"""Which weights a spec quantises: those of linear maps, unless a selector spares them; why the others stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.diagnostics import Diagnostic, Place, nearest, one_of
from peltc.spec.quantising import SPARED, Quantise

READ = "weight"
"""The role of the parameter that is quantised."""


@dataclass(frozen=True)
class Quantised:
    """What becomes of the base's weights.

    Attributes:
        how: as the spec says it.
        weights: those of maps that are quantised, in order.
        left: those that stay as they are, and why.
    """

    how: Quantise
    weights: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """The decision in a sentence."""
        reasons = dict.fromkeys(self.left.values())
        stay = "; ".join(f"{sum(r == why for r in self.left.values())} stay, {why}" for why in reasons)
        found = f"{len(self.weights)} weights of maps become {self.how.to}, once what folds into them is inside"
        return found + (f"; {stay}" if stay else "")


def quantised(how: Quantise, anatomy: Anatomy) -> Quantised:
    """Decide it. The graph has the last word: a weight that something else reads as well, a module say, stays."""
    tables = {site.path for site in anatomy if site.kind == "table"}
    spared = {site.parameters[READ] for site in anatomy if site.kind == "linear"
              and any(site.matches(selector) for selector in how.spared)}  # fmt: skip
    weights: list[str] = []
    left: dict[str, str] = {}
    for site in anatomy:
        name = site.parameters.get(READ, "")
        if site.kind == "experts":
            left[name] = "stacked weights of experts"
        elif site.kind != "linear" or name in left or name in weights:
            continue
        elif name in spared:
            left[name] = "spared by the spec"
        elif tables & set(site.ties):
            left[name] = "one tensor with a table"
        else:
            weights.append(name)
    return Quantised(how, tuple(weights), left)


def unmatched(how: Quantise, anatomy: Anatomy, path: str) -> Iterator[Diagnostic]:
    """The findings about what is to be quantised in a model: selectors that spare nothing."""
    maps = [site for site in anatomy if site.kind in ("linear", "experts")]
    roles = sorted({site.role for site in maps if site.path})
    place = Place(path, key="deploy.quantise.except")
    for selector in how.spared:
        if selector not in SPARED and not any(site.matches(selector) for site in maps):
            yield Diagnostic("E203", f"no map '{selector}' in this model", place, one_of(roles),
                             nearest(selector, roles))  # fmt: skip
