"""JSON Schemas: the spec's is built from the method files; documents are validated with places and hints."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from jsonschema import Draft202012Validator, TypeChecker
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from peltc import schemas
from peltc.spec.combinators import COMBINATORS, Combinator
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, nearest, one_of
from peltc.spec.document import Document
from peltc.spec.method import Method, Option
from peltc.spec.recipe import COMMON, Recipe, recipes

MODES = ("fold", "static", "swappable", "bank")
PRECISIONS = ("checkpoint", "float32", "float16", "bfloat16")

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SELECTOR = {
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]
}
_NUMBERS: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": "^[0-9]{1,12}-[0-9]{1,12}$", "description": "a number or a range '4-7'"},
    ]
}
_COMMON: dict[str, Any] = {
    "name": {
        "type": "string",
        "pattern": "^[A-Za-z][A-Za-z0-9_-]*$",
        "description": "the first part of its tensors' names: a letter, then letters, digits, '_' and '-';"
        " the method's name where absent",
    },
    "at": {**_SELECTOR, "description": "sites: 'attention.query', with globs '*_attention.*'"},
    "parameter": {**_SELECTOR, "description": "parameters by name, for what has no site: '**.q_proj.weight'"},
    "layers": {
        "description": "all; last 4; first 2; a list of numbers and ranges: [0, 2, 4-7]",
        "anyOf": [
            {
                "type": "string",
                "pattern": "^(all|(first|last) [0-9]+|[0-9]+(-[0-9]+)?)$",
                "description": "'all', 'first 2', 'last 4', a number, a range '4-7', or a list of numbers and ranges",
            },
            {"type": "integer", "minimum": 0},
            {
                "type": "array",
                "minItems": 1,
                "items": _NUMBERS,
            },
        ],
    },
    "expect": {"type": "integer", "minimum": 1, "description": "how many sites the selector must match"},
    "mode": {"enum": list(MODES), "description": "as deploy.mode, for this attachment"},
    "tied": {
        "enum": ["apart", "together"],
        "description": "of a table: whether a head that is the same tensor keeps its values (apart, as where nothing is"
        " said) or changes with it (together)",
    },
    "after": {
        **_SELECTOR,
        "description": "the attachments that take effect before this one at shared sites: a name or a"
        " list of names; those that these follow themselves need not be named",
    },
}
RESERVED = ("method", *_COMMON, *COMBINATORS)
"""Keys of an attachment that are not options of its method."""


def combinator_schema(combinator: Combinator) -> dict[str, Any]:
    """What an attachment may say under a combinator's name: `true`, or its options."""
    options = {o.name: {**_one(o.schema), "description": o.doc, "default": o.default} for o in combinator.options}
    one = {"type": "object", "properties": options, "additionalProperties": False}
    return {"description": combinator.title, "anyOf": [one, {"type": "boolean"}]}


def recipe_schema(recipe: Recipe) -> dict[str, Any]:
    """What an entry of a spec may say about a recipe."""
    common = {key: _COMMON[key] for key in COMMON if key in _COMMON}
    properties = {"recipe": {"const": recipe.name, "description": recipe.title}, **common}
    for option in recipe.options:
        properties[option.name] = {**_one(option.schema), "description": option.doc, "default": option.default}
    return {"properties": properties, "additionalProperties": False}


def option_schema(option: Option) -> dict[str, Any]:
    """What an attachment may give for an option: one value, or one per selected layer."""
    one = _one(option.schema)
    described = {"description": option.doc} if option.doc else {}
    default = {"default": option.default} if option.default is not None else {}
    if option.listed:
        return {**described, **default, **one}
    return {**described, **default, "anyOf": [one, {"type": "array", "minItems": 1, "items": one}]}


def _one(option: Mapping[str, Any]) -> dict[str, Any]:
    """What one value of an option must be."""
    if option.get("type") == "array":
        return {"type": "array", "minItems": 1, "items": _NUMBERS}
    return {k: v for k, v in option.items() if k not in ("doc", "default")}


