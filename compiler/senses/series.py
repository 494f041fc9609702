"""Time series, as models of forecasting are given them."""

from __future__ import annotations

from typing import Any

from peltc.compiler.senses.asked import Asked

Made = dict[str, Any]


def history(asked: Asked) -> Made | None:
    """Past values [B, T, C], or [B, T] of one channel, with what is known of each time."""
    import torch

    batch = asked.sizes.batch
    length = asked.number("context_length", default=32)
    channels = asked.number("num_input_channels", "input_size", default=1)
    timed = asked.name("past_time_features")
    lags = asked.setting("lags_sequence", kinds=(list, tuple)) or [0]
    length += max(lags) if timed else 0
    flat = bool(asked.name("freq", "window_size")) or (channels == 1 and bool(timed))
    shape = (batch, length) if flat else (batch, length, channels)
    found: Made = {"past_values": asked.floats(*shape)}
    if timed:
        features = asked.number("num_time_features")
        found[timed] = asked.floats(batch, length, features)
        found["past_observed_mask"] = torch.ones(shape)
        if name := asked.name("future_time_features"):
            ahead = asked.number("prediction_length", default=4)
            found[name] = asked.floats(batch, ahead, features)
    if name := asked.name("past_values_padding"):
        found[name] = torch.zeros(shape, dtype=torch.long)
    if name := asked.name("freq"):
        found[name] = torch.zeros(batch, 1, dtype=torch.long)
    return found


WAYS = (history,)


def asks(asked: Asked) -> bool:
    """Whether a model reads time series."""
    return "past_values" in asked.names
