"""The plan: every site, shape, order, mode and tensor name, decided before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peltc.compiler.plan.checks import Checks
from peltc.compiler.plan.claims import Claim, Plan, Tensor, resolve
from peltc.compiler.plan.findings import Findings, at
from peltc.compiler.plan.folding import Folding
from peltc.compiler.plan.order import order_findings
from peltc.compiler.plan.quantising import quantised, unmatched
from peltc.compiler.plan.selection import Selection
from peltc.compiler.plan.tables import depends_on_id_alone
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.spec.diagnostics import PeltError, one_of
from peltc.spec.formula.dims import Dim, shape_text, simplify
from peltc.spec.formula.interpreter import EvaluationError
from peltc.spec.formula.syntax import Expr, Name
from peltc.spec.interpreters.shapes import ShapeInterpreter
from peltc.spec.method import IDENTITY, Parameter
from peltc.spec.modes import BANK, MODES, PACKED
from peltc.spec.specification import Attachment, Spec

MAX_ELEMENTS = 2**31
"""Of one parameter; more is a slip of the pen, or worse."""


MAX_TOTAL = 2**33
"""Of all parameters, banks included."""


def make_plan(spec: Spec, anatomy: Anatomy, fingerprint: str, mode: str | None = None) -> Plan:
    """Decide everything.

    Args:
        anatomy: the sites of the model.
        fingerprint: identifies the model.
        mode: emission mode in place of the spec's.

    Raises:
        PeltError: every finding: E203 a selector that matches nothing, E204 another number of sites than expected,
            E205 sizes that do not fit, E206 two claims that need an order, E207 a mode that is not there, E208 what
            does not work there, E212 nothing to keep from a prompt, E214 some of the sites that share parameters, E310
            a formula's shapes.
    """
    return _Planner(spec, anatomy, fingerprint, mode).plan()


class _Planner:
    def __init__(self, spec: Spec, anatomy: Anatomy, fingerprint: str, mode: str | None):
        self.spec, self.anatomy, self.fingerprint, self.mode = spec, anatomy, fingerprint, mode
        self.findings = Findings()
        self.find = self.findings.find
        self.selection = Selection(anatomy, self.findings)
        self.checks = Checks(spec, anatomy, self.findings)
        self.shared: dict[str, Tensor] = {}

    def plan(self) -> Plan:
        claims = [claim for entry in self.spec.attach for claim in self.claims(entry)]
        self.findings.extend(order_findings(self.spec.attach, [c for c in claims if c.mirrors is None]))
        self.checks.mirrors(claims)
        self.checks.prepends(claims)
        self.checks.takes(claims)
        self.checks.generates(claims)
        self.checks.holds(claims)
        if (total := sum(math.prod(tensor.shape) for tensor in self.shared.values())) > MAX_TOTAL:
            self.find("E205", f"the modules have {total:,} values", self.spec.attach[0].place, f"at most {MAX_TOTAL:,}")
        how = self.spec.quantise
        self.findings.extend([] if how is None else unmatched(how, self.anatomy, self.spec.path))
        if self.findings:
            raise PeltError(self.findings.told())
        weights = quantised(how, self.anatomy)
        return Plan(self.spec, self.fingerprint, tuple(Folding(self.anatomy).decide(claims)), weights)

    def claims(self, entry: Attachment) -> list[Claim]:
        chosen = self.selection.sites(entry)
        if entry.layers == "all":  # the same modules under other names, within the layers that are meant
            named = {path for site in chosen for path in (site.path, *site.shared) if path}
            chosen = [s for s in self.anatomy if s in chosen or (s.path in named and s.takes(entry.method.site))]
        sites = self.selection.leaders(entry, chosen)
        layers = self.selection.in_order(entry, sites)
        roles = list(dict.fromkeys(site.role for site in sites))
        found = []
        widest = {name: max((s.sizes.get(name, 0) for s in sites), default=0) for name in ("in", "out")}
        for index, site in enumerate(sites):
            options = self.selection.options(entry, site, layers)
            if options is None:
                return []
            mode = entry.mode or self.mode or self.spec.mode
            if mode not in MODES:
                self.find("E207", f"there is no mode '{mode}'", entry.place, one_of(MODES))
                return []
            if mode == BANK and site.kind == "experts":
                self.find("E208", f"a module at {site.name} cannot have a profile for each row of a batch, whose tokens"
                          " are sorted by expert together", entry.place, "fold, static or swappable")  # fmt: skip
                return []
            constants = {**options, **constants_of(site), "index": index, "count": len(sites)}
            constants |= {"role": roles.index(site.role), "roles": len(roles), "d_model": self.anatomy.width}
            place = (site.stack, site.layer)
            constants |= {"layer": layers.index(place) if place in layers else 0, "layers": max(len(layers), 1)}
            if entry.method.site == "linear":
                constants |= {"max_in": widest["in"], "max_out": widest["out"]}
            claim = self.claim(entry, site, options, constants, mode)
            if claim is not None:
                found.append(claim)
        if found and not any(claim.effects for claim in found):
            self.find("E210", f"'{entry.name}' changes nothing at any of its {len(found)} sites", entry.place,
                      "options with which the method has an effect")  # fmt: skip
        if entry.tied == "together":
            return self.mirrored(entry, found)
        first = {path: claim for claim in found for path in claim.site.shared}
        followers = [replace(first[s.path], site=s, follows=first[s.path].site.name) for s in chosen
                     if s not in sites and s.path in first]  # fmt: skip
        return found + followers

    def mirrored(self, entry: Attachment, claims: list[Claim]) -> list[Claim]:
        """Claims at tables, and at whatever else is the same tensor, which follows the first of them."""
        result: list[Claim] = []
        followed: set[str] = set()
        for claim in claims:
            if claim.site.key in followed:
                continue
            same = [s for s in self.anatomy if s.kind in ("table", "linear") and s is not claim.site
                    and s.path in claim.site.ties]  # fmt: skip
            if claim.site.kind != "table" or not same:
                self.find("E208", f"nothing is tied to {claim.site.name} in this model", at(entry, "tied"),
                          "a table that is the same tensor as a head", "leave out `tied`")  # fmt: skip
                return []
            if not depends_on_id_alone(claim):
                self.find("E208", f"what '{entry.name}' makes of an id depends on the others in the sequence, so that"
                          f" {same[0].name} cannot follow {claim.site.name}", at(entry, "tied"),
                          "a method whose rows are the same in every text", "leave out `tied`")  # fmt: skip
                return []
            result.append(claim)
            result += [replace(claim, site=site, follows=claim.site.name, mirrors=claim.site) for site in same]
            followed |= {site.key for site in same}
        return result

    def claim(
        self, entry: Attachment, site: Site, options: dict[str, Any], constants: dict[str, Any], mode: str
    ) -> Claim | None:
        shapes = ShapeInterpreter()
        method = entry.method
        if method.site == "attention" and not site.sizes.get("heads"):
            self.find("E205", f"the heads of {site.name} could not be told apart in this model's graph", at(entry),
                      hint="maps and blocks of this model can be changed: `pelt sites` lists them")  # fmt: skip
            return None
        tensors: dict[str, Tensor] = {}
        for parameter in method.parameters:
            try:
                if parameter.condition is None or shapes.evaluate(parameter.condition, constants):
                    tensors[parameter.name] = self.tensor(entry, site, parameter, constants, shapes)
            except (EvaluationError, _Misfit) as error:
                self.find("E205", f"'{parameter.name}' has no size at {site.name}: {error}", entry.place)
                return None
        effects: dict[str, Expr] = {}
        for name, expr in method.effects:
            resolved = resolve(expr, constants)
            if resolved != Name(IDENTITY.get(name, "")):
                effects[name] = resolved
        if "bias" in effects and site.kind == "norm" and not constants["biased"]:
            del effects["bias"]
        packed = mode == BANK and self.spec.masks == PACKED
        claim = Claim(entry.name, method, site, options, tensors, effects, constants["index"], constants["count"],
                      constants, self.anatomy.width, mode, packed=packed)  # fmt: skip
        if claim.takes:
            embedded = [s for s in self.anatomy if s.kind == "embedding" and s.role == "embedding"]
            claim = replace(claim, text=next((s for s in embedded if s.stack in ("", site.stack)), None))
        if "prepend" in effects and not self.checks.prepend(entry, claim):
            return None
        return claim if self.checks.shapes(entry, claim, shapes) else None

    def tensor(
        self,
        entry: Attachment,
        site: Site,
        parameter: Parameter,
        constants: Mapping[str, Any],
        shapes: ShapeInterpreter,
    ) -> Tensor:
        dims = [shapes.evaluate(axis, constants) for axis in parameter.shape]
        sizes: tuple[Any, ...] = tuple(simplify(d) if isinstance(d, Dim) else d for d in dims)
        for axis, size in zip(parameter.shape, sizes, strict=True):
            if not isinstance(size, int) or size < 1:
                raise _Misfit(f"'{axis.text}' is {size}, and sizes are positive whole numbers")
        experts = site.sizes["experts"] if site.kind == "experts" and parameter.scope == "site" else 0
        sizes = (experts, *sizes) if experts else sizes
        if math.prod(sizes) > MAX_ELEMENTS:
            raise _Misfit(f"{shape_text(sizes)} has more than {MAX_ELEMENTS:,} elements")
        where = {"site": site.name, "layer": site.layer_path, "model": ""}[parameter.scope]
        name = ".".join(part for part in (parameter.owner or entry.name, where, parameter.name) if part)
        tensor = Tensor(name, sizes, parameter.init, parameter.frozen, parameter.scope, parameter.source,
                        parameter.part, experts)  # fmt: skip
        first = self.shared.setdefault(name, tensor)
        if first.shape != sizes:
            raise _Misfit(
                f"it is shared, and has the shape {shape_text(first.shape)} at another site and "
                f"{shape_text(sizes)} here; attach these sites separately"
            )
        return tensor


class _Misfit(Exception):
    """A size that is none."""


def constants_of(site: Site) -> dict[str, Any]:
    """The sizes that formulas at a site may name."""
    constants: dict[str, Any] = {k: v for k, v in site.sizes.items() if k not in ("vocab", "experts")}
    constants["biased"] = "bias" in site.parameters
    constants["table"] = site.kind == "table"
    constants["causal"] = site.stack == "decoder"
    return constants
