"""RandLoRA as Hugging Face PEFT stores it: two tensors of random bases for the whole model, which may stand in the file
once more for each module, and the vectors that scale them."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import BIASES, COMMON, NUMBER, RANK, TARGETS, Array, Config, Entry, Format
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The rank and the scale, which all modules share."""
    dropout = config.get("randlora_dropout")
    return Entry("randlora", (("r", config.get("r", 32)), ("alpha", config.get("randlora_alpha", 640)),
                              *((("dropout", dropout),) if dropout else ())))  # fmt: skip


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The bases [r, 1, n] and [m, bases, r], and what scales the former: [r, bases] and [bases, n]."""
    return dict(tensors)


RANDLORA = Format(
    kind="RANDLORA",
    tensors={"randlora_lambda": "factors", "randlora_gamma": "gains", "randlora_A": "A", "randlora_B": "B"},
    read={**TARGETS, "bias": BIASES, "r": RANK, "randlora_alpha": NUMBER, "randlora_dropout": NUMBER},
    inert=COMMON | {"fan_in_fan_out", "init_weights", "projection_prng_key", "sparse", "very_sparse"},
    refused={},
    only={
        "save_projection": ((True,), "the random bases are not in the file then; save them"),
    },
    entry=entry,
    parameters=parameters,
    shared={"randlora_A": "A", "randlora_B": "B"},
    spans=True,
)
