"""JSON Schemas: the spec's is built from the method files; documents are validated with places and hints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from peltc import schemas
from peltc.spec.diagnostics import Diagnostic, PeltError, nearest, one_of
from peltc.spec.document import Document
from peltc.spec.method import Method, Option

MODES = ("fold", "static", "swappable", "bank")
PRECISIONS = ("checkpoint", "float32", "float16", "bfloat16")

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SELECTOR = {
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]
}
_COMMON: dict[str, Any] = {
    "name": {
        "type": "string",
        "pattern": "^[A-Za-z][A-Za-z0-9_-]*$",
        "description": "the first part of its tensors' names; the method's name where absent",
    },
    "at": {**_SELECTOR, "description": "sites: 'attention.query', with globs '*_attention.*'"},
    "parameter": {**_SELECTOR, "description": "parameters by name, for what has no site: '**.q_proj.weight'"},
    "layers": {
        "description": "all; last 4; first 2; a list of numbers and ranges: [0, 2, 4-7]",
        "anyOf": [
            {"type": "string", "pattern": "^(all|(first|last) [0-9]+|[0-9]+(-[0-9]+)?)$"},
            {"type": "integer", "minimum": 0},
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "anyOf": [
                        {"type": "integer", "minimum": 0},
                        {"type": "string", "pattern": "^[0-9]+-[0-9]+$"},
                    ]
                },
            },
        ],
    },
    "expect": {"type": "integer", "minimum": 1, "description": "how many sites the selector must match"},
    "mode": {"enum": list(MODES), "description": "as deploy.mode, for this attachment"},
    "after": {"type": "string", "description": "the attachment that takes effect before this one at shared sites"},
}
RESERVED = ("method", *_COMMON)
"""Keys of an attachment that are not options of its method."""


def option_schema(option: Option) -> dict[str, Any]:
    """What an attachment may give for an option: one value, or one per selected layer."""
    one = {k: v for k, v in option.schema.items() if k not in ("doc", "default")}
    described = {"description": option.doc} if option.doc else {}
    default = {"default": option.default} if option.default is not None else {}
    return {**described, **default, "anyOf": [one, {"type": "array", "minItems": 1, "items": one}]}


def spec_schema(methods: Mapping[str, Method], named: Iterable[str] | None = None) -> dict[str, Any]:
    """The schema of a spec in which `methods` can be named.

    Args:
        named: the methods that the document at hand names, where the others' options need not be spelt out.
    """
    cases = []
    for name in methods if named is None else [n for n in methods if n in set(named)]:
        method = methods[name]
        properties = {"method": {"const": name, "description": method.title}, **_COMMON}
        properties |= {option.name: option_schema(option) for option in method.options}
        cases.append(
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {"properties": properties, "additionalProperties": False},
            }
        )
    return {
        "$schema": DIALECT,
        "title": "A spec: parameter-efficient fine-tuning modules and where they attach",
        "type": "object",
        "required": ["pelt", "attach"],
        "additionalProperties": False,
        "properties": {
            "pelt": {"const": 1, "description": "the version of the language"},
            "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$"},
            "attach": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["method"],
                    "properties": {"method": {"enum": list(methods)}},
                    "anyOf": [{"required": ["at"]}, {"required": ["parameter"]}],
                    "allOf": cases,
                },
            },
            "methods": {
                "type": "object",
                "description": "methods of one's own, written as method files are",
                "additionalProperties": {**schemas.load("method"), "required": ["site"]},
            },
            "weights": {"type": "string", "description": "a safetensors file, relative to the spec"},
            "seed": {"type": "integer", "minimum": 0, "description": "of start values, where there are no weights"},
            "deploy": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "mode": {"enum": list(MODES), "default": "fold"},
                    "precision": {"enum": list(PRECISIONS), "default": "checkpoint"},
                },
            },
        },
    }


def validate(document: Document, schema: str | Mapping[str, Any]) -> None:
    """Hold a document against a schema.

    Raises:
        PeltError: every finding, E110 to E119, in the order of the document.
    """
    validator = Draft202012Validator(schemas.load(schema) if isinstance(schema, str) else dict(schema))
    findings = [d for error in validator.iter_errors(document.tree) for d in _diagnose(document, error)]
    if findings:
        raise PeltError(sorted(dict.fromkeys(findings), key=lambda d: (d.place.line, d.place.column, d.code)))


def _diagnose(document: Document, error: ValidationError) -> Iterator[Diagnostic]:
    keys = tuple(error.absolute_path)
    place = document.place(*keys)
    value: Any = error.instance
    rule: Any = error.validator_value
    within: Any = error.schema
    match error.validator:
        case "anyOf" if error.context:
            yield from _best_branch(document, error)
        case "if" | "allOf":
            for inner in error.context or ():
                yield from _diagnose(document, inner)
        case "additionalProperties":
            known = [k for k in within.get("properties", {}) if k not in value]
            for key in _extra(value, within):
                where = document.place(*keys, key)
                yield Diagnostic("E110", f"unknown key '{key}'", where, one_of(sorted(known)), nearest(key, known))
        case "required":
            missing = [key for key in rule if key not in value]
            for key in missing:
                yield Diagnostic("E111", f"the key '{key}' is missing", place, f"a key '{key}'")
        case "type":
            wanted = " or ".join(rule) if isinstance(rule, list) else str(rule)
            yield Diagnostic("E112", f"{_show(value)} is not a {wanted}", place, f"a {wanted}")
        case "enum":
            words = [str(word) for word in rule]
            yield Diagnostic("E113", f"unknown value {_show(value)}", place, one_of(words), nearest(str(value), words))
        case "const":
            yield Diagnostic("E113", f"unknown value {_show(value)}", place, _show(rule))
        case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum":
            bound = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}.get(
                error.validator, "below"
            )
            yield Diagnostic("E114", f"{_show(value)} is out of range", place, f"a number {bound} {rule}")
        case "pattern":
            wanted = within.get("description", f"text that matches {rule}")
            yield Diagnostic("E115", f"{_show(value)} does not have the right form", place, wanted)
        case "minItems" | "minLength" | "minProperties":
            yield Diagnostic("E115", "there is nothing here", place, f"at least {rule}")
        case _:
            yield Diagnostic("E119", error.message[:300], place)


def _best_branch(document: Document, error: ValidationError) -> Iterator[Diagnostic]:
    """Of several allowed forms, tell what is wrong with the one that was meant."""
    branches: dict[int, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(int(inner.schema_path[0]), []).append(inner)
    if all(e.validator == "required" for inner in branches.values() for e in inner):
        wanted = " or ".join(
            f"'{key}'" for inner in branches.values() for e in inner for key in _words(e.validator_value)
        )
        yield Diagnostic("E111", f"one of the keys {wanted} is missing", document.place(*error.absolute_path))
        return
    depth = len(error.absolute_path)
    kind = list if isinstance(error.instance, list) else object
    chosen = min(
        branches.values(),
        key=lambda inner: (
            all(e.validator == "type" and len(e.absolute_path) == depth for e in inner),
            kind is list and not any(len(e.absolute_path) > depth for e in inner),
        ),
    )
    if all(e.validator == "type" and len(e.absolute_path) == depth for e in chosen):
        wanted = " or ".join(str(e.validator_value) for inner in branches.values() for e in inner)
        place = document.place(*error.absolute_path)
        yield Diagnostic("E112", f"{_show(error.instance)} is not a {wanted}", place, f"a {wanted}")
        return
    for inner in chosen:
        yield from _diagnose(document, inner)


def _words(rule: Any) -> list[str]:
    return [str(word) for word in rule]


def _extra(value: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterable[str]:
    return [key for key in value if key not in schema.get("properties", {})]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
