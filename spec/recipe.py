"""A recipe: attachments that belong together, under one name, which a spec gives: `recipe: unipelt`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from peltc.spec.formula.interpreter import Interpreter
from peltc.spec.formula.reader import parse
from peltc.spec.formula.syntax import names
from peltc.spec.method import Option
from peltc.spec.shelf import Shelf

COMMON = ("recipe", "name", "layers", "mode")
"""Keys of a recipe's entry in a spec that are not options of the recipe."""
SHARED = (("generate", "network"), ("gate", "central"))
"""Options of combinators that name what several attachments share: a recipe's name goes before these names too."""
_REFERENCE = re.compile(r"\{([a-z][a-z0-9_]*)\}")


@dataclass(frozen=True)
class Recipe:
    """Attachments with options of their own.

    Attributes:
        attach: entries as a spec would have them; `{option}` stands for an option's value, `if` decides by options.
    """

    name: str
    title: str
    source: str
    options: tuple[Option, ...]
    attach: tuple[Mapping[str, Any], ...]
    notes: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        return {option.name: option.default for option in self.options}

    def expand(self, entry: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
        """The attachments that an entry of a spec stands for.

        Args:
            entry: `recipe: <name>`, options, and what may be said about all attachments: `name`, a prefix of theirs;
                `layers`; `mode`.

        Returns:
            For each attachment what a spec would say, and which key of the entry each of its own keys is from.
        """
        options = {**self.defaults, **{k: v for k, v in entry.items() if k not in COMMON}}
        interpreter: Interpreter[Any] = Interpreter()
        found = []
        for item in self.attach:
            if not _holds(item, options, interpreter):
                continue
            kept = {key: value for key, value in item.items() if key != "if" and _holds(value, options, interpreter)}
            filled = {key: _fill(value, options) for key, value in kept.items()}
            origins = {key: name for key, value in item.items() if (name := _option_of(value)) in entry}
            for key in ("layers", "mode"):
                if key in entry:
                    filled[key], origins[key] = entry[key], key
            if "name" in entry:
                if "after" in filled:
                    filled["after"] = _prefixed(filled["after"], entry["name"])
                filled["name"], origins["name"] = f"{entry['name']}_{filled.get('name', filled['method'])}", "name"
                for combinator, key in SHARED:
                    if isinstance(settings := filled.get(combinator), dict) and settings.get(key):
                        settings[key] = f"{entry['name']}_{settings[key]}"
            found.append((filled, origins))
        return found


def _prefixed(named: str | list[str], prefix: str) -> str | list[str]:
    """The names of a recipe's attachments, behind a prefix."""
    return f"{prefix}_{named}" if isinstance(named, str) else [f"{prefix}_{name}" for name in named]


def _holds(value: Any, options: Mapping[str, Any], interpreter: Interpreter[Any]) -> bool:
    """Whether a mapping's `if:` holds; anything without one does."""
    return not isinstance(value, dict) or "if" not in value or interpreter.evaluate(parse(value["if"]), options)


def _fill(value: Any, options: Mapping[str, Any]) -> Any:
    """A value with options in place of references."""
    if isinstance(value, dict):
        return {key: _fill(part, options) for key, part in value.items() if key != "if"}
    if isinstance(value, list):
        return [_fill(part, options) for part in value]
    name = _option_of(value)
    return options[name] if name else value


def _option_of(value: Any) -> str:
    """The option that a value refers to, or ''."""
    found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return found.group(1) if found else ""


def references(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The options that an entry of a recipe refers to, as values and in conditions, with the path to where it does."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key == "if":
                yield from (((*path, key), name) for name in sorted(names(parse(part))))
            else:
                yield from references(part, (*path, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from references(part, (*path, i))
    elif name := _option_of(value):
        yield path, name


def build_recipe(tree: Mapping[str, Any], name: str) -> Recipe:
    """A recipe from the content of a valid document."""
    options = tuple(Option(key, value) for key, value in tree.get("options", {}).items())
    return Recipe(name, str(tree.get("title", name)), str(tree.get("source", "")), options, tuple(tree["attach"]),
                  str(tree.get("notes", "")).strip())  # fmt: skip


@cache
def recipes() -> Mapping[str, Recipe]:
    """The recipes that come with the compiler, by name."""
    return Shelf("peltc.spec.recipes", "recipe", lambda document: build_recipe(document.tree, document.tree["recipe"]))
