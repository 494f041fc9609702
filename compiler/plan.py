"""The plan: every site, shape, order, mode and tensor name, decided before anything is written.

A `Claim` is one attachment at one site. The passes carry claims out; none of them decides anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from peltc.compiler.affine import Affine, AffineInterpreter, NotAffine
from peltc.compiler.anatomy import Anatomy, Site
from peltc.compiler.order import order_findings
from peltc.compiler.tables import depends_on_id_alone, not_of_ids
from peltc.spec.check import fits, joined, normalised, readable, site_shapes
from peltc.spec.cost import Cost, cost_of
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, nearest, one_of
from peltc.spec.dims import Dim, shape_text, simplify
from peltc.spec.formula import Call, Conditional, Deferred, EvaluationError, Expr, Name, is_static, walk
from peltc.spec.method import NAMES, ROLES, RUNTIME_NAMES, Method, Parameter
from peltc.spec.shapes import Shape, ShapeInterpreter
from peltc.spec.shapes import tensor as as_tensor
from peltc.spec.specification import Attachment, Spec

IDENTITY = {"input": "x", "output": "y", "weight": "W", "bias": "b", "keys": "k", "values": "v"}
"""What each definition says when it changes nothing."""


LEVELS = {"table": -1, "linear": 0, "norm": 0, "attention": 0, "block": 1, "embedding": 2}
"""What lies inside takes effect before what contains it, whatever the order in the file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the weights file; or of the `source`, where it has one."""

    name: str
    shape: tuple[int, ...]
    init: Expr
    frozen: bool
    scope: str
    source: str = ""
    part: str = ""


@dataclass(frozen=True, eq=False)
class Claim:
    """One attachment at one site.

    Attributes:
        attachment: its name.
        options: values at this site; a per-layer list is resolved.
        tensors: the method's parameters that exist here.
        effects: definitions that change something, in the order of their effect.
        index, count: this site's number among the attachment's.
        constants: names known at compile time: options and sizes.
        width: the model's.
        mode: emission mode.
        absorbed: the name of the weight that takes the claim in, or "".
        reason: why it is not absorbed; names the sub-expression.
        follows: the first of the sites that share this one's parameters, whose tensors and options it has; "" there.
        mirrors: the table that the site's weight is the same tensor as, and stays: the claim changes it there.
    """

    attachment: str
    method: Method
    site: Site
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    effects: Mapping[str, Expr]
    index: int
    count: int
    constants: Mapping[str, Any]
    width: int
    mode: str
    absorbed: str = ""
    reason: str = ""
    follows: str = ""
    mirrors: Site | None = None

    def scope(self, values: Mapping[str, Any], interpreter: Any) -> dict[str, Any]:
        """Everything a formula may read: constants, `values` for tensors and runtime names, `let:` bindings."""
        offered = set(NAMES[self.method.site])
        known = {n: v for n, v in values.items() if n in offered or n in self.tensors or n not in RUNTIME_NAMES}
        scope: dict[str, Any] = {**self.constants, **known}
        for name, expr in self.method.let:
            scope[name] = Deferred(partial(interpreter.evaluate, expr, scope))
        return scope

    @property
    def cost(self) -> Cost:
        """What the claim costs in the graph; nothing where a weight takes it in."""
        if self.absorbed or self.mirrors is not None:
            return Cost()
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return cost_of(
            self.site.kind, self.site.sizes, self.width, self.effects, self.method.let, self.constants, shapes
        )

    @property
    def marks(self) -> dict[str, str]:
        """What the claim's nodes in the graph carry in their metadata."""
        return {"pelt.attachment": self.attachment, "pelt.method": self.method.name, "pelt.site": self.site.name}

    @property
    def around(self) -> tuple[dict[str, Any], dict[str, Shape]]:
        """The shapes of the site's values, and of what each definition stands for; what follows a table is defined
        there."""
        site = self.mirrors or self.site
        return site_shapes(site.kind, site.sizes, width=self.width)

    def shape(self, effect: str) -> Shape:
        """The shape of a definition at the site; `B`, `S` and `T` are symbols."""
        shapes = ShapeInterpreter()
        values, _ = self.around
        values |= {name: Shape(tensor.shape) for name, tensor in self.tensors.items()}
        values["norm"] = lambda z: z
        return as_tensor(shapes.evaluate(self.effects[effect], self.scope(values, shapes)))

    def added(self, effect: str) -> tuple[int, int]:
        """How many keys or values a definition puts before the text's own, and behind them."""
        found = self.shape(effect)
        before = found.lead or 0
        behind = simplify(Dim.of(found.dims[-2]) - Dim.of("T") - before)
        assert isinstance(before, int) and isinstance(behind, int), "the plan lets nothing else pass"
        return before, behind

    def narrow(self, effect: str) -> bool:
        """Whether a definition says once what is the same for several features, tokens or texts."""
        return self.shape(effect).dims != self.around[1][effect].dims

    @property
    def decisive(self) -> set[str]:
        """The names in conditions of the method's formulas, which decide what they are."""
        exprs = [*self.effects.values(), *(expr for _, expr in self.method.let)]
        return self.read_by(node.test for expr in exprs for node in walk(expr) if isinstance(node, Conditional))

    @property
    def mixed(self) -> str:
        """The function by which one position reads another; "" where none does."""
        return next((by for name in self.effects if (by := self.shape(name).mixed)), "")

    @cached_property
    def cut(self) -> str:
        """Where tokens that the claim puts before the sequence leave it again: `head` or `outputs`."""
        if self.method.cut is None:
            return "outputs"
        return str(ShapeInterpreter().evaluate(self.method.cut, self.constants))

    @cached_property
    def reads(self) -> set[str]:
        """Runtime names that the effects read, `let:` bindings resolved, branches not taken left out."""
        return self.read_by(self.effects.values())

    def read_by(self, exprs: Iterable[Expr]) -> set[str]:
        """Runtime names that expressions of the method read, as `reads`."""
        found: set[str] = set()
        bindings = dict(self.method.let)
        pending, seen = list(exprs), set[str]()
        while pending:
            expr = resolve(pending.pop(), self.constants)
            for node in walk_resolved(expr, self.constants):
                name = node.id if isinstance(node, Name) else node.function if isinstance(node, Call) else ""
                if name and name not in seen:
                    seen.add(name)
                    if name in bindings:
                        pending.append(bindings[name])
                    else:
                        found.add(name)
        return found


