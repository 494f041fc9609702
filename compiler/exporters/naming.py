"""Modules named as a person would in a config of Hugging Face PEFT: by the shortest endings that mean these modules of
the model and no others, and by numbers of layers where some layers alone carry the adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peltc.compiler.importers.peft.targets import means, patterned, targeted


def every_module(parameters: Iterable[str]) -> set[str]:
    """All modules of a model that have parameters, and those around them, from the parameters' names."""
    found: set[str] = set()
    for name in parameters:
        parts = name.split(".")[:-1]
        found.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return found


def endings(wanted: Collection[str], modules: Collection[str]) -> list[str]:
    """The shortest endings of names that mean the wanted modules alone."""
    others, found = set(modules) - set(wanted), dict[str, None]()
    for name in wanted:
        if not means(list(found), name):
            parts = name.split(".")
            forms = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
            found[next((form for form in forms if not any(means([form], other) for other in others)), name)] = None
    return list(found)


def targets(
    wanted: Collection[str], modules: Collection[str], saved: Collection[str], apart: Collection[str] | None
) -> dict[str, Any]:
    """`target_modules`, with `layers_to_transform` where that says it in fewer words; empty where the modules cannot be
    told from others.

    Args:
        saved: `modules_to_save`, which the config means apart.
        apart: of the wanted modules, `feedforward_modules`, which have entries of their own among the targets; a config
            with such has no layers.
    """
    if apart is not None:
        inside = endings(apart, modules)
        rest = endings([name for name in wanted if name not in set(apart)], modules)
        return {"target_modules": [*rest, *inside], "feedforward_modules": inside}
    found: list[dict[str, Any]] = [{"target_modules": endings(wanted, modules)}]
    numbers = {int(match[1]) for name in wanted if (match := re.match(r".*?\.[^.]*\.(\d+)\.", name))}
    if numbers:
        anywhere = {_without_number(name) for name in wanted}
        everywhere = [name for name in sorted(modules) if _without_number(name) in anywhere]
        found.append({"target_modules": endings(everywhere, modules), "layers_to_transform": sorted(numbers)})
    right = [one for one in found if set(targeted({**one, "modules_to_save": list(saved)}, modules, ())) == set(wanted)]
    return min(right, key=lambda one: sum(map(len, one.values())), default={})


def _without_number(name: str) -> str:
    """A module's name with a star for the number of its layer."""
    return re.sub(r"^(.*?\.[^.]*\.)\d+\.", r"\1*.", name)


def patterns(values: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """A config's patterns that give modules these values and the others among `modules` none."""
    found: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        own = [name for name in values if values[name] == value]
        found |= {re.escape(form).replace(r"\_", "_"): value for form in endings(own, modules)}
    simple = {form.replace("\\", ""): value for form, value in found.items()}
    for shape in (simple, found):
        if all(patterned(shape, name, None) == values.get(name) for name in modules):
            return shape
    return {re.escape(name): value for name, value in values.items()}
