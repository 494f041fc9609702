"""VB-LoRA as Hugging Face PEFT stores it: a bank of vectors for the whole model, and for each piece of the factors the
logits of all vectors, or the weights and numbers of the largest few."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from peltc.compiler.importers.formats import (
    BIASES,
    COMMON,
    NUMBER,
    RANK,
    SWITCH,
    TARGETS,
    Array,
    Config,
    Entry,
    Format,
    own_groups,
)
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail

ABSENT, NOTHING = -1e4, -1e3
"""The logit of a vector that a mixture is without, and that of one which is in it with the weight 0."""


def entry(config: Config, module: str) -> Entry:
    """The rank, the sizes of the bank and of the mixtures, which all modules share."""
    found = {"r": config.get("r", 4), "vectors": config.get("num_vectors", 256),
             "length": config.get("vector_length", 256), "k": config.get("topk", 2)}  # fmt: skip
    dropout = config.get("vblora_dropout")
    return Entry("vblora", (*found.items(), *((("dropout", dropout),) if dropout else ())))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The bank and the logits; of a fused map, those of a site's own pieces of B."""
    found = dict(tensors)
    for name in ("logits_A", "logits_B"):
        weights, index = found.pop(f"{name} weights", None), found.pop(f"{name} index", None)
        if weights is not None and index is not None and "bank" in found:
            found[name] = logits(weights, index, len(found["bank"]))
    if "bank" in found and "logits_B" in found and found["bank"].ndim == 2:
        found["logits_B"] = own_groups(found["logits_B"], site, found["bank"].shape[1])
    return found


def logits(weights: Array, index: Array, vectors: int) -> Array:
    """Logits of which softmax makes a mixture's weights [..., k - 1], whose last one is what is missing to 1.

    Args:
        index: which vectors are mixed [..., k].
        vectors: how many there are.
    """
    with np.errstate(invalid="ignore"):
        numbers = index.astype(np.int64)
    last = 1 - weights.sum(-1, keepdims=True)
    given = np.concatenate([weights, last], -1)
    ordered = np.sort(numbers, -1)
    different = (numbers == index).all() and (ordered[..., 1:] != ordered[..., :-1]).all()
    if given.shape != index.shape or not different or ordered.min(initial=0) < 0 or ordered.max(initial=0) >= vectors:
        raise fail("E433", f"weights {list(weights.shape)} and numbers of vectors {list(index.shape)} make no mixtures",
                   expected=f"different numbers below {vectors}, one more than there are weights")  # fmt: skip
    if (given < 0).any():
        raise fail("E433", f"a mixture's weights add up to {1 - last.min():.6g}", expected="at most 1, each at least 0")
    with np.errstate(divide="ignore"):
        chosen = np.where(given > 0, np.log(given), NOTHING)
    found = np.full((*index.shape[:-1], vectors), ABSENT, np.float32)
    np.put_along_axis(found, numbers, chosen.astype(np.float32), -1)
    return found


VBLORA = Format(
    kind="VBLORA",
    tensors={"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B",
             "vblora_logits_A_topk_weights": "logits_A weights", "vblora_logits_A_topk_indices": "logits_A index",
             "vblora_logits_B_topk_weights": "logits_B weights", "vblora_logits_B_topk_indices": "logits_B index"},
    read={**TARGETS, "bias": BIASES,
          "r": RANK, "num_vectors": RANK, "vector_length": RANK, "topk": RANK, "vblora_dropout": NUMBER,
          "save_only_topk_weights": SWITCH},
    inert=COMMON | {"fan_in_fan_out", "init_vector_bank_bound", "init_logits_std"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    shared={"vblora_vector_bank": "bank"},
    integers=frozenset({"vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"}),
)  # fmt: skip
