"""LoRA and DoRA as Hugging Face PEFT stores them.

    ΔW = s B A        s = alpha / r, or alpha / √r with `use_rslora`
    W' = m (W + ΔW) / ‖W + ΔW‖        with `use_dora`, the norm over each row

Ranks and alphas may differ by module: the first of a config's patterns that fits counts, in the order of the keys, for
the file is written with sorted keys and every reload sees them so.
"""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import (
    BIASES,
    COMMON,
    NUMBER,
    PARAMETERS,
    SWITCH,
    TARGETS,
    TOKEN_ROWS,
    Array,
    Config,
    Entry,
    Format,
    each_experts,
    own_rows,
    ranked,
)
from peltc.compiler.importers.peft.targets import OVERLAP, rank_and_alpha
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The method at a module, and its options."""
    dora = bool(config.get("use_dora"))
    options = {
        **rank_and_alpha(config, module, "lora_alpha"),
        **({"rank_stabilised": True} if config.get("use_rslora") else {}),
        **({"bias": True} if config.get("lora_bias") else {}),
        **({"dropout": config["lora_dropout"]} if config.get("lora_dropout") and not dora else {}),
    }
    return Entry("dora" if dora else "lora", tuple(options.items()))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """A [r, I], B [O, r] and the magnitudes m [O, 1]; of a fused map, a site's own rows; of experts, one of each for
    every expert, whose ranks are stored in one matrix."""
    if site.kind == "experts":
        tensors = {name: each_experts(array, site, 0 if name == "A" else 1) for name, array in tensors.items()}
    columns = {name: array.reshape(-1, 1) if name == "m" else array for name, array in tensors.items()}
    return {name: array if name == "A" else own_rows(array, site) for name, array in columns.items()}


BASE_CHANGED = (
    "PEFT changes the base's weights when it loads it; save it with `path_initial_model_for_weight_conversion`"
)
LORA = Format(
    kind="LORA",
    tensors={"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m",
             "lora_magnitude_vector.weight": "m", "lora_B.bias": "B_bias", "lora_embedding_A": "A",
             "lora_embedding_B": "B"},
    read={
        **TARGETS, **ranked("lora_alpha"), "lora_dropout": NUMBER, "use_rslora": SWITCH, "use_dora": SWITCH,
        "lora_bias": SWITCH, "ensure_weight_tying": SWITCH, "trainable_token_indices": TOKEN_ROWS, "bias": BIASES,
        "target_parameters": PARAMETERS,
    },
    inert=COMMON | {"fan_in_fan_out", "megatron_config", "megatron_core", "eva_config",
                    "qalora_group_size"},
    refused={
        "loftq_config": BASE_CHANGED, "corda_config": BASE_CHANGED, "lora_ga_config": BASE_CHANGED,
        "kasa_config": BASE_CHANGED,
        "velora_config": "it is not known here", "monteclora_config": "it is not known here",
        "arrow_config": "its router is not known here", "use_bdlora": "its blocks are not known here",
        "alora_invocation_tokens": "it acts from a token on, which no method here does",
        "use_qalora": "its grouped inputs are not known here",
        "layer_replication": "two modules share one weight then",
    },
    only={
        "init_lora_weights": ((True, False, None, "gaussian", "orthogonal", "eva"), BASE_CHANGED),
    },
    entry=entry,
    parameters=parameters,
    kinds=("linear", "table"),
    quirks=(OVERLAP,),
)  # fmt: skip
