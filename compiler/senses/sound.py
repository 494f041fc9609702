"""The ways in which models are given sound: spectrograms, either way round, and waves. Which one a model takes is found
by trying."""

from __future__ import annotations

from typing import Any

from peltc.compiler.senses.asked import Asked

HEARD = ("input_features", "input_values", "audio_values", "audio_input_features", "audio_features", "waveform",
         "spectrogram", "input_audio_embeds")  # fmt: skip
MASKS = ("input_features_mask", "feature_attention_mask", "audio_attention_mask", "input_features_attention_mask",
         "padding_mask", "audio_mask")  # fmt: skip
UNDER = "audio|speech|encoder"
SAMPLES = 20
"""Samples of a wave for each frame of a spectrogram."""
Made = dict[str, Any]


def wave(asked: Asked) -> Made | None:
    """Samples [B, T]."""
    if not (asked.name("input_values", "waveform", "audio_values") or asked.main == "input_values"):
        return None
    return _masked(asked, asked.floats(asked.sizes.batch, asked.sizes.sound * SAMPLES), 1)


def channel(asked: Asked) -> Made | None:
    """Samples of one channel [B, 1, T]."""
    if wave(asked) is None:
        return None
    return _masked(asked, asked.floats(asked.sizes.batch, 1, asked.sizes.sound * SAMPLES), 2)


def bands_first(asked: Asked) -> Made | None:
    """A spectrogram [B, M, T] of M bands."""
    return _masked(asked, asked.floats(asked.sizes.batch, bands(asked), asked.sizes.sound), 2)


def window(asked: Asked) -> Made | None:
    """A spectrogram [B, M, T] that fills the model's window: two frames for each of its positions."""
    frames = 2 * asked.number("max_source_positions", under=UNDER)
    return _masked(asked, asked.floats(asked.sizes.batch, bands(asked), frames), 2) if frames else None


def frames_first(asked: Asked) -> Made | None:
    """A spectrogram [B, T, M]."""
    return _masked(asked, asked.floats(asked.sizes.batch, asked.sizes.sound, bands(asked)), 1)


def whole(asked: Asked) -> Made | None:
    """A spectrogram [B, T, M] as long as the model's patches cover."""
    frames = asked.number("max_length", under=UNDER)
    return {_main(asked): asked.floats(asked.sizes.batch, frames, bands(asked))} if frames else None


WAYS = (whole, wave, channel, window, bands_first, frames_first)
"""Those that a model of another kind would refuse come first."""


def bands(asked: Asked) -> int:
    """M, the bands of a spectrogram, or the numbers of a frame."""
    names = ("num_mel_bins", "n_mels", "mel_bins", "feature_projection_input_dim", "input_feat_per_channel",
             "num_mel_filters", "input_dim", "feature_size", "input_size", "input_feat_size", "mel_dim")  # fmt: skip
    return asked.number(*names, default=80, under=UNDER)


def asks(asked: Asked) -> bool:
    """Whether a model reads sound."""
    return bool(_main(asked))


def _main(asked: Asked) -> str:
    if asked.main in HEARD and asked.main in asked.names:
        return asked.main
    return asked.name(*HEARD) or (asked.name("inputs") if "audio" in asked.senses else "")


def _masked(asked: Asked, numbers: Any, axis: int) -> Made:
    """A recording, and the masks of its frames that the model takes."""
    import torch

    ones = torch.ones(len(numbers), numbers.shape[axis], dtype=torch.long)
    found = {_main(asked): numbers} | {name: ones.clone() for name in MASKS if name in asked.names}
    if "attention_mask" in asked.names and "input_ids" not in asked.names:
        found["attention_mask"] = ones.clone()
    return found
