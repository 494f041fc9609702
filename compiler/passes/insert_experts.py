"""Modules that stay in the graph, at experts: beside each expert's own product.

x_e ─┬─► MatMul with slice e ─► y_e ─► y_e + delta_e(x_e) ─┐
     └─► ...                                               ├─► Concat
                                                  ...     ─┘
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from peltc.compiler.passes.insert_maps import Maps
from peltc.compiler.passes.insertion import cut_rows
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site


class Experts(Maps):
    """Modules at experts, each of which is a linear map."""

    def experts(self, site: Site, claims: list[Claim]) -> None:
        """Modules at the maps of all experts, one after the other."""
        joint = self.values[site.values["product"]].producer()
        assert joint is not None
        if site.values["product"] not in self.apart:
            self.apart[site.values["product"]] = self.each(site, claims[0], joint)
        for number, values in enumerate(self.apart[site.values["product"]]):
            parameters = {role: f"{name}.{number}" for role, name in site.parameters.items()}
            own = replace(site, path=f"{site.path}.{number}", kind="linear", parameters=parameters, values=values,
                          transposed=True)  # fmt: skip
            self.linear(own, [self.of(claim, own, number) for claim in claims])

    def each(self, site: Site, claim: Claim, joint: ir.Node) -> list[dict[str, str]]:
        """The values of each expert's map, as those of a linear site. A bias that is added to all results at once is
        added to each instead, so that modules see it."""
        found = []
        for number, result in enumerate(joint.inputs):
            product = result.producer() if result is not None else None
            assert product is not None and result is not None
            x, weight = product.inputs
            assert x is not None and weight is not None
            self.values[f"{site.parameters['weight']}.{number}"] = weight
            emitter = self.emitter(claim, result)
            y = result
            if "bias" in site.parameters:
                bias = self.values[site.parameters["bias"]]
                row = emitter.node("Squeeze", [cut_rows(bias, number, number + 1, emitter), emitter.integers([0])])
                row.shape, row.type = ir.Shape([result.shape[-1]]) if result.shape is not None else None, bias.type
                y = emitter.node("Add", [result, row])
                self.values[f"{site.parameters['bias']}.{number}"] = row
                self.write(result, y, emitter.added)
                self.values[y.name or ""] = y
            names = {"x": x, "y": y, "full": y, "product": product.outputs[0]}
            found.append({role: value.name or "" for role, value in names.items()})
        if "bias" in site.parameters:
            whole = joint.outputs[0]
            self.values[site.values["full"]].replace_all_uses_with(whole)
        return found

    def of(self, claim: Claim, site: Site, number: int) -> Claim:
        """A claim at one expert's map, with that expert's own tensors."""
        tensors = {}
        for name, tensor in claim.tensors.items():
            tensors[name] = tensor
            if tensor.experts:
                tensors[name] = replace(tensor, name=f"{tensor.name}.{number}", shape=tensor.inner, experts=0)
                self.tensors[tensors[name].name] = self.tensors[tensor.name][number]
        return replace(claim, site=site, tensors=tensors)
