"""Tiny random instances of the text architectures of `transformers`, built from their configs.

Each has two layers, or one of each kind of layer it knows, and random weights, biases and norms that are not zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES: dict[int, tuple[str, ...]] = {
    64: ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "model_dim",
         "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    128: ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "ffn_hidden_size", "encoder_ffn_dim",
          "decoder_ffn_dim"),
    32: ("moe_intermediate_size", "shared_expert_intermediate_size"),
    16: ("head_dim", "d_kv", "q_lora_rank", "kv_lora_rank", "v_head_dim", "sliding_window"),
    8: ("qk_rope_head_dim", "qk_nope_head_dim"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts"),
    2: ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
        "num_decoder_layers", "num_key_value_heads", "num_experts_per_tok", "top_k", "type_vocab_size", "eos_token_id"),
    1: ("num_hidden_groups", "bos_token_id", "decoder_start_token_id", "n_group", "topk_group",
        "first_k_dense_replace"),
    0: ("pad_token_id",),
    100: ("vocab_size",),
}  # fmt: skip
"""Small values for the names that configs use."""

DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

ODD: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3": {"text_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                               "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}},
    "modernvbert": {"text_config": {"model_type": "modernbert", "hidden_size": 64, "intermediate_size": 128,
                                    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
                                    "pad_token_id": 0}},
}  # fmt: skip
"""What single configs need beside."""

NO_HEAD_DIM = {"gptj", "codegen"}
LATENT = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe_lite", "minicpm3", "kimi_linear",
          "bailing_hybrid", "axk1", "axk2", "glm_moe_dsa", "longcat_flash", "youtu", "mistral4"}  # fmt: skip
"""Latent attention computes the size of a head from its parts, and has as many key and value heads as others."""

FAMILIES: list[tuple[str, str]] = [
    tuple(line.split()) for line in (Path(__file__).parent / "architectures.txt").read_text().splitlines() if line
]  # type: ignore[misc]
"""Model type and class of every architecture that exports to ONNX with symbolic axes."""

SAMPLE = ("albert", "bert", "falcon", "gpt2", "gpt_neox", "llama", "mixtral", "mpt", "phi3", "roformer", "t5", "youtu")
"""A dozen that differ most: shared layers, post-norm, multi-query, fused and interleaved projections, parallel blocks,
rotary, ALiBi and relative positions, experts, an encoder with a decoder, latent attention."""


def config_of(model_type: str) -> Any:
    """A tiny config of a model type."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    known = cls().to_dict()
    aliases = getattr(cls, "attribute_map", {})
    values = {n: size for size, names in SIZES.items() for n in names if n in known or n in aliases}
    for alias, name in aliases.items():
        if alias in values and name in values:
            del values[alias]
    if known.get("layer_types"):
        kinds = list(dict.fromkeys(known["layer_types"]))
        depth = max(2, len(kinds))
        values["layer_types"] = (kinds * 2)[:depth]
        values |= {name: depth for name in DEPTHS if name in values}
    if model_type in NO_HEAD_DIM | LATENT:
        values.pop("head_dim", None)
    if model_type in LATENT and "qk_rope_head_dim" in known:
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)
    values |= ODD.get(model_type, {})
    try:
        return cls(**values)
    except Exception:  # a config that computes the size of a head itself
        values.pop("head_dim", None)
        return cls(**values)


def build(model_type: str, architecture: str) -> Any:
    """A tiny model with random weights, seeded."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config_of(model_type)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms, biases and zero starts too
            parameter += 0.04 * torch.randn(parameter.shape, generator=generator)
    return model


def save(model_type: str, architecture: str, folder: Path) -> Path:
    """A tiny model as a folder."""
    model = build(model_type, architecture)
    model.save_pretrained(folder)
    type(model).from_pretrained(folder).save_pretrained(folder)  # some set padding to zero when they are loaded
    config = json.loads((folder / "config.json").read_text())
    if not config.get("architectures"):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return folder
