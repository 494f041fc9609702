"""The JSON Schemas beside the code: valid, up to date, and true of the examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from peltc.spec.method import shipped
from peltc.spec.schema import spec_schema

ROOT = Path(__file__).parents[1]
SCHEMAS = sorted((ROOT / "schemas").glob("*.schema.json"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
METHODS = sorted((ROOT / "spec/methods").glob("*.yaml"))


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def findings(schema: str, document: Any) -> list[str]:
    validator = Draft202012Validator(read(ROOT / f"schemas/{schema}.schema.json"))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("file", SCHEMAS, ids=lambda f: f.name)
def test_schema_is_valid(file: Path) -> None:
    schema = read(file)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(schema)


def test_spec_schema_is_up_to_date() -> None:
    """`pelt schema > schemas/spec.schema.json` writes it."""
    assert read(ROOT / "schemas/spec.schema.json") == json.loads(json.dumps(spec_schema(shipped())))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.name)
def test_examples_follow_the_schema(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=../schemas/spec.schema.json\n"), "editors complete by it"
    assert findings("spec", yaml.safe_load(text)) == []


@pytest.mark.parametrize("file", METHODS, ids=lambda f: f.name)
def test_methods_follow_the_schema(file: Path) -> None:
    assert findings("method", yaml.safe_load(file.read_text(encoding="utf-8"))) == []


def test_schema_refuses_an_unknown_key() -> None:
    entry = {"method": "lora", "at": "attention.query", "rank": 8}
    assert findings("spec", {"pelt": 1, "attach": [entry]}) != []
    assert findings("spec", {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 8}]}) == []
