"""Methods and recipes that a spec brings itself, with the checks that shipped ones go through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from peltc.spec.diagnostics import Diagnostic, PeltError, Place, nearest, one_of
from peltc.spec.document import Document
from peltc.spec.method import Method, build, shipped
from peltc.spec.recipe import Recipe, build_recipe, recipes, references
from peltc.spec.schema import spec_schema
from peltc.spec.validation import check_defaults, validate


def own_methods(document: Document) -> dict[str, Method]:
    """What stands under `methods:`.

    Raises:
        PeltError: every finding.
    """
    return _own(document, "method", shipped(), lambda name: build(document, name, ("methods", name)))


def own_recipes(document: Document, methods: Mapping[str, Method]) -> dict[str, Recipe]:
    """What stands under `recipes:`; each is expanded with its defaults, and what comes of it is valid.

    Args:
        methods: all that there are.

    Raises:
        PeltError: every finding.
    """

    def made(name: str) -> Recipe:
        recipe = build_recipe(document.tree["recipes"][name], name)
        findings = list(_unknown(document, recipe))
        if not findings:
            for i, item in enumerate(recipe.attach):
                place = document.place("recipes", name, "attach", i)
                for said, _ in replace(recipe, attach=(item,)).expand({}):
                    places = {key: document.place("recipes", name, "attach", i, key) for key in said}
                    findings.extend(held(said, methods, place, places))
        if findings:
            raise PeltError(findings)
        return recipe

    return _own(document, "recipe", recipes(), made)


def held(
    said: Mapping[str, Any], methods: Mapping[str, Method], place: Place, places: Mapping[str, Place]
) -> list[Diagnostic]:
    """What is wrong with an attachment that a recipe makes, as though a spec had said it.

    Args:
        place: of the whole; `places` of its keys.
    """
    found: dict[tuple[str | int, ...], Place] = {("attach", 0, key): where for key, where in places.items()}
    found |= {(): place, ("attach",): place, ("attach", 0): place}
    document = Document(place.path, {"pelt": 1, "attach": [dict(said)]}, found)
    try:
        validate(document, spec_schema(methods, [str(said.get("method", ""))], {}))
    except PeltError as error:
        return [replace(d, place=_back(d.place, place, places)) for d in error.diagnostics]
    return []


def _back(told: Place, place: Place, places: Mapping[str, Place]) -> Place:
    """Where a finding stands in the spec, by where it stands in the attachment alone."""
    key, _, rest = told.key.removeprefix("attach[0]").removeprefix(".").partition(".")
    known = places.get(key.partition("[")[0], place)
    return replace(known, key=".".join(part for part in (known.key, rest) if part))


def _own(document: Document, kind: str, known: Mapping[str, Any], make: Callable[[str], Any]) -> dict[str, Any]:
    """What a spec brings of a kind, made one by one."""
    key = f"{kind}s"
    own = document.tree.get(key) or {}
    if not isinstance(own, dict) or not own:
        return {}
    validate(document, {"properties": {key: spec_schema({}, (), {})["properties"][key]}})
    findings: list[Diagnostic] = []
    added: dict[str, Any] = {}
    for name in own:
        if name in known:
            place = document.place(key, name)
            findings.append(Diagnostic("E201", f"there is a shipped {kind} '{name}'", place, "a name of its own"))
            continue
        if own[name].get(kind, name) != name:
            message = f"the {kind} is called '{name}' and '{own[name][kind]}'"
            findings.append(Diagnostic("E201", message, document.place(key, name, kind), f"'{name}'"))
        findings.extend(check_defaults(document, key, name, "options"))
        try:
            added[name] = make(name)
        except PeltError as error:
            findings.extend(error.diagnostics)
    if findings:
        raise PeltError(findings)
    return added


def _unknown(document: Document, recipe: Recipe) -> Iterator[Diagnostic]:
    """Options that a recipe refers to and does not have, and conditions that are no formulas."""
    known = sorted(recipe.defaults)
    expected = one_of(known) if known else "an option under `options:`"
    for i, item in enumerate(recipe.attach):
        stem = ("recipes", recipe.name, "attach", i)
        try:
            for path, name in references(item):
                if name not in known:
                    message = f"unknown option '{name}' of the recipe '{recipe.name}'"
                    yield Diagnostic("E305", message, document.place(*stem, *path), expected, nearest(name, known))
        except PeltError as error:
            yield from (replace(d, place=document.place(*stem, "if")) for d in error.diagnostics)
