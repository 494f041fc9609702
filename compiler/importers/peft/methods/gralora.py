"""GraLoRA as Hugging Face PEFT stores it: the factors of a grid of low-rank blocks, and those of a LoRA beside it."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import (
    BIASES,
    COMMON,
    NUMBER,
    RANK,
    TARGETS,
    Array,
    Config,
    Entry,
    Format,
    own_rows,
)
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The rank, the grid and the scale, which all modules share."""
    found = {"r": config.get("r", 32), "k": config.get("gralora_k", 2), "hybrid": config.get("hybrid_r", 0),
             "alpha": config.get("alpha", 64)}  # fmt: skip
    dropout = config.get("gralora_dropout")
    return Entry("gralora", (*found.items(), *((("dropout", dropout),) if dropout else ())))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """A [k, I / k, r] and B [k, r, O / k] of the whole map; of the LoRA beside it, a site's own rows."""
    return {name: own_rows(array, site) if name == "general_B" else array for name, array in tensors.items()}


GRALORA = Format(
    kind="GRALORA",
    tensors={"gralora_A": "A", "gralora_B": "B", "gralora_A_general.weight": "general_A",
             "gralora_B_general.weight": "general_B"},
    read={**TARGETS, "bias": BIASES,
          "r": RANK, "gralora_k": RANK, "hybrid_r": {"type": "integer", "minimum": 0}, "alpha": NUMBER,
          "gralora_dropout": NUMBER},
    inert=COMMON | {"fan_in_fan_out", "init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    spans=True,
)  # fmt: skip
