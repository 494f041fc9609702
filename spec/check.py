"""Checks of a spec that need no model: every formula's shapes, with named sizes in place of numbers."""

from __future__ import annotations

from typing import Any

from peltc.spec.diagnostics import Diagnostic, PeltError
from peltc.spec.dims import Dim
from peltc.spec.formula import Conditional, Deferred, EvaluationError
from peltc.spec.method import Method
from peltc.spec.shapes import Shape, ShapeInterpreter, broadcast
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
    values, expected = symbolic_shapes(method, sizes)
    findings = []
    for parameter in method.parameters:
        try:
            if parameter.condition is None or interpreter.evaluate(parameter.condition, constants):
                shape = tuple(interpreter.evaluate(axis, constants) for axis in parameter.shape)
                text = ", ".join(axis.text for axis in parameter.shape)
                values[parameter.name] = Shape(shape, f"parameter {parameter.name} [{text}]")
        except EvaluationError as error:
            findings.append(Diagnostic("E310", f"the size of '{parameter.name}': {error}", method.place))
    scope: dict[str, Any] = {**values, **constants, "norm": lambda z: z}
    for name, expr in method.let:
        scope[name] = Deferred(lambda e=expr: interpreter.evaluate(e, scope))
    for name, expr in method.effects:
        try:
            found = interpreter.evaluate(expr, scope)
            found = found if isinstance(found, Shape) else Shape(())
            wanted = expected[name]
            if name in ("delta", "output", "input", "weight", "bias") and not isinstance(expr, Conditional):
                if broadcast(found, wanted).dims != wanted.dims:
                    findings.append(
                        Diagnostic("E310", f"'{name}' of '{method.name}' has the shape {found}", method.place,
                                   f"the shape {wanted}")  # fmt: skip
                    )
        except Exception as error:
            findings.append(Diagnostic("E310", f"'{name}' of '{method.name}': {error}", method.place))
    return findings


def symbolic_shapes(method: Method, sizes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Shapes of a site's values and of what each definition must yield, `B`, `S` and `T` being symbols."""
    B, S, T = Dim.of("B"), Dim.of("S"), Dim.of("T")
    mask = Shape((B, S), "attention mask")
    if method.site == "attention":
        keys = Shape((B, sizes["kv_heads"], T, sizes["head_dim"]), "keys and values")
        queries = Shape((B, sizes["heads"], S, sizes["head_dim"]), "queries")
        return {"q": queries, "k": keys, "v": keys, "mask": mask}, {"keys": keys, "values": keys}
    if method.site == "embedding":
        return {}, {"prepend": Shape((Dim.of("P"), sizes["d"]), "[length, d]")}
    inputs = sizes.get("in", sizes.get("d"))
    outputs = sizes.get("out", sizes.get("d"))
    x, y = Shape((B, S, inputs), "the site's input"), Shape((B, S, outputs), "the site's output")
    weight = Shape((outputs, inputs) if method.site == "linear" else (outputs,), "the site's weight")
    bias = Shape((outputs,), "the site's bias")
    values = {"x": x, "y": y, "mask": mask, "h": Shape((B, S, Dim.of("width")), "layer input")}
    if method.site in ("linear", "norm"):
        values |= {"W": weight, "b": bias}
    if method.site == "block":
        values["r"] = Shape(y.dims, "residual stream")
    return values, {"input": x, "delta": y, "output": y, "weight": weight, "bias": bias}
