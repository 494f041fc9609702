"""The typology interpreter: a module's row in the reference architecture PEFT-Ref, derived from its formulas.

A value is a tensor's history (`Flow`): which of the site's values and which of the method's parameters it comes from,
and what they went through. A method that a combinator rewrote is read like any other. Terms as in arXiv:2304.12410:
intra- and inter-connectivity, parameters adapted, sharing, input type, insertion form, number of insertions,
integration form, workspace; and the binding time of the weights, which a compiler needs besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from peltc.spec.formula.dims import Dim
from peltc.spec.formula.interpreter import Deferred, Interpreter
from peltc.spec.interpreters.flow_interpreter import TypologyInterpreter, axes_of
from peltc.spec.interpreters.flows import Flow, Part, Way, flow, merged
from peltc.spec.interpreters.workspace import counted, selected, workspace
from peltc.spec.method import NAMES, RUNTIME_NAMES, Method
from peltc.spec.specification import Attachment

PROPERTIES = {
    "intra_connectivity": "intra-connectivity",
    "inter_connectivity": "inter-connectivity",
    "parameters_adapted": "parameters adapted",
    "parameter_sharing": "parameter sharing",
    "input_type": "input type",
    "insertion_form": "insertion form",
    "insertions": "insertions",
    "integration_form": "integration form",
    "workspace": "workspace",
    "binding_time": "binding time",
}
"""The properties of a module at its places, in the order in which they are told."""
Row = dict[str, str]


def row_of(method: Method, options: Mapping[str, Any] | None = None) -> Row:
    """The properties that a method's formulas decide: all but the number of insertions and the workspace.

    Args:
        options: their values, which decide conditionals; the defaults where absent. Where a list gives one value per
            layer and the layers differ, both are told.

    Raises:
        EvaluationError: a formula has no value, which `peltc.spec.interpreters.check` tells better.
    """
    rows = [_Reading(method, layer).row() for layer in _by_layer(method.defaults | dict(options or {}))]
    return {key: " or ".join(dict.fromkeys(row[key] for row in rows)) for key in rows[0]}


def row_at(entry: Attachment, sites: Sequence[str] | None = None) -> Row:
    """An attachment's whole row.

    Args:
        sites: paths of the sites that it has in a model, empty where one has no role; the selectors speak where absent.
    """
    row = row_of(entry.method, entry.options)
    places = entry.at if sites is None else sites
    named = [path for path in places if path] if sites is not None or not entry.by_parameter else []
    words = [workspace(entry.method.site, named, row["insertion_form"].startswith("sequential"))] if named else []
    if len(named) < len(places):
        words.append(f"parameters {', '.join(entry.at)}")
    row["workspace"] = " + ".join(words)
    row["insertions"] = selected(entry) if sites is None else counted(sites)
    return {key: row[key] for key in PROPERTIES}


def _by_layer(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The options of one layer after the other, as far as lists tell them apart."""
    longest = max((len(v) for v in options.values() if isinstance(v, list)), default=1)
    for i in range(longest):
        yield {k: v[min(i, len(v) - 1)] if isinstance(v, list) else v for k, v in options.items()}


UNTOUCHED = {"input": "x", "output": "y", "keys": "k", "values": "v"}
"""What a definition says that changes nothing; of parameters, themselves."""