def spec_schema(methods: Mapping[str, Method], named: Iterable[str] | None = None) -> dict[str, Any]:
    """The schema of a spec in which `methods` can be named.

    Args:
        named: the methods and recipes that the document at hand names, where the others' options need not be spelt
            out.
    """
    cases, own, known = [], schemas.load("method"), recipes()
    wanted = None if named is None else set(named)
    for name in (n for n in known if wanted is None or n in wanted):
        chosen = {"properties": {"recipe": {"const": name}}, "required": ["recipe"]}
        cases.append({"if": chosen, "then": recipe_schema(known[name])})
    for name in (n for n in methods if wanted is None or n in wanted):
        method = methods[name]
        properties = {"method": {"const": name, "description": method.title}, **_COMMON}
        properties |= {option.name: option_schema(option) for option in method.options}
        properties |= {combinator.name: combinator_schema(combinator) for combinator in COMBINATORS.values()}
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
            "name": {
                "type": "string",
                "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$",
                "description": "the adaptation's name: letters, digits, '.', '_' and '-'",
            },
            "attach": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {"method": {"enum": list(methods)}, "recipe": {"enum": list(known)}},
                    "oneOf": [{"required": ["method"]}, {"required": ["recipe"]}],
                    "if": {"required": ["method"]},
                    "then": {"oneOf": [{"required": ["at"]}, {"required": ["parameter"]}]},
                    "allOf": cases,
                },
            },
            "methods": {
                "type": "object",
                "description": "methods of one's own, written as method files are",
                "propertyNames": own["properties"]["method"],
                "additionalProperties": {**own, "required": ["site"]},
            },
            "model": {
                "type": "object",
                "description": "what the model is, where its checkpoint's config does not say it",
                "additionalProperties": False,
                "properties": {
                    "architecture": {
                        "type": "string",
                        "pattern": "^[A-Za-z][A-Za-z0-9_]*$",
                        "description": "a class of transformers, in place of the config's:"
                        " BertForSequenceClassification",
                    },
                    "labels": {
                        "description": "of a classifier: the names of its classes in their order, or how many there"
                        " are; the adapter's own head tells the number where it is absent",
                        "anyOf": [
                            {"type": "array", "minItems": 1, "items": {"type": "string"}, "uniqueItems": True},
                            {"type": "integer", "minimum": 1},
                        ],
                    },
                    "vocabulary": {
                        "type": "integer",
                        "minimum": 1,
                        "description": "how many rows the table of words has, where tokens were added to those of the"
                        " checkpoint; modules give the new rows their values",
                    },
                },
            },
            "weights": {
                "type": "string",
                "pattern": "^[^\\u0000-\\u001f]+$",
                "description": "a safetensors file, relative to the spec",
            },
            "seed": {"type": "integer", "minimum": 0, "description": "of start values, where there are no weights"},
            "deploy": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "mode": {"enum": list(MODES), "default": "fold"},
                    "precision": {"enum": list(PRECISIONS), "default": "checkpoint"},
                    "generation": {
                        "type": "boolean",
                        "default": False,
                        "description": "graphs with a cache of keys and values, for `Session.generate`",
                    },
                    "freeze_gates": {
                        "type": "string",
                        "pattern": "^[^\\u0000-\\u001f]+$",
                        "description": "texts, one per line, relative to the spec: gates become their means over these,"
                        " which changes outputs; the artifact says by how much",
                    },
                },
            },
        },
    }


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
        for error in _Validator(_one(option)).iter_errors(option["default"]):
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
            known = [k for k in within.get("properties", {}) if k not in value]
            for key in _extra(value, within):
                where = document.key_place(*keys, key)
                yield Diagnostic("E110", f"unknown key '{key}'", where, one_of(sorted(known)), nearest(key, known))
        case "required":
            missing = [key for key in rule if key not in value]
            for key in missing:
                yield Diagnostic("E111", f"the key '{key}' is missing", place, f"a key '{key}'")
        case "type":
            yield _wrong_type(value, rule if isinstance(rule, list) else [rule], place)
        case "enum":
            words = [word if isinstance(word, str) else _show(word) for word in rule]
            yield Diagnostic("E113", f"unknown value {_show(value)}", place, one_of(words), nearest(str(value), words))
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


def _wrong_type(value: Any, types: Iterable[str], place: Place) -> Diagnostic:
    """A value of another type than the schema asks for."""
    wanted = ", or ".join(_WORDS.get(name, name) for name in types)
    hint = ""
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
        yield Diagnostic("E111", f"one of the keys {wanted} is missing", place, f"a key {wanted}")
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
        yield _wrong_type(error.instance, [str(e.validator_value) for inner in branches.values() for e in inner], place)
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
