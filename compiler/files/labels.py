"""The names of a profile's labels, as they lie among its arrays and at the end of its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from peltc.spec.diagnostics import wrong_type

Array = np.ndarray[Any, Any]
LABELS = "@labels"
"""Their name among a profile's arrays: bytes [N] of a JSON list."""
FAR = -3e4
"""What is added to outputs that are no labels of a profile: so far below that e to it is 0, and half precision has
it."""
MOST = 1 << 20
"""How many bytes they may have."""


def written(labels: Sequence[str], count: int) -> Array:
    """Names of labels as bytes [N].

    Raises:
        PeltError: E216 something else than so many different texts, or too long ones.
    """
    listed = isinstance(labels, (list, tuple)) and all(isinstance(label, str) and label for label in labels)
    content = json.dumps(list(labels), ensure_ascii=False).encode() if listed else b""
    if not listed or len({*labels}) != count or len(labels) != count or len(content) > MOST:
        raise wrong_type("the labels of a profile", labels, f"a list of {count} different texts")
    return np.frombuffer(content, np.uint8)


def read(content: Any) -> list[str]:
    """The names in bytes [N].

    Raises:
        ValueError: the bytes are none.
    """
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8 or content.ndim != 1 or content.size > MOST:
        raise ValueError("no bytes")
    try:
        found = json.loads(content.tobytes())
    except RecursionError as error:
        raise ValueError("no list") from error
    if not isinstance(found, list) or not all(isinstance(label, str) and label for label in found):
        raise ValueError("no names")
    return found
