"""A setup of several adapters that the `adapters` library saved, each in a folder of its name: a stack, in which each
adapter reads what the one before it gives, a fusion, which attends over what they add, or an average.

A fusion has its own folder beside, whose maps are called after the fusion's name. Its keys and its values are the same
tensor in the library, so that with `residual_before` both have the residual connection in them; in the keys it adds one
number to all that the softmax reads, which changes nothing. Its values' map has no bias, so that it may act before the
softmax's mixture or behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.importers.adapters.average import averaged, shares
from peltc.compiler.importers.adapters.bottleneck import MAPS, PLAIN, plain
from peltc.compiler.importers.adapters.folder import LIBRARY, AdapterFolder, read_adapter_folder
from peltc.compiler.importers.formats import NUMBER, SWITCH, Array, Config, Entry
from peltc.compiler.importers.keys import check_config
from peltc.compiler.importers.modules import Module
from peltc.compiler.importers.quirks import Quirks
from peltc.compiler.importers.stored import read_json, read_tensors
from peltc.spec.diagnostics import Place, fail, one_of
from peltc.spec.foreign import SETUP

FUSION_CONFIG, FUSION_TENSORS = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
FUSION_PICKLE = "pytorch_model_adapter_fusion.bin"
FUSION = {"query.weight": "ask", "query.bias": "ask_bias", "key.weight": "offer", "key.bias": "offer_bias",
        "value.weight": "answer"}  # fmt: skip
STACK, FUSE, AVERAGE = "Stack", "Fuse", "Average"
ROWS = ("BatchSplit", "Parallel")
"""Setups whose adapters have rows of a batch of their own."""
BANK = (
    "compile one of its adapters with `mode: bank`, `pelt link` the others, and give each row its profile:"
    " docs/import.md, 'Rows with adapters of their own'"
)
MANY = 64
"""How many adapters a setup has at most."""
ORDER = "in a setup of several, the library computes something else with it than with the adapter alone"


class FusionKeys:
    """The keys of a fusion's config."""

    read: Mapping[str, Any] = {"query_before_ln": SWITCH, "residual_before": SWITCH, "value": SWITCH,
                               "dropout_prob": {"anyOf": [NUMBER, {"type": "null"}]}}  # fmt: skip
    inert = frozenset({"regularization", "value_before_softmax", "value_initialized"})
    refused: Mapping[str, str] = {
        "temperature": "the library lowers it with each call, in use as in training, and does not save it"
    }
    only: Mapping[str, tuple[tuple[Any, ...], str]] = {
        "query": ((True,), "a fusion without a map of what tokens ask by is not known here"),
        "key": ((True,), "a fusion without a map of what adapters offer is not known here"),
    }


