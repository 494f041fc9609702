"""ReFT as the `adapters` library stores it: for each layer a module for the first tokens and one for the last, or one
for both.

    x + (f(W x + b) − R x) R        R a matrix of its own, or with `orthogonality` made of what is stored:

R's transpose is `base` Q, where Q is the product of the reflections I − τᵢ vᵢ vᵢᵀ, cut to r columns. vᵢ has a one at i
and below it what is stored there, τᵢ is 2 / ‖vᵢ‖², and the whole parts of the stored diagonal are the columns' signs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peltc.compiler.importers.adapters.folder import AdapterFolder, Part
from peltc.compiler.importers.adapters.formats import COUNT, INERT, Facts, activation, unsaid
from peltc.compiler.importers.adapters.places import Places
from peltc.compiler.importers.formats import SWITCH, Array, Config, Entry
from peltc.compiler.importers.modules import Module
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Place, fail

SOURCE = {"learned_source.weight": "source", "learned_source.bias": "source_bias"}
PLAIN = {"projection.weight": "projection"}
REFLECTED = {"projection.parametrizations.weight.original": "original",
             "projection.parametrizations.weight.0.base": "frame"}  # fmt: skip
OTHER_STACK = "the library finds a decoder's last tokens by the encoder's padding, which no method here does"


def modules(configs: Sequence[Config], places: Places) -> list[Module]:
    """The modules of a folder's ReFT.

    Raises:
        PeltError: E431 to E433, where its parts are not what its config says.
    """
    (config,) = configs  # a union has one at most
    if len(places.stacks) > 1 and config.get("suffix_positions"):
        raise unsaid(places.folder, "suffix_positions", config, OTHER_STACK)
    if not config["prefix_positions"] and not config["suffix_positions"]:
        raise unsaid(places.folder, "prefix_positions", config, "it changes no token")
    chosen = config.get("layers", "all")
    layers = [site for site in places.base.anatomy if site.kind == "block" and site.role == "layer"]
    wanted = [site for site in layers if chosen == "all" or places.number(site) in chosen]
    found = []
    for part in places.folder.of("refts"):
        (site,) = places.sites(part)
        found.append(_module(site, part, config, places.folder))
    places.check(wanted, [module.site for module in found])
    return found


def _module(site: Site, part: Part, config: Config, folder: AdapterFolder) -> Module:
    options: dict[str, Any] = {
        "rank": config["r"],
        "first": config["prefix_positions"],
        "last": config["suffix_positions"],
    }
    if config.get("tied_weights"):
        options["shared"] = True
    if not config.get("subtract_projection", True):
        options["subtract"] = False
    if config.get("non_linearity") is not None:
        options["activation"] = activation(config, folder)
    left = dict(part.tensors)
    own: dict[str, Array] = {}
    for number, start in enumerate(("", "last_")[: 1 if config.get("tied_weights") else 2]):
        unit = _unit(left, number, config, part, folder)
        if config.get("tied_weights") or config["suffix_positions" if number else "prefix_positions"]:
            own |= {f"{start}{name}": array for name, array in unit.items()}  # else it has no tokens
    if left:
        raise fail("E433", f"'{min(left)[:120]}' of '{part.source[:120]}' is no part of what the config says",
                   Place(str(folder.path)), "a file each of whose tensors is used once")  # fmt: skip
    return Module(site, Entry("reft", tuple(options.items())), own, part.source)


def _unit(left: dict[str, Any], number: int, config: Config, part: Part, folder: AdapterFolder) -> dict[str, Array]:
    """The maps of one module; its tensors are taken out of those that are left."""
    known = SOURCE | (REFLECTED if config.get("orthogonality") else PLAIN)
    found = {}
    for name, ours in known.items():
        stored = left.pop(f"units.{number}.{name}", None)
        if stored is None:
            raise fail("E433", f"'units.{number}.{name}' of '{part.source[:120]}' is missing", Place(str(folder.path)),
                       "all tensors of the config")  # fmt: skip
        found[ours] = np.asarray(stored.array(), np.float32)
    if config.get("orthogonality"):
        original, frame = found.pop("original"), found.pop("frame")
        wide = original.shape[-1] if original.ndim == 2 else 0
        if not 0 < original.shape[0] < wide or frame.shape != (wide, wide):
            raise fail("E433", f"the projection of '{part.source[:120]}' has the shapes {list(original.shape)} and"
                               f" {list(frame.shape)}", Place(str(folder.path)),
                       "[r, width], r below the width, and [width, width]")  # fmt: skip
        found["projection"] = reflected(original, frame)
    return found


def reflected(original: Array, frame: Array) -> Array:
    """The matrix [r, width] with orthonormal rows that is stored as reflections and a frame."""
    stored = original.T.astype(np.float64)
    rank = stored.shape[1]
    product = np.eye(stored.shape[0])[:, :rank]
    for i in reversed(range(rank)):
        vector = np.concatenate([np.zeros(i), [1.0], stored[i + 1 :, i]])
        product -= np.outer(vector, (2 / (vector @ vector)) * (vector @ product))
    signs = np.trunc(np.diagonal(stored))
    return np.asarray((frame.astype(np.float64) @ (product * signs)).T, np.float32)


def note(config: Config) -> str:
    """The library does not save whether the state in the subspace is subtracted, and a reload subtracts it."""
    open_ = not config.get("orthogonality") and "subtract_projection" not in config
    return "of a DiReFT, which its folder does not tell from a NoReFT, say `subtract: false`" if open_ else ""


POSITIONS = {"type": "integer", "minimum": 0, "maximum": 2**20}
READ: Mapping[str, Any] = {
    "layers": {"anyOf": [{"const": "all"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}]},
    "prefix_positions": POSITIONS, "suffix_positions": POSITIONS, "r": COUNT, "orthogonality": SWITCH,
    "tied_weights": SWITCH, "subtract_projection": SWITCH,
    "non_linearity": {"type": ["string", "null"], "maxLength": 100},
}  # fmt: skip
REFT = Facts(
    name="reft",
    kinds=("refts",),
    read=READ,
    inert=INERT | {"dropout"},
    refused={},
    only={
        "dtype": ((None, "float32"), "another type than the model's has no place in a spec"),
        "output_reft": ((True,), "the library puts interventions behind layers only"),
    },
    modules=modules,
    needed=("r", "prefix_positions", "suffix_positions"),
    note=note,
)
