"""LoRA and what the `adapters` library builds of it: (IA)³, DoRA and VeRA.

    y + s B A x        s = alpha / r; with a gate, which is the mean over the sequence of σ(w x + c), the gate instead
    l ⊙ y              with `composition_mode: scale`, the bias of y included
    m / ‖W + B A‖ ⊙ (y + s B A x)        with `use_dora`: the norm has no s, and the bias of y is scaled as well
    y + s (b B) (D A) x                  VeRA, whose diagonals b and D are matrices

The third is a `lora` with an `ia3` behind it, whose vector is m / ‖W + B A‖, or a `dora` where its quirks are fixed;
the last is a `lora` with factors b B and D A. A fused map has one block of A, of B and of the gate for each of its
projections that the config names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peltc.compiler.importers.adapters.folder import Part
from peltc.compiler.importers.adapters.formats import COUNT, INERT, LEAVE_OUT, PADDING, Facts, gate, unsaid, values
from peltc.compiler.importers.adapters.places import Places
from peltc.compiler.importers.adapters.products import incomplete
from peltc.compiler.importers.formats import NUMBER, SWITCH, Array, Config, Entry
from peltc.compiler.importers.modules import Module
from peltc.compiler.importers.quirks import Quirk
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Place, fail

TENSORS = {name: name for name in ("lora_A", "lora_B", "vera_B", "vera_D")} | {
    "m.weight": "m", "gate.weight": "gate_weight", "gate.bias": "gate_bias"}  # fmt: skip
MATRICES = {"attention.query": "q", "attention.key": "k", "attention.value": "v"}
"""What `attn_matrices` calls the projections."""
VERA = ("vera_d", "vera_b")
"""The keys that make a VeRA of a LoRA, where they are numbers."""
GATED = "its magnitudes have a gate before them, which is no change of a weight"
ELSEWHERE = "its gate reads what the network reads, and the vector would be at its last map"
FIRST_CORRECT = (1, 1)
"""The first version whose LoRA was trained with alpha / r; before, the scale was 1."""
UNSCALED = Quirk(
    "scale_of_early_versions", "versions before 1.1.0 trained without the scale alpha / r, and later ones read their"
    " folders so", "the change is scaled by alpha / r", "arXiv:2106.09685, section 4.1",
)  # fmt: skip
REPLACED = Quirk(
    "gate_without_scale", "a gate stands in place of the scale alpha / r", "the gate scales the scaled change",
    "arXiv:2110.07577, section 3.2: a gate scales what the submodule computes",
)  # fmt: skip
WHOLE = Quirk(
    "gate_of_the_result", "the gate of a vector scales all of the map's output, g l ⊙ y; a gate of 0 leaves nothing",
    "it scales the change, y + g (l ⊙ y - y); a gate of 0 leaves the map as it was",
    "arXiv:2110.07577, section 3.2: a gate of 0 leaves the submodule out",
)  # fmt: skip
BEFORE = Quirk(
    "vector_before_activation", "a feed-forward network's vector scales what its activation reads, f(l ⊙ (W x + b))",
    "it scales what the activation makes, l ⊙ f(W x + b)", "arXiv:2205.05638, section 3.3",
)  # fmt: skip
SWAPPED = Quirk(
    "maps_swapped", "on some models `intermediate_lora` means the feed-forward network's last map and `output_lora` its"
    " first", "", "the trained tensors do not fit the map that the library's documentation means",
)  # fmt: skip
NORM = Quirk(
    "norm_without_scale", "the norm is that of W + B A, and the change is s B A", "the norm is that of W + s B A",
    "arXiv:2402.09353, eq. 5",
)  # fmt: skip
BIAS = Quirk(
    "magnitudes_scale_the_bias", "m / ‖W + B A‖ scales the map's bias as well", "the bias is left alone",
    "arXiv:2402.09353, eq. 5: a change of the weight",
)  # fmt: skip
FIRST, GATE, LAST = "feed_forward.up", "feed_forward.gate", "feed_forward.down"


def matrix(site: Site) -> str:
    """What the library calls the projection that a site is; "" for none."""
    return next((letter for role, letter in MATRICES.items() if site.role.endswith(role)), "")


def modules(configs: Sequence[Config], places: Places) -> list[Module]:
    """The modules of a folder's LoRA.

    Raises:
        PeltError: E431 to E433, where its parts are not what its config says.
    """
    (config,) = configs  # a union has one at most
    found: list[Module] = []
    met: list[Site] = []
    shared = _shared(places)
    for part in places.folder.of("loras"):
        sites = places.sites(part)
        meant = [site for site in sites if len(sites) == 1 or matrix(site) in config["attn_matrices"]]
        met += meant or sites
        stored = values(part.tensors, TENSORS, part, places.folder)
        for number, site in enumerate(meant):
            own = {name: _block(name, array, number, len(meant)) for name, array in stored.items()}
            found += _at(site, own, config, shared, places, part)
    _check(config, places, met)
    return found


def _block(name: str, array: Array, number: int, count: int) -> Array:
    """A projection's own block of rows of a fused map's tensors; a tensor that has no such blocks as it is, for its
    shape will be found not to fit."""
    if count == 1 or not array.ndim or array.shape[0] % count:
        return array
    return np.split(array, count)[number]


def _at(
    site: Site, own: dict[str, Array], config: Config, shared: Mapping[str, Array], places: Places, part: Part
) -> list[Module]:
    """The modules that a part is at one site."""
    if config.get("composition_mode", "add") == "scale":
        return [_vector(site, own, config, places, part)]
    of_gate = {name: own.pop(name) for name in ("gate_weight", "gate_bias") if name in own}
    gated = bool(config.get("use_gating"))
    magnitude = own.pop("m", None)
    factors = _factors(own, shared, places, part)
    rank, alpha = config.get("r", 8), _alpha(config, places)
    options: dict[str, Any] = {"r": rank}
    scaled = not gated or (alpha != rank and places.fixes(REPLACED))
    if scaled:
        options["alpha"] = alpha
    if gated:
        options["gate"] = gate(places, **({"replaces_scale": False} if scaled else {}))
    if config.get("dropout"):
        options["dropout"] = config["dropout"]
    low = Module(site, Entry("lora", tuple(options.items())), factors | of_gate, part.source)
    if not config.get("use_dora"):
        return [low] if magnitude is None else [low, Module(site, Entry("ia3"), {"m": magnitude}, part.source)]
    if magnitude is None or site.transposed or site.rows is not None:
        raise fail("E433", f"'{part.source}' has no magnitudes of a map [outputs, inputs]",
                   Place(str(places.folder.path)), "a tensor 'm.weight'")  # fmt: skip
    met = [NORM] * (alpha != rank and not gated) + [BIAS] * ("bias" in site.parameters)
    if any([places.fixes(quirk, GATED if gated else "") for quirk in met]):
        wide = {**factors, "m": magnitude.reshape(-1, 1)}
        return [Module(site, Entry("dora", (("r", rank), ("alpha", alpha))), wide, part.source)]
    weight = np.asarray(places.base.stored(site.parameters["weight"]).array(), np.float64)
    changed = weight + factors["B"].astype(np.float64) @ factors["A"]
    vector_of = magnitude.reshape(-1).astype(np.float64) / np.linalg.norm(changed, axis=1)
    scaled = {"l": vector_of.astype(np.float32)}
    return [low, Module(site, Entry("ia3", (("after", "lora"),)), scaled, part.source)]


def _vector(site: Site, own: dict[str, Array], config: Config, places: Places, part: Part) -> Module:
    """A vector that scales what a map writes."""
    gated = bool(config.get("use_gating"))
    if _alpha(config, places) != 1 and not gated:
        raise unsaid(places.folder, "alpha", config, "a vector's own factor has no place in a spec", [1])
    vector = {"l" if name == "lora_B" else name: a.reshape(-1) if name == "lora_B" else a for name, a in own.items()}
    options: dict[str, Any] = {}
    if gated:
        options["gate"] = gate(places, **({} if places.fixes(WHOLE) else {"scales": "result"}))
    beside = {other.role: other for other in places.base.anatomy if other.layer_path == site.layer_path}
    if site.role == FIRST and GATE not in beside and places.fixes(BEFORE, ELSEWHERE if gated else ""):
        site, options = beside[LAST], {"position": "input"}
    return Module(site, Entry("ia3", tuple(options.items())), vector, part.source)


def _factors(own: dict[str, Array], shared: Mapping[str, Array], places: Places, part: Part) -> dict[str, Array]:
    """A and B of a part."""
    try:
        if "vera_B" in own:
            return {"A": own["vera_D"] @ shared["lora_A"], "B": own["vera_B"] @ shared["lora_B"]}
        return {"A": own["lora_A"], "B": own["lora_B"]}
    except (KeyError, ValueError) as error:
        raise incomplete(part, places.folder, error) from None


def _shared(places: Places) -> dict[str, Array]:
    """The matrices that all of VeRA's parts share."""
    return {name: np.asarray(stored.array(), np.float32) for part in places.folder.of("shared_parameters")
            for name, stored in part.tensors.items() if name in ("lora_A", "lora_B")}  # fmt: skip


