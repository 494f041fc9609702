"""Documents held against JSON Schemas: every finding with its place, in plain words, and what may have been meant."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from jsonschema import Draft202012Validator, TypeChecker
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from peltc import schemas
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, nearest, one_of
from peltc.spec.document import Document

NUMBERS: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": "^[0-9]{1,12}-[0-9]{1,12}$", "description": "a number or a range '4-7'"},
    ]
}
"""Numbers and ranges of them: 3, '4-7'."""


def one_value(option: Mapping[str, Any]) -> dict[str, Any]:
    """What one value of an option must be."""
    if option.get("type") == "array":
        return {"type": "array", "minItems": 1, "items": NUMBERS}
    return {k: v for k, v in option.items() if k not in ("doc", "default")}


def _is_integer(checker: TypeChecker, value: object) -> bool:
    """JSON Schema takes 4.0 for an integer; a size is written 4."""
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES = Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer)
_Validator = extend(Draft202012Validator, type_checker=_TYPES)  # type: ignore[no-untyped-call]
_WORDS = {
    "object": "a mapping", "array": "a list", "string": "text", "integer": "a whole number", "number": "a number",
    "boolean": "true or false",
}  # fmt: skip


def validate(document: Document, schema: str | Mapping[str, Any]) -> None:
    """Hold a document against a schema.

    Raises:
        PeltError: every finding, E110 to E119, in the order of the document.
    """
    validator = _Validator(schemas.load(schema) if isinstance(schema, str) else dict(schema))
    findings = [d for error in validator.iter_errors(document.tree) for d in _diagnose(document, error)]
    if findings:
        raise PeltError(sorted(dict.fromkeys(findings), key=lambda d: (d.place.line, d.place.column, d.code)))


def check_defaults(document: Document, *keys: str | int) -> Iterator[Diagnostic]:
    """Hold the default of each option, under `keys` of a valid document, against what the option asks for."""
    options: Any = document.tree
    for key in keys:
        options = options.get(key, {})
    for name, option in options.items():
        for error in _Validator(one_value(option)).iter_errors(option["default"]):
            for finding in _diagnose(document, error):
                yield replace(finding, place=document.place(*keys, name, "default"))


def _diagnose(document: Document, error: ValidationError) -> Iterator[Diagnostic]:
    keys = tuple(error.absolute_path)
    place = document.place(*keys)
    value: Any = error.instance
    rule: Any = error.validator_value
    within: Any = error.schema
    if "propertyNames" in error.schema_path:  # the finding is about a key, and stands at the mapping
        place = document.key_place(*keys, value)
        expected = "another name" if error.validator == "not" else within.get("description") or _FORMS.get(rule, rule)
        yield Diagnostic("E115", f"a key cannot be called '{value}' here", place, expected)
        return
    match error.validator:
        case "anyOf" | "oneOf" if error.context:
            yield from _best_branch(document, error)
        case "oneOf" if isinstance(value, dict):
            both = [key for branch in rule for key in branch.get("required", ())]
            message = f"the keys {' and '.join(repr(key) for key in both)} stand together"
            yield Diagnostic("E111", message, place, "one of them")
        case "oneOf":  # what is no mapping is found by its type
            return
        case "if" | "allOf":
            for inner in error.context or ():
                yield from _diagnose(document, inner)
        case "additionalProperties":
            every = sorted(within.get("properties", {}))
            known = [k for k in every if k not in value]  # one that is there already was not meant
            for key in _extra(value, within):
                where = document.key_place(*keys, key)
                yield Diagnostic("E110", f"unknown key '{key}'", where, one_of(every), nearest(key, known))
        case "required":
            missing = [key for key in rule if key not in value]
            for key in missing:
                yield Diagnostic("E111", f"the key '{key}' is missing", place, f"a key '{key}'")
        case "type":
            yield _wrong_type(value, rule if isinstance(rule, list) else [rule], place)
        case "enum":
            words = [word if isinstance(word, str) else _show(word) for word in rule]
            hint = _unquoted(value) or nearest(str(value), words)
            yield Diagnostic("E113", f"unknown value {_show(value)}", place, one_of(words), hint)
        case "const":
            yield Diagnostic("E113", f"unknown value {_show(value)}", place, _show(rule))
        case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum":
            bound = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "of at most"}.get(
                error.validator, "below"
            )
            yield Diagnostic("E114", f"{_show(value)} is out of range", place, f"a number {bound} {rule}")
        case "pattern":
            wanted = within.get("description", f"text that matches {rule}")
            yield Diagnostic("E115", f"{_show(value)} does not have the right form", place, wanted)
        case "minItems" | "minLength" | "minProperties":
            short = "there is too little here" if value else "there is nothing here"
            yield Diagnostic("E115", short, place, f"at least {rule} {_UNITS[str(error.validator)][rule > 1]}")
        case _:
            yield Diagnostic("E119", error.message[:300], place)


_FORMS = {
    "^[a-z][a-z0-9_]*$": "a lower-case letter, then lower-case letters, digits and underscores",
    "^[A-Za-z][A-Za-z0-9_]*$": "a letter, then letters, digits and underscores",
}
_UNITS = {"minItems": ("entry", "entries"), "minLength": ("character", "characters"), "minProperties": ("key", "keys")}


def _unquoted(value: Any) -> str:
    """The hint for braces without quotes, which are a mapping in YAML: in a recipe they stand for an option's value."""
    if isinstance(value, dict) and len(value) == 1 and list(value.values()) == [None]:
        return f'quote it, "{{{next(iter(value))}}}": braces alone are a mapping in YAML'
    return ""


