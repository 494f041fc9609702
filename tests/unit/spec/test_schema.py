"""Documents against schemas: every finding, at the place of the key or value, in the words of YAML."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from peltc.spec.diagnostics import Diagnostic, PeltError
from peltc.spec.document import parse
from peltc.spec.method import shipped
from peltc.spec.schema import MODES, PRECISIONS, RESERVED, option_schema, spec_schema
from peltc.spec.validation import check_defaults, validate


def findings(text: str, schema: Any) -> list[Diagnostic]:
    try:
        validate(parse(text, "f"), schema)
    except PeltError as error:
        return list(error.diagnostics)
    return []


def one(value: str, schema: Any) -> str:
    """The single finding about the value of a key."""
    (found,) = findings(f"a: {value}\n", {"properties": {"a": schema}})
    return str(found)


@pytest.mark.parametrize(
    ("value", "schema", "text"),
    [
        ("x", {"type": "integer"}, "f:1:4  a\n  E112 'x' is not a whole number\n  expected a whole number"),
        (
            "4.0",
            {"type": "integer"},
            "f:1:4  a\n  E112 4.0 is not a whole number\n  expected a whole number\n  hint: write 4",
        ),
        ("true", {"type": "integer"}, "f:1:4  a\n  E112 true is not a whole number\n  expected a whole number"),
        ("true", {"type": "number"}, "f:1:4  a\n  E112 true is not a number\n  expected a number"),
        (
            "off",
            {"type": "boolean"},
            "f:1:4  a\n  E112 'off' is not true or false\n  expected true or false\n  hint: write false",
        ),
        ("1", {"type": "boolean"}, "f:1:4  a\n  E112 1 is not true or false\n  expected true or false"),
        (
            "3",
            {"type": "string"},
            'f:1:4  a\n  E112 3 is not text\n  expected text\n  hint: quote it, "3", if it is meant',
        ),
        ("3", {"type": ["string", "integer", "null"]}, None),
        (
            "[]",
            {"type": ["string", "integer"]},
            "f:1:1  a\n  E112 [] is not text, or a whole number\n  expected text, or a whole number",
        ),
        ("[1]", {"type": "object"}, "f:1:1  a\n  E112 [1] is not a mapping\n  expected a mapping"),
        ("", {"type": "array"}, "f:1:3  a\n  E112 there is nothing here\n  expected a list"),
        ("b", {"enum": ["a", "c", 1, True]}, "f:1:4  a\n  E113 unknown value 'b'\n  expected one of: a, c, 1, true"),
        (
            "folt",
            {"enum": ["fold", "bank"]},
            "f:1:4  a\n  E113 unknown value 'folt'\n  expected one of: fold, bank\n  hint: did you mean 'fold'?",
        ),
        ("2", {"const": 1}, "f:1:4  a\n  E113 unknown value 2\n  expected 1"),
        ("0", {"minimum": 1}, "f:1:4  a\n  E114 0 is out of range\n  expected a number of at least 1"),
        ("2", {"maximum": 1}, "f:1:4  a\n  E114 2 is out of range\n  expected a number of at most 1"),
        ("0", {"exclusiveMinimum": 0}, "f:1:4  a\n  E114 0 is out of range\n  expected a number above 0"),
        ("1.0", {"exclusiveMaximum": 1}, "f:1:4  a\n  E114 1.0 is out of range\n  expected a number below 1"),
        (
            "x y",
            {"pattern": "^x$", "description": "an x"},
            "f:1:4  a\n  E115 'x y' does not have the right form\n  expected an x",
        ),
        (
            "x y",
            {"pattern": "^x$"},
            "f:1:4  a\n  E115 'x y' does not have the right form\n  expected text that matches ^x$",
        ),
        ("[1]", {"minItems": 2}, "f:1:1  a\n  E115 there is too little here\n  expected at least 2 entries"),
        ("[]", {"minItems": 2}, "f:1:1  a\n  E115 there is nothing here\n  expected at least 2 entries"),
        ("''", {"minLength": 1}, "f:1:4  a\n  E115 there is nothing here\n  expected at least 1 character"),
        ("[1, 1]", {"uniqueItems": True}, "f:1:1  a\n  E119 [1, 1] has non-unique elements"),
    ],
)
def test_one_finding(value: str, schema: Any, text: str | None) -> None:
    if text is None:
        assert findings(f"a: {value}\n", {"properties": {"a": schema}}) == []
    else:
        assert one(value, schema) == text


def test_unknown_and_missing_keys() -> None:
    """An unknown key stands where the key does, with all that there are and the nearest that could still be given."""
    schema = {"additionalProperties": False, "required": ["mode"], "properties": {"mode": {}, "name": {}}}
    found = findings("name: x\nmoda: 1\nother: 2\n", schema)
    assert [str(d) for d in found] == [
        "f:1:1\n  E111 the key 'mode' is missing\n  expected a key 'mode'",
        "f:2:1  moda\n  E110 unknown key 'moda'\n  expected one of: mode, name\n  hint: did you mean 'mode'?",
        "f:3:1  other\n  E110 unknown key 'other'\n  expected one of: mode, name",
    ]


def test_names_of_keys() -> None:
    schema = {"propertyNames": {"pattern": "^[a-z][a-z0-9_]*$", "not": {"enum": ["at"]}}}
    assert [str(d) for d in findings("ok: 1\nat: 2\nNo: 3\n", schema)] == [
        "f:2:1  at\n  E115 a key cannot be called 'at' here\n  expected another name",
        "f:3:1  No\n  E115 a key cannot be called 'No' here\n"
        "  expected a lower-case letter, then lower-case letters, digits and underscores",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "f:1:4  a\n  E112 'x' is not a whole number, or a list\n  expected a whole number, or a list"),
        ("0", "f:1:4  a\n  E114 0 is out of range\n  expected a number of at least 1"),
        ("[1, 0]", "f:1:8  a[1]\n  E114 0 is out of range\n  expected a number of at least 1"),
        ("[x]", "f:1:5  a[0]\n  E112 'x' is not a whole number\n  expected a whole number"),
        ("[]", "f:1:1  a\n  E115 there is nothing here\n  expected at least 1 entry"),
    ],
)
def test_of_several_forms_the_one_that_was_meant(value: str, text: str) -> None:
    item = {"type": "integer", "minimum": 1}
    assert one(value, {"anyOf": [item, {"type": "array", "minItems": 1, "items": item}]}) == text


@pytest.mark.parametrize("rule", ["anyOf", "oneOf"])
def test_one_of_two_keys(rule: str) -> None:
    schema = {rule: [{"required": ["at"]}, {"required": ["parameter"]}]}
    (found,) = findings("x: 1\n", schema)
    assert (
        str(found)
        == "f:1:1\n  E111 one of the keys 'at' or 'parameter' is missing\n  expected a key 'at' or 'parameter'"
    )
    assert findings("at: 1\n", schema) == []


def test_two_keys_that_exclude_each_other() -> None:
    (found,) = findings("at: 1\nparameter: 2\n", {"oneOf": [{"required": ["at"]}, {"required": ["parameter"]}]})
    assert str(found) == "f:1:1\n  E111 the keys 'at' and 'parameter' stand together\n  expected one of them"


def test_findings_are_in_the_order_of_the_document_and_each_once() -> None:
    schema = {"additionalProperties": {"allOf": [{"type": "integer"}, {"type": "integer"}]}}
    assert [d.place.line for d in findings("b: x\na: y\nc: z\n", schema)] == [1, 2, 3]


def test_long_values_are_cut() -> None:
    assert len(one("x" * 5000, {"type": "integer"})) < 200


def test_defaults_of_options() -> None:
    text = (
        "o:\n  n: {type: integer, minimum: 3, default: 2}\n  w: {enum: [a, b], default: a, doc: x}\n  f: {default: 1}\n"
    )
    (found,) = check_defaults(parse(text, "f"), "o")
    assert (str(found.place), found.code) == ("f:2:43  o.n.default", "E114")
    assert list(check_defaults(parse("o: {}\n"), "o", "missing")) == []


# The schema of specs.


def test_spec_schema_is_a_schema() -> None:
    schema = spec_schema(shipped())
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["deploy"]["properties"]["mode"]["enum"] == list(MODES)
    assert schema["properties"]["deploy"]["properties"]["precision"]["enum"] == list(PRECISIONS)


def test_spec_schema_spells_out_the_methods_that_are_named() -> None:
    entry = spec_schema(shipped(), ["lora"])["properties"]["attach"]["items"]
    assert [case["if"]["properties"]["method"]["const"] for case in entry["allOf"]] == ["lora"]
    assert entry["properties"]["method"]["enum"] == list(shipped())


@pytest.mark.parametrize("name", list(shipped()))
def test_options_take_one_value_or_one_per_layer(name: str) -> None:
    for option in shipped()[name].options:
        assert option.name not in RESERVED
        validator = Draft202012Validator(option_schema(option))
        assert validator.is_valid(option.default)
        assert validator.is_valid([option.default, option.default]) is not option.listed
        assert not validator.is_valid([]) and not validator.is_valid({}) and not validator.is_valid(None)
