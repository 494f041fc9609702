"""HiRA as Hugging Face PEFT stores it.

W' = W + W ⊙ (B A)
"""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import COMMON, RANK, TARGETS, Array, Config, Entry, Format, own_rows, patterns_of
from peltc.compiler.importers.targets import patterned
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The rank at a module."""
    return Entry("hira", (("r", patterned(config.get("rank_pattern"), module, config.get("r", 32))),))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """A [r, I] and B [O, r]; of a fused map, a site's own rows of B."""
    return {name: own_rows(array, site) if name == "B" else array for name, array in tensors.items()}


HIRA = Format(
    kind="HIRA",
    tensors={"hira_A": "A", "hira_B": "B"},
    read={**TARGETS, "r": RANK, "rank_pattern": patterns_of(RANK)},
    inert=COMMON | {"hira_dropout", "fan_in_fan_out", "init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
)
