"""What other libraries and papers call things that have another name here: for hints alone, no spec is read by it."""

from __future__ import annotations

from collections.abc import Container

ALIASES: dict[str, tuple[str, ...]] = {
    # keys of a spec and of an attachment
    "adapters": ("attach",), "modules": ("attach", "at"), "peft": ("attach",), "version": ("pelt",),
    "adapter": ("method", "bottleneck"), "type": ("method",), "peft_type": ("method",),
    "target_modules": ("at",), "target": ("at",), "targets": ("at",), "sites": ("at",), "site": ("at",),
    "where": ("at",), "layers_to_transform": ("layers",), "leave_out": ("layers",), "layer": ("layers",),
    "adapter_name": ("name",), "base_model": ("model",), "base_model_name_or_path": ("model",),
    "merge": ("mode",), "merged": ("fold",), "unmerged": ("static",), "dynamic": ("static",),
    "dtype": ("precision",), "torch_dtype": ("precision",), "bf16": ("bfloat16",), "fp16": ("float16",),
    "device": ("provider",), "execution_provider": ("provider",), "providers": ("provider",), "gpu": ("cuda",),
    "half": ("float16",), "fp32": ("float32",), "auto": ("checkpoint",), "random_seed": ("seed",),
    "num_labels": ("labels",), "id2label": ("labels",), "classes": ("labels",), "vocab_size": ("vocabulary",),
    "weight": ("weights",), "adapter_weights": ("weights",),
    # options
    "rank": ("r",), "lora_r": ("r",), "dim": ("r", "size"), "lora_alpha": ("alpha",), "lora_dropout": ("dropout",),
    "use_rslora": ("rank_stabilised",), "rslora": ("rank_stabilised",), "use_dora": ("dora",),
    "reduction_factor": ("reduction",), "bottleneck_size": ("size",), "adapter_size": ("size",),
    "num_virtual_tokens": ("length",), "prefix_length": ("length",), "prompt_length": ("length",),
    "num_tokens": ("length",), "tokens": ("length",), "encoder_hidden_size": ("hidden",),
    "bottleneck": ("hidden",), "scaling": ("scale", "alpha"), "non_linearity": ("activation",),
    "activation_function": ("activation",), "use_gating": ("gate",), "gating": ("gate",), "gates": ("gate",),
    "share": ("prototype", "generate"), "shared": ("prototype", "generate"), "hypernetwork": ("generate",),
    "mask": ("bank",), "masks": ("bank",), "mixture": ("experts", "mole"), "moe": ("experts", "mole"),
    # methods and recipes
    "prefix_tuning": ("prefix",), "prefixtuning": ("prefix",), "prompt_tuning": ("prompt",),
    "prompttuning": ("prompt",), "soft_prompt": ("prompt",), "houlsby": ("bottleneck",), "pfeiffer": ("bottleneck",),
    "seq_bn": ("bottleneck",), "double_seq_bn": ("bottleneck",), "par_bn": ("parallel_adapter",),
    "parallel": ("parallel_adapter",), "scaled_parallel": ("parallel_adapter",), "bias": ("bitfit",),
    "bias_tuning": ("bitfit",), "ln_tuning": ("norm_tuning",), "layer_norm_tuning": ("norm_tuning",),
    "layernorm": ("norm_tuning", "norm"), "lora_fa": ("lora",), "rs_lora": ("lora",), "mam_adapter": ("mam",),
    "mix_and_match": ("mam",), "phm": ("compacter",), "compacter++": ("compacter",), "full": ("replace",),
    "token": ("trainable_tokens",), "embedding_tokens": ("trainable_tokens",),
    "x_peft": ("xpeft",), "uni_pelt": ("unipelt",),
    # sites
    "self_attention": ("attention",), "self_attn": ("attention",), "attn": ("attention",), "mlp": ("feed_forward",),
    "ffn": ("feed_forward",), "classifier": ("head",), "lm_head": ("head",), "score": ("head",),
    "embeddings": ("embedding.word", "embedding"), "word_embeddings": ("embedding.word",),
}  # fmt: skip
"""By other words, ours, of which the first that is known at the place is meant."""


SENTENCES = {
    "modules_to_save": "attach `method: replace` there, `at: head` say: it is trained as a whole and saved too",
    "all_linear": "`at: '*'` is every linear map that has a role, a head too",
}
"""What stands here in place of other words that no single word of ours says."""


def said(word: str) -> str:
    """What to write in place of a word that no word of ours stands for, or ""."""
    return SENTENCES.get(_plain(word), "")


def ours(word: str, known: Container[str]) -> str:
    """Our name for what is called or spelt `word` elsewhere, if it is known at the place; "" otherwise."""
    plain = _plain(word)
    return next((name for name in (*ALIASES.get(plain, ()), plain) if name in known), "")


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace(" ", "_").strip("()")