def _wrong_type(value: Any, types: Iterable[str], place: Place) -> Diagnostic:
    """A value of another type than the schema asks for."""
    wanted = ", or ".join(_WORDS.get(name, name) for name in types)
    hint = _unquoted(value)
    if "boolean" in types and isinstance(value, str):
        hint = {"yes": "write true", "on": "write true", "no": "write false", "off": "write false"}.get(value, "")
    if "integer" in types and isinstance(value, float) and value.is_integer():
        hint = f"write {int(value)}"
    if "string" in types and "integer" not in types and isinstance(value, (int, float)):
        hint = f'quote it, "{_show(value)}", if it is meant'
    message = "there is nothing here" if value is None else f"{_show(value)} is not {wanted}"
    return Diagnostic("E112", message, place, wanted, hint)


def _best_branch(document: Document, error: ValidationError) -> Iterator[Diagnostic]:
    """Of several allowed forms, tell what is wrong with the one that was meant."""
    branches: dict[int, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(int(inner.schema_path[0]), []).append(inner)
    place = document.place(*error.absolute_path)
    if all(e.validator == "required" for inner in branches.values() for e in inner):
        wanted = " or ".join(f"'{key}'" for inner in branches.values() for e in inner for key in _list(e))
        keys = [key for inner in branches.values() for e in inner for key in _list(e)]
        given: Any = error.instance
        hints = (f"'{k}' stands there: {h}" for k in given if k not in keys and (h := nearest(str(k), keys)))
        yield Diagnostic("E111", f"one of the keys {wanted} is missing", place, f"a key {wanted}", next(hints, ""))
        return
    depth = len(error.absolute_path)

    def of_another_type(inner: list[ValidationError]) -> bool:
        return all(e.validator == "type" and len(e.absolute_path) == depth for e in inner)

    kind = list if isinstance(error.instance, list) else object
    chosen = min(
        branches.values(),
        key=lambda inner: (
            of_another_type(inner),
            kind is list and not any(len(e.absolute_path) > depth for e in inner),
        ),
    )
    if of_another_type(chosen):
        found = _wrong_type(error.instance, [str(e.validator_value) for b in branches.values() for e in b], place)
        within: list[Any] = [e.schema for b in branches.values() for e in b]
        options = [key for one in within for key in one.get("properties", ())]
        yield replace(found, hint=found.hint or (f"a mapping of {', '.join(options)}" if options else ""))
        return
    for inner in chosen:
        yield from _diagnose(document, inner)


def _list(error: ValidationError) -> list[Any]:
    value: Any = error.validator_value
    return list(value)


def _extra(value: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterable[str]:
    return [key for key in value if key not in schema.get("properties", {})]


def _show(value: Any) -> str:
    """A value as it would be written in YAML, more or less, cut where it is long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
