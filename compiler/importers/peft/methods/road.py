"""RoAd as Hugging Face PEFT stores it: angles and scales of pairs of outputs, which lie half a group apart."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import COMMON, TARGETS, Array, Config, Entry, Format, own_groups
from peltc.compiler.survey.anatomy import Site

VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}
"""How many angles a pair has, by PEFT's names."""


def shape(config: Config) -> tuple[int, int]:
    """How many angles a pair has, and the size of a group."""
    return VARIANTS[config.get("variant", "road_1")], config.get("group_size", 64)


def entry(config: Config, module: str) -> Entry:
    """The variant and the size of a group, which all modules share."""
    variant, group = shape(config)
    return Entry("road", (("variant", variant), ("group", group)))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """Angles and scales of the whole map."""
    return dict(tensors)


def completed(found: dict[str, Array], config: Config, site: Site, outputs: int) -> dict[str, Array]:
    """Of a fused map, the angles and scales of a site's own groups."""
    variant, group = shape(config)
    if site.rows is None or any(len(array) * 2 != variant * outputs for array in found.values()):
        return found
    return {name: own_groups(array.reshape(outputs // group, -1), site, group).reshape(-1)
            for name, array in found.items()}  # fmt: skip


ROAD = Format(
    kind="ROAD",
    tensors={"road_theta": "theta", "road_alpha": "alpha"},
    read={**TARGETS, "variant": {"enum": [*VARIANTS]}, "group_size": {"type": "integer", "minimum": 2}},
    inert=COMMON | {"init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    completed=completed,
)
