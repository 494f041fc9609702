"""The tokenizer that training scripts save beside an adapter, held against the base's: an artifact gets the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peltc.compiler.base.base import Base
from peltc.compiler.base.source import vocabulary_of

FILE, ADDED = "tokenizer.json", "added_tokens.json"
MAX_BYTES = 2**26


def other_tokens(folder: Path, base: Base) -> str:
    """What to know where an adapter's own tokenizer gives other ids than the base's, or ids that the model's table has
    no rows for; nothing where it does not."""
    theirs, ours = added(folder), added(base.folder)
    if theirs is None or theirs == ours:
        return ""
    rows, last = vocabulary_of(base.config) or 0, max(theirs.values(), default=-1)
    if rows and last >= rows:
        return (
            f"the adapter's tokenizer has {last + 1} tokens, and the model's table {rows} rows: the file holds none for"
            " the others, which were in the table that it was trained on"
        )
    if ours is None:
        return "the adapter's folder has a tokenizer, and the model's none: the artifact will have none"
    new = sorted(set(theirs) - set(ours), key=lambda token: theirs[token])
    shown = ", ".join(f"'{token[:40]}'" for token in new[:3]) + (", ..." if len(new) > 3 else "")
    what = f"has {shown} beside" if new else "numbers added tokens in another way than"
    return f"the adapter's tokenizer {what} the model's; the artifact gets the model's, which will not know them"


def added(folder: Path) -> dict[str, int] | None:
    """The added tokens of a folder's tokenizer with their ids; None where there is no tokenizer that can be read."""
    file = folder / FILE
    found: dict[str, int] = {}
    try:
        if (folder / ADDED).is_file():
            found |= _numbered(_read(folder / ADDED))
        if file.is_file():
            told = _read(file)
            entries = told.get("added_tokens") if isinstance(told, dict) else None
            found |= _numbered({e.get("content"): e.get("id") for e in entries or () if isinstance(e, dict)})
            return found
    except (OSError, ValueError, RecursionError, TypeError):
        return None
    return found or None


def _read(file: Path) -> Any:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError("too large")
    return json.loads(file.read_text(encoding="utf-8"))


def _numbered(told: Any) -> dict[str, int]:
    return {token: number for token, number in told.items() if isinstance(token, str) and isinstance(number, int)}