@dataclass(frozen=True, eq=False)
class Plan:
    """A spec on a model, decided."""

    spec: Spec
    fingerprint: str
    claims: tuple[Claim, ...]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the weights file by name."""
        return {tensor.name: tensor for claim in self.claims for tensor in claim.tensors.values()}

    @property
    def prepends(self) -> bool:
        """Whether tokens are put before the sequence, so that the graph must read embedded tokens."""
        return any("prepend" in claim.effects for claim in self.claims)

    def trained(self) -> int:
        """The number of trained values."""
        return sum(int(np.prod(t.shape)) for t in self.tensors.values() if not t.frozen)

    @property
    def notes(self) -> list[str]:
        """What the user should know beside errors, one line each."""
        groups: dict[tuple[str, str], int] = {}
        for claim in self.claims:
            if claim.follows and claim.mirrors is None:
                groups[claim.attachment, claim.follows] = groups.get((claim.attachment, claim.follows), 1) + 1
        told = [f"'{name}' at {site} acts in {count} places, which share these parameters"
                for (name, site), count in groups.items()]  # fmt: skip
        mirrored = {(c.attachment, c.site.path) for c in self.claims if c.mirrors is not None}
        for claim in self.claims:
            if claim.site.ties and claim.mirrors is None:
                changed = [path for path in claim.site.ties if (claim.attachment, path) in mirrored]
                kept = [path for path in claim.site.ties if path not in changed]
                told += [f"'{claim.attachment}' changes {claim.site.name} and, as the same tensor, {path}"
                         for path in changed]  # fmt: skip
                told += [f"'{claim.attachment}' changes {claim.site.name}; {path}, the same tensor in the checkpoint,"
                         " keeps its values" for path in kept]  # fmt: skip
        return told

    @property
    def cost(self) -> Cost:
        """What all claims cost in the graph."""
        return sum((claim.cost for claim in self.claims), Cost())

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for `pelt plan --json` and the manifest."""
        return {
            "name": self.spec.name,
            "base": self.fingerprint,
            "trained": self.trained(),
            "cost": {"flops_per_token": self.cost.flops, "stored": self.cost.stored, "nodes": self.cost.nodes},
            "claims": [
                {
                    "attachment": claim.attachment,
                    "method": claim.method.name,
                    "site": claim.site.name,
                    "options": dict(claim.options),
                    "effects": {name: expr.text or str(expr) for name, expr in claim.effects.items()},
                    "mode": claim.mode,
                    "absorbed": claim.absorbed or None,
                    "reason": claim.reason or None,
                    "tensors": {name: tensor.name for name, tensor in claim.tensors.items()},
                }
                for claim in self.claims
            ],
            "tensors": {
                t.name: {"shape": list(t.shape), "frozen": t.frozen, "scope": t.scope} for t in self.tensors.values()
            },
        }


