"""FourierFT as Hugging Face PEFT stores it: the coefficients of a few frequencies, whose places follow from a seed and
the sizes of the map."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import (
    BIASES,
    COMMON,
    NUMBER,
    RANK,
    SEED,
    TARGETS,
    Array,
    Config,
    Entry,
    Format,
    patterns_of,
)
from peltc.compiler.importers.peft.targets import dotted
from peltc.compiler.importers.peft.torch_random import places
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """How many frequencies a module has, and the factor."""
    count = dotted(config.get("n_frequency_pattern"), module, config.get("n_frequency", 1000))
    return Entry("fourierft", (("n", count), ("scale", config.get("scaling", 150.0))))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The coefficients [n]."""
    return dict(tensors)


def completed(found: dict[str, Array], config: Config, site: Site, outputs: int) -> dict[str, Array]:
    """The coefficients with their places [n, 2], which are the same for all maps of one size."""
    inputs, count = site.sizes["in"], found["spectrum"].size
    return {**found, "places": places(outputs, inputs, count, config.get("random_loc_seed", 777))}


FOURIERFT = Format(
    kind="FOURIERFT",
    tensors={"fourierft_spectrum": "spectrum"},
    read={**TARGETS, "bias": BIASES, "n_frequency": RANK, "n_frequency_pattern": patterns_of(RANK), "scaling": NUMBER,
          "random_loc_seed": SEED},
    inert=COMMON | {"fan_in_fan_out", "init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    completed=completed,
    spans=True,
)  # fmt: skip
