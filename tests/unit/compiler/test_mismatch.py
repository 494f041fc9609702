"""What is wrong with a file of tensors: one finding per kind, and words for what the file is of."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from peltc.compiler.adapter.mismatch import mismatches
from peltc.spec.diagnostics import Place

F32, I32 = np.dtype(np.float32), np.dtype(np.int32)


def named(attachment: str = "lora", site: str = "attention.query", layers: Any = range(12), stack: str = "encoder.",
          shape: tuple[int, ...] = (8, 32)) -> dict[str, tuple[int, ...]]:  # fmt: skip
    return {f"{attachment}.{stack}layers.{n}.{site}.{p}": shape for n in layers for p in "AB"}


def told(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], dtype: Any = F32) -> list[str]:
    """The findings, each as its text without the place."""
    stored = {name: (shape, dtype) for name, shape in given.items()}
    left = [name for name in given if name not in wanted]
    return [str(finding) for finding in mismatches(wanted, stored, left, Place())]


WANTED = "24 tensors of 'lora' at attention.query, encoder layers 0 to 11"
FILES = {
    "another attachment": (
        named("mine"),
        "24 tensors of 'mine' at attention.query, encoder layers 0 to 11",
        "call the attachment so, `name: mine`",
    ),
    "another site": (
        named(site="attention.key"),
        "24 tensors of 'lora' at attention.key, encoder layers 0 to 11",
        "encoder layers 0 to 11",
    ),
    "other layers": (
        named(layers=[12, 13, 17]),
        "6 tensors of 'lora' at attention.query, encoder layers 12 to 13, 17",
        "encoder layers 0 to 11",
    ),
    "another stack": (
        named(stack="decoder."),
        "24 tensors of 'lora' at attention.query, decoder layers 0 to 11",
        "encoder layers 0 to 11",
    ),
    "no adapter": (
        {"weight": (2, 2), "bias": (2,)},
        "2 tensors, whose names are not `<attachment>.<site>.<parameter>`",
        "",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_the_file_looks_like(name: str) -> None:
    given, looks, end = FILES[name]
    missing, left = told(named(), given)
    first = "'lora.encoder.layers.0.attention.query.A', 'lora.encoder.layers.0.attention.query.B'"
    assert missing.startswith(f"E402 24 of the 24 tensors that the spec asks for are missing: {first}, ")
    assert f"\nhint: the file holds {looks}" in missing
    assert missing.endswith(end) and ("names are not" in looks or WANTED in missing)
    assert left.startswith(f"E403 no module of the spec takes {len(given)} of the {len(given)} tensors: '")
    assert "hint" not in left  # it has been said


def test_the_texts() -> None:
    wanted = {"a.s.A": (8, 32), "a.s.B": (32, 8)}
    assert told(wanted, wanted) == []
    assert told(wanted, {"a.s.A": (8, 32), "a.s.b": (32, 8)}) == [
        "E402 the tensor 'a.s.B' is missing\nexpected [32, 8]\nhint: did you mean 'a.s.b'?",
        "E403 no module of the spec takes the tensor 'a.s.b'\nhint: did you mean 'a.s.B'?",
    ]
    assert told(wanted, {"a.s.A": (8, 31), "a.s.B": (32, 8)}) == [
        "E404 the tensor 'a.s.A' is [8, 31]\nexpected [8, 32]",
    ]
    assert told(wanted, {"a.s.A": (8, 31), "a.s.B": (32, 7)}) == [
        "E404 2 tensors are not as the spec has them: 'a.s.A' is [8, 31], 'a.s.B' is [32, 7]\n"
        "expected [8, 32]; [32, 8]",
    ]
    assert told(wanted, wanted, I32) == [
        "E404 2 tensors are not as the spec has them: 'a.s.A' holds int32, 'a.s.B' holds int32\n"
        "expected a float type; a float type",
    ]
    assert told(wanted, {}) == [
        "E402 2 of the 2 tensors that the spec asks for are missing: 'a.s.A', 'a.s.B'\nexpected [8, 32]; [32, 8]\n"
        "hint: the file holds no tensors",
    ]


def test_long_and_many_names() -> None:
    """A file from a stranger may hold a hundred thousand tensors with names of any length."""
    given = {f"x{i}." + "y" * 1000: (1,) for i in range(100_000)}
    started = time.monotonic()
    text = "\n".join(told(named(), given))
    assert len(text) < 4000
    assert time.monotonic() - started < 5
