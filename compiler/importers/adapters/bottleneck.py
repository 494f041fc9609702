"""Bottlenecks of the `adapters` library: in sequence after a sub-layer or beside it, with the library's keys for what
is read, normalised, scaled and gated, and as sums of Kronecker products.

    z = y                  what is read: the sub-layer's output,
        norm(y + r)        or with `original_ln_before` what the block's norm makes of the sum,
        y + r              or the sum, where the block's norm comes before
        r                  or with `is_parallel` what the sub-layer is added to
    a = s · up(f(down(LN(z))))       s a number, a trained one, or one for each feature; LN with `ln_before`
    y' = a + e             e = y, or y + r with `residual_before_ln: post_add`, or z without `residual_before_ln`
    y' = LN(a) + e         with `ln_after`; LN(a + e) with `adapter_residual_before_ln`

What follows is norm(y' + r), or y' + r, as without the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peltc.compiler.importers.adapters.folder import Part
from peltc.compiler.importers.adapters.formats import (
    INERT,
    LEAVE_OUT,
    PADDING,
    Facts,
    activation,
    gate,
    unsaid,
    values,
)
from peltc.compiler.importers.adapters.interface import check_hooks
from peltc.compiler.importers.adapters.places import BLOCKS, Places
from peltc.compiler.importers.adapters.products import PRODUCTS, SHARED, compact, dense, product_values, shared_names
from peltc.compiler.importers.formats import NUMBER, SWITCH, Array, Config, Entry
from peltc.compiler.importers.modules import Module
from peltc.compiler.survey.anatomy import Site

GATE = {"gate.weight": "gate_weight", "gate.bias": "gate_bias"}
OWN = {
    "adapter_up.weight": "up", "adapter_up.bias": "up_bias", "scaling": "factor", **GATE,
    "adapter_norm_before.weight": "before_gain", "adapter_norm_before.bias": "before_bias",
    "adapter_norm_after.weight": "after_gain", "adapter_norm_after.bias": "after_bias",
}  # fmt: skip
DOWN = {"adapter_down.{}.weight": "down", "adapter_down.{}.bias": "down_bias"}
"""The map down, by its place in the sequence of layers: a norm may stand before it, under both its names."""
AGAIN = ("adapter_down.0.weight", "adapter_down.0.bias")
LEARNED = {"learned": "number", "channel": "channels"}
NO_GATE = "a gate that scales the adapter alone, and not its norm or residual, has no place in a spec"
NO_SUM = "the residual stream is left out of the sum then, which no method here does"
UNBOUND = "the library computes this only where the block's norm comes after the sum"


def modules(configs: Sequence[Config], places: Places) -> list[Module]:
    """The modules of a folder's bottlenecks.

    Raises:
        PeltError: E431 to E433, where its parts are not what its configs say.
    """
    found: list[Module] = []
    wanted = [site for site in places.base.anatomy if site.kind == "block" and _config(configs, site, places)]
    met: list[Site] = []
    shared = {name: stored for part in places.folder.of("shared_parameters") for name, stored in part.tensors.items()
              if name in SHARED}  # fmt: skip
    for part in places.folder.of("adapters"):
        (site,) = places.sites(part)
        met.append(site)
        config = _config(configs, site, places)
        if config is not None and places.folder.interface is not None:
            layer = places.read(part.module).rpartition(".")[0]
            check_hooks(places.folder.interface, site, layer, config, places.folder.path)
        if config is not None:
            found.append(_module(site, part, config, shared, places))
    places.check(wanted, met)
    return found


def _config(configs: Sequence[Config], site: Site, places: Places) -> Config | None:
    """The config that means a block."""
    key = BLOCKS.get(site.role, "")
    return next((c for c in configs if c.get(key) and not places.left_out(c, site)), None)


def _module(site: Site, part: Part, config: Config, shared: Mapping[str, Any], places: Places) -> Module:
    folder = places.folder
    normed_first = bool(config.get("ln_before"))
    tensors = dict(part.tensors)
    if normed_first:
        for name in AGAIN:  # the norm once more, as the first of the layers that end in the map down
            tensors.pop(name, None)
    known = {name.format(int(normed_first)): ours for name, ours in DOWN.items()} | OWN
    wide = places.base.anatomy.width
    size = max(1, int(wide // _reduction(config, site, places)))
    options: dict[str, Any] = {"size": size, "activation": activation(config, folder)}
    place, said = wiring(site, config, places)
    options |= said
    scaling = config.get("scaling", 1.0)
    if isinstance(scaling, str):
        options["learned"], scaling = LEARNED[scaling], 1.0
    if scaling != 1 or config.get("is_parallel"):
        options["scale"] = scaling
    inside = {}
    if options.get("scale", 1) != 1 and {"around", "norm_after"} & options.keys():
        inside = {"factor": np.full(1, options.pop("scale"), np.float32)}  # it scales less than all that is added
        options["learned"] = "number"
    if config.get("use_gating"):
        options["gate"] = gate(places, replaces_scale=False)
    if not config.get("phm_layer"):
        own = values(tensors, known, part, folder)
    else:
        products = product_values(tensors, config, shared, int(normed_first), part, folder)
        rest = {name: stored for name, stored in tensors.items() if not name.startswith(PRODUCTS)}
        own = values(rest, known, part, folder)
        if compact(config, options):
            return Module(
                place, Entry("compacter", tuple(_compacted(options, config).items())), own | products, part.source
            )
        own |= dense(products)
    method = "parallel_adapter" if config.get("is_parallel") else "bottleneck"
    return Module(place, Entry(method, tuple(options.items())), own | inside, part.source)


def _reduction(config: Config, site: Site, places: Places) -> float:
    """How many times narrower than the model a bottleneck is: one number, or one for each layer."""
    said = config["reduction_factor"]
    if isinstance(said, Mapping):
        number = str(places.number(site))
        if number not in said and "default" not in said:
            raise unsaid(places.folder, "reduction_factor", config, f"it says nothing for layer {number}")
        said = said.get(number, said.get("default"))
    return float(said)


def normalises_after(site: Site) -> bool:
    """Whether a block's norm comes after the sum with the residual stream."""
    return site.values.get("norm_x", site.values.get("r")) != site.values.get("r")


