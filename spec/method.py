"""A method: one PEFT technique, stated once as formulas. Read from a method file or from a spec's `methods:`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from peltc.spec.diagnostics import NOWHERE, Diagnostic, PeltError, Place, nearest, one_of
from peltc.spec.document import Document
from peltc.spec.formula.interpreter import Interpreter
from peltc.spec.formula.reader import parse
from peltc.spec.formula.syntax import Call, Expr, Name, calls, names
from peltc.spec.shelf import Shelf

KINDS = ("linear", "norm", "attention", "block", "embedding")
"""The kinds of site that a method may ask for."""

EFFECTS: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias", "delta", "output"),
    "norm": ("weight", "bias", "delta", "output"),
    "block": ("delta", "output"),
    "attention": ("keys", "values"),
    "embedding": ("prepend",),
}
"""What a method may define at each kind of site, in the order in which definitions take effect."""

_PLACE = ("index", "count", "layer", "layers", "role", "roles", "d_model", "causal")
NAMES: dict[str, tuple[str, ...]] = {
    "linear": ("x", "y", "W", "b", "h", "mask", "in", "out", "max_in", "max_out", "biased", "table", *_PLACE),
    "norm": ("x", "y", "W", "b", "d", "biased", *_PLACE),
    "block": ("x", "y", "r", "h", "mask", "in", "out", "d", *_PLACE),
    "attention": ("x", "q", "k", "v", "h", "mask", "heads", "kv_heads", "head_dim", *_PLACE),
    "embedding": ("d", *_PLACE),
}
"""Names in scope by kind of site, besides options, parameters and `let:` bindings.

`table` says that the map is one of ids: `x` is a one-hot vector, of which formulas take linear maps only.

`index` of `count` numbers an attachment's sites, `layer` of `layers` their layers, `role` of `roles` what they are in
one layer; `causal` says that the site's stack lets tokens see earlier ones alone."""

MEANINGS = {
    "x": "what the site reads; at an attention, what queries, keys and values are made of",
    "y": "what the site gives, before the method changes it",
    "r": "the residual stream that the sub-layer is added to",
    "h": "the input of the site's layer",
    "q": "the queries, by head",
    "k": "the keys, by head",
    "v": "the values, by head",
    "mask": "1 for tokens, 0 for padding",
    "W": "the site's own weight",
    "b": "its bias, zeros where it has none",
    "in": "how many features the site reads",
    "out": "how many features it gives",
    "max_in": "the largest `in` among the attachment's sites",
    "max_out": "the largest `out` among them",
    "d": "the site's width",
    "heads": "how many heads queries have",
    "kv_heads": "how many heads keys and values have",
    "head_dim": "the width of a head",
    "biased": "whether the site has a bias",
    "table": "whether the site is a table, whose `x` is a one-hot vector: formulas take linear maps of it only",
    "index": "the number of the site among the attachment's, from 0",
    "count": "how many sites the attachment has",
    "layer": "the number of the site's layer among the attachment's, from 0",
    "layers": "how many layers the attachment has",
    "role": "the number of the site's role among those of the attachment's sites, from 0",
    "roles": "how many roles the attachment's sites have",
    "d_model": "the width of the model",
    "causal": "whether the site's stack lets tokens see earlier ones alone",
}
"""What each name in scope is."""

RUNTIME_NAMES = ("x", "y", "r", "h", "q", "k", "v", "mask")
"""Names of values that exist only while the model runs; everything else is known at compile time."""

ROLES = {"weight": "W", "bias": "b"}
"""What formulas call the parameters of a map or a norm, in the order in which they are defined."""

IDENTITY = {"input": "x", "output": "y", "weight": "W", "bias": "b", "keys": "k", "values": "v"}
"""What each definition stands for, so that a definition of that name alone changes nothing."""

START = "start value"
INITIALISERS = ("zeros", "ones", "normal", "uniform", "kaiming_uniform", "paired", "places")
"""Start values by name: `normal(std)`, `uniform(bound)`; `kaiming_uniform` is uniform in ±1/√I, I the last axis;
`paired` as well, but each column is as the one beside it; `places(rows, columns)` are different places of a matrix, a
row and a column for each."""


