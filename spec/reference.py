"""The reference of the spec's language, written from the schema, the methods, the recipes and the combinators.

python -m peltc.spec.reference > docs/spec.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from peltc.spec.combinators import COMBINATORS
from peltc.spec.formula.dims import Dim, shape_text
from peltc.spec.formula.functions import FUNCTIONS
from peltc.spec.formula.reader import OPERATORS
from peltc.spec.interpreters.check import site_shapes
from peltc.spec.method import MEANINGS, NAMES, Option, shipped
from peltc.spec.recipe import recipes
from peltc.spec.schema import COMMON_KEYS, spec_schema
from peltc.spec.table import markdown

INTRO = """\
# The spec

A spec is a YAML file that says which modules attach where in a model. This page is written from the schema and the
methods, `python -m peltc.spec.reference > docs/spec.md`; `pelt schema` prints the schema itself, for editors.

```yaml
# yaml-language-server: $schema=spec.schema.json
pelt: 1
name: mine
attach:
  - method: lora
    at: [attention.query, attention.value]
    layers: last 4
    r: [4, 4, 8, 8]             # one value, or one for each layer
deploy: {precision: float16}
```
"""


FORMULAS = """\
Arithmetic, comparisons, `a if c else b`, lists, and calls. A formula may read the method's options, its parameters,
what `let:` binds, and these names; a column says which shape a name has at a kind of site, and is empty where it is not
there. `B` is the batch, `S` the text's positions, `T` those that keys and values have."""
FUNCTIONS_INTRO = """\
The operators and functions. `...` is any leading dimensions; a negative axis counts from the end. At a block, `norm(z)`
besides is the block's own normalisation of a value `z` that is shaped like `y`."""


def page() -> str:
    """The whole reference as Markdown."""
    schema = spec_schema(shipped())["properties"]
    own, bundle = (schema[key]["additionalProperties"]["properties"] for key in ("methods", "recipes"))
    lines = [INTRO]
    lines += _section("Keys", "Of the file.", _keys(schema))
    lines += _section("An attachment", "An entry of `attach`, beside the options of its method or recipe.",
                      _keys({**schema["attach"]["items"]["properties"], **COMMON_KEYS}))  # fmt: skip
    lines += _section("`model`", schema["model"]["description"] + ".", _keys(schema["model"]["properties"]))
    lines += _section("`deploy`", schema["deploy"]["description"] + ".", _keys(schema["deploy"]["properties"]))
    lines += _section("`methods`", "A method of one's own; see [writing](writing.md).", _keys(own))
    lines += ["Of an option:", "", *_keys(own["options"]["additionalProperties"]["properties"]), "", "Of a parameter:",
              "", *_keys(own["parameters"]["additionalProperties"]["properties"]), ""]  # fmt: skip
    lines += _section("`recipes`", "A recipe of one's own.", _keys(bundle))
    lines += ["## Formulas", "", FORMULAS, "", *_names(), "", FUNCTIONS_INTRO, "", *_functions(), ""]
    lines += ["## Combinators", "", "Keys of an attachment that wrap its method: `true`, or a mapping of options.", ""]
    for combinator in COMBINATORS.values():
        lines += _entry(f"{combinator.name}:", combinator.title, combinator.options)
    lines += ["## Methods", ""]
    for method in shipped().values():
        lines += _entry(method.name, f"{method.title}. At sites of kind {method.site}.", method.options)
    lines += ["## Recipes", ""]
    for recipe in recipes().values():
        lines += _entry(recipe.name, f"{recipe.title}.", recipe.options)
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, text: str, table: list[str]) -> list[str]:
    return [f"## {title}", "", text[:1].upper() + text[1:], "", *table, ""]


def _entry(name: str, title: str, options: Iterable[Option]) -> list[str]:
    rows = [(f"`{o.name}`", _type(o.schema), f"`{_shown(o.default)}`", o.doc or "") for o in options]
    table = [*markdown([("option", "values", "default", "what it is"), *rows]), ""] if rows else []
    return [f"### `{name}`", "", title, "", *table]


def _names() -> list[str]:
    """The names that formulas may read: what each is, and its shape at each kind of site that has it."""
    shapes: dict[str, dict[str, str]] = {}
    for kind, names in NAMES.items():
        values, _ = site_shapes(kind, {name: Dim.of(name) for name in names}, width=Dim.of("d_model"))
        shapes[kind] = {name: f"`{shape_text(values[name].dims)}`" if name in values else _value(name)
                        for name in names}  # fmt: skip
    rows = [(f"`{name}`", meaning, *(shapes[kind].get(name, "") for kind in NAMES))
            for name, meaning in MEANINGS.items()]  # fmt: skip
    return markdown([("name", "what it is", *NAMES), *rows])


def _value(name: str) -> str:
    """What a name without a shape stands for."""
    return "true, false" if name in ("biased", "table", "causal") else "number"


def _functions() -> list[str]:
    rows = []
    for name, one in FUNCTIONS.items():
        written, meaning = one.signature, one.doc
        if name in OPERATORS:
            meaning, _, written = one.doc.rpartition(": ")
        gives = f"`{one.gives}`" if one.gives.startswith("[") else one.gives
        rows.append((f"`{written}`", meaning or name, gives))
    return markdown([("how it is written", "what it means", "shape of the result"), *rows])


def _keys(properties: Mapping[str, Any]) -> list[str]:
    rows = [(f"`{key}`", _type(one), one.get("description", "")) for key, one in properties.items()]
    return markdown([("key", "values", "what it is"), *rows])


def _type(schema: Mapping[str, Any]) -> str:
    """What values a schema takes, in words."""
    if "const" in schema:
        return f"`{_shown(schema['const'])}`"
    if "enum" in schema:
        values = schema["enum"]
        return ", ".join(f"`{_shown(v)}`" for v in values) if len(values) <= 8 else "a name, below"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    kind: Any = schema.get("type", "any")
    words = {
        "object": "mapping",
        "array": "list",
        "string": "text",
        "integer": "whole number",
        "boolean": "true, false",
    }
    kinds: list[str] = kind if isinstance(kind, list) else [str(kind)]
    said = " or ".join(words.get(one, one) for one in kinds)
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([said, *(f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema)])


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).strip('"')


if __name__ == "__main__":
    sys.stdout.write(page())
