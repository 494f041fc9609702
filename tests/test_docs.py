"""The documents beside the code: complete, and true of it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [file for folder in ("spec", "compiler", "runtime") for file in (ROOT / folder).rglob("*.py")]


def test_every_code_has_a_cause_and_a_cure() -> None:
    raised = {code for file in SOURCES for code in re.findall(r'"(E\d{3})"', file.read_text(encoding="utf-8"))}
    rows = re.findall(r"^\| (E\d{3}) \| (.+?) \| (.+?) \|$", (ROOT / "docs/errors.md").read_text("utf-8"), re.M)
    told = [code for code, _, _ in rows]
    assert sorted(told) == sorted(raised), set(told) ^ raised
    assert all(cause.endswith(".") and cure.endswith(".") for _, cause, cure in rows)
