"""Modules at linear maps, tables and norms, reached by hooks on the torch modules that own their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from peltc.compiler.interpreters.numeric import OneHot
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site
from peltc.runtime.training.evaluation import Evaluation, Tensor, on_first
from peltc.runtime.training.places import leaf_of, leaves_of, owner_of, put_rows, rows_of
from peltc.runtime.training.reach import looks_up
from peltc.spec.formula.interpreter import Deferred
from peltc.spec.method import ROLES


class Maps(Evaluation):
    """Modules at linear maps, tables, what is tied to tables, and norms."""

    def install_linear(self, model: Any, site: Site, claims: list[Claim]) -> None:
        module = owner_of(model, site.parameters["weight"])
        index = rows_of(site)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.muted:
                return None
            self.enter(site)
            x, y = args[0], output
            changed = False
            parameters: dict[str, Tensor] = {}
            given = self.owned(site, module, parameters)
            for claim in claims:
                if "input" in claim.effects:
                    x, changed = self.evaluate(claim, "input", x, **{**given, "x": x}), True
            for role in ROLES:
                for claim in claims:
                    if role in claim.effects:
                        self.change(site, module, claim, role, parameters)
            given = self.owned(site, module, dict(parameters))
            extra = parameters.pop("extra", None)
            if changed or parameters:
                fresh = self.quietly(module, leaves_of(site, parameters), x)
                y = fresh if index is None else put_rows(y, index, fresh[..., index])
            own = y if index is None else y[..., index]
            if extra is not None:
                own = own + extra
            own = self.outputs(site, claims, own, **given, x=x)
            return own if index is None else put_rows(y, index, own)

        self.handles.append(module.register_forward_hook(on_first(hook)))

    @staticmethod
    def own(site: Site, module: nn.Module, role: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """A site's weight [O, I] or bias [O] as it is by now, of a fused map its own rows; zeros for no bias."""
        index = rows_of(site)
        full = parameters.get(role, getattr(module, leaf_of(site, role), None))
        if full is None:
            like = next(module.parameters())
            return parameters.get("extra", like.new_zeros(site.sizes["out"]))
        turned = full.T if role == "weight" and site.transposed else full
        return turned if index is None else turned[index]

    def owned(self, site: Site, module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Deferred]:
        """A site's weight and bias as formulas call them, for those that read them."""
        return {short: Deferred(partial(self.own, site, module, role, parameters)) for role, short in ROLES.items()}

    def change(self, site: Site, module: nn.Module, claim: Claim, role: str, parameters: dict[str, Tensor]) -> None:
        """A parameter as a claim defines it, [O, I] in the formula, put back into the module's own layout."""
        own = self.owned(site, module, parameters)
        new = self.evaluate(claim, role, own[ROLES[role]](), **own)
        full = parameters.get(role, getattr(module, leaf_of(site, role), None))
        if full is None:
            parameters["extra"] = new
            return
        turned = full.T if role == "weight" and site.transposed else full
        if (index := rows_of(site)) is not None:
            new = turned.index_copy(0, index.to(turned.device), new)
        parameters[role] = new.T if role == "weight" and site.transposed else new

    def install_table(self, model: Any, site: Site, claims: list[Claim]) -> None:
        """What ids pick: of plain lookups it is changed itself, of others the whole table is."""
        module = owner_of(model, site.parameters["weight"])
        late = [c for c in claims if {"delta", "output"} & set(c.effects)]
        plain = late == claims and looks_up(module, site)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if self.muted:
                return None
            self.enter(site)
            if plain:
                read = OneHot(args[0], site.sizes["in"], getattr(module, "padding_idx", None))
                return self.outputs(site, claims, output, **_turned(getattr(module, leaf_of(site, "weight"))), x=read)
            leaf = leaf_of(site, "weight")
            rows = self.rows(claims, getattr(module, leaf))
            before, self.muted = self.muted, True
            try:
                found: Tensor = functional_call(module, {leaf: rows}, args, kwargs)
                return found
            finally:
                self.muted = before

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def rows(self, claims: list[Claim], table: Tensor) -> Tensor:
        """All rows of a table [V, D], as claims make them."""
        for claim in claims:
            if "weight" in claim.effects:
                turned = table.T
                table = self.evaluate(claim, "weight", turned, W=turned).T
        for claim in claims:
            if "bias" in claim.effects:
                table = table + self.evaluate(claim, "bias", table[0], b=torch.zeros_like(table[0]))
        return self.outputs(claims[0].site, claims, table, **_turned(table), x=OneHot(None, len(table)))

    def install_mirror(self, model: Any, site: Site, claims: list[Claim]) -> None:
        """A map, or another table, that has the rows of the table that it is the same tensor as."""
        table = claims[0].mirrors
        assert table is not None
        own = [replace(claim, site=table) for claim in claims]
        module, owner = owner_of(model, site.parameters["weight"]), owner_of(model, table.parameters["weight"])

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.muted:
                return None
            rows = self.rows(own, getattr(owner, leaf_of(table, "weight")))
            before, self.muted = self.muted, True
            try:
                return functional_call(module, {leaf_of(site, "weight"): rows}, args, kwargs)
            finally:
                self.muted = before

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def install_norm(self, model: Any, site: Site, claims: list[Claim]) -> None:
        module = owner_of(model, site.parameters["weight"])

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if getattr(module, "_pelt_inner", False):
                return None
            self.enter(site)
            parameters = self.affinities(module, site, claims)
            y = output
            if parameters:
                before, self.muted = self.muted, True  # a layer may end in this very module
                module._pelt_inner = True  # type: ignore[assignment]
                try:
                    y = functional_call(module, leaves_of(site, parameters), args)
                finally:
                    self.muted = before
                    module._pelt_inner = False  # type: ignore[assignment]
            return self.outputs(site, claims, y, **self.gains(module, site, parameters), x=args[0])

        self.handles.append(module.register_forward_hook(hook))

    def affinities(self, module: nn.Module, site: Site, claims: list[Claim]) -> dict[str, Tensor]:
        """A norm's gain and bias as claims define them, by role; only those that they change."""
        parameters: dict[str, Tensor] = {}
        for role, short in ROLES.items():
            for claim in claims:
                if role in claim.effects:
                    own = self.gains(module, site, parameters)
                    parameters[role] = self.evaluate(claim, role, own[short], **own)
        return parameters

    @staticmethod
    def gains(module: nn.Module, site: Site, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A norm's gain and bias as they are by now, as formulas call them; zeros for no bias."""
        gain: Tensor = getattr(module, leaf_of(site, "weight"))
        return {short: parameters.get(role, getattr(module, leaf_of(site, role)))
                if role in site.parameters else torch.zeros_like(gain) for role, short in ROLES.items()}  # fmt: skip


def _turned(table: Tensor) -> dict[str, Deferred]:
    """A table [V, D] as formulas see it: the weight [D, V] of a linear map of one-hot ids, which has no bias."""
    return {"W": Deferred(lambda: table.T), "b": Deferred(lambda: torch.zeros_like(table[0]))}