@dataclass(frozen=True)
class Option:
    """A number or word that a user may set. `schema` is its JSON schema, `default` included."""

    name: str
    schema: Mapping[str, Any]

    @property
    def default(self) -> Any:
        return self.schema.get("default")

    @property
    def listed(self) -> bool:
        """Whether one value is a list of whole numbers; a list of other options gives one value per layer."""
        return self.schema.get("type") == "array"

    @property
    def doc(self) -> str:
        return str(self.schema.get("doc", ""))


@dataclass(frozen=True)
class Parameter:
    """A tensor of a method.

    Attributes:
        shape: one expression per axis, over options and sizes.
        init: start value: an initialiser's name or call, or a formula over the site's `W` and `b`.
        scope: one tensor per `site`, per `layer`, or for the whole `model`.
        frozen: not trained, though part of the weights file.
        condition: the parameter exists where this is true of the options; None: always.
        source: where its values lie when it is no part of the weights file: a file's name, or `START` for start
            values that the seed decides.
        owner: what its tensors' names start with, in place of the attachment's name.
        part: what it is where it is no weight of the method's own: `gate`; `mask`, the logits or scores that choose
            from a bank or a prototype; `bank`.
    """

    name: str
    shape: tuple[Expr, ...]
    init: Expr
    scope: str = "site"
    frozen: bool = False
    condition: Expr | None = None
    source: str = ""
    owner: str = ""
    part: str = ""


@dataclass(frozen=True)
class Method:
    """A PEFT technique: options, parameters, and what its formulas define at a site of one kind.

    Attributes:
        gated_by: the name that a gate on this method reads; empty: what the site reads.
        cut: of a method that puts tokens before the sequence, where they leave it again: a formula over the options
            that gives `head`, before the first map after the last layer, or `outputs`.
        takes: of a method that adds keys and values, how many positions before the text these take: a formula over the
            options. Without it they take none.
    """

    name: str
    title: str
    source: str
    site: str
    options: tuple[Option, ...]
    parameters: tuple[Parameter, ...]
    let: tuple[tuple[str, Expr], ...]
    effects: tuple[tuple[str, Expr], ...]
    start: str = ""
    notes: str = ""
    place: Place = NOWHERE
    gated_by: str = ""
    cut: Expr | None = None
    takes: Expr | None = None

    @property
    def defaults(self) -> dict[str, Any]:
        return {option.name: tuple(option.default) if option.listed else option.default for option in self.options}

    def effect(self, name: str) -> Expr | None:
        return dict(self.effects).get(name)

    def chosen(self, options: Mapping[str, Any]) -> Method:
        """The method without the parameters that these options rule out."""
        interpreter: Interpreter[Any] = Interpreter()

        def exists(parameter: Parameter) -> bool:
            condition = parameter.condition
            if condition is None or not names(condition) <= set(options):
                return True
            return bool(interpreter.evaluate(condition, options))

        return replace(self, parameters=tuple(filter(exists, self.parameters)))

    def mentions(self) -> set[str]:
        """Every name in any of its formulas."""
        shapes = (axis for p in self.parameters for axis in (*p.shape, p.init))
        conditions = (p.condition for p in self.parameters if p.condition is not None)
        places = (expr for expr in (self.cut, self.takes) if expr is not None)
        formulas = (*shapes, *conditions, *places, *(e for _, e in self.let), *(e for _, e in self.effects))
        return {name for expr in formulas for name in names(expr)}

    def reads(self) -> set[str]:
        """The names that the method's definitions read, through `let:` bindings."""
        bindings, found = dict(self.let), set[str]()
        pending = [expr for _, expr in self.effects]
        while pending:
            for name in names(expr := pending.pop()) | (calls(expr) & {"norm"}):
                if name not in found:
                    found.add(name)
                    if name in bindings:
                        pending.append(bindings[name])
        return found


