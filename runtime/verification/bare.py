"""The bare base of an artifact whose profiles bring tokens or keys before the text: without a profile, it answers what
PyTorch does without the modules that profiles bring. That rows without such places are exact is read from the graphs;
here it is held, so that no architecture is taken on trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peltc.compiler.base.base import Base
from peltc.compiler.linking.uneven import before
from peltc.compiler.plan.claims import Plan
from peltc.runtime.running.session import Session
from peltc.runtime.verification import answers
from peltc.runtime.verification.quantised import Exact, quantised_parameters
from peltc.runtime.verification.stored import put_in, stored_parameters
from peltc.runtime.verification.verify import CPU, TOLERANCE, attached, base_error, load_model
from peltc.spec.modes import EXCHANGED


def not_bare(
    folder: Path, manifest: Mapping[str, Any], plan: Plan, base: Base, tensors: Mapping[str, Any]
) -> str | None:
    """Why rows without a profile are not the base in an artifact, as it is measured; None where they are, or where
    there is nothing to hold: of the modules nothing stands before the text, rows without are refused anyhow, or half
    precision rounds both.

    Args:
        tensors: the adapter's, of which those in no mode of profiles stay.
    """
    record = manifest["profiles"]
    if not record or record["no_bare_base"] or not any(map(before, plan.claims)) or base.precision != "float32":
        return None
    rest = replace(plan, claims=tuple(claim for claim in plan.claims if claim.mode not in EXCHANGED))
    model, generation = load_model(base), "decode" in manifest["graphs"]
    if quantised := manifest["quantised"]:  # held on the weights that the artifact has, what folds into them inside
        parameters = quantised_parameters(folder, quantised, model, base)
        others = [entry for entry in manifest["folded"] if entry["parameter"] not in parameters]
        put_in(model, stored_parameters(folder, others) | parameters)
        rest = replace(rest, claims=tuple(claim for claim in rest.claims if not claim.absorbed))
    expected = answers.of_torch(attached(model, rest, tensors) if rest.claims else model, base, generation)
    del model
    session = (Exact if quantised else Session)(folder, CPU, spinning=False)
    found = answers.of_bare(session, base, generation)
    worst = answers.worst(answers.differences(found, expected, str(folder), hidden=False))
    if worst <= TOLERANCE[base.precision] or worst <= 2 * base_error(base):
        return None
    return (f"measured, rows without a profile differ from PyTorch by {worst:.1e} of the largest value, since the model"
            " sees places that a mask hides")  # fmt: skip
