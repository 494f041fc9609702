"""LayerNorm tuning as Hugging Face PEFT stores it: the gains, and the biases where there are any, of whole norms."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import COMMON, TARGETS, Array, Config, Entry, Format
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The method; gain and bias are both trained."""
    return Entry("norm_tuning")


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The norm's gain [D] and bias [D], as they are."""
    return dict(tensors)


LN_TUNING = Format(
    kind="LN_TUNING",
    tensors={"ln_tuning_layers.weight": "gain", "ln_tuning_layers.bias": "shift"},
    read=TARGETS,
    inert=COMMON,
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    kinds=("norm",),
)