def wiring(site: Site, config: Config, places: Places) -> tuple[Site, dict[str, Any]]:
    """Where an adapter stands, and what it reads and normalises there, as options."""
    folder, after = places.folder, normalises_after(site)
    gated = bool(config.get("use_gating"))
    options: dict[str, Any] = {}
    if config.get("ln_before"):
        options["norm_before"] = True
    ends = bool(config.get("original_ln_after", True))
    if config.get("is_parallel"):
        for key in ("ln_before", "ln_after"):
            if config.get(key):
                raise unsaid(folder, key, config, "a norm in an adapter beside a sub-layer has no place in a spec")
        if not ends:
            raise unsaid(folder, "original_ln_after", config, NO_SUM)
        return site, {"reads": "residual"}
    reads = ("normed" if after else "sum") if config.get("original_ln_before") else "raw"
    around = _around(config, reads, after, places)
    if config.get("ln_after"):
        options["norm_after"] = "result" if config.get("adapter_residual_before_ln") else "change"
    if not ends:
        if after and reads == "normed" and around == "read" and site.role == "feed_forward.block":
            if gated and "norm_after" in options:
                raise unsaid(folder, "use_gating", config, NO_GATE)
            layer = next(s for s in places.base.anatomy if s.kind == "block" and s.path == site.layer_path)
            return layer, options  # behind the norm, which ends the layer: no other follows
        if after or reads != "sum" or around != "sum":
            raise unsaid(folder, "original_ln_after", config, NO_SUM)
        around = "raw"  # the sum is there already
        if options.get("norm_after") == "result":
            raise unsaid(folder, "ln_after", config, "it normalises the sum, which is the model's own")
    if reads != "raw":
        options["reads"] = reads
    if around != "raw":
        options["around"] = around
    if gated and (around != "raw" or "norm_after" in options):
        raise unsaid(folder, "use_gating", config, NO_GATE)
    return site, options


def _around(config: Config, reads: str, after: bool, places: Places) -> str:
    """Where the adapter's own residual connection begins."""
    said = config.get("residual_before_ln", True)
    if said == "post_add":
        if reads != "normed" or not after:
            raise unsaid(places.folder, "residual_before_ln", config, UNBOUND)
        return "sum"
    if said or reads == "raw":
        return "raw"
    return "read" if reads == "normed" else "sum"


def _compacted(options: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The options of a bottleneck as those of one from products."""
    return {**options, "n": config.get("phm_dim", 4), "rank": config.get("phm_rank", 1)}


MAPS = ("down", "down_bias", "up", "up_bias")
PLAIN = {"size", "activation", "reads", "scale", "learned"}
"""The options of adapters that are two maps and a factor, and nothing else."""


def plain(module: Module) -> dict[str, Array]:
    """The maps of an adapter of such options, its factor multiplied into what it adds."""
    options, found = dict(module.entry.options), {name: module.values[name] for name in MAPS}
    if "factor" in module.values or "scale" in options:
        factor = np.asarray(module.values.get("factor", options.get("scale")), np.float32).reshape(-1)
        found |= {"up": found["up"] * factor[:, None], "up_bias": found["up_bias"] * factor}
    return found


FLAGS = ("mh_adapter", "output_adapter", "cross_adapter", "original_ln_before", "original_ln_after", "ln_before",
         "ln_after", "is_parallel", "use_gating", "adapter_residual_before_ln", "phm_layer", "factorized_phm_W",
         "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_bias")  # fmt: skip
POSITIVE = {"type": "number", "exclusiveMinimum": 0, "maximum": 2**20}
BOTTLENECK = Facts(
    name="",
    kinds=("adapters",),
    read={
        **dict.fromkeys(FLAGS, SWITCH),
        "reduction_factor": {"anyOf": [POSITIVE, {"type": "object", "additionalProperties": POSITIVE}]},
        "non_linearity": {"type": "string", "maxLength": 100}, "scaling": {"anyOf": [NUMBER, {"enum": [*LEARNED]}]},
        "residual_before_ln": {"enum": [True, False, "post_add"]}, "leave_out": LEAVE_OUT,
        "phm_dim": {"type": "integer", "minimum": 1, "maximum": 2**12},
        "phm_rank": {"type": "integer", "minimum": 1, "maximum": 2**12},
    },
    inert=INERT | {"dropout", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity",
                   "stochastic_depth", "inv_adapter_reduction_factor"},
    refused={"inv_adapter": "invertible adapters after the embedding have no counterpart here"},
    only={},
    modules=modules,
    needed=("reduction_factor", "non_linearity"),
    shared=shared_names,
    quirks=(PADDING,),
)  # fmt: skip
