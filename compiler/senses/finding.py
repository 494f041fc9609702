"""How a model is given what it reads, found by running it on tensors without memory: each way is tried until one is
taken, and each size is varied to see which axes follow it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from peltc.compiler.senses import text
from peltc.compiler.senses.asked import Asked, Sizes
from peltc.compiler.senses.examples import SENSES, WORDS, Axes, Reading
from peltc.compiler.senses.trial import run_empty
from peltc.spec.diagnostics import fail, first_line

OTHER = {"batch": 3, "text": 10, "target": 7, "sound": 96}
"""Another value of each size that may vary. Images are of the size that the config says: what a graph exported for one
size gives for another, the exporter does not promise."""
FEATURES = {"image": "get_image_features", "audio": "get_audio_features"}
"""What classes call the method that makes features of a sense."""
MISMATCH = re.compile(r"tokens:? *(\d+)\D+features:? *(\d+)", re.IGNORECASE | re.DOTALL)
"""How models complain of too few or too many tokens that stand for features."""


def find_reading(model: Any) -> Reading:
    """The way in which a model takes its inputs, and the axes that may have any size.

    Args:
        model: a torch model of `transformers`; parameters without memory will do.

    Raises:
        PeltError: E514 none of the ways that there are is the model's; what it said to each.
    """
    asked, said = Asked.of(model), []
    for chosen in _choices(asked):
        for reading in _counted(model, asked, Reading(chosen)):
            inputs = reading.make(asked, Sizes())
            if not inputs:
                continue
            error = refusal(model, inputs)
            if error is None:
                return _with_axes(model, asked, reading, inputs)
            said.append((" and ".join(chosen.values()), error))
            if (told := MISMATCH.search(str(error))) and len(chosen) == 1 and int(told[2]) % Sizes().batch == 0:
                again = replace(reading, counts=dict.fromkeys(chosen, int(told[2]) // Sizes().batch))
                inputs = again.make(asked, Sizes())
                if inputs and refusal(model, inputs) is None:
                    return _with_axes(model, asked, again, inputs)
    lines = dict.fromkeys(f"{way}: {type(error).__name__}: {first_line(error)}" for way, error in said)
    tried = "; ".join([*lines][:6])
    raise fail("E514", f"how {type(model).__name__} is given its inputs is not known"
               + (f"; tried were {tried}" if tried else ""),
               expected=f"inputs that can be made from '{', '.join(asked.needed or asked.names[:6])}' and the config",
               hint="load the model, and give the live module with inputs that it runs on: "
               "peltc.compile(spec, module, out, example_inputs={name: example, ...})")  # fmt: skip


def _choices(asked: Asked) -> Iterator[dict[str, str]]:
    """A way for each sense that a model asks for, and then, beside text, for one sense alone."""
    senses = [sense for sense, kind in SENSES.items() if kind.asks(asked)]
    alone = [(sense,) for sense in senses] if len(senses) > 1 and "input_ids" in asked.names else []
    for chosen in [tuple(senses), *alone]:
        for ways in itertools.product(*(SENSES[sense].WAYS for sense in chosen)):
            yield {sense: way.__name__ for sense, way in zip(chosen, ways, strict=True)}


def _counted(model: Any, asked: Asked, reading: Reading) -> Iterator[Reading]:
    """A reading with the numbers of tokens that stand for what the model sees and hears, as its own features tell."""
    if "input_ids" not in asked.names:
        yield reading
        return
    counts: dict[str, int] = {}
    inputs = reading.make(asked, Sizes()) or {}
    for sense in reading.ways:
        if text.placeholder(asked, sense) is not None:
            counts[sense] = _features(model, FEATURES.get(sense, ""), inputs) // Sizes().batch
    yield replace(reading, counts={sense: count for sense, count in counts.items() if count})


def _features(model: Any, method: str, inputs: Mapping[str, Any]) -> int:
    """How many features a model makes of its images or recordings, in all; 0 where it does not tell."""
    import inspect

    owners = (model, getattr(model, "model", None), getattr(model, "base_model", None))
    owner = next((o for o in owners if method and hasattr(o, method)), None)
    if owner is None:
        return 0
    accepted = inspect.signature(getattr(owner, method)).parameters
    given = {name: value for name, value in inputs.items() if name in accepted}
    settings = {name: getattr(model.config, name) for name in accepted
                if name not in given and hasattr(model.config, name)}  # fmt: skip
    try:
        answer = run_empty(getattr(owner, method), {**given, **settings})
    except Exception:
        return 0
    pooled = getattr(answer, "pooler_output", None)
    states = pooled if pooled is not None else getattr(answer, "last_hidden_state", answer)
    tensors = states if isinstance(states, (list, tuple)) else [states]
    return sum(t.numel() // t.shape[-1] for t in tensors if hasattr(t, "numel") and t.dim() > 1)


def refusal(model: Any, inputs: Mapping[str, Any]) -> Exception | None:
    """What a model says to some inputs, or None where it takes them."""
    import inspect

    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    try:
        run_empty(model, {**inputs, **extra})
    except Exception as error:
        return error
    return None


def _with_axes(model: Any, asked: Asked, reading: Reading, inputs: Mapping[str, Any]) -> Reading:
    """A reading with the names of the axes that may have any size: those that move with a size, if the model runs on
    what has moved."""
    found: dict[str, list[str | None]] = {name: [None] * tensor.dim() for name, tensor in inputs.items()}
    varied = []
    for size, other in OTHER.items():
        if size == "sound" and reading.counts:
            continue  # as many tokens stand for a recording as its length asks for: the text would have to change
        moved = reading.make(asked, replace(Sizes(), **{size: other})) or {}
        shapes = {name: (inputs[name].shape, moved[name].shape) for name in inputs if name in moved}
        if all(one == two for one, two in shapes.values()) or refusal(model, moved) is not None:
            continue
        varied.append(size)
        lengths: dict[int, str] = {}
        for name, (one, two) in shapes.items():
            for axis in (axis for axis in range(len(one)) if one[axis] != two[axis]):
                word = f"{WORDS[size]}_{len(lengths)}" if lengths else WORDS[size]
                found[name][axis] = lengths.setdefault(int(one[axis]), word)
    axes: Axes = {name: tuple(words) for name, words in found.items()}
    made = reading.by_sense(asked.sized(Sizes(), dict(reading.counts))) or {}
    senses = {name: sense for sense, tensors in made.items() for name in tensors}
    tokens = {sense: token for sense in reading.counts if (token := text.placeholder(asked, sense)) is not None}
    return replace(reading, axes=axes, varied=tuple(varied), senses=senses, tokens=tokens)