def build(document: Document, name: str = "", keys: tuple[str | int, ...] = ()) -> Method:
    """A method from a validated tree at `keys` of a document, which says its name where `name` does not.

    Raises:
        PeltError: every finding: formulas that do not parse (E301-E304), names not in scope (E305), definitions that
            do not belong to the kind of site (E306).
    """
    tree: Any = document.tree
    for key in keys:
        tree = tree[key]
    name = name or tree["method"]
    findings: list[Diagnostic] = []

    def formula(text: Any, *path: str | int, functions: tuple[str, ...] = ("norm",)) -> Expr:
        try:
            return parse(text, document.place(*keys, *path), functions)
        except PeltError as error:
            findings.extend(error.diagnostics)
            return Name("?")

    site = tree["site"]
    options = tuple(Option(key, value) for key, value in tree.get("options", {}).items())
    parameters = []
    for key, value in tree.get("parameters", {}).items():
        path = ("parameters", key)
        parameters.append(
            Parameter(
                key,
                tuple(formula(axis, *path, "shape", i) for i, axis in enumerate(value["shape"])),
                formula(value["init"], *path, "init", functions=INITIALISERS),
                value.get("scope", "site"),
                value.get("frozen", False),
                formula(value["if"], *path, "if") if "if" in value else None,
            )
        )
    let = tuple((key, formula(value, "let", key)) for key, value in tree.get("let", {}).items())
    defined = [key for effects in EFFECTS.values() for key in effects if key in tree]
    effects = []
    for key in dict.fromkeys(defined):
        if key not in EFFECTS[site]:
            findings.append(
                Diagnostic(
                    "E306",
                    f"a method of site kind '{site}' cannot define '{key}'",
                    document.place(*keys, key),
                    one_of(EFFECTS[site]),
                )
            )
    for key in EFFECTS[site]:
        if key in tree:
            effects.append((key, formula(tree[key], key)))
    if not defined:
        findings.append(
            Diagnostic("E306", f"the method '{name}' defines nothing", document.place(*keys), one_of(EFFECTS[site]))
        )

    known = {*NAMES[site], *(o.name for o in options)}
    sizes = {*NAMES[site]} - set(RUNTIME_NAMES) - {"W", "b"} | {o.name for o in options}

    def check(expr: Expr, scope: set[str], *path: str | int) -> None:
        for unknown in sorted(names(expr) - scope - {"?"}):
            findings.append(
                Diagnostic(
                    "E305",
                    f"unknown name '{unknown}' in {expr.text!r}",
                    document.place(*keys, *path),
                    one_of(sorted(scope)),
                    nearest(unknown, scope),
                )
            )

    for option in options:
        if option.name in NAMES[site]:
            findings.append(
                Diagnostic(
                    "E305",
                    f"the option '{option.name}' hides a name of the site",
                    document.place(*keys, "options", option.name),
                )
            )
    for parameter in parameters:
        path = ("parameters", parameter.name)
        if parameter.name in known:
            message = f"the parameter '{parameter.name}' hides an option or a name of the site"
            findings.append(Diagnostic("E305", message, document.place(*keys, *path)))
        for i, axis in enumerate(parameter.shape):
            check(axis, sizes, *path, "shape", i)
        check(parameter.init, {*sizes, "W", "b", *INITIALISERS}, *path, "init")
        if parameter.condition is not None:
            check(parameter.condition, sizes, *path, "if")
    scope = known | {p.name for p in parameters}
    for key, expr in let:
        check(expr, scope, "let", key)
        if key in scope or key == "norm":
            message = f"'{key}' hides a name that there is already"
            findings.append(Diagnostic("E305", message, document.key_place(*keys, "let", key)))
        scope.add(key)
    for key, expr in effects:
        check(expr, scope, key)
    places = {key: formula(tree[key], key) for key in ("cut", "takes") if key in tree}
    for key, expr in places.items():
        check(expr, sizes, key)
    if (gated_by := str(tree.get("gated_by", ""))) and gated_by not in scope:
        message, where = f"unknown name '{gated_by}'", document.place(*keys, "gated_by")
        findings.append(Diagnostic("E305", message, where, one_of(sorted(scope)), nearest(gated_by, scope)))
    if findings:
        raise PeltError(findings)
    return Method(
        name,
        str(tree.get("title", name)),
        str(tree.get("source", "")),
        site,
        options,
        tuple(parameters),
        let,
        tuple(effects),
        str(tree.get("start", "")),
        str(tree.get("notes", "")).strip(),
        document.place(*keys),
        gated_by,
        places.get("cut"),
        places.get("takes"),
    )


@cache
def shipped() -> Mapping[str, Method]:
    """The methods that come with the compiler, by name."""
    return Shelf("peltc.spec.methods", "method", build)


def initialiser(expr: Expr) -> tuple[str, tuple[Expr, ...]] | None:
    """The initialiser that a start value names, with its arguments; None where the start value is a formula."""
    match expr:
        case Name(id=name) if name in INITIALISERS:
            return name, ()
        case Call(function=name, args=args) if name in INITIALISERS:
            return name, args
    return None