def make_plan(spec: Spec, anatomy: Anatomy, fingerprint: str, mode: str | None = None) -> Plan:
    """Decide everything.

    Args:
        anatomy: the sites of the model.
        fingerprint: identifies the model.
        mode: emission mode in place of the spec's.

    Raises:
        PeltError: every finding: E203 a selector that matches nothing, E204 another number of sites than expected,
            E205 sizes that do not fit, E206 two claims that need an order, E207 a mode that is not there, E214 some of
            the sites that share parameters, E310 a formula's shapes.
    """
    return _Planner(spec, anatomy, fingerprint, mode).plan()


class _Planner:
    def __init__(self, spec: Spec, anatomy: Anatomy, fingerprint: str, mode: str | None):
        self.spec, self.anatomy, self.fingerprint, self.mode = spec, anatomy, fingerprint, mode
        self.findings: list[Diagnostic] = []
        self.shared: dict[str, Tensor] = {}
        self.trials: dict[Any, str] = {}
        self.order = {site.path: position for position, site in enumerate(anatomy.sites)}

    def plan(self) -> Plan:
        claims = [claim for entry in self.spec.attach for claim in self.claims(entry)]
        self.findings.extend(order_findings(self.spec.attach, [c for c in claims if c.mirrors is None]))
        self.check_mirrors(claims)
        self.check_prepends(claims)
        if (total := sum(math.prod(tensor.shape) for tensor in self.shared.values())) > MAX_TOTAL:
            self.find("E205", f"the modules have {total:,} values", self.spec.attach[0].place, f"at most {MAX_TOTAL:,}")
        if self.findings:
            raise PeltError(_once(self.findings))
        return Plan(self.spec, self.fingerprint, tuple(self.decide(claims)))

    def find(self, code: str, message: str, place: Place, expected: str = "", hint: str = "") -> None:
        self.findings.append(Diagnostic(code, message, place, expected, hint))

    # which sites

    def claims(self, entry: Attachment) -> list[Claim]:
        chosen = self.sites(entry)
        if entry.layers == "all":  # the same modules under other names, within the layers that are meant
            named = {path for site in chosen for path in (site.path, *site.shared) if path}
            chosen = [s for s in self.anatomy if s in chosen or (s.path in named and s.takes(entry.method.site))]
        sites = self.leaders(entry, chosen)
        layers = self.in_order(entry, sites)
        roles = list(dict.fromkeys(site.role for site in sites))
        found = []
        widest = {name: max((s.sizes.get(name, 0) for s in sites), default=0) for name in ("in", "out")}
        for index, site in enumerate(sites):
            options = self.options(entry, site, layers)
            if options is None:
                return []
            mode = entry.mode or self.mode or self.spec.mode
            if mode not in ("fold", "static"):
                self.find("E207", f"the mode '{mode}' is not available yet", entry.place, "fold or static")
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
                self.find("E208", f"nothing is tied to {claim.site.name} in this model", _at(entry, "tied"),
                          "a table that is the same tensor as a head", "leave out `tied`")  # fmt: skip
                return []
            if not depends_on_id_alone(claim):
                self.find("E208", f"what '{entry.name}' makes of an id depends on the others in the sequence, so that"
                          f" {same[0].name} cannot follow {claim.site.name}", _at(entry, "tied"),
                          "a method whose rows are the same in every text", "leave out `tied`")  # fmt: skip
                return []
            result.append(claim)
            result += [replace(claim, site=site, follows=claim.site.name, mirrors=claim.site) for site in same]
            followed |= {site.key for site in same}
        return result

    def leaders(self, entry: Attachment, sites: list[Site]) -> list[Site]:
        """Of sites that share their parameters the first: layers that are one module cannot be told apart in it, so a
        change of one is a change of all."""
        found: dict[str, Site] = {}
        paths = {site.path for site in sites}
        for site in sites:
            if others := set(site.shared) - paths:
                self.find(
                    "E214",
                    f"'{site.path}' and '{min(others)}' are one set of parameters, and only one of them is meant",
                    _at(entry, "layers" if entry.layers != "all" else ""),
                    "all of the sites that share parameters",
                )
                return []
            found.setdefault(min((site.path, *site.shared), key=self.order.__getitem__), site)
        return list(found.values())

    def sites(self, entry: Attachment) -> list[Site]:
        """The sites that an attachment means.

        Every selector must match, and match sites of the method's kind."""
        chosen: dict[int, Site] = {}
        kind = entry.method.site
        listed = list(self.anatomy)
        for selector in entry.at:
            if entry.by_parameter:
                hits = [s for s in listed if s.takes(kind) and s.matches_parameter(selector)]
                known = sorted({s.parameters["weight"] for s in listed if s.takes(kind) and "weight" in s.parameters})
            else:
                hits = [s for s in listed if s.matches(selector) and s.takes(kind)]
                known = sorted({s.role for s in listed if s.takes(kind) and s.path})
            if not hits:
                others = sorted({s.kind for s in listed if s.matches(selector)})
                what = "parameter" if entry.by_parameter else "site"
                message = f"no {what} '{selector}' in this model"
                if others:
                    message = f"'{selector}' is a site of kind {others[0]}, and '{entry.method.name}' needs kind {kind}"
                self.find("E203", message, _at(entry), one_of(known), nearest(selector, known))
            chosen |= {id(s): s for s in hits}
        sites = [s for s in listed if id(s) in chosen]
        wanted = self.layers(entry, sites)
        if wanted is not None:
            sites = [s for s in sites if s.layer in wanted.get(s.stack, ())]
            if not sites and not self.findings:
                self.find("E203", "the selector matches nothing in these layers", _at(entry, "layers"),
                          "layers that the model has")  # fmt: skip
        if entry.expect is not None and len(sites) != entry.expect and sites:
            self.find("E204", f"the selector matches {len(sites)} sites", _at(entry, "expect"), f"{entry.expect} sites")
        return sites

    def layers(self, entry: Attachment, sites: list[Site]) -> dict[str, set[int]] | None:
        """The chosen layers by stack; None for all sites, those outside layers included."""
        if entry.layers == "all":
            return None
        depth = {
            s.stack: 1 + max(t.layer for t in self.anatomy if t.stack == s.stack and t.layer is not None)
            for s in sites
            if s.layer is not None
        }
        words = entry.layers if isinstance(entry.layers, tuple) else (entry.layers,)
        wanted: dict[str, set[int]] = {}
        for stack, n in depth.items():
            numbers: set[int] = set()
            for word in words:
                if isinstance(word, str) and (few := re.match(r"(first|last) (\d+)$", word)):
                    k = int(few.group(2))
                    numbers |= set(range(min(k, n)) if few.group(1) == "first" else range(max(n - k, 0), n))
                elif isinstance(word, str) and "-" in word:
                    a, b = map(int, word.split("-"))
                    numbers |= set(range(a, min(b, n) + 1))  # one beyond the last is enough to say that it is not there
                else:
                    numbers.add(int(word))
            if over := sorted(i for i in numbers if i >= n):
                self.find(
                    "E203",
                    f"the {stack or 'model'} has no layer {over[0]}",
                    _at(entry, "layers"),
                    f"layers 0 to {n - 1}",
                )
            wanted[stack] = numbers
        return wanted

    @staticmethod
    def in_order(entry: Attachment, sites: list[Site]) -> list[tuple[str, int | None]]:
        """The layers of sites in the order in which lists of options give their values: stacks as the model has them,
        and in each the layers as the attachment's `layers` has them."""
        words = entry.layers if isinstance(entry.layers, tuple) else (entry.layers,)
        ranges = [(int(a), int(b or a)) for a, _, b in (str(word).partition("-") for word in words) if a.isdigit()]

        def place(layer: int) -> int:
            return next((i for i, (first, last) in enumerate(ranges) if first <= layer <= last), len(ranges))

        stacks = list(dict.fromkeys(site.stack for site in sites))
        found = {(site.stack, site.layer) for site in sites if site.layer is not None}
        return sorted(found, key=lambda p: (stacks.index(p[0]), place(p[1] or 0), p[1] or 0))

    def options(self, entry: Attachment, site: Site, layers: list[tuple[str, int | None]]) -> dict[str, Any] | None:
        """An attachment's options at a site: lists give one value per selected layer."""
        result = {}
        for name, value in entry.options.items():
            if isinstance(value, list):
                if len(value) != len(layers):
                    self.find("E205", f"'{name}' lists {len(value)} values for {len(layers)} layers", _at(entry, name),
                              f"one value, or {len(layers)}")  # fmt: skip
                    return None
                if site.layer is None:
                    self.find("E205", f"'{name}' gives one value per layer, and '{site.name}' lies in none",
                              _at(entry, name), "one value", "attach to it separately")  # fmt: skip
                    return None
                value = value[layers.index((site.stack, site.layer))]
            result[name] = value
        return result

    # what happens at a site

    def claim(
        self, entry: Attachment, site: Site, options: dict[str, Any], constants: dict[str, Any], mode: str
    ) -> Claim | None:
        shapes = ShapeInterpreter()
        method = entry.method
        if method.site == "attention" and not site.sizes.get("heads"):
            self.find("E205", f"the heads of {site.name} could not be told apart in this model's graph", _at(entry),
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
        claim = Claim(entry.name, method, site, options, tensors, effects, constants["index"], constants["count"],
                      constants, self.anatomy.width, mode)  # fmt: skip
        if "prepend" in effects and not self.check_prepend(entry, claim):
            return None
        return claim if self.check_shapes(entry, claim, shapes) else None

    def check_prepend(self, entry: Attachment, claim: Claim) -> bool:
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
            self.find("E208", message, _at(entry), expected, f"attach to '{hint}'" if hint else "")
        return not message

    def check_prepends(self, claims: list[Claim]) -> None:
        """Tokens of several attachments join at one place and leave at one, and tables beside them are the base's."""
        entries = {entry.name: entry for entry in self.spec.attach}
        prepended = [claim for claim in claims if "prepend" in claim.effects]
        for claim in claims if prepended else ():
            if claim.site.kind == "table" and claim.mirrors is None:
                message = (
                    f"'{claim.attachment}' changes {claim.site.name}, and '{prepended[0].attachment}' puts tokens"
                    " before the embedded sequence, where tables are the base's own"
                )
                self.find("E208", message, _at(entries[claim.attachment]), "one of them")
        for first, second in pairwise(prepended):
            if (first.site.role, first.cut) != (second.site.role, second.cut):
                message = (
                    f"the tokens of '{first.attachment}' and '{second.attachment}' join or leave at different places"
                )
                self.find("E208", message, _at(entries[second.attachment]), "one place for all")

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
        if math.prod(sizes) > MAX_ELEMENTS:
            raise _Misfit(f"{shape_text(sizes)} has more than {MAX_ELEMENTS:,} elements")
        where = {"site": site.name, "layer": site.layer_path, "model": ""}[parameter.scope]
        name = ".".join(part for part in (parameter.owner or entry.name, where, parameter.name) if part)
        tensor = Tensor(name, sizes, parameter.init, parameter.frozen, parameter.scope, parameter.source,
                        parameter.part)  # fmt: skip
        first = self.shared.setdefault(name, tensor)
        if first.shape != sizes:
            raise _Misfit(
                f"it is shared, and has the shape {shape_text(first.shape)} at another site and "
                f"{shape_text(sizes)} here; attach these sites separately"
            )
        return tensor

    def check_shapes(self, entry: Attachment, claim: Claim, shapes: ShapeInterpreter) -> bool:
        """Hold each definition's shape against what the site needs."""
        values, expected = site_shapes(claim.site.kind, claim.site.sizes, claim.site.name, self.anatomy.width)
        for name, tensor in claim.tensors.items():
            declared = next(p for p in claim.method.parameters if p.name == name)
            origin = f"parameter {name} [{', '.join(a.text for a in declared.shape)}]"
            values[name] = Shape(tensor.shape, origin)
        if "norm" in claim.site.anchors:
            values["norm"] = partial(normalised, values["y"])
        offered = {*NAMES[claim.method.site]} & {*RUNTIME_NAMES} - {"mask"}
        there = offered & {*claim.site.values}
        missing = sorted(claim.reads & offered - there)
        if missing and claim.site.kind != "table":  # a table says itself what it cannot give
            message = f"'{entry.name}' reads '{missing[0]}', which {claim.site.name} does not have"
            self.find("E205", message, _at(entry), one_of(sorted(there)))
            return False
        whole: dict[str, Shape] = {}
        for name, expr in claim.effects.items():
            place = entry.method.place
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
            self.find("E310", f"'{claim.method.name}' at {claim.site.name}: {problem}", entry.method.place,
                      "keys and values of the same positions")  # fmt: skip
            return False
        if claim.site.kind == "table" and (reason := not_of_ids(claim)):
            self.find("E205", f"'{entry.name}' cannot change {claim.site.name}: {reason}", _at(entry),
                      "a method that takes linear maps of its input, such as lora, or changes weights")  # fmt: skip
            return False
        return True

    # tables that others follow, and who absorbs what

    def check_mirrors(self, claims: list[Claim]) -> None:
        """What follows a table has nothing of its own."""
        entries = {entry.name: entry for entry in self.spec.attach}
        followers = {claim.site.key: claim for claim in claims if claim.mirrors is not None}
        for claim in claims:
            if claim.mirrors is None and (follower := followers.get(claim.site.key)):
                self.find(
                    "E208",
                    f"{claim.site.name} follows its table, which '{follower.attachment}' changes, and"
                    f" '{claim.attachment}' changes it besides",
                    _at(entries[claim.attachment]),
                    "one of them",
                    f"leave out `tied: together` in '{follower.attachment}'",
                )
        followed = {(c.attachment, c.mirrors.key) for c in claims if c.mirrors is not None}
        for claim in claims:
            if claim.site.key in {key for _, key in followed} and (claim.attachment, claim.site.key) not in followed:
                self.find("E208", f"{claim.site.name} is changed by '{claim.attachment}', which is apart, and by others"
                          " together with what is tied to it", _at(entries[claim.attachment]),
                          "one `tied` for all that change a table")  # fmt: skip

    def decide(self, claims: list[Claim]) -> list[Claim]:
        """Which claims go into weights. At one weight, claims are absorbed up to the first that cannot be; later
        additions that read the input alone commute with it and are absorbed as well. None is absorbed whose change a
        claim that stays must not see: that would read it in the weight."""
        kept: dict[int, str] = {}
        while True:
            decided = self.absorbed(claims, kept)
            staying = [c for c in decided.values() if not c.absorbed]
            seen = {
                key: reader.attachment
                for key, claim in decided.items()
                for reader in staying
                if claim.absorbed == _weight_at(reader.site) != "" and _reads_before(reader, claim)
            }
            if not seen:
                break
            kept |= {key: f"'{name}', which stays in the graph, reads what was before" for key, name in seen.items()}
        own = {(c.attachment, c.site.key): decided[id(c)] for c in claims if c.mirrors is None}
        for claim in (c for c in claims if c.mirrors is not None):
            assert claim.mirrors is not None
            leader = own[claim.attachment, claim.mirrors.key]
            weight = claim.site.parameters["weight"] if leader.absorbed else ""
            decided[id(claim)] = replace(claim, absorbed=weight, reason=leader.reason)
        return [decided[id(claim)] for claim in claims]

    def absorbed(self, claims: list[Claim], kept: Mapping[int, str]) -> dict[int, Claim]:
        """The claims with their absorbers, in order of effect; those `kept` stay in the graph, for a reason."""
        blocked: dict[str, list[Claim]] = {}
        decided: dict[int, Claim] = {}
        for claim in sorted(claims, key=lambda c: LEVELS[c.site.kind]):
            if claim.mirrors is not None:
                continue
            target, reason = ("", kept[id(claim)]) if id(claim) in kept else self.absorber(claim)
            before = blocked.get(target, [])
            if target and before:
                additive = set(claim.effects) == {"delta"} and "y" not in claim.reads
                others = all(set(c.effects) == {"delta"} and "y" not in c.reads for c in before)
                if not (additive and others):
                    reason, target = f"it takes effect after '{before[0].attachment}', which stays in the graph", ""
            result = replace(claim, absorbed=target, reason="" if target else reason)
            if not target:
                blocked.setdefault(_weight_at(claim.site), []).append(result)
            decided[id(claim)] = result
        return decided

    def absorber(self, claim: Claim) -> tuple[str, str]:
        """The weight that can take a claim in, or why none can."""
        site = claim.site
        if claim.mode != "fold":
            return "", f"the mode is {claim.mode}"
        if site.kind == "norm":
            runtime = {"x", "y"} & claim.reads
            if {"delta", "output"} & set(claim.effects) or runtime:
                return "", "a norm takes in changes of its gain and bias only"
            return self.single(site.parameters["weight"], site) or ("", _SHARED)
        if site.kind == "table" and not depends_on_id_alone(claim):
            return "", "what it makes of an id depends on the others in the sequence"
        if site.kind == "table":
            return self.single(site.parameters["weight"], site) or ("", _SHARED)
        if site.kind == "block":
            weight = site.values.get("linear", "")
            if not weight:
                return "", "the block does not end in a linear map"
            reason = self.not_affine(claim)
            if not reason and (more := claim.reads & {"x", "r", "h"}):
                reason = f"it reads '{min(more)}', and the map that ends the block does not"
            return ("", reason) if reason else self.affine(claim, weight)
        if site.kind == "linear":
            if more := claim.reads & {"h", "mask"}:
                return "", self.not_affine(claim) or f"it reads '{min(more)}', and the map does not"
            if "weight" in claim.effects and claim.reads & {"x", "y"}:
                return "", "its weight depends on the input"
            return self.affine(claim, site.parameters["weight"])
        return "", {"attention": "attention's softmax is not linear in keys and values",
                    "embedding": "tokens are added to the sequence"}[site.kind]  # fmt: skip

    def affine(self, claim: Claim, weight: str) -> tuple[str, str]:
        reason = self.not_affine(claim)
        if reason:
            return "", reason
        return self.single(weight, claim.site) or ("", _SHARED)

    def single(self, weight: str, site: Site) -> tuple[str, str] | None:
        """The weight, if the map at a site alone uses it, and those that are changed with it."""
        kind = site.kind if site.kind in ("norm", "table") else "linear"
        maps = {s.values.get("product", s.path): s for s in self.anatomy
                if s.parameters.get("weight") == weight and s.kind == kind}  # fmt: skip
        return (weight, "") if len(maps) == 1 + len(site.shared) else None

    def not_affine(self, claim: Claim) -> str:
        """Why a claim's effects are not affine, naming the sub-expression; empty where they are. It is tried."""
        apart = {"index", "layer", "role"} - claim.decisive
        kinds = tuple(sorted((k, v) for k, v in claim.constants.items() if k not in apart and is_static(v)))
        key = (id(claim.method), kinds, tuple(claim.effects.items()), claim.site.kind)
        if key not in self.trials:
            self.trials[key] = self.trial(claim)
        return self.trials[key]

    @staticmethod
    def trial(claim: Claim) -> str:
        interpreter = AffineInterpreter()
        some = np.float32(0.37)  # zeros would divide by zero; broadcast, a bank of any size takes no memory
        values: dict[str, Any] = {n: np.broadcast_to(some, t.shape) for n, t in claim.tensors.items()}
        values |= {role: Affine.identity(role) for role in ("x", "y", "r", "h", "mask")}
        values["norm"] = _no_norm
        out, inputs = claim.site.sizes.get("out", 0), claim.site.sizes.get("in", 0)
        values["b"] = np.zeros(out, np.float32)
        values["W"] = Deferred(lambda: np.ones((out, inputs), np.float32))
        scope = claim.scope(values, interpreter)
        for name in ("input", "delta", "output"):
            if name in claim.effects:
                try:
                    interpreter.evaluate(claim.effects[name], scope)
                except EvaluationError as error:
                    return str(error)
        return ""


def _weight_at(site: Site) -> str:
    """The weight that a site's claims would go into."""
    return site.values.get("linear") or site.parameters.get("weight", "")


def _reads_before(reader: Claim, absorbed: Claim) -> bool:
    """Whether a claim reads a value as it was before another that has gone into the weight: the map's raw input, or a
    weight and bias without what was added to the output or made of it."""
    if reader.site.kind == "block":  # it reads what its first map does, and the output of its last
        return False
    read = reader.reads | {short for role, short in ROLES.items() if role in reader.effects}
    changed, made = set(absorbed.effects), {"input", "delta", "output"}
    if "bias" not in reader.site.parameters and "b" in read:  # a bias that the base lacks is added to the output
        made.add("bias")
    return ("x" in read and "input" in changed) or bool({"W", "b"} & read and made & changed)


def _no_norm(z: Any) -> Any:
    raise NotAffine("a normalisation is not affine")


_SHARED = "the weight is shared with other sites, which folding would change too"


MAX_ELEMENTS = 2**31
"""Of one parameter; more is a slip of the pen, or worse."""


MAX_TOTAL = 2**33
"""Of all parameters, banks included."""


class _Misfit(Exception):
    """A size that is none."""


def _once(findings: list[Diagnostic]) -> list[Diagnostic]:
    """Findings that repeat from site to site, told once each with their number."""
    groups: dict[tuple[Any, ...], list[Diagnostic]] = {}
    for finding in dict.fromkeys(findings):
        apart = () if finding.code in ("E205", "E206", "E310") else (finding.message,)
        groups.setdefault((finding.code, finding.place, finding.hint, *apart), []).append(finding)
    told = []
    for first, *more in groups.values():
        again = f" (and {len(more)} more like it)" if more else ""
        told.append(replace(first, message=first.message + again))
    return told


def _at(entry: Attachment, key: str = "") -> Place:
    """Where an attachment says something: under `key`, or where it names its sites."""
    return entry.at_key(key or ("parameter" if entry.by_parameter else "at"))


def constants_of(site: Site) -> dict[str, Any]:
    """The sizes that formulas at a site may name."""
    constants: dict[str, Any] = {k: v for k, v in site.sizes.items() if k != "vocab"}
    constants["biased"] = "bias" in site.parameters
    constants["table"] = site.kind == "table"
    constants["causal"] = site.stack == "decoder"
    return constants


def resolve(expr: Expr, constants: Mapping[str, Any]) -> Expr:
    """An expression without the conditionals that constants decide at its root."""
    interpreter = ShapeInterpreter()
    while isinstance(expr, Conditional):
        try:
            chosen = interpreter.evaluate(expr.test, constants)
        except EvaluationError:
            return expr
        expr = expr.then if chosen else expr.other
    return expr


def walk_resolved(expr: Expr, constants: Mapping[str, Any]) -> list[Expr]:
    """The expression and its parts, without branches that constants rule out."""
    expr = resolve(expr, constants)
    parts: list[Expr] = [expr]
    children: tuple[Expr, ...] = ()
    if isinstance(expr, Call):
        children = (*expr.args, *(value for _, value in expr.keywords))
    elif isinstance(expr, Conditional):
        children = (expr.test, expr.then, expr.other)
    elif hasattr(expr, "elements"):
        children = expr.elements
    for child in children:
        parts.extend(walk_resolved(child, constants))
    return parts
