"""The expression language of method files: Python's expression syntax, read with `ast` against a closed list.

`parse` gives a tree of six kinds of node; an `Interpreter` walks the tree over its own kind of value. Nothing here
runs code from a formula: operators and calls become `Call` nodes whose function must stand in `FUNCTIONS`, and
every other construct of Python is refused.
"""

from __future__ import annotations

import ast
import re

from peltc.spec.diagnostics import Place, fail, nearest, one_of
from peltc.spec.formula.functions import FUNCTIONS
from peltc.spec.formula.interpreter import MAX_NUMBER
from peltc.spec.formula.syntax import COMPARE, Call, Conditional, Expr, Items, Name, Number, Text, shown

MAX_CHARACTERS = 4_000
MAX_NODES = 400
MAX_DEPTH = 40
MAX_INTEGER = 2**31
_BINARY = {
    ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide", ast.FloorDiv: "floor_divide",
    ast.Mod: "modulo", ast.Pow: "power", ast.MatMult: "matmul",
}  # fmt: skip


def parse(text: str | int | float, place: Place | None = None, functions: tuple[str, ...] = ("norm",)) -> Expr:
    """Read a formula.

    Args:
        text: the formula; a bare number is a formula too.
        place: where it stands, for messages.
        functions: names that may be called besides `FUNCTIONS`.

    Raises:
        PeltError: E301 not an expression, E302 forbidden syntax, E303 an unknown function, E304 too large.
    """
    place = place or Place()
    source = str(text)
    if len(source) > MAX_CHARACTERS:
        raise fail("E304", f"the formula has {len(source):,} characters", place, f"at most {MAX_CHARACTERS:,}")
    source = source.strip()
    if not source:
        raise fail("E301", "the formula is empty", place, "one expression")
    try:
        tree = _python(source)
    except (SyntaxError, ValueError) as error:
        detail = getattr(error, "msg", str(error))
        if "too many nested" in detail:
            raise _too_deep(place) from None
        raise fail("E301", f"not an expression: {detail}: '{shown(source)}'", place, "one expression") from None
    except (RecursionError, MemoryError):
        raise _too_deep(place) from None
    return _Reader(source, place, functions).read(tree.body)


def _python(source: str) -> ast.Expression:
    try:
        return ast.parse(_spell_in(source), mode="eval")
    except SyntaxError as error:
        try:
            return ast.parse(source, mode="eval")  # `in` as Python has it: read, so that it is refused by its name
        except SyntaxError:
            raise error from None


def _too_deep(place: Place) -> Exception:
    return fail("E304", "the formula is nested too deeply", place, f"at most {MAX_DEPTH} levels")


def _spell_in(source: str) -> str:
    """`in`, the number of a map's inputs, is a keyword of Python's: spelt `iN` for its parser, which keeps columns."""
    return re.sub(r"('[^']*'|\"[^\"]*\")|\bin\b", lambda m: m.group(1) or "iN", source)