class Setup:
    """A setup's folder.

    Args:
        quirks: what becomes of them; those of the setup are noted.

    Attributes:
        kind: `Stack`, `Fuse` or `Average`.
        folders: the adapters, in their order.
        name: a fusion's.
        weights: an average's.
    """

    def __init__(self, path: Path, quirks: Quirks):
        self.path, self.quirks, place = path, quirks, Place(str(path / SETUP))
        said = read_json(path / SETUP, LIBRARY).get("adapter_setup")
        self.kind = str(said.get("type"))[:60] if isinstance(said, dict) else ""
        if not isinstance(said, dict) or self.kind not in (STACK, FUSE, AVERAGE):
            raise fail("E431", f"a setup of the kind {self.kind!r} is not imported", place,
                       one_of([STACK, FUSE, AVERAGE]), BANK if self.kind in ROWS else "")  # fmt: skip
        names = [_single(child, place) for child in said.get("children") or ()]
        if not 0 < len(names) <= MANY:
            raise fail("E430", f"the setup has {len(names)} adapters", place, f"one to {MANY}")
        options = said.get("kwargs")
        named = options.get("name") if isinstance(options, dict) else None
        self.name = _safe(named if named is not None else ",".join(names), place)
        self.folders = [read_adapter_folder(path / name) for name in names]
        weights = options.get("weights") if isinstance(options, dict) else None
        self.weights = shares(weights, len(names), place) if self.kind == AVERAGE else []

    @property
    def whole(self) -> AdapterFolder:
        """The last adapter's folder, whose head is the one of all.

        Raises:
            PeltError: E431 heads that differ.
        """
        heads = [folder.head for folder in self.folders if folder.head is not None]
        for head in heads[:-1]:
            first, last = ({n: t.array() for n, t in one.tensors.items()} for one in (head, heads[-1]))
            if first.keys() != last.keys() or not all(np.array_equal(first[name], last[name]) for name in first):
                raise fail("E431", "the adapters have heads that differ", Place(str(self.path)), "one head for all",
                           "save the setup without the heads of the others")  # fmt: skip
        return replace(self.folders[-1], head=heads[-1] if heads else None)

    def together(self, each: Sequence[Sequence[Module]]) -> list[Module]:
        """The modules of all adapters as the setup has them.

        Args:
            each: those of each folder.

        Raises:
            PeltError: E431 adapters that the setup changes in ways that are not known here.
        """
        if self.kind != AVERAGE or any(module.entry.method == "bottleneck" for own in each for module in own):
            for folder, modules in zip(self.folders, each, strict=True):
                _check_alone(folder, modules)
        if self.kind == AVERAGE:
            return averaged(each, self.weights, self.quirks, self.path)
        if self.kind == STACK:
            return [_behind(module, number) for number, modules in enumerate(each) for module in modules]
        return self._fused(each)

    def _fused(self, each: Sequence[Sequence[Module]]) -> list[Module]:
        config, maps = self._fusion()
        found = []
        by_site = [{module.site.name: module for module in modules} for modules in each]
        if any(sites.keys() != by_site[0].keys() for sites in by_site) or maps.keys() != {
            module.source for module in each[0]
        }:
            raise fail("E432", "the adapters and their fusion are not at the same places", Place(str(self.path)),
                       "adapters and a fusion after the same sub-layers")  # fmt: skip
        for module in each[0]:
            own = [sites[module.site.name] for sites in by_site]
            options = [dict(one.entry.options) for one in own]
            same = {(one["activation"], one.get("reads", "raw")) for one in options}
            if len(same) > 1 or any(one.keys() - PLAIN for one in options):
                told = f"the adapters at {module.site.name} differ in what they read, or are more than two maps"
                raise fail("E431", told, Place(str(self.path)), "plain bottlenecks of one kind")
            size = max(one["size"] for one in options)
            said = {"adapters": len(own), "size": size, "activation": options[0]["activation"],
                    "reads": options[0].get("reads", "raw"),
                    **({"asks": "raw"} if config.get("query_before_ln") else {}),
                    **({} if config.get("value") else {"answers": False}),
                    **({"before": True} if config.get("residual_before") else {})}  # fmt: skip
            maps_of = [plain(one) for one in own]
            values = {name: np.stack([_padded(one, name, size) for one in maps_of]) for name in MAPS}
            found.append(Module(module.site, Entry("fusion", tuple(said.items())), values | maps[module.source],
                                module.source))  # fmt: skip
        return found

    def _fusion(self) -> tuple[Config, dict[str, dict[str, Array]]]:
        """The fusion's config, and its maps by the adapters' place."""
        folder = self.path / self.name
        said = read_json(folder / FUSION_CONFIG, LIBRARY)
        config, place = said.get("config"), Place(str(folder / FUSION_CONFIG))
        if not isinstance(config, dict):
            raise fail("E430", "the fusion's config says nothing", place, "a key 'config'")
        check_config(config, FusionKeys(), place, LIBRARY)
        tensors = read_tensors(folder, FUSION_TENSORS, FUSION_PICKLE)
        form = re.compile(rf"(?P<module>.+)\.adapter_fusion_layer\.{re.escape(self.name)}\.(?P<rest>.+)")
        found: dict[str, dict[str, Array]] = {}
        for name, stored in tensors.items():
            match = form.fullmatch(name) if len(name) < 1000 else None
            if match is None or match["rest"] not in FUSION:
                raise fail("E433", f"'{name[:120]}' is no part of the fusion '{self.name}'", Place(str(folder)),
                           "a file each of whose tensors is used once")  # fmt: skip
            array = np.asarray(stored.array(), np.float32)
            found.setdefault(f"{match['module']}.adapters", {})[FUSION[match["rest"]]] = array
        return config, found


def _single(child: Any, place: Place) -> str:
    """The name of a child of a setup, which is an adapter."""
    within = child.get("children") if isinstance(child, dict) and child.get("type") == "single" else None
    if not isinstance(within, list) or len(within) != 1 or not isinstance(within[0], str):
        raise fail("E431", "a setup within a setup is not imported", place, "a stack or a fusion of adapters")
    return _safe(within[0], place)


def _safe(name: Any, place: Place) -> str:
    """A name that is that of a folder beside, and of no other."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w,+-][\w,.+ -]{0,200}", name):
        raise fail("E430", f"{name!r:.60} is no name of a folder", place, "letters, digits, '_', '-', ',' and '.'")
    return name


def _check_alone(folder: AdapterFolder, modules: Sequence[Module]) -> None:
    """Whether an adapter does in a setup what it does alone, on what it is given."""
    config = folder.config
    for key, allowed in (("architecture", (None,)), ("is_parallel", (False, None)), ("original_ln_after", (True,))):
        if config.get(key, allowed[0]) not in allowed:
            raise fail("E431", f"'{key}' is {config[key]!r:.60}: {ORDER}", Place(folder.place.path, key=key),
                       one_of([repr(one) for one in allowed]))  # fmt: skip
    if any(module.entry.method != "bottleneck" for module in modules):
        raise fail("E431", f"adapters from products in a setup of several: {ORDER}", folder.place, "plain bottlenecks")


def _behind(module: Module, number: int) -> Module:
    """A module of a stack, after those of the adapters before it."""
    options = (*module.entry.options, *((("after", "bottleneck"),) if number else ()))
    return replace(module, entry=Entry("bottleneck", options), group=str(number))


def _padded(maps: Mapping[str, Array], name: str, size: int) -> Array:
    """A map of one of several adapters, as wide as the widest is: what is added reads the further features by zeros."""
    array, axis = maps[name], {"down": 0, "down_bias": 0, "up": 1}.get(name)
    if axis is None or array.shape[axis] >= size:
        return array
    wide = [(0, size - array.shape[axis]) if i == axis else (0, 0) for i in range(array.ndim)]
    return np.pad(array, wide)
