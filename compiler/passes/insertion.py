"""What every insertion into a graph needs: nodes, scopes, values that take the place of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.graphs.wide import HALF
from peltc.compiler.interpreters.emitter import Emitter, replace_uses
from peltc.compiler.interpreters.onnx import OnnxInterpreter
from peltc.compiler.passes.keep import Keeper
from peltc.compiler.passes.packing import unpacked
from peltc.compiler.passes.uneven import Uneven
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail
from peltc.spec.formula.interpreter import Deferred
from peltc.spec.method import ROLES

Array = np.ndarray[Any, Any]
FLOATING = {ir.DataType.FLOAT, *HALF}
"""The types that models compute in."""
Around = tuple[int, int]
"""How many positions stand before the text's own, and behind them."""


class Insertion:
    """A graph that modules are put into: what formulas read there, and how their results take the place of values."""

    def __init__(
        self,
        model: ir.Model,
        tensors: Mapping[str, Array],
        keeps: bool = False,
        exchange: Mapping[str, Sequence[int]] | None = None,
    ):
        self.graph, self.tensors, self.numbers = model.graph, dict(tensors), exchange
        self.exchange = exchange is not None
        self.keeper = Keeper(model.graph) if keeps else None
        self.values: dict[str, ir.Value] = {v.name: v for v in model.graph.inputs if v.name}
        for node in model.graph:
            self.values |= {v.name: v for v in node.outputs if v.name}
        self.replaced: dict[ir.Value, ir.Value] = {}
        self.weights: dict[str, ir.Value] = {}
        self.biased: dict[str, Any] = {}  # what claims make of the bias of a map that has none
        self.apart: dict[str, list[dict[str, str]]] = {}  # of experts whose maps are one site, the values of each
        self.kept: set[ir.Node] = set()  # nodes that go on reading the values which claims replace
        self.extended: dict[tuple[ir.Value, ir.Value, Around, ir.Value | None], ir.Value] = {}
        self.shown: dict[tuple[str, int], ir.Value] = {}  # which keys profiles bring, by attachment and number
        self.starts: dict[str, Array] = {}
        self.longer: dict[ir.Value, int] = {}  # by how many positions caches are longer than the text in them
        self.counted: dict[ir.Value, ir.Value] = {}  # caches, before and after a step, which positions are counted by
        self.standing: Uneven | None = None  # the places of keys that take positions, where profiles bring these
        self.begun: ir.Value | None = None  # whether there is anything in the caches yet

    def emitter(self, claim: Claim, like: ir.Value) -> Emitter:
        dtype = like.dtype or ir.DataType.FLOAT
        return Emitter(self.graph, dtype, f"pelt.{claim.attachment}.{claim.site.name}", claim.marks)

    def current(self, name: str) -> ir.Value:
        """A graph value as it is by now, claims made before included."""
        value = self.values[name]
        while value in self.replaced:
            value = self.replaced[value]
        return value

    def scope(self, claim: Claim, interpreter: OnnxInterpreter, **values: Any) -> dict[str, Any]:
        """What the claim's formulas may read; runtime values of the site by name."""
        found: dict[str, Any] = {"mask": Deferred(partial(self.mask, claim, interpreter))}
        for role in ("x", "y", "r", "h", "q", "k", "v"):
            if claim.site.values.get(role):
                found[role] = Deferred(partial(self.read, claim.site.values[role], interpreter.emitter))
        own = {name: self.tensors[t.name] for name, t in claim.tensors.items()}
        kind, emitter = interpreter.emitter.dtype, interpreter.emitter
        values = {name: alike(v, kind, emitter) if isinstance(v, ir.Value) else v for name, v in values.items()}
        scope = claim.scope(found | values | own, interpreter)  # a parameter may have a name of other kinds of site
        for name, hard in claim.held.items():
            scope[name] = Deferred(partial(self.held, scope[name], hard, interpreter.emitter))
        return scope

    def read(self, name: str, emitter: Emitter) -> ir.Value:
        """A graph value as it is by now, in the type that the emitter computes in: a model in half precision has values
        in float32, such as those that norms compute in, beside others."""
        return alike(self.current(name), emitter.dtype, emitter)

    @staticmethod
    def held(weights: Deferred, hard: bool, emitter: Emitter) -> ir.Value:
        """Weights over a bank, by which the graph mixes it."""
        found = np.asarray(weights(), np.float32)
        return unpacked(found, emitter) if hard else emitter.constant(found, "weights")

    def mask(self, claim: Claim, interpreter: OnnxInterpreter) -> ir.Value:
        """The mask of the tokens that a site sees, [B, S], as numbers: ones where the graph takes none."""
        site = claim.site
        behind = site.stack == "decoder" and "decoder_input_ids" in self.values and not site.reads_encoder
        given = self.values.get("decoder_attention_mask" if behind else "attention_mask")
        emitter = interpreter.emitter
        ids = self.values.get("decoder_input_ids" if behind else "input_ids")
        if given is not None and ids is not None and given.shape != ids.shape and not site.reads_encoder:
            given = new_tokens(given, ids, emitter)
        if given is None:
            x = self.current(site.values["x"])
            if x.shape is None or len(x.shape) < 3:
                raise fail("E208", f"this model takes no attention mask, and a formula reads `mask` at {site.name},"
                                   " whose tokens stand in one row")  # fmt: skip
            lead = emitter.node("Shape", [x], {"start": 0, "end": 2})
            return emitter.node("Expand", [emitter.constant(np.ones((), np.float32)), lead])
        return emitter.node("Cast", [given], {"to": emitter.dtype.value})

    def evaluate(self, claim: Claim, effect: str, like: ir.Value, **values: Any) -> tuple[Any, OnnxInterpreter]:
        interpreter = OnnxInterpreter(self.emitter(claim, like))
        own = self.parameters(claim.site, interpreter.emitter) if claim.method.site in ("linear", "norm") else {}
        if self.keeper is not None:
            interpreter.held = self.keeper.of(claim, effect, interpreter)
        found = interpreter.evaluate(claim.effects[effect], self.scope(claim, interpreter, **{**own, **values}))
        if effect in ("input", "output"):
            found = filled(claim, effect, found, like, interpreter)
        return found, interpreter

    def write(self, old: ir.Value, new: ir.Value, keep: set[ir.Node]) -> None:
        """Let everything downstream read `new` instead of `old`."""
        new.shape = old.shape
        new.type = old.type
        replace_uses(old, new, keep | self.kept, self.graph)
        self.replaced[old] = new

    def full_weight(self, site: Site, emitter: Emitter) -> ir.Value:
        """The whole weight as it is by now, [O, I]."""
        name = site.parameters["weight"]
        if name not in self.weights:
            parameter = self.values[name]
            self.weights[name] = self.oriented(parameter, emitter) if site.transposed else parameter
        return self.weights[name]

    @staticmethod
    def oriented(value: ir.Value, emitter: Emitter) -> ir.Value:
        return emitter.node("Transpose", [value], {"perm": [1, 0]})

    @staticmethod
    def rows(site: Site, full: ir.Value, emitter: Emitter) -> ir.Value:
        """The rows that the site owns."""
        if site.rows is None:
            return full
        parts = [cut_rows(full, a, b, emitter) for a, b in site.rows]
        return parts[0] if len(parts) == 1 else emitter.node("Concat", parts, {"axis": 0})

    def parameters(self, site: Site, emitter: Emitter) -> dict[str, Deferred]:
        """A map's own weight [O, I] and bias [O] as they are by now, in the type that the emitter computes in; for no
        bias, what claims have made of zeros."""

        def own(role: str) -> Any:
            name = site.parameters.get(role)
            if name is None:
                return self.biased.get(site.key, np.zeros(site.sizes.get("out", site.sizes.get("d", 0)), np.float32))
            if site.kind == "norm":
                return alike(self.weights.get(name, self.values[name]), emitter.dtype, emitter)
            full = self.full_weight(site, emitter) if role == "weight" else self.weights.get(name, self.values[name])
            value = alike(self.rows(site, full, emitter), emitter.dtype, emitter)
            sizes = ("out", "in") if role == "weight" else ("out",)
            value.shape = ir.Shape([site.sizes[size] for size in sizes])
            return value

        return {short: Deferred(partial(own, role)) for role, short in ROLES.items()}


