"""Which claims go into weights, and why the others stay in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peltc.compiler.interpreters.affine import Affine, AffineInterpreter, NotAffine
from peltc.compiler.plan.claims import LEVELS, Claim
from peltc.compiler.plan.tables import depends_on_id_alone
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.spec.formula.interpreter import Deferred, EvaluationError, is_static
from peltc.spec.method import ROLES, initialiser


class Folding:
    """Decides it for a model.

    Args:
        anatomy: the sites of the model.
    """

    def __init__(self, anatomy: Anatomy):
        self.anatomy = anatomy
        self.trials: dict[Any, str] = {}

    def decide(self, claims: list[Claim]) -> list[Claim]:
        """Which claims go into weights. At one weight, claims are absorbed up to the first that cannot be; later
        additions that read the input alone commute with it and are absorbed as well. None is absorbed whose change a
        claim that stays must not see: that would read it in the weight; and none that must see the change of one."""
        kept: dict[int, str] = {}
        while True:
            decided = self.absorbed(claims, kept)
            staying = [c for c in decided.values() if not c.absorbed]
            apart = {
                key: f"'{other.attachment}', which stays in the graph, {why}"
                for key, claim in decided.items()
                for other in staying
                if claim.absorbed == _weight_at(other.site) != "" and (why := _apart(claim, other))
            }
            if not apart:
                break
            kept |= apart
        own = {(c.attachment, c.site.key): decided[id(c)] for c in claims if c.mirrors is None}
        for claim in (c for c in claims if c.mirrors is not None):
            assert claim.mirrors is not None
            leader = own[claim.attachment, claim.mirrors.key]
            weight = claim.site.parameters["weight"] if leader.absorbed else ""
            decided[id(claim)] = replace(claim, absorbed=weight, reason=leader.reason)
        return [decided[id(claim)] for claim in claims]

    def absorbed(self, claims: list[Claim], kept: Mapping[int, str]) -> dict[int, Claim]:
        """The claims with their absorbers, in order of effect; those `kept` stay in the graph, for a reason."""
        blocked: dict[str, list[Claim]] = {}
        decided: dict[int, Claim] = {}
        for claim in sorted(claims, key=lambda c: LEVELS[c.site.kind]):
            if claim.mirrors is not None:
                continue
            target, reason = ("", kept[id(claim)]) if id(claim) in kept else self.absorber(claim)
            before = blocked.get(target, [])
            if target and before:
                additive = set(claim.effects) == {"delta"} and "y" not in claim.reads
                others = all(set(c.effects) == {"delta"} and "y" not in c.reads for c in before)
                if not (additive and others):
                    reason, target = f"it takes effect after '{before[0].attachment}', which stays in the graph", ""
            result = replace(claim, absorbed=target, reason="" if target else reason)
            if not target:
                blocked.setdefault(_weight_at(claim.site), []).append(result)
            decided[id(claim)] = result
        return decided

    def absorber(self, claim: Claim) -> tuple[str, str]:
        """The weight that can take a claim in, or why none can."""
        site = claim.site
        if claim.mode != "fold":
            return "", f"the mode is {claim.mode}"
        if self.anatomy.packed and _weight_at(site) in self.anatomy.packed.weights:
            return "", "the weight is stored in small whole numbers, which a fold would round anew"
        if site.kind == "norm":
            runtime = {"x", "y"} & claim.reads
            if {"delta", "output"} & set(claim.effects) or runtime:
                return "", "a norm takes in changes of its gain and bias only"
            return self.single(site.parameters["weight"], site) or ("", _SHARED)
        if site.kind == "table" and not depends_on_id_alone(claim):
            return "", "what it makes of an id depends on the others in the sequence"
        if site.kind == "table":
            return self.single(site.parameters["weight"], site) or ("", _SHARED)
        if site.kind == "block":
            weight = site.values.get("linear", "")
            if not weight:
                return "", "the block does not end in a linear map"
            reason = self.not_affine(claim)
            if not reason and (more := claim.reads & {"x", "r", "h"}):
                reason = f"it reads '{min(more)}', and the map that ends the block does not"
            return ("", reason) if reason else self.affine(claim, weight)
        if site.kind in ("linear", "experts"):
            if more := claim.reads & {"h", "mask"}:
                return "", self.not_affine(claim) or f"it reads '{min(more)}', and the map does not"
            if "weight" in claim.effects and claim.reads & {"x", "y"}:
                return "", "its weight depends on the input"
            return self.affine(claim, site.parameters["weight"])
        return "", {"attention": "attention's softmax is not linear in keys and values",
                    "embedding": "tokens are added to the sequence"}[site.kind]  # fmt: skip

    def affine(self, claim: Claim, weight: str) -> tuple[str, str]:
        reason = self.not_affine(claim)
        if reason:
            return "", reason
        return self.single(weight, claim.site) or ("", _SHARED)

    def single(self, weight: str, site: Site) -> tuple[str, str] | None:
        """The weight, if the map at a site alone uses it, and those that are changed with it."""
        kind = site.kind if site.kind in ("norm", "table", "experts") else "linear"
        maps = {s.values.get("product", s.path): s for s in self.anatomy
                if s.parameters.get("weight") == weight and s.kind == kind}  # fmt: skip
        return (weight, "") if len(maps) == 1 + len(site.shared) else None

    def not_affine(self, claim: Claim) -> str:
        """Why a claim's effects are not affine, naming the sub-expression; empty where they are. It is tried."""
        key = trial_key(claim)
        if key not in self.trials:
            self.trials[key] = self.trial(claim)
        return self.trials[key]

    @staticmethod
    def trial(claim: Claim) -> str:
        try:
            tried(claim, AffineInterpreter())
        except EvaluationError as error:
            return str(error)
        return ""


