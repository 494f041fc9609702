"""The typology interpreter: a module's row in the reference architecture PEFT-Ref, derived from its formulas.

A value is a tensor's history (`Flow`): which of the site's values and which of the method's parameters it comes from,
and what they went through. A method that a combinator rewrote is read like any other. Terms as in arXiv:2304.12410:
intra- and inter-connectivity, parameters adapted, sharing, input type, insertion form, number of insertions,
integration form, workspace; and the binding time of the weights, which a compiler needs besides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial, reduce
from typing import Any

from peltc.spec.formula.dims import Dim
from peltc.spec.formula.functions import ACTIVATIONS
from peltc.spec.formula.interpreter import Deferred, EvaluationError, Interpreter, Undecided, is_static
from peltc.spec.formula.syntax import Conditional, Expr, Number
from peltc.spec.method import NAMES, RUNTIME_NAMES, Method, Parameter
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


# rows


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


# what a tensor went through


class Way(Enum):
    """What a value of the running model went through."""

    MAP = "a linear map of the method's own"
    FACTOR = "a factor for each feature, before anything else"
    CURVE = "a non-linear function"
    NORM = "a normalisation"
    ATTENTION = "a product of two such values over their positions"
    TOKENS = "a sum over positions"


class Part(Enum):
    """What a parameter is in a module."""

    MASK = "a choice of elements"
    COEFFICIENT = "what chooses or weighs frozen values"
    BANK = "the frozen values"
    PROTOTYPE = "what a mask leaves some elements of"
    EXPERTS = "a stack of which one is drawn in training"
    NETWORK = "a piece of a network that yields other values"
    KRONECKER = "a factor of a Kronecker product"
    BLOCKS = "the blocks on a diagonal"


NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Flow:
    """A tensor's history; one that reads nothing of the running model is known at compile time.

    Attributes:
        passes: the site's values that it still is, or a sum of them.
        reads: the site's values that something was made of.
        own: the method's parameters in it; those of gates apart.
        went: what the site's values went through.
        parts: what its parameters are, by name.
        gates: what it was multiplied by that depends on the input.
        gate: what it has one value between 0 and 1 for, token or sample, where it can be such a factor itself.
        scaled: whether a factor other than 1 stands before it.
        bent: whether it is known at compile time and went through a non-linear function.
    """

    passes: frozenset[str] = NONE
    reads: frozenset[str] = NONE
    own: frozenset[str] = NONE
    went: frozenset[Way] = frozenset()
    parts: frozenset[tuple[Part, str]] = frozenset()
    gates: frozenset[str] = NONE
    gate: str = ""
    scaled: bool = False
    bent: bool = False

    @property
    def running(self) -> bool:
        return bool(self.passes or self.reads or self.gates)

    def being(self, part: Part) -> Flow:
        """The same, its parameters being something."""
        return replace(self, parts=self.parts | {(part, name) for name in self.own})

    def through(self, *ways: Way, gate: str = "", scaled: bool = False) -> Flow:
        """The same after something was made of it."""
        return replace(self, passes=NONE, reads=self.passes | self.reads, went=self.went | set(ways), gate=gate,
                       scaled=scaled)  # fmt: skip

    def what(self, *parts: Part) -> set[str]:
        """The parameters that are one of these."""
        return {name for part, name in self.parts if part in parts}


def merged(flows: Iterable[Flow]) -> Flow:
    """The history of what tensors come together in."""
    flows = tuple(flows)

    def union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
        return frozenset().union(*sets)

    gates = {f.gate for f in flows if f.running}
    return Flow(
        union(f.passes for f in flows),
        union(f.reads for f in flows),
        union(f.own for f in flows),
        union(f.went for f in flows),
        union(f.parts for f in flows),
        union(f.gates for f in flows),
        gates.pop() if len(gates) == 1 else "",
        any(f.scaled for f in flows),
        any(f.bent for f in flows),
    )


CURVES = {*ACTIVATIONS} - {"identity"}
UNEVEN = {"exp", "log", "sqrt", "abs", "power", "norm2"}
UNCHANGED = {"identity", "detach", "dropout", "reshape", "transpose", "permute", "take", "slice", "unsqueeze", "negate"}
MAPS = {"linear": ("x", "weight"), "matmul": ("a", "b"), "kron": ("a", "b")}
PARTS = {"top_k_mask": Part.MASK, "choose": Part.EXPERTS, "block_diagonal": Part.BLOCKS}


class TypologyInterpreter(Interpreter[Flow]):
    """Evaluates formulas over histories.

    Args:
        parameters: the method's, by name.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = parameters

    def _evaluate(self, expr: Expr, scope: Mapping[str, Any]) -> Any:
        """As everywhere; but where only a model decides a condition, both branches count."""
        if not isinstance(expr, Conditional):
            return super()._evaluate(expr, scope)
        try:
            chosen = self.evaluate(expr.test, scope)
        except EvaluationError as error:
            if not isinstance(error.__cause__, Undecided):
                raise
            both = self.evaluate(expr.then, scope), self.evaluate(expr.other, scope)
            return both[0] if all(map(is_static, both)) else merged(map(flow, both))
        return self.evaluate(expr.then if chosen else expr.other, scope)

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        given = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
        flows = [v for v in given if isinstance(v, Flow)]
        if name == "activation":
            name = arguments["name"]
        if name in ("multiply", "divide"):
            return self.elementwise(name, **arguments)
        if name in MAPS or name == "einsum":
            return self.matrices(name, arguments, flows)
        both = merged(flows)
        if name in UNCHANGED:
            return both
        if name in ("add", "subtract", "concat"):
            return both if len(flows) == 1 else replace(both, gate="")
        if name in PARTS:
            return both.being(PARTS[name])
        if not both.running:
            return both.being(Part.MASK) if name == "softmax" else replace(both, bent=both.bent or name in CURVES)
        if name in ("sigmoid", "softmax"):
            return both.through(Way.CURVE, gate="token")
        if name == "mean_seq":
            return both.through(Way.TOKENS, gate="sample" if both.gate else "")
        ways = {"attend": (Way.ATTENTION, Way.TOKENS), "layer_norm": (Way.NORM,)}
        return both.through(*ways.get(name, (Way.CURVE,) if name in CURVES | UNEVEN else ()))

    def elementwise(self, name: str, a: Any, b: Any) -> Flow:
        """`a * b` and `a / b`."""
        left, right = flow(a), flow(b)
        both = merged((left, right))
        numbers = [v for v in (a, b) if is_static(v)]
        if not both.running:
            return replace(both, scaled=both.scaled or numbers != [1]) if numbers else self.constant(left, right)
        if left.running and right.running:
            if name == "multiply" and (left.gate or right.gate):
                gate, value = (left, right) if left.gate else (right, left)
                return replace(_scaled(value, Flow()), gates=value.gates | {gate.gate})
            return both.through(Way.CURVE)
        if name == "divide" and right.running:
            return both.through(Way.CURVE)
        value, factor = (left, right) if left.running else (right, left)
        if value.gate:  # times what is learned it is that which the gate scales
            return replace(factor, gates=factor.gates | {value.gate}) if factor.own else value
        return value if numbers == [1] else _scaled(value, factor)

    def matrices(self, name: str, arguments: Mapping[str, Any], flows: list[Flow]) -> Flow:
        """Products of matrices in all spellings."""
        both = merged(flows)
        factors = flows if name == "einsum" else [flow(arguments[key]) for key in MAPS[name]]
        running = [f for f in factors if f.running]
        constant = merged(f for f in factors if not f.running)
        if len(running) > 1:
            return both.through(Way.ATTENTION, Way.TOKENS)
        if running:
            value = running[0]
            if name == "einsum" and not _summed(arguments["equation"], factors.index(value)):
                return _scaled(value, constant)
            ways = [Way.MAP] if constant.own else []
            return both.through(*ways, gate="" if constant.own else value.gate, scaled=constant.scaled)
        if name != "einsum" and factors[0].bent:
            return replace(both.being(Part.NETWORK), went=both.went - {Way.MAP})
        if name == "kron" or (name == "einsum" and _outer(arguments["equation"])):
            both = both.being(Part.KRONECKER)
        went = both.went | {Way.MAP} if name != "einsum" and both.own else both.went
        return replace(merged((both, reduce(self.constant, factors))), went=went, scaled=False)

    def constant(self, a: Flow, b: Flow) -> Flow:
        """The product of two things known at compile time: one may choose or weigh what the other is."""
        parts: set[tuple[Part, str]] = set()
        for factor, thing in ((a, b), (b, a)):
            frozen = {name for name in thing.own if self.parameters[name].frozen}
            if self.weighs(factor) and frozen:
                parts |= {(Part.COEFFICIENT, name) for name in factor.own} | {(Part.BANK, name) for name in frozen}
            elif self.weighs(factor) and factor.what(Part.MASK):
                parts |= {(Part.PROTOTYPE, name) for name in thing.own}
        both = merged((a, b))
        return replace(both, parts=both.parts | parts)

    def weighs(self, factor: Flow) -> bool:
        """Whether all that is in a factor are masks, and trained vectors."""
        trained = [self.parameters[name] for name in factor.own]
        masks = factor.what(Part.MASK)
        return bool(trained) and all(p.name in masks or (not p.frozen and _axes(p) <= 1) for p in trained)


