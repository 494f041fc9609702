"""The ways in which models are given images and videos. Which one a model takes is found by trying; none is looked up
by the model's type.

A way makes inputs by name, or says None where the model's `forward` asks for something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peltc.compiler.senses.asked import Asked

if TYPE_CHECKING:
    import torch

PIXELS = ("pixel_values", "pixel_values_videos", "flattened_patches", "images", "hidden_states", "inputs")
SIDE, PATCHES = 224, 12
"""The side of an image where the config does not say it, and in how many patches, which 2, 3 and 4 divide."""
UNDER = "vision|image|visual|encoder|backbone"
Made = dict[str, Any]


def side_of(asked: Asked) -> tuple[int, int, int, int]:
    """Channels, height, width and patch of an image."""
    size: Any = asked.setting("image_size", "img_size", "input_size", kinds=(int, list, tuple, dict), under=UNDER)
    patch = asked.setting("patch_size", "spatial_patch_size", kinds=(int, list, tuple), under=UNDER)
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch or 1
    if isinstance(size, dict):
        size = [size.get("height", SIDE), size.get("width", SIDE)]
    free = patch * PATCHES if patch > 1 else SIDE  # of a model that takes images of any size
    high, wide = (size, size) if isinstance(size, int) else (size[0], size[-1]) if size else (free, free)
    channels = asked.number("num_channels", "in_channels", "in_chans", "image_channels", default=3, under=UNDER)
    return channels, high, wide, patch


def one(asked: Asked) -> Made | None:
    """One image a row [B, C, H, W]."""
    channels, high, wide, _ = side_of(asked)
    return {_main(asked): asked.floats(asked.sizes.batch, channels, high, wide)}


def measured(asked: Asked) -> Made | None:
    """One image a row [B, C, H, W], and how large it is."""
    channels, high, wide, patch = side_of(asked)
    return _with_sizes(asked, asked.floats(asked.sizes.batch, channels, high, wide), high, wide, patch)


def several(asked: Asked) -> Made | None:
    """A list of images a row, of one [B, 1, C, H, W]."""
    return _listed(asked, 1)


def tiled(asked: Asked) -> Made | None:
    """An image and its tiles [B, 3, C, H, W]."""
    return _listed(asked, 3)


def filmed(asked: Asked) -> Made | None:
    """Frames of a video [B, N, C, H, W]."""
    if not {"video"} & asked.senses and "videos" not in _main(asked):
        return None
    return _listed(asked, asked.number("num_frames", "frames_per_clip", default=4, under=UNDER))


def cut(asked: Asked) -> Made | None:
    """Patches of an image as rows of numbers [B, N, C * P * P], with their places where the model asks for them."""
    import torch

    channels, high, wide, patch = side_of(asked)
    rows, columns = max(1, high // patch), max(1, wide // patch)
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    width = asked.number("patch_embed_hidden_size", default=channels * patch * patch, under=UNDER)
    numbers = asked.floats(asked.sizes.batch, rows * columns, width)
    main = _main(asked)
    if main == "flattened_patches":  # the first two numbers are the place, counted from 1
        place = torch.stack([axis.flatten() + 1.0 for axis in grid], -1)
        numbers = torch.cat([place.expand(asked.sizes.batch, -1, -1), numbers], -1)
    found = {main: numbers}
    if name := asked.name("pixel_attention_mask"):
        found[name] = torch.ones(numbers.shape[:2], dtype=torch.long)
    if name := asked.name("spatial_shapes"):
        found[name] = torch.tensor([[rows, columns]] * asked.sizes.batch)
    if name := asked.name("image_position_ids", "pixel_position_ids"):
        place = torch.stack([axis.flatten() for axis in grid[::-1]], -1)
        found[name] = place.repeat(asked.sizes.batch, 1, 1)
    return found


WAYS = (one, measured, several, filmed, tiled, cut)
"""Likeliest first."""


def _main(asked: Asked) -> str:
    return asked.main if asked.main in PIXELS and asked.main in asked.names else asked.name(*PIXELS)


def _listed(asked: Asked, count: int) -> Made:
    channels, high, wide, patch = side_of(asked)
    numbers = asked.floats(asked.sizes.batch, count, channels, high, wide)
    return _with_sizes(asked, numbers, high, wide, patch)


def _with_sizes(asked: Asked, numbers: torch.Tensor, high: int, wide: int, patch: int) -> Made:
    """An image, and what says how large it is, where the model asks for that."""
    import torch

    batch, found = asked.sizes.batch, {_main(asked): numbers}
    if name := asked.name("image_sizes"):
        found[name] = torch.tensor([[high, wide]] * batch)
    if name := asked.name("target_sizes"):
        found[name] = torch.tensor([[high // patch, wide // patch]] * batch)
    if name := asked.name("high_res_pixel_values"):
        found[name] = asked.floats(*numbers.shape)
    return found


def asks(asked: Asked) -> bool:
    """Whether a model reads images or videos."""
    return bool(_main(asked)) and (_main(asked) not in ("hidden_states", "inputs") or bool({"image"} & asked.senses))
