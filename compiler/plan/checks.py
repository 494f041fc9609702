"""Whether claims are possible: shapes, tokens before the sequence, and tables that others follow."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from peltc.compiler.plan.claims import Claim
from peltc.compiler.plan.experts import not_of_weights
from peltc.compiler.plan.findings import Findings, at
from peltc.compiler.plan.folding import trial_key
from peltc.compiler.plan.tables import not_of_ids
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.diagnostics import Place, one_of
from peltc.spec.formula.interpreter import EvaluationError
from peltc.spec.interpreters.check import fits, joined, normalised, readable, site_shapes
from peltc.spec.interpreters.shape import Shape
from peltc.spec.interpreters.shape import tensor as as_tensor
from peltc.spec.interpreters.shapes import ShapeInterpreter
from peltc.spec.method import NAMES, RUNTIME_NAMES
from peltc.spec.specification import Attachment, Spec


def needs_text(claim: Claim, gates: str) -> tuple[str, str] | None:
    """Why a claim cannot be computed of new tokens alone, and what to do; None where it can.

    Args:
        gates: when what is computed of a whole text is, as the spec says.
    """
    by = claim.mixed if claim.grows else ""
    if not by or (gates and claim.holds):
        return None
    message = f"'{claim.attachment}' at {claim.site.name} reads the whole sequence by '{claim.open or by}', and a token"
    hint = "`deploy: {gates: {at: prefill}}` keeps what the prompt gives; `freeze_gates` makes gates constants"
    return f"{message} at a time is generated", hint if claim.holds else ""


def not_generated(claim: Claim, gates: str) -> tuple[str, str] | None:
    """Why a claim cannot be in graphs that generate a token at a time, and what to do; None where it can; the arguments
    are those of `needs_text`."""
    where = f"'{claim.attachment}' at {claim.site.name}"
    if "prepend" in claim.effects and claim.site.role == "embedding":
        return (f"{where} puts tokens behind the embedding, where they take no positions; a cache counts them",
                f"attach it to '{claim.site.name}.word'")  # fmt: skip
    return needs_text(claim, gates)


class Checks:
    """What is asked of claims, one by one and together.

    Args:
        spec: theirs.
        anatomy: the sites of the model.
        findings: where to say what is wrong with them.
    """

    def __init__(self, spec: Spec, anatomy: Anatomy, findings: Findings):
        self.spec, self.anatomy, self.find = spec, anatomy, findings.find
        self.tried: dict[Any, str] = {}

    def generates(self, claims: list[Claim]) -> None:
        """Where the spec asks for generation, whether claims allow it. Gates that are to be frozen are looked at once
        they are."""
        for entry in self.spec.attach if self.spec.generation and not self.spec.freeze_gates else ():
            for claim in claims:
                if claim.attachment == entry.name and (found := not_generated(claim, self.spec.gates)):
                    self.find("E208", found[0], at(entry), hint=found[1])
                    break

    def holds(self, claims: list[Claim]) -> None:
        """What is kept from the prompt is there, and is not made of tokens too that the cache begins with."""
        place = self.spec.places.get("deploy", Place(self.spec.path))
        if not self.spec.gates:
            return
        if self.spec.freeze_gates:
            self.find("E212", "gates are to be kept from the prompt, and to be frozen to constants", place,
                      "`gates` or `freeze_gates`")  # fmt: skip
        holding = [claim for claim in claims if claim.holds]
        if not holding:
            self.find("E212", "no module makes one value of a whole text that grows, so nothing is kept from a prompt",
                      place, "an attachment with `gate:` in a decoder", "leave out deploy.gates")  # fmt: skip
        before = [c for c in claims if c.takes or "prepend" in c.effects] if self.spec.generation else []
        for claim in [c for c in before if c.site.stack != "encoder"][:1] if holding else ():
            entry = next(entry for entry in self.spec.attach if entry.name == claim.attachment)
            self.find("E208", f"'{holding[0].attachment}' at {holding[0].site.name} reads the tokens of"
                      f" '{claim.attachment}' too, which lie in the cache before there is a text", at(entry),
                      "one of them", "in torch, with the modules attached, both work")  # fmt: skip

    def shapes(self, entry: Attachment, claim: Claim, shapes: ShapeInterpreter) -> bool:
        """Hold each definition's shape against what the site needs."""
        values, expected = site_shapes(claim.site.kind, claim.site.sizes, claim.site.name, self.anatomy.width)
        for name, tensor in claim.tensors.items():
            declared = next(p for p in claim.method.parameters if p.name == name)
            origin = f"parameter {name} [{', '.join(a.text for a in declared.shape)}]"
            values[name] = Shape(tensor.inner, origin)
        if "norm" in claim.site.anchors:
            values["norm"] = partial(normalised, values["y"])
        offered = {*NAMES[claim.method.site]} & {*RUNTIME_NAMES} - {"mask"}
        there = offered & {*claim.site.values}
        missing = sorted(claim.reads & offered - there)
        if missing and claim.site.kind != "table":  # a table says itself what it cannot give
            message = f"'{entry.name}' reads '{missing[0]}', which {claim.site.name} does not have"
            self.find("E205", message, at(entry), one_of(sorted(there)))
            return False
        whole: dict[str, Shape] = {}
        for name, expr in claim.effects.items():
            place = entry.formulas
            try:
                found = as_tensor(shapes.evaluate(expr, claim.scope(readable(values, name), shapes)))
                wanted, whole[name] = expected[name], found
                if not fits(found, wanted, name):
                    self.find("E310", f"'{name}' of '{claim.method.name}' has the shape {found} at {claim.site.name}",
                              place, f"the shape {wanted}")  # fmt: skip
                    return False
            except EvaluationError as error:
                self.find("E310", f"'{name}' of '{claim.method.name}' at {claim.site.name}: {error}", place)
                return False
            except Exception as error:
                self.find(
                    "E310", f"'{name}' of '{claim.method.name}' at {claim.site.name}: in '{expr.text}': {error}", place
                )
                return False
        if problem := joined(whole, expected):
            self.find("E310", f"'{claim.method.name}' at {claim.site.name}: {problem}", entry.formulas,
                      "keys and values of the same positions")  # fmt: skip
            return False
        if claim.site.kind == "table" and (reason := not_of_ids(claim)):
            self.find("E205", f"'{entry.name}' cannot change {claim.site.name}: {reason}", at(entry),
                      "a method that takes linear maps of its input, such as lora, or changes weights")  # fmt: skip
            return False
        if claim.site.kind == "experts" and (reason := self.not_of_experts(claim)):
            self.find("E205", f"'{entry.name}' cannot change {claim.site.name}: {reason}", at(entry),
                      "a method whose effect is one on the experts' weights, such as lora")  # fmt: skip
            return False
        return True

    def not_of_experts(self, claim: Claim) -> str:
        """Why a claim cannot change experts; it is tried once for claims that differ in their place alone."""
        key = trial_key(claim)
        if key not in self.tried:
            self.tried[key] = not_of_weights(claim)
        return self.tried[key]

    def prepend(self, entry: Attachment, claim: Claim) -> bool:
        """Whether tokens can be put before the sequence at a site, and leave it where they should."""
        site, several = claim.site, len({s.stack for s in self.anatomy if s.stack}) > 1
        message = hint = ""
        if several and site.stack == "decoder":
            message = "tokens before the sequence of an encoder-decoder model's decoder are not available"
            hint = "encoder.embedding.word"
        elif site.role == "embedding" and (several or not site.anchors.get("y")):
            message = f"'{site.name}' has no module of its own in this model, after which tokens could join"
            hint = f"{site.name}.word"
        elif claim.cut not in ("head", "outputs"):
            message = f"'cut' of '{claim.method.name}' is '{claim.cut}'"
        elif claim.cut == "head" and (several or not site.values.get("end")):
            message = "this model's last layer does not end in a norm, after which tokens could leave before the head"
        if message:
            expected = f"the site '{hint}'" if hint else "a model whose last layer ends in a norm"
            self.find("E208", message, at(entry), expected, f"attach to '{hint}'" if hint else "")
        return not message

    def prepends(self, claims: list[Claim]) -> None:
        """Tokens of several attachments join at one place and leave at one, and tables beside them are the base's."""
        entries = {entry.name: entry for entry in self.spec.attach}
        prepended = [claim for claim in claims if "prepend" in claim.effects]
        for claim in claims if prepended else ():
            if claim.site.kind == "table" and claim.mirrors is None:
                message = (
                    f"'{claim.attachment}' changes {claim.site.name}, and '{prepended[0].attachment}' puts tokens"
                    " before the embedded sequence, where tables are the base's own"
                )
                self.find("E208", message, at(entries[claim.attachment]), "one of them")
        for first, second in pairwise(prepended):
            if (first.site.role, first.cut) != (second.site.role, second.cut):
                message = (
                    f"the tokens of '{first.attachment}' and '{second.attachment}' join or leave at different places"
                )
                self.find("E208", message, at(entries[second.attachment]), "one place for all")

    def takes(self, claims: list[Claim]) -> None:
        """Keys and values that take positions are the only ones that come before the text, in each of its layers."""
        entries = {entry.name: entry for entry in self.spec.attach}
        taking = [claim for claim in claims if claim.takes]
        for name in dict.fromkeys(claim.attachment for claim in taking):
            own = [claim for claim in taking if claim.attachment == name]
            stacks = {claim.site.stack for claim in own}
            cores = [s for s in self.anatomy if s.kind == "attention" and s.stack in stacks and s.role == "attention"]
            layers = {s.layer_path for s in self.anatomy if s.stack in stacks and s.layer is not None}
            others = [claim for claim in claims if claim.attachment != name]
            beside = [c for c in others if "prepend" in c.effects or (
                c.site in cores and {"keys", "values"} & set(c.effects))]  # fmt: skip
            several = len({s.stack for s in self.anatomy if s.stack}) > 1
            expected = ""
            if {claim.site.key for claim in own} != {site.key for site in cores} or len({c.takes for c in own}) > 1:
                expected = "every layer's `attention`, and one length for all"
            elif layers - {s.layer_path for s in cores}:
                expected = "a model each of whose layers has attention, by which alone a text sees what is before it"
            elif any(claim.shape(e).lead != claim.takes or claim.added(e)[1] for claim in own for e in claim.effects):
                expected = "keys and values before the text, as many as they take positions"
            elif beside:
                expected = f"it or '{beside[0].attachment}', which puts something before the text too"
            elif several and stacks != {"decoder"}:
                expected = "the decoder of a model that has an encoder too, whose decoder reads all of its states"
            elif "encoder" in stacks and not (own[0].text and own[0].text.values.get("end")):
                expected = "a model whose last layer ends in a norm, after which tokens can leave before the head"
            if expected:
                self.find(
                    "E208",
                    f"the keys and values of '{name}' take positions before the text",
                    at(entries[name]),
                    expected,
                )

    def mirrors(self, claims: list[Claim]) -> None:
        """What follows a table has nothing of its own."""
        entries = {entry.name: entry for entry in self.spec.attach}
        followers = {claim.site.key: claim for claim in claims if claim.mirrors is not None}
        for claim in claims:
            if claim.mirrors is None and (follower := followers.get(claim.site.key)):
                self.find(
                    "E208",
                    f"{claim.site.name} follows its table, which '{follower.attachment}' changes, and"
                    f" '{claim.attachment}' changes it besides",
                    at(entries[claim.attachment]),
                    "one of them",
                    f"leave out `tied: together` in '{follower.attachment}'",
                )
        followed = {(c.attachment, c.mirrors.key) for c in claims if c.mirrors is not None}
        for claim in claims:
            if claim.site.key in {key for _, key in followed} and (claim.attachment, claim.site.key) not in followed:
                self.find("E208", f"{claim.site.name} is changed by '{claim.attachment}', which is apart, and by others"
                          " together with what is tied to it", at(entries[claim.attachment]),
                          "one `tied` for all that change a table")  # fmt: skip
