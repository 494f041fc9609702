"""Modules at experts, and at routers: the weights that a torch module's forward pass reads are others while it runs.

Such a module computes all experts at once, or chooses experts by what its map gives; no hook sees the map alone. But it
finds in its attributes what the modules make of the weights. Gradients flow through that to the modules' parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from peltc.compiler.plan.claims import Claim
from peltc.compiler.plan.experts import not_of_weights
from peltc.compiler.survey.anatomy import Site
from peltc.runtime.training.basis import Basis, BasisInterpreter
from peltc.runtime.training.maps import Maps
from peltc.runtime.training.places import leaf_of, owner_of, rows_of
from peltc.runtime.training.reach import is_map
from peltc.spec.diagnostics import fail
from peltc.spec.method import ROLES

Tensor = torch.Tensor
LOOKING = {"scatter"}
"""Functions that look at values, which is not possible of all experts at once."""


class Experts(Maps):
    """Modules at weights that a torch module reads in its own way."""

    def install_linear(self, model: Any, site: Site, claims: list[Claim]) -> None:
        """A hook on the torch module of a linear map; where that computes more than the map, its weights are changed.

        Raises:
            PeltError: E209 a module whose effect is no change of these.
        """
        module = owner_of(model, site.parameters["weight"])
        if isinstance(module, nn.Linear) or is_map(module, site):
            super().install_linear(model, site, claims)
            return
        for claim in claims:
            if reason := not_of_weights(claim):
                raise fail("E209", f"'{claim.attachment}' cannot be reached at {site.name} in torch:"
                                   f" {type(module).__name__} computes more than this map, and {reason}",
                           expected="a method whose effect is one on the weights, such as lora")  # fmt: skip
        self.install_experts(model, site, claims)

    def install_experts(self, model: Any, site: Site, claims: list[Claim]) -> None:
        """Let the module that owns the weights see others, for as long as its forward pass lasts."""
        module = owner_of(model, site.parameters["weight"])

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self.muted:
                self.enter(site)
                vars(module).update(self.stacks(site, claims, module))

        def undo(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for role in ROLES:
                vars(module).pop(leaf_of(site, role), None)

        self.handles.append(module.register_forward_pre_hook(before))
        self.handles.append(module.register_forward_hook(undo, always_call=True))

    def after(self, module: nn.Module, groups: Iterable[tuple[Site, list[Claim]]]) -> dict[str, Tensor]:
        """The stacked weights and biases that a module sees once the modules at all of its sites took effect."""
        found: dict[str, Tensor] = {}
        try:
            for site, claims in groups:
                found |= self.stacks(site, claims, module)
                vars(module).update(found)
        finally:
            for leaf in found:
                vars(module).pop(leaf, None)
        return found

    def stacks(self, site: Site, claims: list[Claim], module: nn.Module) -> dict[str, Tensor]:
        """The stacked weights and biases with modules inside, as the module stores them, by its names of them."""
        full = {role: getattr(module, leaf_of(site, role)) for role in site.parameters}
        turned = {role: stack.transpose(-1, -2) if role == "weight" and site.transposed else stack
                  for role, stack in full.items()}  # fmt: skip
        index, axis = rows_of(site), int(site.kind == "experts")
        own = {r: s if index is None else s.index_select(axis, index.to(s.device)) for r, s in turned.items()}
        stacked = {t.name: self.parameter(t.name) for claim in claims for t in claim.tensors.values() if t.experts}
        one = partial(self.one, site, claims)
        if site.kind != "experts":
            made = one(own, stacked)
        elif any(LOOKING & claim.reads for claim in claims):
            parts = [one(_each(own, i), _each(stacked, i)) for i in range(site.sizes["experts"])]
            made = {role: torch.stack([part[role] for part in parts]) for role in parts[0]}
        else:
            made = torch.vmap(one, randomness="same")(own, stacked)
        found = {}
        for role, stack in made.items():
            new = stack.to(full[role].dtype)
            if index is not None:
                new = turned[role].index_copy(axis, index.to(new.device), new)
            found[leaf_of(site, role)] = new.transpose(-1, -2) if role == "weight" and site.transposed else new
        return found

    def one(self, site: Site, claims: list[Claim], own: Mapping[str, Tensor], stacked: Mapping[str, Tensor]) -> Any:
        """The weight [O, I] and bias [O] of one expert with modules inside; of a fused map, its own rows."""
        wide = {role: _wide(tensor) for role, tensor in own.items()}
        W, b = wide["weight"], wide.get("bias")
        none = W.new_zeros(len(W))
        inputs: list[Any] = [Basis(W.shape[1]), W.new_zeros(1, W.shape[1])]

        def value(claim: Claim, effect: str, **values: Any) -> Any:
            interpreter = BasisInterpreter(self.training, W, self.draws.of(claim))
            tensors = {n: stacked[t.name].to(W.dtype) if t.experts else self.lifted(t.name, W.dtype)
                       for n, t in claim.tensors.items()}  # fmt: skip
            scope = claim.scope({**tensors, "W": W, "b": none if b is None else b, **values}, interpreter)
            try:
                result = interpreter.evaluate(claim.effects[effect], scope)
                if isinstance(result, Basis):
                    return result if effect == "input" else result.dense(W)
                return result if isinstance(result, Tensor) else W.new_tensor(result)
            finally:
                scope.clear()  # it refers to itself: its tensors would stay until the garbage collector comes

        for claim in claims:
            if "input" in claim.effects:
                inputs = [value(claim, "input", x=x) for x in inputs]
        for claim in claims:
            if "weight" in claim.effects:
                W = value(claim, "weight").expand(W.shape)
        for claim in claims:
            if "bias" in claim.effects and b is not None:
                b = value(claim, "bias").expand(b.shape)
        late = [(claim, effect) for claim in claims for effect in ("delta", "output") if effect in claim.effects]
        if not late and all("input" not in claim.effects for claim in claims):
            return {"weight": W} if b is None else {"weight": W, "bias": b}
        # What is made of the basis without any bias, less what is made of nothing, is the matrix: no bias takes digits.
        rows, nothing = (x.through(W.T) if isinstance(x, Basis) else x @ W.T for x in inputs)
        offset = nothing if b is None else nothing + b
        for claim, effect in late:
            results = []
            for x, y in ((inputs[0], rows), (inputs[1], nothing), (inputs[1], offset)):
                made = value(claim, effect, x=x, y=y)
                results.append(y + made if effect == "delta" else made.expand(y.shape))
            rows, nothing, offset = results
        return {"weight": (rows - nothing).T} if b is None else {"weight": (rows - nothing).T, "bias": offset[0]}


def _each(stacks: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Of each stack, the part of one expert."""
    return {name: stack[number] for name, stack in stacks.items()}


def _wide(tensor: Tensor) -> Tensor:
    """What modules compute in: float32 for half precision, as they are trained."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
