"""The JSON Schema of a spec, built from the methods, the recipes and the combinators that there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peltc import schemas
from peltc.spec.combinators import COMBINATORS, Combinator
from peltc.spec.method import Method, Option
from peltc.spec.modes import ANY, MIXED, MODES, PACKED, PROVIDERS
from peltc.spec.quantising import quantise_schema
from peltc.spec.recipe import COMMON, Recipe, recipes
from peltc.spec.validation import NUMBERS, one_value

PRECISIONS = ("checkpoint", "float32", "float16", "bfloat16")
TIMES = ("prefill",)
"""When what is computed of a whole text is computed, where the text grows."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SELECTOR = {
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]
}
COMMON_KEYS: dict[str, Any] = {
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
                "items": NUMBERS,
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
"""Keys that attachments of all methods have."""
RESERVED = ("method", *COMMON_KEYS, *COMBINATORS)
"""Keys of an attachment that are not options of its method."""


def combinator_schema(combinator: Combinator) -> dict[str, Any]:
    """What an attachment may say under a combinator's name: `true`, or its options."""
    options = {o.name: {**one_value(o.schema), "description": o.doc, "default": o.default} for o in combinator.options}
    one = {"type": "object", "properties": options, "additionalProperties": False}
    return {"description": combinator.title, "anyOf": [one, {"type": "boolean"}]}


def recipe_schema(recipe: Recipe) -> dict[str, Any]:
    """What an entry of a spec may say about a recipe."""
    common = {key: COMMON_KEYS[key] for key in COMMON if key in COMMON_KEYS}
    properties = {"recipe": {"const": recipe.name, "description": recipe.title}, **common}
    for option in recipe.options:
        properties[option.name] = {**one_value(option.schema), "description": option.doc, "default": option.default}
    return {"properties": properties, "additionalProperties": False}


def option_schema(option: Option) -> dict[str, Any]:
    """What an attachment may give for an option: one value, or one per selected layer."""
    one = one_value(option.schema)
    described = {"description": option.doc} if option.doc else {}
    default = {"default": option.default} if option.default is not None else {}
    if option.listed:
        return {**described, **default, **one}
    return {**described, **default, "anyOf": [one, {"type": "array", "minItems": 1, "items": one}]}


def spec_schema(
    methods: Mapping[str, Method], named: Iterable[str] | None = None, known: Mapping[str, Recipe] | None = None
) -> dict[str, Any]:
    """The schema of a spec in which `methods` can be named.

    Args:
        named: the methods and recipes that the document at hand names, where the others' options need not be spelt
            out.
        known: the recipes that can be named; those that are shipped where absent.
    """
    cases, own, bundle = [], schemas.load("method"), schemas.load("recipe")
    known = recipes() if known is None else known
    wanted = None if named is None else set(named)
    for name in (n for n in known if wanted is None or n in wanted):
        chosen = {"properties": {"recipe": {"const": name}}, "required": ["recipe"]}
        cases.append({"if": chosen, "then": recipe_schema(known[name])})
    for name in (n for n in methods if wanted is None or n in wanted):
        method = methods[name]
        properties = {"method": {"const": name, "description": method.title}, **COMMON_KEYS}
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
                "description": "the modules: methods and recipes, each with the sites that it attaches to",
                "items": {
                    "type": "object",
                    "properties": {
                        "method": {"enum": list(methods), "description": "the method's name"},
                        "recipe": {"enum": list(known), "description": "or a recipe's, in a method's place"},
                    },
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
            "recipes": {
                "type": "object",
                "description": "recipes of one's own, written as recipe files are",
                "propertyNames": bundle["properties"]["recipe"],
                "additionalProperties": {**bundle, "required": ["attach"]},
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
                "description": "what the artifact is",
                "additionalProperties": False,
                "properties": {
                    "mode": {
                        "enum": list(MODES),
                        "default": "fold",
                        "description": "fold what is exact into the weights, keep modules in the graph (static), or let"
                        " profiles bring their tensors while the artifact runs, one profile at a time (swappable) or"
                        " another for each row of a batch (bank)",
                    },
                    "precision": {
                        "enum": list(PRECISIONS),
                        "default": "checkpoint",
                        "description": "the float type of weights and computation; checkpoint is that of the stored"
                        " weights, where bfloat16 is computed in float32 unless the provider is cuda",
                    },
                    "provider": {
                        "enum": list(PROVIDERS),
                        "default": ANY,
                        "description": "what the artifact is to run on; for cuda, an operation that ONNX Runtime has"
                        " no CUDA kernel for is an error",
                    },
                    "quantise": quantise_schema(),
                    "generation": {
                        "type": "boolean",
                        "default": False,
                        "description": "graphs with a cache of keys and values, for `Session.generate`",
                    },
                    "masks": {
                        "enum": [PACKED, MIXED],
                        "default": PACKED,
                        "description": "of attachments with `bank:`, in mode bank: a profile is its masks, by which the"
                        " graph mixes the modules on each run (packed), or it is the modules that they mix (mixed)",
                    },
                    "blend": {
                        "type": "boolean",
                        "default": False,
                        "description": "in mode bank: a text may have several profiles, each with a weight, by which"
                        " what their modules compute is added up",
                    },
                    "fewer_labels": {
                        "type": "boolean",
                        "default": False,
                        "description": "profiles may have fewer labels than the model, whose head has room for the most"
                        " of them: the others are far below",
                    },
                    "gates": {
                        "type": "object",
                        "description": "`{at: prefill}`: gates, and whatever else is computed of a whole text, are"
                        " computed from the prompt and kept with the cache while tokens are generated",
                        "additionalProperties": False,
                        "required": ["at"],
                        "properties": {
                            "at": {
                                "enum": list(TIMES),
                                "description": "when they are computed: with the prompt, each text's from its own",
                            },
                        },
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
