"""PVeRA as Hugging Face PEFT stores it: VeRA whose hidden values are drawn in training, and their means in deployment;
the first half of A and of the vector d make the means, the second half the variances, which are left out."""

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
    """VeRA of the rank that all modules share."""
    return Entry("vera", (("r", config.get("r", 256)),))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The halves that make means: A [r, I] and d [r]; B [O, r] and its scale [O], of a fused map a site's own rows."""
    halves = {name: array[: len(array) // 2] if name in ("A", "d") and array.ndim else array
              for name, array in tensors.items()}  # fmt: skip
    return {name: array if name in ("A", "d") else own_rows(array, site) for name, array in halves.items()}


PVERA = Format(
    kind="PVERA",
    tensors={"pvera_lambda_b": "b_scale", "pvera_lambda_d": "d"},
    read={**TARGETS, "bias": BIASES, "r": RANK, "d_initial": NUMBER},
    inert=COMMON | {"pvera_dropout", "fan_in_fan_out", "init_weights", "projection_prng_key", "generator_seed"},
    refused={"sample_at_inference": "what is drawn anew for each input is no function of it"},
    only={
        "save_projection": ((True,), "the random matrices are not in the file then; save them"),
    },
    entry=entry,
    parameters=parameters,
    shared={"pvera_A": "A", "pvera_B": "B"},
)
