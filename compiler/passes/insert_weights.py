"""Weights and biases that stay in the graph as formulas."""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.graphs.wide import HALF
from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.interpreters.onnx import OnnxInterpreter
from peltc.compiler.passes.insertion import Insertion, cast_to, cut_rows, filled
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Rows, Site


class Weights(Insertion):
    """Weights and biases that stay in the graph as formulas of themselves."""

    def weight(self, site: Site, claim: Claim, product: ir.Node) -> None:
        """A weight computed in the graph from the base's, in float32; ONNX Runtime does so once, at load."""
        parameter = self.values[site.parameters["weight"]]
        emitter = self.emitter(claim, parameter)
        full = self.full_weight(site, emitter)
        if not claim.follows:  # what follows has the same parameters, changed already
            wide = OnnxInterpreter(Emitter(self.graph, ir.DataType.FLOAT, emitter.owner, emitter.marks))
            own = self.parameters(site, wide.emitter)
            W = own["W"]()
            new = wide.evaluate(claim.effects["weight"], self.scope(claim, wide, **own))
            new = filled(claim, "weight", new, W, wide)
            if parameter.dtype in HALF:
                assert parameter.dtype is not None
                new = cast_to(new, parameter.dtype, wide.emitter)
            full = self.weights[site.parameters["weight"]] = _assemble(full, site.rows, new, self.extent(site), emitter)
        flat = product.op_type == "Gemm" and product.attributes.get_int("transB", 0) == 1
        place = 0 if site.kind == "table" else 1
        product.replace_input_with(place, full if flat else self.oriented(full, emitter))

    def extent(self, site: Site) -> int:
        """The number of output features of the whole map."""
        shape = self.values[site.parameters["weight"]].shape
        assert shape is not None
        return int(shape[1 if site.transposed else 0])  # type: ignore[arg-type]

    def biases(self, site: Site, claims: list[Claim], product: ir.Node) -> None:
        """A map's own bias, or a new one, which is added to its output."""
        claims = [claim for claim in claims if "bias" in claim.effects]
        if "bias" in site.parameters or not claims:
            for claim in claims:
                self.bias(site, claim, product)
            return
        y = self.current(site.values["y"])
        added: set[ir.Node] = set()
        for claim in claims:
            interpreter = OnnxInterpreter(self.emitter(claim, y))
            given = self.parameters(site, interpreter.emitter)
            self.biased[site.key] = interpreter.evaluate(claim.effects["bias"], self.scope(claim, interpreter, **given))
            added |= interpreter.emitter.added
        total = interpreter.value(interpreter.on_add(y, self.biased[site.key]))
        self.write(y, total, added | interpreter.emitter.added)

    def bias(self, site: Site, claim: Claim, product: ir.Node) -> None:
        """A map's own bias as a claim defines it."""
        name = site.parameters["bias"]
        emitter = self.emitter(claim, self.current(site.values["y"]))
        interpreter = OnnxInterpreter(emitter)
        full = self.weights.get(name, self.values[name])
        if claim.follows:
            changed = full
        else:
            own = self.parameters(site, emitter)
            new = interpreter.evaluate(claim.effects["bias"], self.scope(claim, interpreter, **own))
            new = filled(claim, "bias", new, own["b"], interpreter)
            changed = self.weights[name] = _assemble(full, site.rows, new, self.extent(site), emitter)
        readers = {product, *(use.node for use in product.outputs[0].uses())}
        for use in tuple((self.values[name] if claim.follows else full).uses()):
            if use.node in readers:
                use.node.replace_input_with(use.idx, changed)


def _assemble(full: ir.Value, rows: Rows | None, part: ir.Value, extent: int, emitter: Emitter) -> ir.Value:
    """A fused parameter with some of its rows replaced."""
    if rows is None:
        return part
    pieces, position, taken = [], 0, 0
    for start, stop in rows:
        if start > position:
            pieces.append(cut_rows(full, position, start, emitter))
        pieces.append(part if len(rows) == 1 else cut_rows(part, taken, taken + stop - start, emitter))
        position, taken = stop, taken + stop - start
    if position < extent:
        pieces.append(cut_rows(full, position, extent, emitter))
    return emitter.node("Concat", pieces, {"axis": 0})
