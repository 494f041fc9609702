"""Prefix tuning as the `adapters` library stores it: for each kind of attention one network, or one array, that makes
the keys and values of all its layers.

    [length, layers, 2, heads, head_dim]        the array, flat; or wte and the maps `control_trans.0` and `.2`

Keys and values join after position encoding, and take no position. A gate is each layer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peltc.compiler.importers.adapters.folder import Part
from peltc.compiler.importers.adapters.formats import COUNT, INERT, LEAVE_OUT, PADDING, Facts, activation, gate, values
from peltc.compiler.importers.adapters.places import PREFIXES, Places
from peltc.compiler.importers.formats import SWITCH, Array, Config, Entry
from peltc.compiler.importers.modules import Module
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Place, fail

NETWORK = {"wte.weight": "embedding", "control_trans.0.weight": "down", "control_trans.0.bias": "down_bias",
           "control_trans.2.weight": "up", "control_trans.2.bias": "up_bias"}  # fmt: skip
FLAT = {"control_trans": "both"}
RELATIVE = ("relative_attention_num_buckets", "relative_attention", "position_embedding_type")
"""Keys of a model's config by which its attention adds what depends on how far tokens are apart."""
SHIFTED = "the library counts the prefix among the positions of its relative bias, so that the text's own are shifted"
POOL = "prefix_tuning.pool"
"""How the name of a layer's reference to all prefixes ends."""
GATE = {"weight": "gate_weight", "bias": "gate_bias"}


def modules(configs: Sequence[Config], places: Places) -> list[Module]:
    """The modules of a folder's prefixes.

    Raises:
        PeltError: E432 places that the config does not mean, or that the file has nothing for; E433 tensors that do not
            fit.
    """
    (config,) = configs  # a union has one at most
    found: list[Module] = []
    folder = places.folder
    gates = {site.name: part for part in folder.of("prefix_gates") for site in places.sites(part)}
    if any(places.base.config.get(key) not in (None, False, "absolute") for key in RELATIVE):
        raise fail("E431", f"a prefix in the {places.base.architecture}: {SHIFTED}", folder.place,
                   "a model whose attention has no such bias")  # fmt: skip
    wanted, met = [], []
    by_location = _by_location(places)
    for location in PREFIXES:
        sites = [site for site in places.attentions(location) if not places.left_out(config, site)]
        if location == "self_prefix" or config.get(location, True):
            wanted += sites
        if location not in by_location:
            continue
        met += sites
        shared = values(by_location[location].tensors, FLAT if config.get("flat") else NETWORK, by_location[location],
                        folder)  # fmt: skip
        for number, site in enumerate(sites):
            own = _own(shared, site, number, len(sites), by_location[location], places)
            options: dict[str, Any] = _options(config, shared, site, places)
            if of_gate := gates.pop(site.name, None):
                own |= values(of_gate.tensors, GATE, of_gate, folder)
            if config.get("use_gating"):
                options["gate"] = gate(places)
            found.append(
                Module(site, Entry("prefix", tuple(options.items())), own, f"prefix_tunings.{location}", location)
            )
    places.check(wanted, met)
    if gates:
        raise fail("E433", f"'{next(iter(gates.values())).source}' is a gate where no prefix stands",
                   Place(str(folder.path)))  # fmt: skip
    return found


def _by_location(places: Places) -> dict[str, Part]:
    """The networks by the kind of attention that they are for. Each layer refers to all of them, so that the file has
    them once more for each layer: the copies are the same.

    Raises:
        PeltError: E433 a prefix of no known place, or copies that differ.
    """
    place = Place(str(places.folder.path))
    found: dict[str, Part] = {}
    for part in sorted(places.folder.of("prefix_tunings"), key=lambda part: part.module.endswith(POOL)):
        for name, stored in part.tensors.items():
            location, _, rest = name.partition(".")
            if location not in PREFIXES:
                raise fail("E433", f"'{name[:120]}' is a prefix of no known place", place,
                           f"one of {', '.join(PREFIXES)}")  # fmt: skip
            tensors = found.setdefault(location, Part(part.module, part.kind)).tensors
            if rest not in tensors and not part.module.endswith(POOL):
                tensors[rest] = stored
            elif rest not in tensors or not np.array_equal(tensors[rest].array(), stored.array()):
                raise fail("E433", f"'{part.source[:120]}' has another '{name[:120]}' than the model has", place,
                           "copies of one prefix")  # fmt: skip
    return found


def _options(config: Config, shared: dict[str, Array], site: Site, places: Places) -> dict[str, Any]:
    length = config.get("prefix_length", 30)
    if config.get("flat"):
        return {"length": length, "reparameterise": False}
    width = places.base.anatomy.width
    wide = {} if width == site.sizes["heads"] * site.sizes["head_dim"] else {"width": width}
    inner = activation(config, places.folder)
    return {"length": length, "hidden": config.get("bottleneck_size", 512), **wide,
            **({} if inner == "tanh" else {"activation": inner})}  # fmt: skip


def _own(shared: dict[str, Array], site: Site, number: int, count: int, part: Part, places: Places) -> dict[str, Array]:
    """What one layer's attention has: the whole network, or its own keys and values [heads, length, head_dim]."""
    if "both" not in shared:
        return dict(shared)
    both, heads, width = shared["both"], site.sizes["kv_heads"], site.sizes["head_dim"]
    if both.size % (count * 2 * heads * width):
        one = f"{count * 2 * heads * width:,}, which one position has in {count} layers"
        raise fail("E433", f"'{part.source}' has {both.size:,} values", Place(str(places.folder.path)),
                   f"a multiple of {one}")  # fmt: skip
    array = both.reshape(-1, count, 2, heads, width)[:, number]
    return {"K": np.transpose(array[:, 0], (1, 0, 2)), "V": np.transpose(array[:, 1], (1, 0, 2))}


PREFIX = Facts(
    name="prefix_tuning",
    kinds=("prefix_tunings", "prefix_gates"),
    read={
        "encoder_prefix": SWITCH, "cross_prefix": SWITCH, "leave_out": LEAVE_OUT, "flat": SWITCH,
        "prefix_length": COUNT, "bottleneck_size": COUNT, "use_gating": SWITCH,
        "non_linearity": {"type": ["string", "null"], "maxLength": 100},
    },
    inert=INERT | {"dropout"},
    refused={},
    only={"shared_gating": ((True,), "a gate for keys and another for values have no place in `prefix`")},
    modules=modules,
    quirks=(PADDING,),
)  # fmt: skip
