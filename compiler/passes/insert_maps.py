"""Modules that stay in the graph, at linear maps, tables, norms and blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.graphs.flow import last_size
from peltc.compiler.interpreters.emitter import clone_between, replace_uses
from peltc.compiler.interpreters.numeric import OneHot
from peltc.compiler.interpreters.onnx import OnnxInterpreter
from peltc.compiler.passes.insert_weights import Weights
from peltc.compiler.passes.insertion import alike, filled
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site
from peltc.spec.method import ROLES


class Maps(Weights):
    """Modules at linear maps, tables, norms and blocks."""

    def linear(self, site: Site, claims: list[Claim]) -> None:
        """Inputs first, then weights and biases, then what is added to or made of the output."""
        product = self.values[site.values["product"]].producer()
        assert product is not None
        if claims[0].mirrors is not None:
            self.mirror(claims, product)
            return
        site, claims = self.joined(site, claims)
        x = self.current(site.values["x"])
        start, apart = x, False
        for claim in claims:
            if "input" in claim.effects:
                value, interpreter = self.evaluate(claim, "input", x, x=x)
                x = interpreter.value(value)
                if site.rows is None:
                    source = product.inputs[0]
                    assert source is not None
                    moved = clone_between(start, source, x, interpreter.emitter)
                    product.replace_input_with(0, moved)
                    start = x
                else:
                    apart = True
        for claim in claims:
            if "weight" in claim.effects:
                self.weight(site, claim, product)
        if "bias" in site.parameters:
            self.biases(site, claims, product)
        y = self.current(site.values["y"])
        if apart:
            last = next(c for c in claims if "input" in c.effects)
            emitter = self.emitter(last, y)
            new = emitter.node(
                "MatMul", [x, self.oriented(self.rows(site, self.full_weight(site, emitter), emitter), emitter)]
            )
            bias = site.parameters.get("bias")
            if bias:
                new = emitter.node("Add", [new, self.rows(site, self.weights.get(bias, self.values[bias]), emitter)])
            self.write(y, new, emitter.added)
        if "bias" not in site.parameters:
            self.biases(site, claims, product)
        if any({"delta", "output"} & set(c.effects) and "x" in c.reads for c in claims):
            self.outputs(site, claims, {"x": self.unflattened(x, site, claims[0])})
        else:
            self.outputs(site, claims, {})

    def table(self, site: Site, claims: list[Claim]) -> None:
        """The rows of a table, then what ids pick of it."""
        product = self.values[site.values["product"]].producer()
        assert product is not None
        if claims[0].mirrors is not None:
            self.mirror(claims, product)
            return
        for claim in claims:
            if "weight" in claim.effects:
                self.weight(site, claim, product)
        self.biases(site, claims, product)
        ids = self.values[site.values["x"]]
        self.outputs(site, claims, {"x": OneHot(ids, site.sizes["in"])})

    def mirror(self, claims: list[Claim], product: ir.Node) -> None:
        """Let a map, or another table, have all rows of the table that it is the same tensor as."""
        table = claims[0].mirrors
        assert table is not None
        emitter = self.emitter(claims[0], self.values[table.parameters["weight"]])
        rows = self.oriented(self.full_weight(table, emitter), emitter)
        rows.shape = self.values[table.parameters["weight"]].shape
        zeros = np.zeros(table.sizes["out"], np.float32)
        for claim in (c for c in claims if "bias" in c.effects):
            value, interpreter = self.evaluate(claim, "bias", rows, b=zeros)
            shape, rows = rows.shape, interpreter.value(interpreter.on_add(rows, value))
            rows.shape = shape
        for claim in claims:
            for effect in ("delta", "output"):
                if effect in claim.effects:
                    every = OneHot(None, table.sizes["in"])
                    value, interpreter = self.evaluate(claim, effect, rows, x=every, y=rows)
                    shape, rows = rows.shape, interpreter.value(
                        interpreter.on_add(rows, value) if effect == "delta" else value)  # fmt: skip
                    rows.shape = shape
        if product.op_type == "Gather":
            product.replace_input_with(0, rows)
        else:
            flat = product.op_type == "Gemm" and product.attributes.get_int("transB", 0) == 1
            product.replace_input_with(1, rows if flat else self.oriented(rows, emitter))

    def joined(self, site: Site, claims: list[Claim]) -> tuple[Site, list[Claim]]:
        """The site with its own features, and no others, in one axis. A graph may split a fused map by heads before it
        splits queries from keys, or may put the heads first; then nodes are added that undo it."""
        name, full = site.values["y"], self.values[site.values["full"]]
        y = self.current(name)
        apart = y.shape is not None and full.shape is not None and len(y.shape) > len(full.shape)
        mixed = site.rows is not None and name == full.name
        if not (apart or mixed) or full.shape is None:
            return site, claims
        emitter = self.emitter(claims[0], y)
        if mixed:
            assert site.rows is not None
            owned = [i for a, b in site.rows for i in range(a, b)]
            extent = last_size(full) or 0
            places = np.arange(extent)
            places[owned] = extent + np.arange(len(owned))
            flat = emitter.node("Gather", [y, emitter.integers(owned)], {"axis": -1})
            both = emitter.node("Concat", [y, flat], {"axis": -1})
            back = emitter.node("Gather", [both, emitter.integers(places.tolist())], {"axis": -1})
            both.shape = back.shape = None
        else:
            lead = [0] * (len(full.shape) - 1)
            flat = emitter.node("Reshape", [y, emitter.integers([*lead, site.sizes["out"]])])
            back = emitter.node("Reshape", [flat, emitter.node("Shape", [y])])
        flat.shape = ir.Shape([*list(full.shape)[:-1], site.sizes["out"]])
        self.write(y, back, emitter.added)
        self.values[flat.name or ""] = flat
        site = replace(site, values={**site.values, "y": flat.name or ""})
        return site, [replace(claim, site=site) for claim in claims]

    def unflattened(self, x: ir.Value, site: Site, claim: Claim) -> ir.Value:
        """The input with the output's leading axes, where the graph flattens tokens before the product."""
        y = self.current(site.values["y"])
        if x.shape is None or y.shape is None or len(x.shape) == len(y.shape):
            return x
        emitter = self.emitter(claim, x)
        lead = emitter.node("Shape", [y], {"start": 0, "end": len(y.shape) - 1})
        shape = emitter.node("Concat", [lead, emitter.integers([site.sizes["in"]])], {"axis": 0})
        self.kept |= emitter.added
        return emitter.node("Reshape", [x, shape])

    def outputs(self, site: Site, claims: list[Claim], values: Mapping[str, Any]) -> None:
        """Definitions of `delta` and `output`."""
        for claim in claims:
            for effect in ("delta", "output"):
                if effect not in claim.effects:
                    continue
                y = self.current(site.values["y"])
                value, interpreter = self.evaluate(claim, effect, y, **{**values, "y": y})
                if effect == "delta":
                    value = interpreter.on_add(y, value)
                self.write(y, interpreter.value(value), interpreter.emitter.added)

    def norm(self, site: Site, claims: list[Claim]) -> None:
        """A normalisation's gain and bias, or its output."""
        for role in ROLES:
            for claim in claims:
                if role in claim.effects and not claim.follows:  # what follows has the same parameters, changed already
                    parameter = self.weights.get(site.parameters[role], self.values[site.parameters[role]])
                    value, interpreter = self.evaluate(claim, role, parameter)
                    new = filled(claim, role, value, parameter, interpreter)
                    replace_uses(parameter, new, interpreter.emitter.added, self.graph)
                    self.weights[site.parameters[role]] = new
        self.outputs(site, claims, {})

    def block(self, site: Site, claims: list[Claim]) -> None:
        """What follows a sub-layer, before its residual addition."""
        for claim in claims:
            emitter_like = self.current(site.values["y"])

            def norm(z: Any, claim: Claim = claim, like: ir.Value = emitter_like) -> ir.Value:
                interpreter = OnnxInterpreter(self.emitter(claim, like))
                emitter = interpreter.emitter
                source, target = self.values[site.values["norm_x"]], self.current(site.values["norm_y"])
                given = alike(interpreter.value(z), source.dtype or emitter.dtype, emitter)
                result = alike(clone_between(source, target, given, emitter), emitter.dtype, emitter)
                self.kept |= emitter.added
                return result

            for effect in ("delta", "output"):
                if effect in claim.effects:
                    y = self.current(site.values["y"])
                    value, interpreter = self.evaluate(claim, effect, y, y=y, norm=norm)
                    if effect == "delta":
                        value = interpreter.on_add(y, value)
                    self.write(y, interpreter.value(value), interpreter.emitter.added)