class _Reading:
    """A method's formulas, evaluated for some options, and what PEFT-Ref says of them."""

    def __init__(self, method: Method, options: Mapping[str, Any]):
        self.method = method
        self.parameters = {p.name: p for p in method.parameters}
        sizes = {name: Dim.of(name) for name in NAMES[method.site] if name not in (*RUNTIME_NAMES, "W", "b")}
        self.constants: dict[str, Any] = {
            **sizes,
            "biased": True,
            "table": False,
            "index": 0,
            "layer": 0,
            "role": 0,
            **options,
        }
        interpreter = TypologyInterpreter(self.parameters)
        values: dict[str, Any] = {name: Flow(frozenset({name})) for name in RUNTIME_NAMES}
        values |= {"mask": Flow(), "W": Flow(), "b": Flow(), "norm": lambda z: z.through(Way.NORM)}
        values |= {name: Flow(own=frozenset({name})) for name in self.parameters}
        scope = {**values, **self.constants}
        for name, expr in method.let:
            scope[name] = Deferred(partial(interpreter.evaluate, expr, scope))
        found = {name: flow(interpreter.evaluate(expr, scope)) for name, expr in method.effects}
        changes = {name: f for name, f in found.items() if f != values.get(UNTOUCHED.get(name, ""), Flow())}
        self.effects = changes or found
        self.all = merged(self.effects.values())
        self.joins = bool({"keys", "values", "prepend"} & set(self.effects))
        self.replaces = set(self.effects) <= {"weight", "bias"}
        ways = self.all.went & {Way.FACTOR, Way.MAP, Way.ATTENTION}
        self.rescales = ways == {Way.FACTOR} and "delta" not in self.effects

    def row(self) -> Row:
        return {
            "intra_connectivity": self.intra(),
            "inter_connectivity": self.inter(),
            "parameters_adapted": self.adapted(),
            "parameter_sharing": self.sharing(),
            "input_type": self.input(),
            "insertion_form": self.insertion(),
            "integration_form": self.integration(),
            "binding_time": self.binding(),
        }

    def intra(self) -> str:
        """How the features inside a module are connected, on the way from what it reads to what it adds. A module that
        reads nothing and joins the sequence has its way from its parameters."""
        went, own = self.all.went, self.all
        written = self.joins and not own.reads and bool(own.what(Part.NETWORK))
        curved = Way.CURVE in went or written
        matrix = "weight" in self.effects and any(self.axes(name) > 1 for name in own.own)
        if Way.ATTENTION in went:
            found = "dense: self-attention"
        elif Way.MAP in went or matrix or written:
            found = "dense: non-linear MLP" if curved else "dense: linear MLP"
        else:
            found = "dense: embedding" if self.joins else "none: vectors"
        if own.what(Part.KRONECKER):
            found += ", of Kronecker products"
        if own.what(Part.BLOCKS):
            found += ", in blocks"
        if bank := own.what(Part.BANK):
            found += f", a mixture of {self.count(bank)} in weight space"
        if experts := own.what(Part.EXPERTS):
            found += f", one of {self.count(experts)} at random in training"
        return found

    def inter(self) -> str:
        """Whether the strength of the connection depends on the input."""
        if self.all.gates:
            return "dynamic: a gate per " + " and ".join(sorted(self.all.gates))
        if Way.ATTENTION in self.all.went:
            return "dynamic: attention"
        if self.all.what(Part.BANK):
            return "fixed: dense, for each profile"
        return "fixed: dense" + (", at random in training" if self.all.what(Part.EXPERTS) else "")

    def adapted(self) -> str:
        """A map's own parameters, or new ones. What is linear beside a linear map changes the map's parameters."""
        beside = self.method.site == "linear" and set(self.effects) == {"delta"} and self.all.reads <= {"x"}
        affine = self.all.went <= {Way.MAP, Way.FACTOR}
        found = "reparameterisation" if self.replaces or (beside and affine) else "addition"
        if not self.all.what(Part.BANK):
            return found
        new = {name for name in self.all.own if not self.parameters[name].frozen} - self.all.what(Part.COEFFICIENT)
        return f"{found if new else 'none new'}; selection from a frozen bank"

    def sharing(self) -> str:
        """Which parameters serve several sites, experts or profiles."""
        own, found = self.all, []
        common = {name for name in own.own if self.parameters[name].scope == "model"}
        if common & own.what(Part.NETWORK):
            found.append("a network shared by all sites")
        if common & own.what(Part.PROTOTYPE):
            found.append("a prototype shared by all sites, a mask for each")
        rest = own.own - own.what(Part.NETWORK, Part.PROTOTYPE)
        if names := self.listed(rest & common):
            found.append(f"{names} shared by all sites")
        if names := self.listed(name for name in rest if self.parameters[name].scope == "layer"):
            found.append(f"{names} shared in each layer")
        if own.what(Part.BANK):
            found.append("the bank shared by all profiles")
        if experts := own.what(Part.EXPERTS):
            alike = (name for name in rest - common - experts if not self.parameters[name].frozen)
            if names := self.listed(alike):
                found.append(f"{names} shared by the experts")
        return "; ".join(found) or "none"

    def input(self) -> str:
        """What the module reads. An affine change of a linear map is one of its weights as well."""
        if "prepend" in self.effects:
            return "task embeddings"
        if not self.all.reads:
            return "weights (learned prefix)" if self.joins else "weights"
        if Way.TOKENS in self.all.went:
            return "hidden representations of all tokens"
        affine = self.all.went <= {Way.MAP, Way.FACTOR} and self.all.reads <= {"x", "y"} and not self.all.gates
        return "hidden representation" + (" / weights" if affine and self.method.site == "linear" else "")

    def insertion(self) -> str:
        """Whether the module stands behind what it changes, or beside it."""
        if self.replaces:
            return "in place"
        if self.rescales:
            return "sequential (in place)"
        return "sequential" if "y" in self.all.reads or "input" in self.effects else "parallel"

    def integration(self) -> str:
        """How the module's result comes together with the model's."""
        if self.joins:
            found = "concatenation"
        elif self.replaces:
            found = "replacement of parameters"
        elif self.rescales:
            found = "rescaling"
        elif self.all.gates:
            found = "addition"
        else:
            found = "scaled addition" if any(f.scaled for f in self.effects.values()) else "direct addition"
        return f"gated {found}" if self.all.gates else found

    def binding(self) -> str:
        """When the values are known that the module works with."""
        found = "compile time"
        if coefficients := self.all.what(Part.COEFFICIENT):
            found += " or run-time " + ("mask" if coefficients & self.all.what(Part.MASK) else "weights")
        return found + (" + run-time gate" if self.all.gates else "")

    def axes(self, name: str) -> int:
        """A parameter's axes; that of a stack and those of a network that writes parameters apart."""
        stacked = name in self.all.what(Part.EXPERTS, Part.BANK)
        return 0 if name in self.all.what(Part.NETWORK) else axes_of(self.parameters[name]) - stacked

    def count(self, names: set[str]) -> str:
        """The size of a stack."""
        found = {str(Interpreter[Any]().evaluate(self.parameters[n].shape[0], self.constants)) for n in names}
        return found.pop() if len(found) == 1 else "several"

    def listed(self, names: Iterable[str]) -> str:
        """Names in the order of the method's parameters."""
        wanted = set(names)
        return ", ".join(name for name in self.parameters if name in wanted)
