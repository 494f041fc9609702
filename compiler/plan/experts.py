"""What can change experts: methods for linear maps, each expert's map being one, whose effect is one on the weights.

A torch model computes all experts of a layer at once, from weights that are stacked in one parameter, and shows nobody
what a single expert reads. So a method must say itself what it makes of the weights.
"""

from __future__ import annotations

from typing import Any

from peltc.compiler.interpreters.affine import Affine, AffineInterpreter, NotAffine
from peltc.compiler.plan.claims import Claim
from peltc.compiler.plan.folding import tried
from peltc.spec.formula.interpreter import EvaluationError


def not_of_weights(claim: Claim) -> str:
    """Why a claim at a map is no change of its weights, naming the sub-expression; empty where it is one."""
    if more := claim.reads & {"h", "mask"}:
        return f"it reads '{min(more)}', which no weight sees"
    if "weight" in claim.effects and claim.reads & {"x", "y"}:
        return "its weight depends on the input"
    try:
        made = tried(claim, _OfWeights())
    except EvaluationError as error:
        return str(error)
    biased = "bias" in claim.effects or any(not isinstance(v, Affine) or v.offset is not None for v in made)
    return "it needs a bias, and there is none" if biased and "bias" not in claim.site.parameters else ""


class _OfWeights(AffineInterpreter):
    """Evaluates formulas over affine maps which are the same in training and in deployment."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "dropout" and isinstance(arguments["x"], Affine) and arguments["p"]:
            raise NotAffine("'dropout' of the input is no change of the weights; leave it out")
        return super().call(name, arguments)
