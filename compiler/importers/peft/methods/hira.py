"""HiRA as Hugging Face PEFT stores it.

W' = W + W ⊙ (B A)

The rank stands in the shapes of the tensors: the config may have a `rank_pattern`, which PEFT does not follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peltc.compiler.importers.formats import (
    COMMON,
    RANK,
    TARGETS,
    Array,
    Config,
    Entry,
    Format,
    Shapes,
    own_rows,
    patterns_of,
)
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The method; its rank is in the tensors' shapes."""
    return Entry("hira")


def measured(shapes: Shapes, site: Site) -> dict[str, Any]:
    """The rank, of A [r, I]."""
    found = shapes.get("A", ())
    return {"r": found[0]} if found and found[0] else {}


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """A [r, I] and B [O, r]; of a fused map, a site's own rows of B."""
    return {name: own_rows(array, site) if name == "B" else array for name, array in tensors.items()}


HIRA = Format(
    kind="HIRA",
    tensors={"hira_A": "A", "hira_B": "B", "hira_embedding_A": "A", "hira_embedding_B": "B"},
    read={**TARGETS, "r": RANK, "rank_pattern": patterns_of(RANK)},
    inert=COMMON | {"hira_dropout", "fan_in_fan_out", "init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    measured=measured,
    kinds=("linear", "table"),
)
