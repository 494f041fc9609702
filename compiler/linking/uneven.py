"""Whether a row may have fewer tokens or keys before its text than profiles bring, or none: what is not filled is
masked then, which is exact where a mask is all that a text is seen by. Read from the graphs, so that it holds for every
input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from peltc.compiler.base.base import Base
from peltc.compiler.export.exported import DECODE
from peltc.compiler.passes.insert_attention import alone, mask_origin, of_rows
from peltc.compiler.passes.stand_in import ids_of
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.survey.anatomy import Site
from peltc.spec.modes import EXCHANGED


@dataclass(frozen=True)
class Uneven:
    """Why rows must have all that stands before their text.

    Attributes:
        none: why no row can be without; "" where it can, and is the bare base then.
        fewer: why no row can have fewer; "" where it can.
    """

    none: str = ""
    fewer: str = ""


def before(claim: Claim) -> bool:
    """Whether profiles bring something of a claim that stands before the text."""
    joins = [effect for effect in ("keys", "values") if effect in claim.effects and any(claim.added(effect))]
    return claim.mode in EXCHANGED and bool(joins or "prepend" in claim.effects)


def uneven(plan: Plan, bases: Mapping[str, Base], sites: Mapping[str, Mapping[str, Site]]) -> Uneven:
    """Whether rows may have fewer of a plan's tokens and keys.

    Args:
        bases: of the artifact's graphs, by name.
        sites: of each, by key.
    """
    claims = [claim for claim in plan.claims if before(claim)]
    if not claims:
        return Uneven()
    none = next(_reasons(plan, claims, bases, sites), "")
    return Uneven(none, none or next(_blind(plan.claims, claims), ""))


def _blind(claims: Iterable[Claim], brought: Iterable[Claim]) -> Iterator[str]:
    """Which claims read places before or behind the text that a mask alone tells from it.

    Args:
        brought: those by which profiles bring something before the text.
    """
    for claim in claims if any(own.takes or "prepend" in own.effects for own in brought) else ():
        if claim.mixed and "mask" not in claim.reads:
            yield f"'{claim.attachment}' at {claim.site.name} reads the whole text by '{claim.mixed}', without its mask"


def evened(plan: Plan) -> Plan:
    """The plan where each row has all that stands before its text."""
    return replace(plan, claims=tuple(replace(claim, even=True) for claim in plan.claims))


def _reasons(
    plan: Plan, claims: list[Claim], bases: Mapping[str, Base], sites: Mapping[str, Mapping[str, Site]]
) -> Iterator[str]:
    """What stands against rows without what profiles bring before the text."""
    yield from _blind([claim for claim in plan.claims if claim.mode not in EXCHANGED], claims)
    for name, base in bases.items():
        graph = base.load_graph().graph
        values = {v.name: v for v in graph.inputs} | {v.name: v for node in graph for v in node.outputs}
        for claim in claims:
            site = sites[name].get(claim.site.key)
            if site is not None and claim.takes:
                if not all(alone(claim, effect) for effect in claim.effects):
                    yield f"'{claim.attachment}' at {site.name} does more than to put keys before the text's"
            elif site is not None and "prepend" not in claim.effects:
                mask = values.get(site.values.get("mask") or None)
                behind = any(claim.added(e)[1] for e in ("keys", "values") if e in claim.effects)
                if mask is None or behind or not of_rows(mask_origin(mask)[0]):
                    yield f"the attention at {site.name} has no mask for each text that could hide keys"
        longer = [claim for claim in claims if claim.takes or "prepend" in claim.effects]
        if longer:
            yield from _of_longer(longer[0], name, base, graph)


def _of_longer(claim: Claim, name: str, base: Base, graph: ir.Graph) -> Iterator[str]:
    """The same of what takes places in the sequence, in one graph."""
    given = {v.name or "" for v in graph.inputs}
    encoder = claim.site.stack == "encoder" and any(site.stack == "decoder" for site in base.anatomy)
    if (name == DECODE and encoder) or (name == "encoder" and not encoder):
        return
    ids, axis = ids_of(claim, given) if name == "model" else ("", "")
    causal = ids == "decoder_input_ids"  # which does not see what stands behind it
    mask = "decoder_attention_mask" if "decoder_input_ids" in given and not encoder else "attention_mask"
    if mask not in given and not causal:
        yield "the model takes no mask of its text"
    if name == DECODE and "position_ids" not in given:
        yield "the graph with a cache counts positions by itself, and counts those of tokens that a row does not have"
    own = [site for site in base.anatomy if site.stack == claim.site.stack]
    cores = {site.layer_path for site in own if site.kind == "attention" and site.role == "attention"}
    if {site.layer_path for site in own if site.layer is not None} - cores:
        yield "not every layer of the model has attention, by which alone a mask hides"
    before_head = claim.cut == "head" or (claim.takes and claim.site.stack == "encoder")
    if name == "model" and not before_head:
        for output in graph.outputs:
            sizes = [str(size) for size in output.shape or ()]
            if "target" not in {*sizes} - {axis} and sizes[1:2] != [axis] and not _of_first(output, axis):
                yield f"the model's '{output.name}' is read elsewhere than at the first token of a text"


def _of_first(output: ir.Value, axis: str) -> bool:
    """Whether what a value reads of a text's tokens, along an axis, is the first one."""
    pending, seen = [output], {output}
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            continue
        for given in node.inputs:
            if given is None or given in seen or given.const_value is not None or given.is_graph_input():
                continue
            seen.add(given)
            if given.shape is None:
                return False
            if axis not in [str(size) for size in given.shape]:
                pending.append(given)
            elif not _takes_first(node):
                return False
    return True


def _takes_first(node: ir.Node) -> bool:
    """Whether a node takes the first of the second axis."""
    numbers = [None if v is None or v.const_value is None else v.const_value.numpy() for v in node.inputs[1:]]
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) == 1 and numbers[0] is not None and not numbers[0].any()
    if node.op_type != "Slice" or any(number is None for number in numbers):
        return False
    return [number.tolist() for number in numbers[:3] if number is not None] == [[0], [1], [1]]
