"""AdaLoRA as Hugging Face PEFT stores it.

ΔW = (alpha / (r + 1e-5)) B diag(E) A        r the initial rank

Pruned ranks are left out of the file, and `rank_pattern` says which; the scale stays that of the initial rank. The
config has LoRA's keys, most of which AdaLoRA does not read: `r`, `alpha_pattern` and `use_rslora` are among these.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from peltc.compiler.importers.formats import (
    BIASES,
    COMMON,
    NUMBER,
    RANK,
    TARGETS,
    TOKEN_ROWS,
    Array,
    Config,
    Entry,
    Format,
    own_rows,
)
from peltc.compiler.importers.peft.methods.lora import LORA
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The initial rank, how many of its ranks are left, and alpha, in whose place the rank stands where it is no
    positive number."""
    rank = config.get("init_r", 12)
    pattern = config.get("rank_pattern") or {}
    kept = sum(pattern.get(f"{module}.lora_E", [True] * rank))
    alpha = config.get("lora_alpha", 8)
    pruned = (("kept", max(kept, 1)),) if kept < rank else ()
    return Entry("adalora", (("r", rank), *pruned, ("alpha", alpha if alpha > 0 else kept)))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """A [k, I], E [k] from [k, 1] and B [O, k]; of a fused map, a site's own rows. A module that has no rank left gets
    one that is zero."""
    found = {name: array.reshape(-1) if name == "E" else array for name, array in tensors.items()}
    if "E" in found and not found["E"].size:
        found = {name: np.zeros([size or 1 for size in array.shape], array.dtype) for name, array in found.items()}
    return {name: own_rows(array, site) if name == "B" else array for name, array in found.items()}


SCHEDULE = {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
ADALORA = Format(
    kind="ADALORA",
    tensors={f"lora_{name}": name for name in ("A", "E", "B")},
    read={
        **TARGETS, "bias": BIASES, "trainable_token_indices": TOKEN_ROWS, "init_r": RANK, "lora_alpha": NUMBER,
        "rank_pattern": {"type": ["object", "null"],
                         "additionalProperties": {"type": "array", "items": {"type": "boolean"}}},
    },
    inert=COMMON | LORA.inert | SCHEDULE | {"r", "alpha_pattern", "lora_dropout", "use_rslora", "init_lora_weights",
                                            "lora_bias"},
    refused=LORA.refused,
    only={},
    entry=entry,
    parameters=parameters,
)  # fmt: skip
