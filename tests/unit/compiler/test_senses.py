"""Example inputs made from a model itself: every way by hand, what is free, and trials that leave no traces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from peltc.compiler.senses import images, others, series, sound, text
from peltc.compiler.senses.asked import Asked, Sizes
from peltc.compiler.senses.examples import SENSES, Reading
from peltc.compiler.senses.finding import find_reading
from peltc.compiler.senses.trial import run_empty
from peltc.compiler.survey.probe import computed
from peltc.spec.diagnostics import PeltError

VISION = {"image_size": 32, "patch_size": 8, "num_channels": 3, "num_frames": 4}


def asked(
    names: str, senses: str = "image", main: str = "", counts: dict[str, int] | None = None, **config: Any
) -> Asked:
    """What a class with these inputs and this config asks for."""
    settings = transformers.PretrainedConfig(**config)
    words = tuple(names.split())
    return Asked(settings, words, (), frozenset(senses.split()), main or words[0], Sizes(), counts or {},
                 torch.Generator().manual_seed(0))  # fmt: skip


def shapes(made: dict[str, Any] | None) -> dict[str, list[int]]:
    assert made is not None
    return {name: list(tensor.shape) for name, tensor in made.items()}


@pytest.mark.parametrize(
    ("way", "given", "expected"),
    [
        (images.one, ("pixel_values", "image"), {"pixel_values": [2, 3, 32, 32]}),
        (images.measured, ("pixel_values image_sizes", "image"),
         {"pixel_values": [2, 3, 32, 32], "image_sizes": [2, 2]}),
        (images.several, ("pixel_values", "image"), {"pixel_values": [2, 1, 3, 32, 32]}),
        (images.tiled, ("pixel_values", "image"), {"pixel_values": [2, 3, 3, 32, 32]}),
        (images.filmed, ("pixel_values", "video"), {"pixel_values": [2, 4, 3, 32, 32]}),
        (images.cut, ("pixel_values spatial_shapes pixel_attention_mask", "image"),
         {"pixel_values": [2, 16, 192], "spatial_shapes": [2, 2], "pixel_attention_mask": [2, 16]}),
        (images.cut, ("flattened_patches", "image"), {"flattened_patches": [2, 16, 194]}),
    ],
)  # fmt: skip
def test_images(way: Callable[[Asked], Any], given: tuple[str, str], expected: dict[str, list[int]]) -> None:
    assert shapes(way(asked(*given, **VISION))) == expected


def test_patches_say_where_they_are() -> None:
    made = images.cut(asked("flattened_patches", **VISION))
    assert made is not None
    places = made["flattened_patches"][0, :, :2]
    assert places.tolist() == [[row, column] for row in range(1, 5) for column in range(1, 5)]


def test_the_size_of_an_image_is_that_of_the_part_that_sees() -> None:
    config = transformers.LlavaConfig(vision_config={"model_type": "siglip_vision_model", "image_size": 48})
    assert images.side_of(Asked.of(transformers.LlavaForConditionalGeneration, config))[1:3] == (48, 48)


@pytest.mark.parametrize(
    ("way", "names", "expected"),
    [
        (sound.wave, "input_values attention_mask", {"input_values": [2, 1280], "attention_mask": [2, 1280]}),
        (sound.channel, "input_values", {"input_values": [2, 1, 1280]}),
        (sound.bands_first, "input_features attention_mask",
         {"input_features": [2, 16, 64], "attention_mask": [2, 64]}),
        (sound.window, "input_features", {"input_features": [2, 16, 48]}),
        (sound.frames_first, "input_features feature_attention_mask",
         {"input_features": [2, 64, 16], "feature_attention_mask": [2, 64]}),
    ],
)  # fmt: skip
def test_sound(way: Callable[[Asked], Any], names: str, expected: dict[str, list[int]]) -> None:
    made = way(asked(names, "audio", num_mel_bins=16, max_source_positions=24))
    assert shapes(made) == expected


def test_sound_as_long_as_the_patches_cover() -> None:
    config = transformers.ASTConfig(max_length=100, num_mel_bins=16)
    made = sound.whole(Asked.of(transformers.ASTForAudioClassification, config))
    assert shapes(made) == {"input_values": [2, 100, 16]}


def test_what_does_not_fit_is_not_made() -> None:
    assert images.filmed(asked("pixel_values", "image", **VISION)) is None
    assert sound.wave(asked("input_features", "audio")) is None
    assert sound.window(asked("input_features", "audio")) is None
    assert not series.asks(asked("pixel_values"))


def test_series() -> None:
    made = series.history(asked("past_values", "time", context_length=24, num_input_channels=3))
    assert shapes(made) == {"past_values": [2, 24, 3]}
    made = series.history(asked("past_values past_time_features future_time_features", "time", context_length=16,
                                lags_sequence=[1, 7], num_time_features=2, prediction_length=4))  # fmt: skip
    assert shapes(made) == {"past_values": [2, 23], "past_time_features": [2, 23, 2], "past_observed_mask": [2, 23],
                            "future_time_features": [2, 4, 2]}  # fmt: skip


def test_texts_have_the_tokens_that_stand_for_images() -> None:
    one = asked("input_ids attention_mask", counts={"image": 5}, vocab_size=100, image_token_id=97, eos_token_id=2,
                vision_start_token_id=80)  # fmt: skip
    made = text.read(one)
    assert (made["input_ids"] == 97).sum(-1).tolist() == [5, 5]
    assert shapes(made) == {"input_ids": [2, 13], "attention_mask": [2, 13]}
    ordinary = made["input_ids"][made["input_ids"] != 97]
    assert not {2, 80} & {*ordinary.tolist()} and ordinary.max() < 97


def test_inputs_of_models_that_act() -> None:
    made = others.read(asked("states actions timesteps attention_mask", "text", state_dim=5, act_dim=2))
    assert shapes(made) == {"states": [2, 8, 5], "actions": [2, 8, 2], "timesteps": [2, 8], "attention_mask": [2, 8]}


def test_readings_are_kept_as_plain_data() -> None:
    import json

    reading = Reading(
        {"image": "one"}, {"image": 4}, {"a": ("batch", None)}, ("batch",), {"a": "image"}, {}, {"image": 9}
    )
    again = Reading.from_json(json.loads(json.dumps(reading.to_json())))
    assert again == reading and {way.__name__ for kind in SENSES.values() for way in kind.WAYS} >= {"one", "wave"}
    fixed = reading.fixed("batch")
    assert fixed.axes == {"a": (None, None)} and fixed.held == {"batch": 1} and fixed.varied == ()
    assert fixed.sizes(batch=7, text=9) == Sizes(batch=1) and reading.sizes(batch=7, text=9) == Sizes(batch=7)


def test_no_way_that_fits() -> None:
    class Stubborn(transformers.ViTModel):
        def forward(self, pixel_values: Any = None, **_: Any) -> Any:
            raise ValueError("never like this")

    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=16, patch_size=8)  # fmt: skip
    with pytest.raises(PeltError, match=r"E514 .*tried were one: ValueError: never like this"):
        find_reading(Stubborn(config))


@functools.lru_cache
def corners(size: int) -> torch.Tensor:
    return torch.arange(size)


class Remembering(torch.nn.Module):
    """A module whose function keeps what it made."""

    def forward(self, size: int) -> torch.Tensor:
        return corners(size)


def test_trials_leave_nothing_behind() -> None:
    model = Remembering()
    made = run_empty(model, {"size": 3})
    assert type(made) is not torch.Tensor, "without memory"
    assert type(model(3)) is torch.Tensor and model(3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("expression", "size"),
    [("batch", 2), ("time", 1280), ("((time//5)) - 1", 255), ("(((time//10)) - 3)//2 + 1", 63), ("2*sequence", 6),
     ("-1 + target", 4), ("s77", None), ("time.__class__", None), ("time**99999999", None), ("time//0", None),
     ("[", None), ("Max(1, time)", None)],
)  # fmt: skip
def test_sizes_that_are_computed(expression: str, size: int | None) -> None:
    """Of names of axes and numbers alone; nothing is evaluated that is anything else."""
    assert computed(expression) == size