def _scaled(value: Flow, factor: Flow) -> Flow:
    """A value of the running model times what is known at compile time."""
    ways = [Way.FACTOR] if value.passes and not value.reads else []
    own = replace(value, own=value.own | factor.own, parts=value.parts | factor.parts)
    return own.through(*ways, scaled=True)


def flow(value: Any) -> Flow:
    """A value's history; a number has none."""
    return value if isinstance(value, Flow) else Flow()


def _axes(parameter: Parameter) -> int:
    """How many axes have more than one element."""
    return sum(axis != Number(1) for axis in parameter.shape)


def _terms(equation: str) -> tuple[list[str], str]:
    left, right = equation.replace(" ", "").split("->")
    return left.split(","), right


def _summed(equation: str, running: int) -> bool:
    """Whether a letter that the running operand and another have is summed over."""
    terms, result = _terms(equation)
    others = set("".join(term for i, term in enumerate(terms) if i != running))
    return bool(set(terms[running]) & others - set(result))


def _outer(equation: str) -> bool:
    """Whether each of two matrices keeps two axes of its own, as in a Kronecker product."""
    terms, result = _terms(equation)
    return len(terms) == 2 and all(
        len(set(mine) & set(result) - set(other)) >= 2 for mine, other in (terms, reversed(terms))
    )


