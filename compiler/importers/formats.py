"""What a format is: the facts about one method of another library, in a table that one mechanism reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from peltc.compiler.importers.quirks import Config as Config
from peltc.compiler.importers.quirks import Misread
from peltc.compiler.importers.quirks import Shapes as Shapes
from peltc.compiler.survey.anatomy import Anatomy, Site, places_of
from peltc.spec.diagnostics import fail

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Entry:
    """How one module of the adapter is said in a spec.

    Attributes:
        method: our method.
        options: its options, as a tuple of pairs, so that modules with equal options can be told.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()


def unmeasured(shapes: Shapes, site: Site) -> dict[str, Any]:
    """No options: the config tells them all."""
    return {}


def unchanged(found: dict[str, Array], config: Config, site: Site, outputs: int) -> dict[str, Array]:
    """The parameters as they are."""
    return found


@dataclass(frozen=True)
class Format:
    """One method as its library stores it.

    Attributes:
        kind: the library's name of it.
        tensors: what follows a module's name in the names of its tensors → what `parameters` calls it; the whole name,
            where the method has `sites` of its own.
        read: keys of the config that are understood, with the JSON Schema of their values.
        inert: keys that change nothing in what the adapter computes once it is trained.
        refused: keys that must be off, with the reason.
        only: keys of which some values alone are understood, with these and the reason.
        entry: the method and options of a module, by the config and the module's name.
        parameters: our parameters at a site, by the tensors of the module that owns its weight and those that all
            modules share.
        shared: names of tensors that all modules share → what `parameters` calls them; of larger ones than a spec's
            sites need, the leading part counts.
        integers: what follows a module's name in the names of tensors that may be of whole numbers.
        completed: what becomes of these parameters by the config, the site and the outputs of the map that the site is
            or is part of: what the file has a seed of, say.
        spans: whether what a module has is of all outputs of a fused map and cannot be told apart by rows, so that the
            method at a site says by its options `whole` and `rows` which of them are its own.
        kinds: the kinds of site whose modules can carry it.
        measured: options that the shapes of a module's tensors tell, and not the config, by these shapes and the site.
        tied: whether what is the same tensor as a table in the model changes with it; the file may hold copies then.
        sites: for a method that is of the whole model rather than of modules: the sites that it attaches to, by the
            config and the model's sites.
        evaluated: for such a method: what the config makes of the tensors, before each site takes its parameters.
        quirks: where the library computes something else than the method says; shapes by what `parameters` calls them.
    """

    kind: str
    tensors: Mapping[str, str]
    read: Mapping[str, Any]
    inert: frozenset[str]
    refused: Mapping[str, str]
    only: Mapping[str, tuple[tuple[Any, ...], str]]
    entry: Callable[[Config, str], Entry]
    parameters: Callable[[Mapping[str, Array], Site], dict[str, Array]]
    shared: Mapping[str, str] = field(default_factory=dict)
    integers: frozenset[str] = frozenset()
    completed: Callable[[dict[str, Array], Config, Site, int], dict[str, Array]] = unchanged
    spans: bool = False
    kinds: tuple[str, ...] = ("linear",)
    measured: Callable[[Shapes, Site], dict[str, Any]] = unmeasured
    tied: bool = False
    sites: Callable[[Config, Anatomy], Sequence[Site]] | None = None
    evaluated: Callable[[Config, Mapping[str, Array]], Mapping[str, Array]] | None = None
    quirks: tuple[Misread, ...] = ()


COMMON = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config",
})  # fmt: skip
"""Keys of every config of Hugging Face PEFT that say nothing of the function."""
NAMES = {"type": ["array", "string", "null"], "items": {"type": "string", "maxLength": 500}, "maxLength": 4000}
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks whose head has a row for each label."""
TARGETS = {
    "target_modules": NAMES, "exclude_modules": NAMES, "layers_pattern": NAMES,
    "layers_to_transform": {"type": ["array", "integer", "null"], "items": {"type": "integer"}},
    "modules_to_save": {"type": ["array", "null"], "items": {"type": "string"}},
}  # fmt: skip
"""Keys that say which modules carry the adapter."""


PARAMETERS = {"type": ["array", "null"], "items": {"type": "string", "maxLength": 500}, "maxItems": 2000}
"""Which parameters carry the adapter by their own names, beside those that are some module's weight."""
NUMBER = {"type": "number"}
RANK = {"type": "integer", "minimum": 1, "maximum": 2**20}
SWITCH = {"type": ["boolean", "null"]}
SEED = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}


BIASES = {"type": "string", "pattern": "^(none|all|[A-Za-z0-9]+_only)$"}
"""Which biases of the model were trained beside. They are in the file."""
_ROWS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 2**20}
TOKEN_ROWS = {"anyOf": [_ROWS, {"type": "null"}, {"type": "object", "additionalProperties": _ROWS}]}
"""Rows of tables that were trained beside, of the only one or by the table's name."""


def patterns_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of patterns with values."""
    return {"type": ["object", "null"], "additionalProperties": dict(value)}


def ranked(alpha: str) -> dict[str, Any]:
    """The keys of ranks and alphas, with the schemas of their values.

    Args:
        alpha: what the method calls the alpha of all modules.
    """
    return {"r": RANK, alpha: NUMBER, "rank_pattern": patterns_of(RANK), "alpha_pattern": patterns_of(NUMBER)}


def own_rows(array: Array, site: Site) -> Array:
    """Of an array with a row for each feature of a fused map, those of a site; of experts, of the array of each. An
    array without as many rows as it is, for its shape will be found not to fit."""
    if site.rows is None:
        return array
    if site.kind == "experts" and array.ndim == 3 and len(array):
        return np.stack([own_rows(part, replace(site, kind="linear")) for part in array])
    index = places_of(site.rows)
    return array[index] if array.ndim and index.max() < len(array) else array


def each_experts(array: Array, site: Site, axis: int) -> Array:
    """Of a matrix [R, C] with some of its rows, or columns, for each expert, the matrix of each. With rows, an expert's
    own follow each other; with columns, those of the same number do. An array of another size as it is."""
    count = site.sizes["experts"]
    if array.ndim != 2 or array.shape[axis] % count:
        return array
    if axis == 0:
        return array.reshape(count, -1, array.shape[1])
    return array.reshape(len(array), -1, count).transpose(2, 0, 1)


def whole_blocks(site: Site, size: int) -> list[int] | None:
    """Of a fused map whose features lie in blocks, the numbers of the blocks that a site owns; None where it owns parts
    of blocks.

    Args:
        size: features in a block.
    """
    ranges = site.rows or ((0, site.sizes["out"]),)
    if any(a % size or b % size for a, b in ranges):
        return None
    return [block for a, b in ranges for block in range(a // size, b // size)]


def own_groups(array: Array, site: Site, size: int) -> Array:
    """Of an array with an entry for each group of features of a fused map, those of a site.

    Raises:
        PeltError: E431 the site has parts of groups.
    """
    if site.rows is None:
        return array
    if any(a % size or b % size for a, b in site.rows):
        raise fail("E431", f"{site.name} has parts of the groups of {size} outputs that the adapter has in a fused map",
                   expected="sites that have whole groups")  # fmt: skip
    index = np.concatenate([np.arange(a // size, b // size) for a, b in site.rows])
    return array[index] if array.ndim and index.max() < len(array) else array


def is_off(value: Any) -> bool:
    """Whether a key's value turns the thing off."""
    return value is None or value is False or value in ({}, [])
