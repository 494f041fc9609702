"""BEFT as Hugging Face PEFT stores it: a vector for each module, which is added to its bias, or is one where there was
none."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import COMMON, TARGETS, Array, Config, Entry, Format, own_rows
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The method, which has no options."""
    return Entry("bitfit")


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The change [O] from [1, O]; of a fused map, a site's own part."""
    return {name: own_rows(array.reshape(-1), site) for name, array in tensors.items()}


BEFT = Format(
    kind="BEFT",
    tensors={"beft_bias": "change"},
    read=TARGETS,
    inert=COMMON | {"init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
)
