"""Checks of a spec that need no model: every formula's shapes, with named sizes in place of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from peltc.spec.diagnostics import Diagnostic, PeltError
from peltc.spec.dims import Dim, Size, same
from peltc.spec.formula import Deferred, EvaluationError, Expr, FormulaError, Undecided, shown
from peltc.spec.method import Method
from peltc.spec.shapes import Shape, ShapeInterpreter, broadcast, tensor
from peltc.spec.specification import Spec


def check_formulas(spec: Spec) -> None:
    """Evaluate each attachment's formulas over symbolic shapes.

    Raises:
        PeltError: E310 shapes that cannot fit, whatever the model.
    """
    findings = []
    for entry in spec.attach:
        options = {k: v[0] if isinstance(v, list) else v for k, v in entry.options.items()}
        findings += check_method(entry.method, options)
    if findings:
        raise PeltError(list(dict.fromkeys(findings)))


def check_method(method: Method, options: dict[str, Any]) -> list[Diagnostic]:
    """What is wrong with a method's shapes for some options, sizes being symbols."""
    names = {"linear": ("in", "out", "max_in", "max_out"), "norm": ("d",), "block": ("d",), "embedding": ("d",),
             "attention": ("heads", "kv_heads", "head_dim")}[method.site]  # fmt: skip
    sizes: dict[str, Any] = {name: Dim.of(name) for name in names}
    if method.site == "block":
        sizes |= {"in": sizes["d"], "out": sizes["d"]}
    constants = {**options, **sizes, "biased": True, "index": 0, "count": Dim.of("count")}
    interpreter = ShapeInterpreter()
    values, expected = site_shapes(method.site, sizes)
    findings = []

    def find(message: str, expected: str = "") -> None:
        findings.append(Diagnostic("E310", message, method.place, expected))

    for parameter in method.parameters:
        try:
            if parameter.condition is None or _holds(interpreter, parameter.condition, constants):
                shape = tuple(interpreter.evaluate(axis, constants) for axis in parameter.shape)
                text = ", ".join(axis.text for axis in parameter.shape)
                values[parameter.name] = Shape(shape, f"parameter {parameter.name} [{text}]")
        except EvaluationError as error:
            find(f"the size of '{parameter.name}': {error}")
    scope: dict[str, Any] = {**values, **constants, "norm": lambda z: z}
    for name, expr in method.let:
        scope[name] = Deferred(partial(interpreter.evaluate, expr, scope))
    for name, expr in method.effects:
        try:
            found = tensor(interpreter.evaluate(expr, scope))
            if not fits(found, expected[name], name):
                find(f"'{name}' of '{method.name}' has the shape {found}", f"the shape {expected[name]}")
        except EvaluationError as error:
            if not isinstance(error.__cause__, Undecided):
                find(f"'{name}' of '{method.name}': {error}", f"the shape {expected[name]}")
        except FormulaError as error:
            find(f"'{name}' of '{method.name}': in '{shown(expr.text)}': {error}", f"the shape {expected[name]}")
    return findings


def _holds(interpreter: ShapeInterpreter, condition: Expr, constants: Mapping[str, Any]) -> bool:
    """Whether a parameter exists; where the model decides, it may."""
    try:
        return bool(interpreter.evaluate(condition, constants))
    except EvaluationError as error:
        if isinstance(error.__cause__, Undecided):
            return True
        raise


def fits(found: Shape, wanted: Shape, effect: str) -> bool:
    """Whether a definition has a shape that its site can take.

    Raises:
        FormulaError: the shapes do not broadcast.
    """
    if effect in ("keys", "values", "prepend"):  # the number of positions is the method's own
        return found.rank == wanted.rank and same(found.dims[-1], wanted.dims[-1])
    return broadcast(found, wanted).dims == wanted.dims


def site_shapes(
    kind: str, sizes: Mapping[str, Any], label: str = "the site", width: Size | str = "width"
) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Shapes of a site's values, and of what each definition must yield there.

    Args:
        kind: the kind of site.
        sizes: `in` and `out`, or `d`, or `heads`, `kv_heads` and `head_dim`: numbers or symbols.
        label: the site, for messages.
        width: the model's, which is that of the layer's input.

    Returns:
        Values by name and definitions by name; `B`, `S`, `T` and `P` are symbols in both.
    """
    B, S, T = Dim.of("B"), Dim.of("S"), Dim.of("T")
    mask = Shape((B, S), "attention mask")
    h = Shape((B, S, Dim.of(width)), "layer input")
    if kind == "attention":
        keys = Shape((B, sizes["kv_heads"], T, sizes["head_dim"]), "keys and values")
        queries = Shape((B, sizes["heads"], S, sizes["head_dim"]), "queries")
        return {"q": queries, "k": keys, "v": keys, "mask": mask, "h": h}, {"keys": keys, "values": keys}
    if kind == "embedding":
        return {}, {"prepend": Shape((Dim.of("P"), sizes["d"]), "[length, d]")}
    inputs: Any = sizes.get("in", sizes.get("d"))
    outputs: Any = sizes.get("out", sizes.get("d"))
    x, y = Shape((B, S, inputs), f"input of {label}"), Shape((B, S, outputs), f"output of {label}")
    weight = Shape((outputs, inputs) if kind == "linear" else (outputs,), f"weight of {label}")
    bias = Shape((outputs,), f"bias of {label}")
    values = {"x": x, "y": y, "mask": mask, "h": h}
    values |= {"r": Shape(y.dims, "residual stream")} if kind == "block" else {"W": weight, "b": bias}
    return values, {"input": x, "delta": y, "output": y, "weight": weight, "bias": bias}
