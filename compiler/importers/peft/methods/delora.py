"""DeLoRA as Hugging Face PEFT stores it: two factors whose pairs are scaled to the norm 1, a strength, and the norms of
the weight's columns when the module was made."""

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
    patterns_of,
)
from peltc.compiler.importers.peft.targets import patterned
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The rank at a module, and the strength that it started with."""
    options = {
        "r": patterned(config.get("rank_pattern"), module, config.get("r", 8)),
        "strength": patterned(config.get("lambda_pattern"), module, config.get("delora_lambda", 15)),
    }
    return Entry("delora", tuple(options.items()))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """A [r, I], B [O, r], the strength and the norms [I] of the whole map."""
    return dict(tensors)


DELORA = Format(
    kind="DELORA",
    tensors={"delora_A": "A", "delora_B": "B", "delora_lambda": "bound", "delora_w_norm": "norms"},
    read={**TARGETS, "bias": BIASES, "r": RANK, "delora_lambda": NUMBER, "rank_pattern": patterns_of(RANK),
          "lambda_pattern": patterns_of(NUMBER)},
    inert=COMMON | {"module_dropout", "init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    spans=True,
)  # fmt: skip
