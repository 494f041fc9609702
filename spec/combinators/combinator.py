"""What a combinator is, and the steps that several of them take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from peltc.spec.diagnostics import Place, fail
from peltc.spec.formula.reader import parse
from peltc.spec.formula.syntax import Call, Expr, Name, Number, names, walk
from peltc.spec.method import INITIALISERS, NAMES, Method, Option, Parameter, initialiser

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Combinator:
    """Wraps a method: the result is a method too, which every interpreter evaluates like any other.

    Attributes:
        options: what a spec may set under the combinator's name.
        rewrite: the wrapped method, from a method, the options' values and where the combinator stands.
        excludes: combinators that cannot be used together with it, each with the reason.
        training: options that act in training alone and decide nothing of what is deployed.
    """

    name: str
    title: str
    source: str
    options: tuple[Option, ...]
    rewrite: Callable[[Method, Settings, Place], Method]
    notes: str = ""
    excludes: Mapping[str, str] | None = None
    training: tuple[str, ...] = ()

    @property
    def defaults(self) -> dict[str, Any]:
        return {option.name: option.default for option in self.options}


def option(name: str, doc: str, default: Any, **schema: Any) -> Option:
    """An option of a combinator."""
    return Option(name, {**schema, "default": default, "doc": doc})


def formula(text: str) -> Expr:
    """A formula that a combinator writes."""
    return parse(text, functions=("norm", *INITIALISERS))


def number(value: float) -> Expr:
    return Number(value, str(value))


def refused(name: str, method: Method, reason: str, place: Place, hint: str = "") -> Exception:
    """What to raise where a combinator and a method do not go together."""
    return fail("E211", f"`{name}:` does not go with '{method.name}': {reason}", place, hint=hint)


def add(
    method: Method,
    parameters: tuple[Parameter, ...],
    let: tuple[tuple[str, Expr], ...],
    place: Place,
    without: frozenset[str] = frozenset(),
) -> Method:
    """The method with more parameters and bindings, which come before its own.

    Args:
        without: parameters that bindings of the same name replace.

    Raises:
        PeltError: E211 the method has such a name already.
    """
    kept = tuple(p for p in method.parameters if p.name not in without)
    taken = {
        *NAMES[method.site],
        *(o.name for o in method.options),
        *(n for n, _ in method.let),
        *(p.name for p in kept),
    }
    for name in (*(p.name for p in parameters), *(n for n, _ in let)):
        if name in taken:
            raise fail("E211", f"'{method.name}' has a '{name}' of its own, which a combinator needs", place)
    return replace(method, parameters=kept + parameters, let=let + method.let)


def groups(method: Method) -> dict[str, str]:
    """Parameters that go together, as a map's weight and bias do: each by name, with the first of its group.

    What the whole model shares does not tie a site's own parameters together.
    """
    own = {p.name: p for p in method.parameters}
    bindings = dict(method.let)
    lead = {name: name for name in own}

    def behind(expr: Expr) -> list[str]:
        found: list[str] = []
        for name in sorted(names(expr)):
            if name in bindings:
                found += behind(bindings[name])
            elif name in own:
                found.append(name)
        return found

    def join(members: list[str]) -> None:
        members = [m for m in members if own[m].scope != "model"] or members
        roots = {root(member) for member in members}
        first = next((name for name in own if name in roots), None)
        for other in roots:
            lead[other] = first or other

    def root(name: str) -> str:
        while lead[name] != name:
            name = lead[name]
        return name

    for expr in (*bindings.values(), *(e for _, e in method.effects)):
        for node in walk(expr):
            match node:
                case Call(function="linear", args=(_, *map_)):
                    join([name for part in map_ for name in behind(part)])
                case Call(function="add", args=(Call(function="matmul", args=(_, weight)), bias)):
                    join(behind(weight) + (behind(bias) if isinstance(bias, Name) else []))
    return {name: root(name) for name in own}


def norms(method: Method) -> set[str]:
    """The parameters that are a normalisation's gain or bias."""
    formulas = (*(e for _, e in method.let), *(e for _, e in method.effects))
    inside = (n.args[1:] for e in formulas for n in walk(e) if isinstance(n, Call) and n.function == "layer_norm")
    return {name for args in inside for arg in args for name in names(arg)} & {p.name for p in method.parameters}


def starts_at_zero(parameter: Parameter) -> bool:
    """Whether a parameter's start value is 0 everywhere."""
    return initialiser(parameter.init) == ("zeros", ()) or parameter.init == Number(0)