def trial_key(claim: Claim) -> Any:
    """What is the same of claims whose trials end alike."""
    apart = {"index", "layer", "role"} - claim.decisive
    kinds = tuple(sorted((k, v) for k, v in claim.constants.items() if k not in apart and is_static(v)))
    return id(claim.method), kinds, tuple(claim.effects.items()), claim.site.kind


def tried(claim: Claim, interpreter: AffineInterpreter) -> list[Any]:
    """What a claim makes of inputs and outputs, as affine maps; the values of its tensors are of no matter.

    Raises:
        EvaluationError: it is not affine; names the sub-expression.
    """
    some, first = np.float32(0.37), np.float32(0)  # zeros would divide by zero; a place is a number of a row or column
    values: dict[str, Any] = {  # broadcast, a bank of any size takes no memory
        n: np.broadcast_to(first if (initialiser(t.init) or ("",))[0] == "places" else some, t.inner)
        for n, t in claim.tensors.items()
    }
    values |= {role: Affine.identity(role) for role in ("x", "y", "r", "h", "mask")}
    values["norm"] = _no_norm
    out, inputs = claim.site.sizes.get("out", 0), claim.site.sizes.get("in", 0)
    values["b"] = np.zeros(out, np.float32)
    values["W"] = Deferred(lambda: np.ones((out, inputs), np.float32))
    scope = claim.scope(values, interpreter)
    return [interpreter.evaluate(claim.effects[name], scope) for name in ("input", "delta", "output")
            if name in claim.effects]  # fmt: skip


def _weight_at(site: Site) -> str:
    """The weight that a site's claims would go into."""
    return site.values.get("linear") or site.parameters.get("weight", "")


def _apart(absorbed: Claim, staying: Claim) -> str:
    """Why a claim cannot go into a weight while another stays in the graph; empty where it can."""
    if _reads_before(staying, absorbed):
        return "reads what was before"
    return "changes what it reads" if _reads_changed(absorbed, staying) else ""


def _reads_changed(absorbed: Claim, staying: Claim) -> bool:
    """Whether a claim that would go into the weight reads a weight or bias that another changes in the graph. Weights
    are changed before biases, and both before outputs, whatever the order of the claims."""
    order = [*ROLES, "delta", "output"]
    for place, role in enumerate(ROLES):
        later = [absorbed.effects[effect] for effect in order[place + 1 :] if effect in absorbed.effects]
        if role in staying.effects and ROLES[role] in absorbed.read_by(later):
            return True
    return False


def _reads_before(reader: Claim, absorbed: Claim) -> bool:
    """Whether a claim reads a value as it was before another that has gone into the weight: the map's raw input, or a
    weight and bias without what was added to the output or made of it."""
    if reader.site.kind == "block":  # it reads what its first map does, and the output of its last
        return False
    read = reader.reads | {short for role, short in ROLES.items() if role in reader.effects}
    changed, made = set(absorbed.effects), {"input", "delta", "output"}
    if "bias" not in reader.site.parameters and "b" in read:  # a bias that the base lacks is added to the output
        made.add("bias")
    return ("x" in read and "input" in changed) or bool({"W", "b"} & read and made & changed)


def _no_norm(z: Any) -> Any:
    raise NotAffine("a normalisation is not affine")


_SHARED = "the weight is shared with other sites, which folding would change too"
