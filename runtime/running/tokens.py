"""Inputs from text, by the tokenizer in an artifact's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peltc.spec.diagnostics import Place, fail, wrong_type
from peltc.spec.packages import needing

Array = np.ndarray[Any, Any]


def tokenized(file: Path, texts: Sequence[str], max_length: int | None, left: bool) -> dict[str, Array]:
    """Ids, masks and types [B, S] of texts, padded to one length.

    Args:
        file: the tokenizer's.
        max_length: the most tokens of a text; None for no bound.
        left: whether they are padded on the left; else as the tokenizer's file says, or on the right.

    Raises:
        PeltError: as `Session.tokenize`.
    """
    if not file.is_file():
        raise fail("E607", "the artifact has no tokenizer.json", Place(str(file.parent)),
                   hint="put the model's tokenizer beside it and compile again")  # fmt: skip
    with needing("Session.tokenize"):
        from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    own = tokenizer.padding or {}
    said = {key: own[key] for key in ("pad_id", "pad_type_id", "pad_token") if key in own}
    tokenizer.enable_padding(direction="left" if left else own.get("direction", "right"), length=None, **said)
    side = (tokenizer.truncation or {}).get("direction", "right")
    tokenizer.no_truncation()
    if max_length is not None:
        around = tokenizer.num_special_tokens_to_add(False)
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= around:
            because = f", since the tokenizer puts {around} around each text" if around else ""
            raise wrong_type("the most tokens of a text, max_length,", max_length,
                             f"a whole number of at least {around + 1}{because}")  # fmt: skip
        tokenizer.enable_truncation(max_length, direction=side)
    encoded = tokenizer.encode_batch(list(texts))
    empty = [i for i, found in enumerate(encoded) if not any(found.attention_mask)]
    if empty or not encoded:
        which = f"text {empty[0]}, {texts[empty[0]][:60]!r}, has no tokens" if encoded else "there is no text"
        raise fail("E617", which, expected="texts of at least one token")
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
    }