def _alpha(config: Config, places: Places) -> Any:
    """The numerator of the scale; what an old version trained without one has r there."""
    version = places.folder.version
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    alone = config is places.folder.config
    rank, alpha = config.get("r", 8), config.get("alpha", 8)
    early = alone and len(numbers) == 2 and numbers < FIRST_CORRECT
    return rank if early and alpha != rank and not places.fixes(UNSCALED) else alpha


def _check(config: Config, places: Places, met: Sequence[Site]) -> None:
    """Whether the parts are at all places that the config means. The library tells the two maps of a feed-forward
    network apart by names that differ between models, so here it counts them."""
    roles = {site.role for site in met if not matrix(site)}
    count = sum(bool(config.get(key)) for key in ("intermediate_lora", "output_lora"))
    if len(roles) != count:
        raise fail("E432", f"the adapter has tensors at {len(roles)} maps of a feed-forward network",
                   places.folder.place, f"{count}, as 'intermediate_lora' and 'output_lora' say")  # fmt: skip
    if count == 1 and roles & {LAST if config.get("intermediate_lora") else FIRST}:
        places.fixes(SWAPPED)
    wanted = [
        site for site in places.base.anatomy
        if site.kind == "linear" and site.layer is not None and not places.left_out(config, site)
        and (site.role in roles or (config.get("selfattn_lora", True) and matrix(site) in config["attn_matrices"]))
    ]  # fmt: skip
    places.check(wanted, met)


LORA = Facts(
    name="lora",
    kinds=("loras",),
    read={
        "selfattn_lora": SWITCH, "intermediate_lora": SWITCH, "output_lora": SWITCH, "leave_out": LEAVE_OUT, "r": COUNT,
        "alpha": NUMBER, "dropout": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "use_gating": SWITCH,
        "use_dora": SWITCH, "vera_d": {"type": ["number", "null"]}, "vera_b": {"type": ["number", "null"]},
        "attn_matrices": {"type": "array", "items": {"enum": ["q", "k", "v", "o"]}},
        "composition_mode": {"enum": ["add", "scale"]},
    },
    inert=INERT,
    refused={},
    only={"dtype": ((None, "float32"), "another type than the model's has no place in a spec")},
    modules=modules,
    needed=("attn_matrices",),
    shared=lambda config: {"lora_A", "lora_B"} if {type(config.get(k)) for k in VERA} & {float, int} else set(),
    quirks=(UNSCALED, REPLACED, WHOLE, PADDING, BEFORE, SWAPPED, NORM, BIAS),
)  # fmt: skip
