"""What a request asks of texts that grow, whichever protocol it is written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peltc.runtime.serving.fields import Fields, texts

STOPS, STOP = 16, 1000
"""How many strings may end a text, and of how many characters."""
BIASES = 1024
"""How many tokens may be made likelier, or less so."""


@dataclass(frozen=True)
class Manner:
    """How texts grow.

    Attributes:
        new: how many tokens each may get; None for as many as there may be.
        count: how many texts each prompt gets.
        options: of `generate`, but for `top_k`.
        top_k: of how many tokens one is drawn; None for what the model's generation config says.
        penalties: for each time that a token was generated, and for having been at all.
        seed: of what is drawn.
        stops: strings at which texts end.
        best: how many of the likeliest tokens are told beside each; None for none.
    """

    new: int | None
    count: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    top_k: int | None = None
    penalties: tuple[float, float] = (0.0, 0.0)
    seed: int | None = None
    stops: Sequence[str] = ()
    best: int | None = None


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        prompts: texts, ids, or a list of a chat's messages.
        profile: its name; None for the bare base.
        manner: how they go on.
        stream: whether pieces are wanted as they come.
        usage: whether the last of them is to say how many tokens there were.
        echo: whether the prompt comes before what follows it.
        ids: whether token ids are wanted beside texts.
        id: the caller's name for it.
    """

    prompts: Sequence[Any]
    profile: str | None
    manner: Manner
    stream: bool = False
    usage: bool = False
    echo: bool = False
    ids: bool = False
    id: str = ""


def manner(fields: Fields, names: Sequence[str], new: int | None, samples: bool, best: int | None = None) -> Manner:
    """How texts are to grow, from fields that the protocols share.

    Args:
        names: of the fields that may say how many tokens a text gets.
        new: how many, where none does.
        samples: whether tokens are drawn where nothing is said of it; otherwise the model's config says that.
        best: as the manner's.

    Raises:
        PeltError: E801 a field of another type or size; E809 tokens that may not end a text, beside none that do.
    """
    asked = [fields.whole(name, 1, 1 << 31) for name in names]
    temperature = fields.number("temperature", 0, 2)
    options: dict[str, Any] = {
        "top_p": fields.number("top_p", 0, 1, above=True),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0, 10, above=True),
        "min_new_tokens": fields.whole("min_tokens", 1, 1 << 31) if fields.take("min_tokens") != 0 else None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    top_k, seed = fields.whole("top_k", 0, 1 << 31), fields.whole("seed", -(1 << 63), (1 << 63) - 1)
    if temperature == 0:
        options = {name: value for name, value in options.items() if name not in ("top_p", "min_p")}
        options["do_sample"] = False
    elif samples or temperature is not None or {"top_p", "min_p"} & set(options) or top_k or seed is not None:
        options["do_sample"] = True
        if temperature is not None:
            options["temperature"] = temperature
    bias = fields.inner("logit_bias")
    if bias.said:
        ids = {name: bias.number(name, -100, 100) for name in bias.said}
        if len(ids) > BIASES:
            raise fields.wrong("logit_bias", f"has {len(ids):,} tokens", f"at most {BIASES:,}")
        if not all(name.isascii() and name.isdigit() and len(name) < 10 for name in ids):
            raise fields.wrong("logit_bias", "has a key that is no token id", "numbers by token id")
        options["sequence_bias"] = {(int(name),): value for name, value in ids.items()}
    if fields.truth("ignore_eos"):
        options["eos_token_id"] = None
    return Manner(
        next((one for one in asked if one is not None), new),
        fields.whole("n", 1, 1 << 31) or 1,
        options,
        top_k,
        (fields.number("frequency_penalty", -2, 2) or 0.0, fields.number("presence_penalty", -2, 2) or 0.0),
        seed,
        texts(fields, "stop", STOPS, STOP),
        best,
    )
