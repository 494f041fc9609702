"""SHiRA as Hugging Face PEFT stores it: the values of a sparse change of the weight, and their rows and columns."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import COMMON, RANK, TARGETS, Array, Config, Entry, Format
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The rank of a LoRA with as many values."""
    return Entry("shira", (("r", config.get("r", 32)),))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The values [n] and their places [n, 2], from [2, n]."""
    return {name: array.T if name == "places" else array for name, array in tensors.items()}


SHIRA = Format(
    kind="SHIRA",
    tensors={"shira_weight": "changes", "shira_indices": "places"},
    read={**TARGETS, "r": RANK},
    inert=COMMON | {"fan_in_fan_out", "init_weights", "mask_type", "random_seed"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    integers=frozenset({"shira_indices"}),
    spans=True,
)
