"""WaveFT as Hugging Face PEFT stores it: a few wavelet coefficients, whose places follow from a seed and the sizes of
the map."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import (
    BIASES,
    COMMON,
    NUMBER,
    RANK,
    SEED,
    SWITCH,
    TARGETS,
    Array,
    Config,
    Entry,
    Format,
    patterns_of,
)
from peltc.compiler.importers.peft.targets import patterned
from peltc.compiler.importers.peft.torch_random import places
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """How many coefficients a module has, the factor, and whether they are transformed."""
    count = patterned(config.get("n_frequency_pattern"), module, config.get("n_frequency", 2592))
    plain = () if config.get("use_idwt", True) else (("transform", False),)
    return Entry("waveft", (("n", count), ("scale", config.get("scaling", 25.0)), *plain))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The coefficients [n]."""
    return dict(tensors)


def completed(found: dict[str, Array], config: Config, site: Site, outputs: int) -> dict[str, Array]:
    """The coefficients with their places [n, 2], which are the same for all maps of one size."""
    inputs, count = site.sizes["in"], found["spectrum"].size
    return {**found, "places": places(outputs, inputs, count, config.get("random_loc_seed", 777))}


WAVEFT = Format(
    kind="WAVEFT",
    tensors={"waveft_spectrum": "spectrum"},
    read={**TARGETS, "bias": BIASES, "n_frequency": RANK, "n_frequency_pattern": patterns_of(RANK), "scaling": NUMBER,
          "random_loc_seed": SEED, "use_idwt": SWITCH},
    inert=COMMON | {"fan_in_fan_out", "init_weights"},
    refused={"proportional_parameters": "how many coefficients a module has is a share of all modules' then"},
    only={
        "wavelet_family": (("db1",), "Haar's wavelet is the one that is known here"),
    },
    entry=entry,
    parameters=parameters,
    completed=completed,
    spans=True,
)  # fmt: skip
