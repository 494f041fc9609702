"""The documents beside the code: complete, and true of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from peltc.spec.formula.functions import FUNCTIONS
from peltc.spec.formula.reader import OPERATORS
from peltc.spec.interpreters.shape import Shape
from peltc.spec.interpreters.shapes import ShapeInterpreter
from peltc.spec.method import MEANINGS, NAMES, shipped
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


def test_every_name_and_every_function_is_described() -> None:
    """In one line each, with a shape; and nothing is described that there is not."""
    assert set(MEANINGS) == {name for names in NAMES.values() for name in names}
    for text in (*MEANINGS.values(), *(part for one in FUNCTIONS.values() for part in (one.doc, one.gives))):
        assert text and "\n" not in text and not text.endswith(".")
    rows = page().split("## Formulas")[1].split("\n## ")[0]
    for name, one in FUNCTIONS.items():
        found = f"| `{one.doc.rpartition(': ')[2]}` |" if name in OPERATORS else f"| `{one.signature}` | {one.doc} |"
        assert found in rows.replace("\\|", "|")


ARGUMENTS = {"n": 3, "equation": "ij,jk->ik", "axes": [1, 0], "shape": [2, 3]}
SIZES = {"M": 2, "N": 3, "K": 2, "I": 3, "O": 2, "A": 2, "B": 2, "C": 3, "D": 4, "S": 3, "T": 5, "E": 4, "F": 6, "n": 3}


@pytest.mark.parametrize("name", [name for name, one in FUNCTIONS.items() if "[" in one.gives + one.doc])
def test_the_shapes_of_functions_are_theirs(name: str) -> None:
    """Where the line of a function gives shapes in letters, the shape interpreter finds the same for such arguments."""
    one = FUNCTIONS[name]
    shapes = dict(re.findall(r"(?:^|[ ,:])(\w+) \[([^\]]+)\]", one.doc))

    def sized(letters: str) -> list[int]:
        parts = [part for part in letters.replace("...", "A, B" if name not in ("mean_seq",) else "M").split(", ")]
        return [eval(part.replace("n(n-1)/2", "3"), {}, SIZES) for part in parts]

    given = {key: Shape(tuple(sized(shapes[key]))) for key, _ in one.parameters if key in shapes}
    if not one.gives.startswith("["):
        assert one.gives in ("that of x", "that of x, reordered", "as the equation says")
        return
    rest = {key: ARGUMENTS.get(key, default) for key, default in one.parameters if key not in given}
    if name == "skew":
        rest["x"] = Shape((2, 2, 3))
    assert ShapeInterpreter().call(name, {**given, **rest}).dims == tuple(sized(one.gives[1:-1]))


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
