"""What an adapter changes of a model: the whole change of each linear map's weight and bias, whatever its methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from peltc.compiler.adapter.weights import parameters_of
from peltc.compiler.base.base import Base
from peltc.compiler.passes.absorb import fold_map
from peltc.compiler.plan.claims import Claim, Plan
from peltc.spec.diagnostics import Diagnostic, PeltError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Changes:
    """An adapter whose modules can be combined with others'.

    Attributes:
        label: what the adapter is called.
        plan, tensors: what its modules are.
    """

    label: str
    plan: Plan
    base: Base
    tensors: Mapping[str, Array]

    @cached_property
    def claims(self) -> dict[str, list[Claim]]:
        """The claims that change what a map has, by site; sites that share parameters with an earlier one are left
        out."""
        found: dict[str, list[Claim]] = {}
        for claim in self.plan.claims:
            if not (claim.follows or is_whole(claim)):
                found.setdefault(claim.site.key, []).append(claim)
        return found

    @cached_property
    def whole(self) -> dict[str, Claim]:
        """The claims that put a map of their own in the base's place, by site."""
        return {claim.site.key: claim for claim in self.plan.claims if is_whole(claim)}

    def check(self) -> None:
        """Whether all that the adapter does is changes of linear maps.

        Raises:
            PeltError: E435, a finding for each attachment that does something else.
        """
        findings: dict[str, Diagnostic] = {}
        for claim in self.plan.claims:
            why = claim.reason or "it could not be folded into the weights"
            if claim.site.kind != "linear":
                why = f"it changes {'an' if claim.site.kind[0] in 'ae' else 'a'} {claim.site.kind}, and no linear map"
            elif claim.mirrors is None and claim.absorbed:
                continue
            entry = next(entry for entry in self.plan.spec.attach if entry.name == claim.attachment)
            findings.setdefault(claim.attachment, Diagnostic(
                "E435", f"'{claim.attachment}' of {self.label} at {claim.site.name} is no change of a weight: {why}",
                entry.place, "methods that fold into linear maps",
                "leave the attachment out, or attach it beside the others in one spec"))  # fmt: skip
        for key in set(self.whole) & set(self.claims):
            findings[key] = Diagnostic("E435", f"{self.label} replaces {key} and changes it too",
                                       expected="one of both")  # fmt: skip
        if findings:
            raise PeltError(list(findings.values()))

    def at(self, key: str) -> tuple[Array, Array | None]:
        """The change of a site's weight [O, I] and of its bias [O], float32; None where the bias keeps its values.

        It is computed without the base where the base has no say in it, and is a difference of two weights otherwise.
        """
        claims = self.claims[key]
        site = claims[0].site
        if all(set(c.effects) == {"delta"} and not c.reads & {"W", "b", "y"} for c in claims):
            weight, bias = fold_map(claims, np.zeros((site.sizes["out"], site.sizes["in"]), np.float32), None,
                                    self.tensors)  # fmt: skip
            return weight, bias
        held = parameters_of(site, self.base.whole)
        weight, bias = held["W"](), held["b"]() if "bias" in site.parameters else None
        new_weight, new_bias = fold_map(claims, weight, bias, self.tensors)
        if new_bias is bias or new_bias is None:
            return new_weight - weight, None
        return new_weight - weight, new_bias - (0 if bias is None else bias)


def is_whole(claim: Claim) -> bool:
    """Whether a claim makes nothing of the weight that it finds: a head that is trained, say."""
    return "weight" in claim.effects and "W" not in claim.reads
