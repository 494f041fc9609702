"""What modules make of a prompt, carried by the cache of the text that grows from it.

A gate that is a mean over the text has a value for each prompt. While tokens are generated the model reads new tokens
alone, so that the value is kept, and goes wherever the rows of the cache go: to the beams that are chosen, to copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from peltc.spec.diagnostics import fail

KEPT = "pelt_kept"
"""The attribute of a cache that holds them: values [B, ...] by key."""
ROWS = {
    "reorder_cache": lambda value, rows: value.index_select(0, rows.to(value.device)),
    "batch_select_indices": lambda value, rows: value[rows.to(value.device)],
    "batch_repeat_interleave": lambda value, count: value.repeat_interleave(count, dim=0),
}
"""What a cache does with its rows, and what then becomes of a value for each of them, by the method's name."""
ONE_PROMPT = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Options of `generate` by which a model reads a part of a prompt, or a prompt and guesses of what follows, at once."""
NO_PROMPT = "what is kept from the prompt is made of it as a whole, and it alone"


def carry(cache: Any, values: Mapping[Any, Any]) -> None:
    """Let a cache carry values [B, ...] by key, in place of those that it has carried so far."""
    setattr(cache, KEPT, dict(values))
    for name in ROWS:
        if hasattr(type(cache), name):  # bound so that a copy of the cache has its own
            setattr(cache, name, partial(_on_rows, cache, name))


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
    configs = (options.get("generation_config"), getattr(model, "generation_config", None))

    def said(name: str) -> Any:
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    name = next((name for name in ONE_PROMPT if said(name)), "")
    name = "assistant_model" if not name and options.get("assistant_model") is not None else name
    if name:
        raise fail(code, f"'{name}' lets the model read a part of a prompt, or more than a prompt, and {NO_PROMPT}",
                   expected=f"`generate` without '{name}'")  # fmt: skip
    if said("use_cache") is False:
        raise fail(code, "'use_cache' is false: the model reads the prompt and what follows as one text for each token,"
                         f" and {NO_PROMPT}", expected="`generate` with a cache")  # fmt: skip