def new_tokens(mask: ir.Value, ids: ir.Value, emitter: Emitter) -> ir.Value:
    """A mask [B, T] of a text that a cache holds the first tokens of, for the last, which are those of the ids."""
    length = emitter.node("Shape", [ids], {"start": 1, "end": 2})
    bounds = [emitter.node("Neg", [length]), *(emitter.integers([n]) for n in (2**62, 1))]
    new = emitter.node("Slice", [mask, *bounds])
    new.type = mask.type
    return new


def filled(claim: Claim, effect: str, value: Any, like: Any, interpreter: OnnxInterpreter) -> ir.Value:
    """A definition's value, in the shape of what it stands for: what is the same for all may be said once.

    Args:
        like: what it stands for; or `Deferred`, where that is computed if need be.
    """
    if not claim.narrow(effect):
        return interpreter.value(value)
    return interpreter.expanded(value, like() if isinstance(like, Deferred) else like)


def swap_input(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for i, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(i, new)


def cast_to(value: ir.Value, dtype: ir.DataType, emitter: Emitter) -> ir.Value:
    return emitter.node("Cast", [value], {"to": dtype.value})


def alike(value: ir.Value, dtype: ir.DataType, emitter: Emitter) -> ir.Value:
    """A value in a floating-point type; itself where it has it, or is no floating-point number."""
    if value.dtype == dtype or value.dtype not in FLOATING:
        return value
    found = cast_to(value, dtype, emitter)
    found.shape = value.shape
    return found


def cut_rows(value: ir.Value, start: int, stop: int, emitter: Emitter) -> ir.Value:
    return emitter.node("Slice", [value, *(emitter.integers([n]) for n in (start, stop, 0))])