class _Reader:
    def __init__(self, source: str, place: Place, functions: tuple[str, ...]):
        self.source, self.place, self.functions = source, place, functions
        self.nodes = 0

    def read(self, node: ast.expr, depth: int = 0) -> Expr:
        text = ast.get_source_segment(self.source, node) or ""
        self.nodes += 1
        if self.nodes > MAX_NODES or depth > MAX_DEPTH:
            limit = f"at most {MAX_NODES} parts, nested at most {MAX_DEPTH} deep"
            raise fail("E304", "the formula is too large", self.place, limit)

        def sub(child: ast.expr) -> Expr:
            return self.read(child, depth + 1)

        match node:
            case ast.Constant(value=float() as value) if not abs(value) <= MAX_NUMBER:
                raise fail("E304", f"the number {text[:20]} is too large", self.place, f"at most {MAX_NUMBER:g}")
            case ast.Constant(value=bool() | float() as value):
                return Number(value, text)
            case ast.Constant(value=int() as value):
                if abs(value) > MAX_INTEGER:
                    raise fail("E304", f"the number {text[:20]}... is too large", self.place, "below 2**31")
                return Number(value, text)
            case ast.Constant(value=str() as value):
                return Text(value, text)
            case ast.Name(id=name):
                return Name(text or name, text)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return Items(tuple(sub(e) for e in elements), text)
            case ast.IfExp(test=test, body=then, orelse=other):
                return Conditional(sub(test), sub(then), sub(other), text)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return Call(_BINARY[type(op)], (sub(left), sub(right)), (), text)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Call("negate", (sub(operand),), (), text)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Call("not", (sub(operand),), (), text)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARE:
                return Call(COMPARE[type(op)], (sub(left), sub(right)), (), text)
            case ast.BoolOp(op=op, values=[first, *rest]):
                result, name = sub(first), "and" if isinstance(op, ast.And) else "or"
                if depth + len(rest) > MAX_DEPTH:  # each operand is a level of the tree made here
                    raise _too_deep(self.place)
                for operand in rest:
                    result = Call(name, (result, sub(operand)), (), text)
                return result
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                known = (*FUNCTIONS, *self.functions)
                if name not in known or name in OPERATORS:
                    offered = sorted(set(known) - OPERATORS)
                    raise fail(
                        "E303",
                        f"unknown function '{name}' in '{shown(text)}'",
                        self.place,
                        one_of(offered),
                        nearest(name, offered),
                    )
                if any(k.arg is None for k in keywords) or any(isinstance(a, ast.Starred) for a in args):
                    raise self.forbidden("an unpacked argument", text)
                if len({k.arg for k in keywords}) < len(keywords):
                    raise self.forbidden("an argument given twice", text)
                return Call(
                    name, tuple(sub(a) for a in args), tuple((str(k.arg), sub(k.value)) for k in keywords), text
                )
            case ast.Compare() | ast.BinOp() | ast.UnaryOp():
                raise self.forbidden(_operator(node), text)
            case _:
                what, hint = _FORBIDDEN.get(type(node), (f"'{type(node).__name__}'", ""))
                raise self.forbidden(what, text, hint)

    def forbidden(self, what: str, text: str, hint: str = "") -> Exception:
        return fail(
            "E302",
            f"{what} in a formula: '{shown(text)}'",
            self.place,
            "numbers, names, operators, conditional expressions and calls of the language's functions",
            hint,
        )


def _operator(node: ast.Compare | ast.BinOp | ast.UnaryOp) -> str:
    """What to call an operator that the language lacks."""
    if isinstance(node, ast.Compare) and len(node.ops) > 1:
        return "a chain of comparisons"
    sign = node.ops[0] if isinstance(node, ast.Compare) else node.op
    return f"the operator '{_SIGNS.get(type(sign), type(sign).__name__)}'"


_SIGNS: dict[type[ast.AST], str] = {
    ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not", ast.BitAnd: "&", ast.BitOr: "|",
    ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>", ast.Invert: "~", ast.UAdd: "+",
}  # fmt: skip
_FORBIDDEN: dict[type[ast.AST], tuple[str, str]] = {
    ast.Attribute: ("attribute access", ""),
    ast.Subscript: ("an index", "`take` and `slice` reach into tensors"),
    ast.Call: ("a call of something that is not a name", ""),
    ast.Constant: ("a constant that is no number, text or truth value", ""),
    ast.Lambda: ("a lambda", ""),
    ast.NamedExpr: ("an assignment", "give it a name under `let:`"),
    ast.JoinedStr: ("an f-string", ""),
    ast.Starred: ("an unpacked value", ""),
    ast.Dict: ("a dictionary", ""),
    ast.Set: ("a set", ""),
    **{kind: ("a comprehension", "") for kind in (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)},
    **{kind: ("a coroutine or generator", "") for kind in (ast.Await, ast.Yield, ast.YieldFrom)},
}
OPERATORS = {*_BINARY.values(), *COMPARE.values(), "negate", "not", "and", "or"}
"""Functions that are written as signs, and not called by their names."""
