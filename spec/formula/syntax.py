"""The expression language's syntax: numbers, text, names, lists, conditionals and calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_SHOWN = 120

COMPARE = {
    ast.Eq: "equal", ast.NotEq: "not_equal", ast.Lt: "less", ast.LtE: "less_equal",
    ast.Gt: "greater", ast.GtE: "greater_equal",
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    value: int | float | bool
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Text:
    value: str
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Name:
    id: str
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Items:
    elements: tuple[Expr, ...]
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Conditional:
    """`then if test else other`; the test must be known at compile time."""

    test: Expr
    then: Expr
    other: Expr
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Call:
    """A function or operator of `FUNCTIONS`, or a function that the site offers (`norm`)."""

    function: str
    args: tuple[Expr, ...]
    keywords: tuple[tuple[str, Expr], ...] = ()
    text: str = field(default="", compare=False)


Expr = Number | Text | Name | Items | Conditional | Call


def shown(text: str) -> str:
    """A formula's text as messages show it: on one line, without control characters, cut where it is long."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= MAX_SHOWN else line[:MAX_SHOWN] + "..."


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything in it."""
    yield expr
    match expr:
        case Items(elements=parts):
            children: tuple[Expr, ...] = parts
        case Conditional(test=test, then=then, other=other):
            children = (test, then, other)
        case Call(args=args, keywords=keywords):
            children = (*args, *(value for _, value in keywords))
        case _:
            children = ()
    for child in children:
        yield from walk(child)


def names(expr: Expr) -> set[str]:
    """The names that an expression reads, functions apart."""
    return {node.id for node in walk(expr) if isinstance(node, Name)}


def calls(expr: Expr) -> set[str]:
    """The functions that an expression calls, operators included."""
    return {node.function for node in walk(expr) if isinstance(node, Call)}
