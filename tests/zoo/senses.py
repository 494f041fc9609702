"""Tiny random instances of architectures of `transformers` that read images, sound, videos or series.

A config is its class's default one with every size shrunk by what it is called, and what single ones need beside. The
weights are random, norms, biases and running statistics too, and none of them zero.
"""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

FAMILIES: list[tuple[str, str]] = [
    tuple(line.split()) for line in (Path(__file__).parent / "senses.txt").read_text().splitlines() if line
]  # type: ignore[misc]
"""Model type and class of every architecture that exports to ONNX and reads more than text."""

SAMPLE = ("vit", "swinv2", "convnext", "levit", "clip", "siglip2", "llava", "whisper", "wav2vec2", "videomae",
          "patchtst", "florence2")  # fmt: skip
"""A dozen that differ most."""

CONVOLUTIONS = ("convnext", "dinov3_convnext", "hgnet_v2", "mobilenet_v1", "pp_lcnet", "pp_lcnet_v4", "resnet",
                "textnet", "superpoint", "uvdoc_backbone", "dac")  # fmt: skip
WITHOUT_ATTENTION = {
    **dict.fromkeys(CONVOLUTIONS, "it is of convolutions"),
    "focalnet": "it modulates by what surrounds a patch, without a softmax of a product",
    "mobilevitv2": "its attention is a sum, without a product of queries and keys",
    "swiftformer": "its attention is a sum, without a product of queries and keys",
    "patchtsmixer": "it mixes by maps alone",
}
"""Architectures whose graph has no attention, and why."""

HIDDEN, FEED, LAYERS, HEADS, HEAD, WORDS, SIDE = 64, 96, 2, 4, 16, 100, 32
WIDTHS = re.compile(
    r"^((vision_|encoder_|text_|audio_|decoder_|output_|projector_|fusion_|memory_|img_|image_|proj_|adapter_|mm_|share_|"
    r"aligner_|gen_|cond_|bottleneck_|pooler_|qformer_|out_)?(hidden_size|embed_dim|embeds_dim|hidden_dim|hidden_dims|"
    r"emb_dim|width|proj_dim)|d_model|n_embd|dim|model_dim|embedding_dim|d_embed|embedding_size|projection_dim|"
    r"word_embed_proj_dim|pooler_output_size|(encoder_|text_|vision_|audio_)?(output_size|output_dim)|"
    r"classifier_proj_size|projector_(hidden|output|input)_(size|dim)|lm_hidden_size|intermediate_hidden_size|"
    r"audio_embed_dim|vision_embed_dim|d_text|d_vision|query_dim_)$"
)
FEEDS = re.compile(r"(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size|feed_forward_dim|mlp_hidden_size|ffn_inner_dim|"
                   r"intermediate_dim|mlp_hidden_dim|feedforward_dim)$")  # fmt: skip
DEPTHS = re.compile(r"^(depth|n_layers?|(num_)?(\w+_)?(hidden_)?(layers|blocks)|num_\w+_layers|\w+_num_layers|"
                    r"\w+_(depth|num_hidden_layers))$")  # fmt: skip
COUNTS = re.compile(r"(^|_)(num_attention_heads|num_heads|attention_heads|n_heads?|num_query_heads|nhead|heads)$")
SHARED = re.compile(r"(key_value_heads|kv_heads)$")
HEAD_SIZES = re.compile(r"^(\w+_)?(head_dim|head_size|head_width|d_kv|kv_channels)$")
CHANNELS = re.compile(r"(hidden_sizes|embed_dims?|channels?|dims?|widths|filters|channel_list|backbone_hidden_sizes)$")
STAGES = re.compile(r"^(depths|layers|blocks_per_stage|stage_num\w*_(blocks|of_layers)|num_blocks|num_block_repeats|"
                    r"encoder_layers|num_hidden_layers|conv_layer_repeats|layer_depths|stage_depths)$")  # fmt: skip
CHOSEN = re.compile(r"indexes|layer_ids|_layers$|global_attention|layer_indices|insert_layer")
TOKEN = re.compile(r"(^|_)(token_id|token_index|token_ids|token)$")
DROPPED = {"id2label", "label2id", "transformers_version", "dtype", "architectures", "_name_or_path", "out_features",
           "out_indices", "_out_features", "_out_indices", "stage_names", "num_labels", "block_types"}  # fmt: skip
