"""Tiny instances of models that read images, sound, videos or series, alone or beside text, and inputs for them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
TEXT = {**SMALL, "vocab_size": 100, "max_position_embeddings": 64}
SPEECH = {
    "vocab_size": 100, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAVE = {"conv_dim": (32,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
LEVIT = {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8], "drop_path_rate": 0, "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]}  # fmt: skip
SERIES = {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 32,
          "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 64, "prediction_length": 4}  # fmt: skip

MADE: dict[str, Callable[[], Any]] = {
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**{**VISION, "mlp_ratio": 2})),
    "swin": lambda: t.SwinForImageClassification(
        t.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)),
    "levit": lambda: t.LevitForImageClassification(t.LevitConfig(**LEVIT)),
    "videomae": lambda: t.VideoMAEForVideoClassification(t.VideoMAEConfig(**VISION, num_frames=4)),
    "wav2vec2": lambda: t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SMALL, vocab_size=30, **WAVE)),
    "whisper": lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**SPEECH)),
    "patchtst": lambda: t.PatchTSTForPrediction(t.PatchTSTConfig(**SERIES)),
    "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)),
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config={**TEXT, "model_type": "llama", "num_key_value_heads": 2},
            vision_config={**VISION, "model_type": "clip_vision_model"}, image_token_index=99)),
}  # fmt: skip


def tiny(name: str) -> Any:
    """A tiny model with random weights, biases, norms and running statistics, none of them zero."""
    torch.manual_seed(0)
    model = MADE[name]().eval()
    for key, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and key.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=0.1)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def save(name: str, folder: Path) -> Path:
    """Write a tiny model to a folder."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny(name).save_pretrained(folder)
    logging.disable(logging.NOTSET)
    return folder


def feeds(name: str, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs as a processor would make them, of lengths that are not those of the compiler's examples."""
    draw = torch.Generator().manual_seed(seed)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    def ids(length: int, high: int = 90) -> torch.Tensor:
        return torch.randint(6, high, (batch, length), generator=draw)

    if name in ("vit", "dinov2", "swin"):
        return {"pixel_values": floats(batch, 3, 32, 32)}
    if name == "levit":
        return {"pixel_values": floats(batch, 3, 64, 64)}
    if name == "videomae":
        return {"pixel_values": floats(batch, 4, 3, 32, 32)}
    if name == "wav2vec2":
        mask = torch.ones(batch, 3000, dtype=torch.long)
        mask[-1, 2000:] = 0
        return {"input_values": floats(batch, 3000) * mask, "attention_mask": mask}
    if name == "whisper":
        return {"input_features": floats(batch, 8, 32), "attention_mask": torch.ones(batch, 32, dtype=torch.long),
                "decoder_input_ids": ids(11)}  # fmt: skip
    if name == "patchtst":
        return {"past_values": floats(batch, 32, 2)}
    rows = ids(15)
    if name == "llava":  # four patches of an image
        rows = torch.cat([rows[:, :2], torch.full((batch, 4), 99), rows[:, 2:]], 1)
    return {"input_ids": rows, "pixel_values": floats(batch, 3, 32, 32), "attention_mask": torch.ones_like(rows)}
