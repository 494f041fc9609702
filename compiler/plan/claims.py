"""What a plan is made of: claims, each of which is one attachment at one site, and the tensors that they have.

The passes carry claims out; none of them decides anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from peltc.compiler.plan.quantising import Quantised
from peltc.compiler.survey.anatomy import Site
from peltc.compiler.survey.grouping import columns, grouped
from peltc.spec.formula.dims import Dim, simplify
from peltc.spec.formula.interpreter import Deferred, EvaluationError
from peltc.spec.formula.syntax import Call, Conditional, Expr, Name, Number, names, walk
from peltc.spec.interpreters.check import site_shapes
from peltc.spec.interpreters.cost import Cost, cost_of
from peltc.spec.interpreters.shape import Shape
from peltc.spec.interpreters.shape import tensor as as_tensor
from peltc.spec.interpreters.shapes import ShapeInterpreter, Summaries
from peltc.spec.method import NAMES, RUNTIME_NAMES, Method
from peltc.spec.modes import EXCHANGED
from peltc.spec.specification import Spec

LEVELS = {"table": -1, "linear": 0, "experts": 0, "norm": 0, "attention": 0, "block": 1, "embedding": 2}
"""What lies inside takes effect before what contains it, whatever the order in the file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the weights file; or of the `source`, where it has one. `experts` says of how many experts it holds
    one value each, along its first axis; 0 where it is no such stack."""

    name: str
    shape: tuple[int, ...]
    init: Expr
    frozen: bool
    scope: str
    source: str = ""
    part: str = ""
    experts: int = 0

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape that formulas see: that of one expert's own."""
        return self.shape[1:] if self.experts else self.shape


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
        text: where the text that the site reads is embedded, for a claim that takes positions before it.
        packed: a profile brings masks as they are, and the graph mixes the bank by them; not modules mixed already.
        even: all rows of a batch have all that it puts before the text, as many as their profile's or not.
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
    text: Site | None = None
    packed: bool = False
    even: bool = False

    def scope(self, values: Mapping[str, Any], interpreter: Any) -> dict[str, Any]:
        """Everything a formula may read: constants, `values` for tensors and runtime names, `let:` bindings."""
        offered = set(NAMES[self.method.site])
        known = {n: v for n, v in values.items() if n in offered or n in self.tensors or n not in RUNTIME_NAMES}
        scope: dict[str, Any] = {**self.constants, **known}
        for name, expr in self.bindings:
            if isinstance(expr, Name) and expr.id in scope:  # one value by two names
                scope[name] = scope[expr.id]
            else:
                scope[name] = Deferred(partial(interpreter.evaluate, expr, scope))
        return scope

    def __post_init__(self) -> None:
        self.bindings  # noqa: B018  # chosen here: torch's compiler follows what is evaluated in training

    @cached_property
    def bindings(self) -> tuple[tuple[str, Expr], ...]:
        """The `let:` bindings, of whose conditions the branch is chosen that holds here."""
        return tuple((name, resolve(expr, self.constants)) for name, expr in self.method.let)

    @cached_property
    def held(self) -> Mapping[str, bool]:
        """The bindings of masks alone, which a profile brings where it is packed: [N] weights over a bank of N; of each
        whether a hard mask gives them, so that bits tell it."""
        if not self.packed:
            return {}
        masks = {name for name, tensor in self.tensors.items() if tensor.part == "mask"}
        known = masks | set(self.constants)
        return {n: _is_hard(e) for n, e in self.bindings if names(e) & masks and names(e) <= known}

    @property
    def cost(self) -> Cost:
        """What the claim costs in the graph; nothing where a weight takes it in. A token goes through one expert at a
        time, and each has nodes and values of its own."""
        if self.absorbed or self.mirrors is not None:
            return Cost()
        shapes = {name: tensor.inner for name, tensor in self.tensors.items()}
        cost = cost_of(
            self.site.kind, self.site.sizes, self.width, self.effects, self.method.let, self.constants, shapes
        )
        count = self.site.sizes.get("experts", 1)
        return Cost(cost.flops, cost.stored * count, cost.nodes * count)

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

    def shape(self, effect: str, shapes: ShapeInterpreter | None = None) -> Shape:
        """The shape of a definition at the site; `B`, `S` and `T` are symbols.

        Args:
            shapes: what evaluates it.
        """
        shapes = shapes or ShapeInterpreter()
        values, _ = self.around
        values |= {name: Shape(tensor.inner) for name, tensor in self.tensors.items()}
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

    @property
    def uneven(self) -> bool:
        """Whether rows of a batch may have fewer of what it puts before the text than others: what their profiles have,
        and nothing where they have none."""
        return self.mode in EXCHANGED and not self.even

    @cached_property
    def grows(self) -> bool:
        """Whether the text that the site reads grows while tokens are generated, so that its modules see new tokens
        alone: it does in whatever is no encoder and reads no encoder's states."""
        return self.site.stack != "encoder" and not self.site.reads_encoder

    @property
    def open(self) -> str:
        """The function by which a position reads others to have a value of its own of them, which no value for the
        whole text can stand for; "" where none does."""
        return next((by for name in self.effects if (by := self.shape(name).open)), "")

    @cached_property
    def summaries(self) -> dict[str, dict[Expr, tuple[int, ...]]]:
        """What the claim makes of a text as a whole, by definition: expressions whose values are one for each text, and
        their sizes beside the batch's, which comes first."""
        found = {}
        for effect in self.effects:
            shapes = Summaries()
            self.shape(effect, shapes)
            found[effect] = {expr: tuple(int(str(n)) for n in s.dims[1:]) for expr, s in shapes.found.items()}
        return {effect: values for effect, values in found.items() if values}

    @cached_property
    def holds(self) -> bool:
        """Whether all that the claim makes of other tokens than its own can be kept from the prompt. Sites outside of
        layers may be given the last tokens alone, as heads are."""
        return self.grows and bool(self.mixed and not self.open and self.site.stack)

    @cached_property
    def cut(self) -> str:
        """Where tokens that the claim puts before the sequence leave it again: `head` or `outputs`."""
        if self.method.cut is None:
            return "outputs"
        return str(ShapeInterpreter().evaluate(self.method.cut, self.constants))

    @cached_property
    def takes(self) -> int:
        """How many positions before the text the keys and values take that the claim adds."""
        if self.method.takes is None:
            return 0
        return int(ShapeInterpreter().evaluate(self.method.takes, self.constants))

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


