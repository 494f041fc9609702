"""What modules make of a prompt, carried by the cache of the text that grows from it.

A gate that is a mean over the text has a value for each prompt. While tokens are generated the model reads new tokens
alone, so that the value is kept, and goes wherever the rows of the cache go: to the beams that are chosen, to copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any

from peltc.spec.diagnostics import fail

KEPT = "pelt_kept"
"""The attribute of a cache that holds them: values [B, ...] by key."""
ROWS: Mapping[str, Callable[[Any, Any], Any]] = {
    "reorder_cache": lambda value, rows: value.index_select(0, rows.to(value.device)),
    "batch_select_indices": lambda value, rows: value[rows.to(value.device)],
    "batch_repeat_interleave": lambda value, count: value.repeat_interleave(count, dim=0),
}
"""What a cache does with its rows, and what then becomes of a value for each of them, by the method's name."""
WHOLE = "what is kept from the prompt is made of it as a whole, and of it alone"


def carry(cache: Any, values: Mapping[Any, Any]) -> None:
    """Let a cache carry values [B, ...] by key, in place of those that it has carried so far."""
    setattr(cache, KEPT, dict(values))
    for name in ROWS:
        if hasattr(type(cache), name):
            method: Any = partial(_on_rows, cache, name)  # a copy of the cache binds its own
            method.__name__ = name
            setattr(cache, name, method)


def _on_rows(cache: Any, name: str, argument: Any) -> Any:
    """A method of a cache that changes its rows, and those of what it carries."""
    found = getattr(type(cache), name)(cache, argument)
    setattr(cache, KEPT, {key: ROWS[name](value, argument) for key, value in carried(cache).items()})
    return found


def carried(cache: Any) -> dict[Any, Any]:
    """What a cache carries; nothing where it was made without."""
    return getattr(cache, KEPT, {})


def check_generate(model: Any, options: Mapping[str, Any], code: str) -> None:
    """Whether `generate` reads a prompt as a whole, once, and its cache afterwards.

    Args:
        model: whose own generation config counts too.
        options: what `generate` is called with.
        code: of the error.

    Raises:
        PeltError: it does not.
    """
    configs = [options.get("generation_config"), getattr(model, "generation_config", None)]
    assisted = (has_guesses(config, options) for config in configs if config is not None)

    def said(name: str) -> Any:
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    reason = ""
    if said("prefill_chunk_size"):
        reason = "by 'prefill_chunk_size' the model reads a part of the prompt at a time"
    elif any(assisted):
        reason = "in assisted generation the model reads guesses of what follows together with the prompt"
    elif said("use_cache") is False:
        reason = "with 'use_cache' false the model reads the prompt and what follows as one text"
    if reason:
        raise fail(code, f"{reason}, and {WHOLE}", expected="a prompt that is read at once, and a cache afterwards")


def has_guesses(config: Any, options: Mapping[str, Any]) -> bool:
    """Whether `generate` is assisted: by a smaller model, or by whatever else guesses tokens that the model checks.

    Args:
        config: of the generation.
        options: what `generate` is called with, which the config has less say than.
    """
    from transformers.generation.configuration_utils import GenerationMode

    effective = copy(config)
    for name, value in options.items():
        if value is not None and hasattr(effective, name):
            setattr(effective, name, value)
    return bool(effective.get_generation_mode(options.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION)
