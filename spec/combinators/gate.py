"""`gate:` scales what a method adds by a number that a small map reads off the input.

g = mean_S σ(z wᵀ + c)        delta: g · delta        keys: [g · K ; k]        (UniPELT)

A central gate is one map of several outputs for a layer, from which each of its attachments takes one:

g = softmax(mean_S relu(z Wᵀ + c))        delta: g₀ · delta        keys: [g₁ · K ; k]        (UniPELT, central)
"""

from __future__ import annotations

from dataclasses import replace

from peltc.spec.combinators.combinator import Combinator, Settings, add, formula, number, option, refused
from peltc.spec.diagnostics import Place
from peltc.spec.formula.syntax import Call, Conditional, Expr, Name, names
from peltc.spec.method import NAMES, Method, Parameter

READS = {"linear": "x", "norm": "x", "block": "y", "attention": "x"}
SIZES = {"x": "in", "h": "d_model", "y": "out"}
WIDTHS = {"block": "d", "norm": "d", "attention": "d_model"}
GATE_NAME = Name("gate", "gate")
OUTPUTS = 2
"""Outputs of a central gate, as in the authors' code: one for LoRA, one for the prefix."""


def rewrite(method: Method, settings: Settings, place: Place) -> Method:
    """The method, gated."""
    if method.site == "embedding":
        raise refused("gate", method, "tokens before a sequence cannot be scaled by what follows them", place)
    for effect, _ in method.effects:
        if effect in ("weight", "bias"):
            reason = f"it changes a {effect}, which is known before any input is, and a gate reads the input"
            raise refused("gate", method, reason, place)
    central, outputs, output = settings["central"], settings["outputs"], settings["output"]
    if output >= outputs:
        raise refused("gate", method, f"there is no output {output} among {outputs}", place)
    if not central and (output or outputs != OUTPUTS):
        hint = "`central: NAME`, the same in each attachment that shares the gate"
        raise refused("gate", method, "the outputs of a gate are for attachments that share it by name", place, hint)
    if settings["constant"]:
        start = formula(f"1 / {outputs}" if central else "0.5")
        gated = add(method, (Parameter("gate", (formula("1"),), start, part="gate"),), (), place)
    else:
        reads = settings["reads"] or method.gated_by or READS[method.site]
        size = WIDTHS.get(method.site) or SIZES.get(reads, "")
        offered = [name for name in ("x", "y", "h", "r") if name in NAMES[method.site]]
        if not size or (settings["reads"] and reads not in offered):
            raise refused(
                "gate", method, f"a gate cannot read '{reads}' there; it can read {', '.join(offered)}", place
            )
        own = {"scope": "layer" if central else "site", "owner": central, "part": "gate"}
        rows = number(outputs if central else 1)
        weight = Parameter("gate_weight", (rows, formula(size)), formula("normal(0.02)"), **own)
        bias = Parameter("gate_bias", (rows,), formula("zeros"), **own)
        bent, masked = "relu" if central else "sigmoid", ", mask" if settings["mask_padding"] else ""
        text = f"mean_seq({bent}(linear({reads}, gate_weight, gate_bias)){masked})"
        text = f"slice(softmax({text}), {output}, {output + 1})" if central else text
        gated = add(method, (weight, bias), (("gate", formula(text)),), place)
    return replace(gated, effects=tuple((e, scaled(e, expr, method, settings, place)) for e, expr in method.effects))


def scaled(effect: str, expr: Expr, method: Method, settings: Settings, place: Place) -> Expr:
    """A definition with the gate in it."""
    if isinstance(expr, Conditional):
        then, other = (scaled(effect, branch, method, settings, place) for branch in (expr.then, expr.other))
        return Conditional(expr.test, then, other, f"({then.text}) if {expr.test.text} else ({other.text})")
    if effect == "delta":
        if settings["replaces_scale"] and isinstance(expr, Call) and expr.function == "multiply":
            known = {o.name for o in method.options}
            if names(expr.args[0]) <= known:
                expr = expr.args[1]
        return _times(GATE_NAME, expr)
    if effect in ("keys", "values"):
        own = {"keys": "k", "values": "v"}[effect]
        if not (isinstance(expr, Call) and expr.function == "concat" and Name(own) in expr.args):
            raise refused("gate", method, f"its {effect} are not joined to the sequence's own, {expr.text!r}", place)
        wide = Call("unsqueeze", (GATE_NAME, formula("1")), (), "unsqueeze(gate, 1)")
        parts = tuple(part if part == Name(own) else _times(wide, part) for part in expr.args)
        more = [f"{name}={value.text}" for name, value in expr.keywords]
        return replace(expr, args=parts, text=f"concat({', '.join([part.text for part in parts] + more)})")
    own = {"input": "x", "output": "y"}[effect]
    if expr == Name(own):
        return expr
    if settings["scales"] == "result":
        return _times(GATE_NAME, expr)
    change = Call("subtract", (expr, Name(own, own)), (), f"({expr.text}) - {own}")
    return Call("add", (Name(own, own), _times(GATE_NAME, change)), (), f"{own} + gate * ({change.text})")


def _times(factor: Expr, expr: Expr) -> Expr:
    return Call("multiply", (factor, expr), (), f"{factor.text} * ({expr.text})")


GATE = Combinator(
    "gate",
    "a gate per sample scales what the method adds",
    "arXiv:2110.07577, section 3.2; the authors' code: sigmoid, then the mean over the sequence",
    (
        option("mask_padding", "the mean leaves padding out; published weights were trained with it in", False,
               type="boolean"),
        option("replaces_scale", "the gate stands in place of the method's own constant scale", True, type="boolean"),
        option("scales", "of a method that replaces a value: its change, or its result", "change",
               enum=["change", "result"]),
        option("reads", "the value that the gate reads; empty: what the method reads", "",
               enum=["", "x", "y", "h", "r"]),
        option("central", "attachments that name one central gate share its map in each layer, and each takes an output"
               " of its softmax; empty: a gate of its own", "", type="string", pattern="^([A-Za-z][A-Za-z0-9_-]*)?$"),
        option("outputs", "number of outputs of a central gate", OUTPUTS, type="integer", minimum=2, maximum=256),
        option("output", "the output of a central gate that this attachment takes, from 0", 0, type="integer",
               minimum=0),
        option("constant", "one trained or measured number in place of the map", False, type="boolean"),
    ),
    rewrite,
    notes="The mean is over one sequence, so that splitting a batch changes nothing. It includes padding, as in the"
    " authors' code: the same text with more padding gives another result. `mask_padding` repairs that. Of a text that"
    " grows token by token it is undefined, until `deploy: {gates: {at: prefill}}` says that it is the prompt's."
    " A central gate's softmax is over its outputs, after the mean.",
)  # fmt: skip
