"""Maps from sums of Kronecker products, as the `adapters` library stores Compacter's.

    H = Σᵢ ruleᵢ ⊗ Wᵢ        x H + b        W = left right, or stored whole; rule likewise

Where the rule is one for all adapters and W is stored as factors, they are kept as such; else the maps are computed, so
that the adapter is an ordinary bottleneck, of the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peltc.compiler.importers.adapters.folder import AdapterFolder, Part
from peltc.compiler.importers.formats import Array, Config
from peltc.spec.diagnostics import PeltError, Place, fail

PRODUCTS = ("adapter_down.0.W", "adapter_down.0.b", "adapter_down.0.phm", "adapter_down.1.W", "adapter_down.1.b",
            "adapter_down.1.phm", "adapter_up.W", "adapter_up.b", "adapter_up.phm")  # fmt: skip
"""How the names of their tensors begin."""
RULE, RULES = {"phm_rule"}, {"phm_rule_left", "phm_rule_right"}
WHOLE, FACTORS = {"W_down", "W_up"}, {"W_down_left", "W_down_right", "W_up_left", "W_up_right"}
SHARED = RULE | RULES | WHOLE | FACTORS
"""What adapters may share."""
UNSAVED = (
    "what adapters share is not saved by the library where the model has no inner model, as T5; a folder from there"
    " lacks it, and the library draws it anew"
)
PLAIN = {"size", "activation", "reads", "gate"}
"""The options that `compact` adapters have as others do."""


def shared_names(config: Config) -> set[str]:
    """What the adapters of a config share."""
    if not config.get("phm_layer"):
        return set()
    rule = RULES if config.get("factorized_phm_rule") else RULE
    weight = FACTORS if config.get("factorized_phm_W", True) else WHOLE
    return (rule if config.get("shared_phm_rule", True) else set()) | (weight if config.get("shared_W_phm") else set())


def compact(config: Config, options: Mapping[str, Any]) -> bool:
    """Whether an adapter is one that is kept as products."""
    shared = config.get("shared_phm_rule", True) and not config.get("factorized_phm_rule")
    factors = config.get("factorized_phm_W", True) and not config.get("shared_W_phm") and config.get("phm_bias", True)
    return bool(shared and factors and options.keys() <= PLAIN and options.get("reads") != "residual")


def product_values(
    tensors: Mapping[str, Any], config: Config, shared: Mapping[str, Any], first: int, part: Part, folder: AdapterFolder
) -> dict[str, Array]:
    """The rule, the factors and the biases of a part.

    Args:
        first: the place of the map down in its sequence.

    Raises:
        PeltError: E433 tensors that are missing or left.
    """
    starts = {"down": f"adapter_down.{first}.", "up": "adapter_up."}
    left = {name for name in tensors if name.startswith(PRODUCTS)}
    found: dict[str, Array] = {}

    def taken(own: str, common: str) -> Array | None:
        """A tensor of the part's own, or the one that all share."""
        stored = tensors.get(own, shared.get(common) if common else None)
        left.discard(own)
        return None if stored is None else np.asarray(stored.array(), np.float32)

    for side, start in starts.items():
        pairs = {f"{side}_l": ("W_left", f"W_{side}_left"), f"{side}_r": ("W_right", f"W_{side}_right"),
                 f"{side}_whole": ("W", f"W_{side}"), f"{side}_bias": ("b", ""),
                 f"{side}_rule": ("phm_rule", "phm_rule"), f"{side}_rule_l": ("phm_rule_left", "phm_rule_left"),
                 f"{side}_rule_r": ("phm_rule_right", "phm_rule_right")}  # fmt: skip
        for ours, (own, common) in pairs.items():
            value = taken(start + own, common)
            if value is not None:
                found[ours] = value
    if left:
        raise fail("E433", f"'{min(left)}' of '{part.source[:120]}' is no part of what the config says",
                   Place(str(folder.path)), "a file each of whose tensors is used once")  # fmt: skip
    try:
        if compact(config, {}):
            rule = found.pop("down_rule")
            found.pop("up_rule")
            return {**found, "rule": rule}
        return {name: array for side in starts for name, array in _computed(found, side).items()}
    except (KeyError, ValueError) as error:
        raise incomplete(part, folder, error) from None


def incomplete(part: Part, folder: AdapterFolder, error: Exception) -> PeltError:
    """The finding about tensors that are missing, or do not fit each other."""
    told = f"the tensors of '{part.source[:120]}' are not all there, or do not fit each other: {str(error)[:120]}"
    return fail("E433", told, Place(str(folder.path)), "all tensors of the config", "" if folder.of("shared_parameters")
                else UNSAVED)  # fmt: skip


def _computed(found: Mapping[str, Array], side: str) -> dict[str, Array]:
    """A map's matrix [outputs, inputs] and its bias, from whatever it is stored as."""
    wide = np.float64
    whole = found.get(f"{side}_whole")
    if whole is None:
        whole = found[f"{side}_l"].astype(wide) @ found[f"{side}_r"]
    rule = found.get(f"{side}_rule")
    if rule is None:
        rule = found[f"{side}_rule_l"].astype(wide) @ found[f"{side}_rule_r"]
    _, i, k = whole.shape
    joined = np.einsum("nab,nik->aibk", rule.astype(wide), whole.astype(wide))
    matrix = joined.reshape(rule.shape[1] * i, rule.shape[2] * k).T
    bias = found.get(f"{side}_bias", np.zeros(matrix.shape[0]))
    return {side: matrix.astype(np.float32), f"{side}_bias": bias.astype(np.float32)}


def dense(values: Mapping[str, Array]) -> dict[str, Array]:
    """The maps of an adapter whose products are computed."""
    if "rule" not in values:
        return dict(values)
    apart = {**values, "down_rule": values["rule"], "up_rule": values["rule"]}
    return _computed(apart, "down") | _computed(apart, "up")