SIZES = {
    SIDE: ("image_size", "img_size", "input_image_size", "pretrain_image_size", "max_source_positions",
           "sliding_window", "subsampling_conv_channels", "conv_channels", "conv_hidden_size"),
    16: ("num_mel_bins", "mel_bins", "n_mels", "num_mel_filters", "input_feat_per_channel", "num_position_embeddings",
         "num_conv_pos_embeddings", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
         "v_head_dim"),
    8: ("patch_size", "encoder_stride"),
    4: ("num_query_tokens", "num_queries", "num_latents", "resampler_n_latents", "mm_tokens_per_image",
        "image_seq_length", "num_image_tokens", "num_frames", "num_experts", "num_local_experts", "n_routed_experts",
        "moe_num_experts"),
    2: ("num_conv_pos_embedding_groups", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"),
    1: ("n_shared_experts", "n_group", "topk_group", "moe_num_shared_experts", "first_k_dense_replace"),
    64: ("codebook_size", "num_embeddings"),
}  # fmt: skip
SMALL = {name: size for size, names in SIZES.items() for name in names}
"""The size of what is called so, where it is larger."""
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 3, "forced": 2, "sep": 2, "unk": 4, "cls": 1, "mask": 5}

SWIN = {"depths": [1, 1], "num_heads": [2, 4]}
NET = {"width_coefficient": 0.1, "hidden_dim": 128}
SERIES = {"feature_size": ..., "prediction_length": 4, "context_length": 16, "num_time_features": 2}
ROPE = {"text_config": {"rope_parameters": {"mrope_section": [4, 2, 2]}}}
ODD: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 64, "vision_config": {**NET, "hidden_dim": 64, "width_coefficient": 0.2}},
    "levit": {"image_size": 64, "patch_size": 16}, "mobilevitv2": {"image_size": 64}, "donut-swin": SWIN, "swin": SWIN,
    "textnet": {"stem_out_channels": 16},
    "audio-spectrogram-transformer": {"frequency_stride": 8, "time_stride": 8, "max_length": 64, "num_mel_bins": 16},
    "hgnet_v2": {"stem_channels": [3, 16, 16], "stage_in_channels": [16, 32, 32, 64], "embedding_size": 16,
                 "stage_mid_channels": [16, 16, 32, 32], "stage_out_channels": [32, 32, 64, 64],
                 "hidden_sizes": [32, 32, 64, 64], "stage_numb_of_layers": [2, 2, 2, 2]},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "cls_token": [False, False, True]},
    "wav2vec2-conformer": {"vocab_size": 100},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4, "encoder_config": {"num_key_value_heads": 4}},
    "clvp": {part: {"num_attention_heads": 2} for part in ("text_config", "speech_config", "decoder_config")},
    "aria": {"projector_patch_to_query_dict": {16: 4}}, "kosmos-2": {"latent_query_num": 4},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 192}},
    "glmasr": {"audio_config": {"intermediate_size": 256}}, "gemma4": {"text_config": {"per_layer_config": {}}},
    "perceiver": {"d_latents": 64, "d_model": 64, "num_blocks": 1},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]}, "time_series_transformer": SERIES,
    "qwen3_omni_moe_thinker": {**ROPE, "vision_start_token_id": 80, "audio_start_token_id": 81},
}  # fmt: skip
"""What single configs need beside; `...` leaves a key out."""


def small(content: dict[str, Any], taken: dict[str, int]) -> dict[str, Any]:
    """A config's content with small sizes, by the names of its keys.

    Args:
        taken: ids that special tokens have already, the same for the same word in all parts of a config.
    """
    staged = any(isinstance(content.get(key), (list, tuple)) for key in ("depths", "num_heads"))
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key in DROPPED:
            continue
        found[key] = value
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            found[key] = small(value, taken)
        elif key in ("layer_types", "mlp_layer_types") and value:
            other = next((kind for kind in value if kind != value[0]), value[0])
            found[key] = list(value)[:LAYERS] if len(value) <= LAYERS else [value[0], other]
        elif re.search("feature_layers?$", key) and isinstance(value, (int, list)):
            several = [
                max(v, -LAYERS) if v < 0 else min(v, LAYERS - 1) for v in ([value] if isinstance(value, int) else value)
            ]
            found[key] = several[0] if isinstance(value, int) else several
        elif isinstance(value, bool) or not isinstance(value, (int, list, tuple)) or key == "rope_parameters":
            continue
        elif TOKEN.search(key):
            found[key] = token(key, value, taken)
        elif isinstance(value, int):
            found[key] = size_of(key, value, staged, content)
        elif value and all(type(v) is int for v in value):
            found[key] = several_of(key, list(value))
    if staged:
        for key in ("num_layers", *(["hidden_size"] if {"embed_dim", "embed_dims"} & content.keys() else [])):
            found.pop(key, None)
    if all(isinstance(content.get(key), (list, tuple)) for key in ("conv_dim", "conv_kernel", "conv_stride")):
        found |= {
            "conv_dim": [32] * 3,
            "conv_kernel": [10, 3, 2],
            "conv_stride": [5, 2, 2],
            "num_feat_extract_layers": 3,
        }
    sections(found)
    return found


