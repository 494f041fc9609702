"""Sites as a person would write them in a spec: by role where all layers are meant, by role and layers where some are,
and by parameter where a site has no role. What is written means exactly the sites that were given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.compiler.survey.grouping import spans


def selections(sites: Sequence[Site], anatomy: Anatomy) -> list[dict[str, Any]]:
    """What to write for `at`, `layers` and `parameter`, one mapping for each attachment that it takes."""
    found: list[dict[str, Any]] = []
    named = [site for site in sites if site.path]
    groups: dict[tuple[str, tuple[int, ...] | None], list[str]] = {}
    for role in dict.fromkeys(site.role for site in named):
        own = [site for site in named if site.role == role]
        every = [site for site in anatomy.named if site.role == role and site.kind == own[0].kind]
        if len(own) == len(every):
            groups.setdefault(("", None), []).append(role)
            continue
        if any(site.layer is None for site in own):
            groups.setdefault(("", None), []).extend(site.path for site in own)
            continue
        chosen = {stack: _numbers(own, stack) for stack in dict.fromkeys(site.stack for site in every)}
        if len(set(chosen.values())) == 1:  # the same layers of each stack
            groups.setdefault(("", next(iter(chosen.values()))), []).append(role)
            continue
        for stack, numbers in chosen.items():
            if numbers and role == "layer":  # a glob for layers would mean what is in them
                groups.setdefault(("", None), []).extend(f"{stack}.layers.{number}" for number in numbers)
            elif numbers:
                whole = numbers == _numbers(every, stack)
                groups.setdefault((f"{stack}.layers.*.", None if whole else numbers), []).append(role)
    for (prefix, layers), roles in groups.items():
        at = [prefix + role for role in roles]
        entry: dict[str, Any] = {"at": at[0] if len(at) == 1 else at}
        if layers is not None:
            entry["layers"] = _layers(layers)
        found.append(entry)
    unnamed = [site.parameters["weight"] for site in sites if not site.path]
    if unnamed:
        others = {site.parameters["weight"] for site in anatomy if "weight" in site.parameters} - set(unnamed)
        names = _globs(unnamed, others)
        found.append({"parameter": names[0] if len(names) == 1 else names})
    return found


def _numbers(sites: Iterable[Site], stack: str) -> tuple[int, ...]:
    return tuple(sorted(site.layer for site in sites if site.stack == stack and site.layer is not None))


def _layers(numbers: Iterable[int]) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in spans(list(numbers)).split(",")]


def _globs(names: Sequence[str], others: set[str]) -> list[str]:
    """Names with a star for the number of the layer, where that means no other parameter."""
    found: list[str] = []
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        form = re.compile(re.escape(pattern).replace(r"\*", ".*"))
        found.append(name if any(form.fullmatch(other) for other in others) else pattern)
    return list(dict.fromkeys(found))