# from histories to words


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
        """How the features inside are connected, on the way from what the module reads to what it adds; of what joins
        the sequence and reads nothing, on that from its parameters."""
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
        return 0 if name in self.all.what(Part.NETWORK) else _axes(self.parameters[name]) - stacked

    def count(self, names: set[str]) -> str:
        """The size of a stack."""
        found = {str(Interpreter[Any]().evaluate(self.parameters[n].shape[0], self.constants)) for n in names}
        return found.pop() if len(found) == 1 else "several"

    def listed(self, names: Iterable[str]) -> str:
        """Names in the order of the method's parameters."""
        wanted = set(names)
        return ", ".join(name for name in self.parameters if name in wanted)


# where

SUBLAYERS = {"attention": "attention", "cross_attention": "cross-attention", "feed_forward": "feed-forward"}
_PATH = re.compile(r"^(?:(encoder|decoder)\.)?(?:layers\.([^.]+)(?:\.|$))?(.*)$")
_GLOB = re.compile(r"[*?\[]")


def place(path: str) -> tuple[str, str, str]:
    """The stack, layer and role that a path or a selector names; each may be empty. A layer's own role is `layer`."""
    found = _PATH.match(path)
    assert found
    stack, layer, role = found.groups(default="")
    return stack, layer, role or ("layer" if layer else "")


def workspace(kind: str, paths: Iterable[str], sequential: bool) -> str:
    """Where in the reference architecture modules work: `attention query, value + feed-forward output`.

    Args:
        kind: the kind of site.
        paths: of sites, or selectors.
        sequential: whether the module stands behind its sites rather than beside them.
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        stack, _, role = place(path)
        head, _, part = role.partition(".")
        words = SUBLAYERS.get(head, head.replace("_", " "))
        if _GLOB.search(role):
            exact = role in ("*", f"*{kind}", f"*.{kind}")
            words, part = f"{_kind(kind)}s" + ("" if exact else f" {role}"), ""
        elif kind == "attention":
            part = "keys and values"
        elif kind == "embedding":
            words, part = f"{part} {words}".strip(), ""
        elif kind == "block" and head in SUBLAYERS | {"layer": ""}:
            part = "output" if sequential else ""
        groups.setdefault(" ".join(filter(None, (stack, words))), []).append(part.replace("_", " "))
    told = ((words, ", ".join(filter(None, dict.fromkeys(parts)))) for words, parts in groups.items())
    return " + ".join(" ".join(filter(None, pair)) for pair in told)


def counted(sites: Sequence[str]) -> str:
    """How many insertions there are: `12 (6 layers x 2)`."""
    layers = Counter((stack, layer) for stack, layer, _ in map(place, sites) if layer)
    if len(each := set(layers.values())) != 1:
        return str(len(sites))
    words = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
    words += f" × {number}" if (number := each.pop()) > 1 else ""
    outside = len(sites) - layers.total()
    return f"{len(sites)} ({words}{f' + {outside} outside' if outside else ''})"


def selected(entry: Attachment) -> str:
    """How many insertions an attachment asks for, in words: `all layers × 2`."""
    if entry.by_parameter:
        return f"each map that matches {', '.join(entry.at)}"
    places = [place(path) for path in dict.fromkeys(entry.at)]
    inside = [role for _, layer, role in places if not _GLOB.search(role) and _in_layer(role) and not layer.isdigit()]
    single = [role for _, layer, role in places if not _GLOB.search(role) and (layer.isdigit() or not _in_layer(role))]
    found = []
    if inside:
        found.append(_layers(entry) + (f" × {len(inside)}" if len(inside) > 1 else ""))
    if single:
        found.append(f"{len(single)} ({', '.join(role.replace('_', ' ') for role in single)})")
    if globs := [role for _, _, role in places if _GLOB.search(role)]:
        found.append(f"each {_kind(entry.method.site)} that matches {', '.join(globs)}")
    return " + ".join(found)


def _kind(kind: str) -> str:
    return "linear map" if kind == "linear" else kind


def _in_layer(role: str) -> bool:
    return role.partition(".")[0] in (*SUBLAYERS, "layer")


def _layers(entry: Attachment) -> str:
    """An attachment's layers in words."""
    chosen = entry.layers if isinstance(entry.layers, tuple) else (entry.layers,)
    words = ", ".join(map(str, chosen))
    if words == "all":
        return "all layers"
    if words[0].isalpha():
        return f"the {words} layers"
    return f"layer{'' if words.isdigit() else 's'} {words}"