def token(key: str, value: Any, taken: dict[str, int]) -> Any:
    """The id of a special token in a small vocabulary."""
    if isinstance(value, (list, tuple)):
        return [token(key, v, taken) for v in value][:1]
    word = re.sub(r"_(token_id|token_index|index|id|token)$", "", key)
    for name, number in SPECIAL.items():
        if word == name or (name == "forced" and word.startswith(name)):
            return number if value is None or not 0 <= value < WORDS - 60 else value
    return value if value is None or value < 0 else taken.setdefault(word, WORDS - 1 - len(taken))


def size_of(key: str, value: int, staged: bool, content: dict[str, Any]) -> int:
    """A small size for a name."""
    if value <= 0:
        return value
    if "vocab_size" in key:
        return value if key.startswith("type") else WORDS
    if key == "window_size":  # in pixels where patches are merged, else in patches
        return SIDE if "spatial_merge_size" in content else min(value, 4)
    if WIDTHS.search(key):
        return 32 if key == "embed_dim" and staged else HIDDEN
    if FEEDS.search(key):
        return 32 if key.startswith(("moe_", "expert_", "shared_expert_")) else FEED
    if SHARED.search(key):
        return 2 if value < content.get("num_attention_heads", value + 1) else HEADS
    if COUNTS.search(key):
        return min(value, HEADS)
    if key in SMALL:
        return min(value, SMALL[key]) if key not in ("image_size", "img_size") else SIDE
    if HEAD_SIZES.search(key):
        return HEAD
    if DEPTHS.search(key):
        return min(value, LAYERS)
    if re.search(r"^(max_\w*positions?\w*|n_positions|n_ctx|max_seq_len|max_sequence_length)$", key):
        return min(value, 160)
    return value


def several_of(key: str, value: list[int]) -> list[int]:
    """Small sizes of stages."""
    if STAGES.search(key):
        return [1] * len(value)
    if COUNTS.search(key):
        return [1 if v < 2 else 2 if v < 4 else 4 for v in value]
    if CHANNELS.search(key) and min(value) > 4:
        unit = max(1, min(value) // 16)
        return [max(8, (v // unit + 7) // 8 * 8) for v in value]
    if key in ("image_size", "input_size"):
        return [SIDE] * len(value)
    if CHOSEN.search(key):
        return sorted({min(v, LAYERS - 1) for v in value})
    return [min(v, 4) for v in value] if key.endswith("window_size_per_stage") else value


def sections(found: dict[str, Any]) -> None:
    """Sections of rotations along several axes as wide as a head is now, in place."""
    for name in ("rope_parameters", "rope_scaling"):
        table = found.get(name)
        if isinstance(table, dict) and table.get("mrope_section"):
            half = int(found.get("head_dim") or HEAD) // 2
            table["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def changed(content: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A config's content with other settings, deep ones too."""
    for key, value in more.items():
        if value is ...:
            content.pop(key, None)
        elif isinstance(value, dict) and isinstance(content.get(key), dict):
            changed(content[key], value)
        else:
            content[key] = value
    return content


def build(model_type: str, architecture: str) -> Any:
    """A tiny model with random weights, seeded."""
    import torch
    import transformers

    cls = transformers.CONFIG_MAPPING[model_type]
    content = small(cls().to_dict(), {})
    content.pop("model_type", None)
    config = cls(**changed(content, copy.deepcopy(ODD.get(model_type, {}))))
    torch.manual_seed(0)
    model = getattr(transformers, architecture)._from_config(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.is_floating_point():
                    continue
                noise = torch.randn(parameter.shape, generator=draw)
                if "Conv" in type(module).__name__ and name == "weight":  # else nothing is left behind many of them
                    noise *= 40 / math.sqrt(max(1, parameter[0].numel()))
                gain = name in ("weight", "gamma") and parameter.dim() <= 1 and "norm" in type(module).__name__.lower()
                parameter.copy_(1 + 0.1 * noise if gain else 0.05 * noise)
            for name, buffer in module._buffers.items():
                if name == "running_mean":
                    buffer.copy_(0.05 * torch.randn(buffer.shape, generator=draw))
                elif name == "running_var":
                    buffer.copy_(1 + 0.1 * torch.rand(buffer.shape, generator=draw))
    return model


def save(model_type: str, architecture: str, folder: Path) -> Path:
    """A tiny model as a folder."""
    model = build(model_type, architecture)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if not config.get("architectures"):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return folder
