"""HRA as Hugging Face PEFT stores it: the directions of the Householder reflections of a module's input, as columns."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import BIASES, COMMON, RANK, SWITCH, TARGETS, Array, Config, Entry, Format
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The method, by whether the directions are made orthogonal first, and their number."""
    return Entry("hra_orthogonal" if config.get("apply_GS") else "hra", (("r", config.get("r", 8)),))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The directions [I, r], which all rows of a fused map share."""
    return dict(tensors)


HRA = Format(
    kind="HRA",
    tensors={"hra_u": "u"},
    read={**TARGETS, "bias": BIASES, "r": RANK, "apply_GS": SWITCH},
    inert=COMMON | {"init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
)
