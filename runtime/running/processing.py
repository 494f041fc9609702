"""Inputs from images, sound and text, by the processor in an artifact's folder: what the checkpoint came with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peltc.spec.diagnostics import Place, fail, first_line
from peltc.spec.packages import needing

Array = np.ndarray[Any, Any]
FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What a checkpoint says of its processor."""


def prepared(
    folder: Path, inputs: Mapping[str, Sequence[int | str]], text: Any, image: Any, sound: Any, rate: int | None
) -> dict[str, Array]:
    """Inputs of a graph, as `Session.prepare` gives them.

    Args:
        folder: the artifact's.
        inputs: the axes of each input of the graph.

    Raises:
        PeltError: as `Session.prepare`.
    """
    processor = _processor(folder)
    given: dict[str, Any] = {}
    options: dict[str, Any] = {"return_tensors": "np"}
    if text is not None:
        given["text"] = [text] if isinstance(text, str) else list(text)
        options["padding"] = True
    if image is not None:
        given["images"] = [_image(one) for one in _several(image)]
    if sound is not None:
        wanted = getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", None)
        given["audio"] = [_wave(one, rate, wanted) for one in _several(sound)]
        options |= {"sampling_rate": wanted, "return_attention_mask": True}
    try:
        found = _called(processor, given, options)
    except Exception as error:
        raise fail("E641", f"the checkpoint's {type(processor).__name__} does not take what is given:"
                   f" {type(error).__name__}: {first_line(error)}", Place(str(folder)),
                   f"{' and '.join(given) or 'text, an image or sound'}, as the model was trained on"
                   ) from error  # fmt: skip
    made = {name: np.asarray(value) for name, value in found.items() if name in inputs}
    return made | _masks(made, inputs)


def _processor(folder: Path) -> Any:
    """The checkpoint's processor; its code is that of `transformers`, never the folder's own."""
    if not any((folder / name).is_file() for name in (*FILES, "tokenizer.json")):
        raise fail("E607", "the artifact has no processor", Place(str(folder)), " or ".join(FILES[:2]),
                   "put the model's processor beside it and compile again")  # fmt: skip
    with needing("Session.prepare"):
        from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    said: list[str] = []
    for kind in (AutoProcessor, AutoImageProcessor, AutoFeatureExtractor, AutoTokenizer):
        try:
            return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            said.append(f"{type(error).__name__}: {first_line(error)}")
    raise fail("E607", f"the artifact's processor cannot be read: {said[0]}", Place(str(folder)),
               "a processor of transformers")  # fmt: skip


def _called(processor: Any, given: Mapping[str, Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a processor makes, whatever it calls what it is given."""
    import inspect

    names = inspect.signature(processor.__call__).parameters
    if len(given) == 1 and not {*given} <= {*names}:  # of one sense: its first argument, under a name of its own
        return processor(next(iter(given.values())), **options)  # type: ignore[no-any-return]
    return processor(**given, **options)  # type: ignore[no-any-return]


def _several(value: Any) -> list[Any]:
    """One, or a list of several; a list of numbers is one."""
    one = not isinstance(value, (list, tuple)) or not value or isinstance(value[0], (int, float))
    return [value] if one else list(value)


def _image(value: Any) -> Any:
    """An image, from a file where it is none yet, in three colours."""
    if not isinstance(value, (str, Path)):
        return value
    with needing("Session.prepare(image=...)"):
        from PIL import Image
    try:
        with Image.open(value) as found:
            return found.convert("RGB")
    except Exception as error:
        raise fail("E641", f"the image cannot be read: {type(error).__name__}: {first_line(error)}", Place(str(value)),
                   "an image file that pillow reads, or an array [H, W, C]") from error  # fmt: skip


def _wave(value: Any, rate: int | None, wanted: int | None) -> Array:
    """Samples [T] of one channel, from a file where they are none yet, at the rate that the model was trained on."""
    place = None
    if isinstance(value, (str, Path)):
        place = Place(str(value))
        with needing("Session.prepare(sound=...)"):
            import soundfile
        try:
            value, rate = soundfile.read(str(value), dtype="float32")
        except Exception as error:
            raise fail("E641", f"the sound cannot be read: {type(error).__name__}: {first_line(error)}", place,
                       "a sound file that soundfile reads, or samples [T] and their rate") from error  # fmt: skip
    samples = np.asarray(value, np.float32)
    if samples.ndim == 2 and place is not None:
        samples = samples.mean(1)  # channels of a file
    if samples.ndim != 1 or not samples.size:
        raise fail("E641", f"the sound has the shape {list(samples.shape)}", place, "samples [T] of one channel")
    if wanted is not None and rate != wanted:
        told = "no rate is given" if rate is None else f"the sound has {rate} samples a second"
        raise fail("E641", f"{told}, and the model was trained on {wanted}", place, f"{wanted} samples a second",
                   "resample it" if rate is not None else f"rate={wanted}, if that is what it has")  # fmt: skip
    return samples


def _masks(made: Mapping[str, Array], inputs: Mapping[str, Sequence[int | str]]) -> dict[str, Array]:
    """Masks of ones, for those of a graph's masks that its processor does not make: nothing is padding then. A mask
    [B, T] is as long as the input that shares its axis, or as the graph says."""
    if not made:
        return {}
    sizes = {axis: array.shape[i] for name, array in made.items() for i, axis in enumerate(inputs[name])
             if isinstance(axis, str) and i < array.ndim}  # fmt: skip
    found = {}
    for name, axes in inputs.items():
        if name.endswith("mask") and name not in made:
            shape = [axis if isinstance(axis, int) else sizes.get(axis, 0) for axis in axes]
            if all(shape):
                found[name] = np.ones(shape, np.int64)
    return found
