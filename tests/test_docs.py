"""The documents beside the code: complete, and true of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peltc.spec.method import shipped
from peltc.spec.reference import page
from peltc.spec.schema import spec_schema

ROOT = Path(__file__).parents[1]
SOURCES = [file for folder in ("spec", "compiler", "runtime") for file in (ROOT / folder).rglob("*.py")]


def test_every_code_has_a_cause_and_a_cure() -> None:
    raised = {code for file in SOURCES for code in re.findall(r'"(E\d{3})"', file.read_text(encoding="utf-8"))}
    rows = re.findall(r"^\| (E\d{3}) \| (.+?) \| (.+?) \|$", (ROOT / "docs/errors.md").read_text("utf-8"), re.M)
    told = [code for code, _, _ in rows]
    assert sorted(told) == sorted(raised), set(told) ^ raised
    assert all(cause.endswith(".") and cure.endswith(".") for _, cause, cure in rows)


def test_the_reference_is_up_to_date() -> None:
    """`python -m peltc.spec.reference > docs/spec.md` writes it."""
    assert page() == (ROOT / "docs/spec.md").read_text(encoding="utf-8")


def test_every_key_is_described() -> None:
    missing: list[str] = []

    def walk(schema: Any, path: str) -> None:
        for key, one in schema.get("properties", {}).items():
            if "description" not in one and "const" not in one:
                missing.append(f"{path}.{key}")
            walk(one, f"{path}.{key}")
        for word in ("items", "additionalProperties", "then"):
            if isinstance(schema.get(word), dict):
                walk(schema[word], path)
        for word in ("anyOf", "oneOf", "allOf"):
            for one in schema.get(word, ()):
                walk(one, path)

    walk(spec_schema(shipped()), "")
    assert missing == []