def _is_hard(expr: Expr) -> bool:
    """Whether a formula is a hard mask, over a number or not."""
    match expr:
        case Call(function="divide" | "multiply", args=(mask, Number())):
            return _is_hard(mask)
    return isinstance(expr, Call) and expr.function == "top_k_mask"


@dataclass(frozen=True, eq=False)
class Plan:
    """A spec on a model, decided; `quantised` is what becomes of the base's weights where the spec asks for it."""

    spec: Spec
    fingerprint: str
    claims: tuple[Claim, ...]
    quantised: Quantised | None = None

    def __repr__(self) -> str:
        folded = sum(bool(claim.absorbed) for claim in self.claims)
        return f"<Plan of '{self.spec.name}': {len(self.claims)} modules, {folded} fold, {self.trained():,} values>"

    def __str__(self) -> str:
        return "\n".join(self.told())

    def told(self, every: bool = False) -> list[str]:
        """The decisions as the lines of a table, and what the user should know beside.

        Args:
            every: each layer by itself, not equal ones once.
        """
        rows = []
        for claim in self.claims:
            decision = f"folds into {claim.absorbed}" if claim.absorbed else f"stays: {claim.reason}"
            tensors = ", ".join(f"{n} {list(t.shape)}" for n, t in claim.tensors.items())
            cells = (claim.site.name, claim.attachment, "+".join(claim.effects), decision, tensors)
            rows.append((None if every else claim.site.layer, cells))
        header = ("SITE", "ATTACHMENT", "EFFECT", "DECISION", "PARAMETERS")
        return [*columns([header, *grouped(rows)]), *self.notes]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the weights file by name."""
        return {tensor.name: tensor for claim in self.claims for tensor in claim.tensors.values()}

    @property
    def exchange(self) -> str:
        """The mode in which profiles bring tensors of some attachments; "" where none do."""
        return next((claim.mode for claim in self.claims if claim.mode in EXCHANGED), "")

    @property
    def prepends(self) -> bool:
        """Whether tokens are put before the sequence, so that the graph must read embedded tokens."""
        return any("prepend" in claim.effects for claim in self.claims)

    @cached_property
    def held(self) -> tuple[Claim, ...]:
        """The claims that compute something of a whole text from the prompt, and keep it while the text grows."""
        return tuple(claim for claim in self.claims if claim.holds) if self.spec.gates else ()

    def trained(self) -> int:
        """The number of trained values."""
        return sum(int(np.prod(t.shape)) for t in self.tensors.values() if not t.frozen)

    @property
    def notes(self) -> list[str]:
        """What the user should know, one line each."""
        shared = [(c.attachment, c.follows) for c in self.claims if c.follows and c.mirrors is None]
        told = [] if self.quantised is None else [self.quantised.note]
        told += [f"'{name}' at {site} acts in {count + 1} places, which share these parameters"
                for (name, site), count in Counter(shared).items()]  # fmt: skip
        if self.held:
            names = ", ".join(f"'{name}'" for name in dict.fromkeys(claim.attachment for claim in self.held))
            told.append(f"what {names} makes of a whole text is computed from the prompt, and kept while tokens are"
                        " generated")  # fmt: skip
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
