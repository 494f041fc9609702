"""Checks of a spec that need no model: every formula's shapes, with named sizes in place of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from peltc.spec.diagnostics import Diagnostic, PeltError, Place
from peltc.spec.formula.dims import Dim, Size, same, shape_text
from peltc.spec.formula.interpreter import Deferred, EvaluationError, FormulaError, Undecided
from peltc.spec.formula.syntax import Expr, shown
from peltc.spec.interpreters.shape import POSITIONS, Shape, broadcast, named, tensor
from peltc.spec.interpreters.shapes import ShapeInterpreter
from peltc.spec.method import RUNTIME_NAMES, Method, Parameter, initialiser
from peltc.spec.specification import Spec


def check_formulas(spec: Spec) -> None:
    """Evaluate each attachment's formulas over symbolic shapes.

    Raises:
        PeltError: E310 shapes that cannot fit, whatever the model.
    """
    findings = []
    for entry in spec.attach:
        options = {k: v[0] if isinstance(v, list) else v for k, v in entry.options.items()}
        findings += check_method(entry.method, options, entry.formulas)
    if findings:
        raise PeltError(list(dict.fromkeys(findings)))


def check_method(method: Method, options: dict[str, Any], place: Place | None = None) -> list[Diagnostic]:
    """What is wrong with a method's shapes for some options, sizes being symbols.

    A formula that fits square maps only is right for many sites: wrong is what fits neither those nor others.

    Args:
        place: where the findings stand; at the method where absent.
    """
    place = place or method.place
    names = {"linear": ("in", "out", "max_in", "max_out"), "norm": ("d",), "block": ("d",), "embedding": ("d",),
             "attention": ("heads", "kv_heads", "head_dim")}[method.site]  # fmt: skip
    sizes: dict[str, Any] = {name: Dim.of(name) for name in names}
    if method.site == "block":
        sizes |= {"in": sizes["d"], "out": sizes["d"]}
    findings = _check(method, options, sizes, "width", place)
    d = Dim.of("d")
    square = {name: d if name in ("in", "out", "max_in", "max_out") else size for name, size in sizes.items()}
    return findings if findings and _check(method, options, square, d, place) else []


def _check(
    method: Method, options: dict[str, Any], sizes: dict[str, Any], width: Size | str, place: Place
) -> list[Diagnostic]:
    constants = {
        **options,
        **sizes,
        "biased": True,
        "table": False,
        "index": 0,
        "count": Dim.of("count"),
        "d_model": Dim.of(width),
    }
    constants |= {"layer": 0, "layers": Dim.of("layers"), "role": 0, "roles": Dim.of("roles"), "causal": False}
    values, expected = site_shapes(method.site, sizes, width=width)
    check = _Check(place)
    for parameter in method.parameters:
        what = f"the size of '{parameter.name}'"
        if parameter.condition is None or check.value(what, parameter.condition, constants, undecided=True):
            values[parameter.name] = check.size(what, parameter, constants)
    if check.findings:
        return check.findings
    for parameter in method.parameters:
        if parameter.name in values and initialiser(parameter.init) is None:
            what = f"the start value of '{parameter.name}'"
            check.fit(what, parameter.init, {**values, **constants}, values[parameter.name])
    if method.site == "block":
        values["norm"] = partial(normalised, values["y"])
    found: dict[str, Shape] = {}
    for name, expr in method.effects:
        scope: dict[str, Any] = {**readable(values, name), **constants}
        for binding, inner in method.let:
            scope[binding] = Deferred(partial(check.interpreter.evaluate, inner, scope))
        shape = check.fit(f"'{name}' of '{method.name}'", expr, scope, expected[name], name)
        if shape is not None:
            found[name] = shape
    if len(found) == len(method.effects) and (problem := joined(found, expected)):
        check.find(f"'{method.name}': {problem}", "keys and values of the same positions")
    return check.findings


class _Check:
    """Evaluates formulas and collects what is wrong; what only a model decides passes."""

    def __init__(self, place: Place):
        self.place = place
        self.interpreter = ShapeInterpreter()
        self.findings: list[Diagnostic] = []

    def find(self, message: str, expected: str = "") -> None:
        self.findings.append(Diagnostic("E310", message, self.place, expected))

    def value(self, what: str, expr: Expr, scope: Mapping[str, Any], expected: str = "", undecided: Any = None) -> Any:
        """A formula's value; None where it has none."""
        try:
            return self.interpreter.evaluate(expr, scope)
        except EvaluationError as error:
            if isinstance(error.__cause__, Undecided):
                return undecided
            self.find(f"{what}: {error}", expected)
            return None

    def size(self, what: str, parameter: Parameter, constants: Mapping[str, Any]) -> Shape:
        dims = []
        for axis in parameter.shape:
            size = self.value(what, axis, constants, undecided=Dim.of(axis.text))
            if size is not None and not (isinstance(size, Dim) or (type(size) is int and size > 0)):
                self.find(f"{what}: '{axis.text}' is {size}", "positive whole numbers")
            dims.append(size)
        return Shape(tuple(dims), f"parameter {parameter.name} [{', '.join(axis.text for axis in parameter.shape)}]")

    def fit(self, what: str, expr: Expr, scope: Mapping[str, Any], wanted: Shape, effect: str = "") -> Shape | None:
        """A formula's shape, held against what it must be; None where it has none."""
        expected = f"the shape {wanted}"
        found = self.value(what, expr, scope, expected)
        if found is None:
            return None
        try:
            if not fits(tensor(found), wanted, effect):
                self.find(f"{what} has the shape {found}", expected)
            return tensor(found)
        except FormulaError as error:
            self.find(f"{what}: in '{shown(expr.text)}': {error}", expected)
            return None


LATER = {
    "input": {"y": "is what the map makes of what 'input' defines"},
    **{name: dict.fromkeys(RUNTIME_NAMES, "exists only while the model runs, and parameters are known before")
       for name in ("weight", "bias")},
}  # fmt: skip
"""Names that a definition cannot read though others at the same site can, and why."""


def readable(values: Mapping[str, Any], effect: str) -> dict[str, Any]:
    """A site's values as a definition sees them: to read what is made of it is an error."""

    def refuse(name: str, reason: str) -> Any:
        raise FormulaError(f"'{name}' {reason}")

    later = {name: Deferred(partial(refuse, name, why)) for name, why in LATER.get(effect, {}).items()
             if name in values and isinstance(values[name], Shape) and values[name].running}  # fmt: skip
    return {**values, **later}


def normalised(y: Shape, z: Any) -> Shape:
    """The shape of a block's normalisation of a value, which is one like the block's output.

    Raises:
        FormulaError: it is none.
    """
    if tensor(z).rank != y.rank or not same(tensor(z).dims[-1], y.dims[-1]) or not tensor(z).running:
        raise FormulaError(f"norm needs {shape_text(y.dims)}, found {z}")
    return tensor(z)


def joined(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Why definitions of keys and values do not belong together, or nothing: each value has a key, the text's own are
    still there, and it is known where."""
    texts = {name: shape for name, shape in {**expected, **found}.items() if name in ("keys", "values")}
    for name, shape in texts.items():
        if not named(shape.dims[-2]) & POSITIONS:
            return f"the text's own positions are missing in '{name}', {shape}"
        if shape.lead is None:
            return f"where the text's own positions are in '{name}', {shape}, cannot be told"
    if texts:
        keys, values = texts["keys"], texts["values"]
        if not same(keys.dims[-2], values.dims[-2]):
            return f"there are {keys.dims[-2]} keys and {values.dims[-2]} values"
        if not same(keys.lead or 0, values.lead or 0):
            return f"{keys.lead} keys stand before the text's and {values.lead} values"
    return ""


def fits(found: Shape, wanted: Shape, effect: str) -> bool:
    """Whether a definition has a shape that its site can take.

    Raises:
        FormulaError: the shapes do not broadcast.
    """
    if effect in ("keys", "values", "prepend"):  # the number of positions is the method's own
        return found.rank == wanted.rank and all(
            same(a, b) for i, (a, b) in enumerate(zip(found.dims, wanted.dims, strict=True)) if i != wanted.rank - 2
        )
    dims = broadcast(found, wanted).dims
    return len(dims) == wanted.rank and all(map(same, dims, wanted.dims))


def site_shapes(
    kind: str, sizes: Mapping[str, Any], label: str = "the site", width: Size | str = "width"
) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Shapes of a site's values, and of what each definition must yield there.

    Args:
        kind: the kind of site; of experts, the values of one of them.
        sizes: `in` and `out`, or `d`, or `heads`, `kv_heads` and `head_dim`: numbers or symbols.
        label: the site, for messages.
        width: the model's, which is that of the layer's input.

    Returns:
        Values by name and definitions by name; `B`, `S`, `T` and `P` are symbols in both.
    """
    B, S, T = Dim.of("B"), Dim.of("S"), Dim.of("T")
    mask = Shape((B, S), "attention mask", True)
    h = Shape((B, S, Dim.of(width) if isinstance(width, str) else width), "layer input", True)
    if kind == "attention":
        keys = Shape((B, sizes["kv_heads"], T, sizes["head_dim"]), "keys and values", True)
        queries = Shape((B, sizes["heads"], S, sizes["head_dim"]), "queries", True)
        x = Shape(h.dims, "what queries, keys and values are made of", True)
        return {"x": x, "q": queries, "k": keys, "v": keys, "mask": mask, "h": h}, {"keys": keys, "values": keys}
    if kind == "embedding":
        return {}, {"prepend": Shape((Dim.of("P"), sizes["d"]), "[length, d]")}
    inputs: Any = sizes.get("in", sizes.get("d"))
    outputs: Any = sizes.get("out", sizes.get("d"))
    x = Shape((B, S, inputs), f"input of {label}", True)
    y = Shape((B, S, outputs), f"output of {label}", True)
    weight = Shape((outputs, inputs) if kind in ("linear", "table", "experts") else (outputs,), f"weight of {label}")
    bias = Shape((outputs,), f"bias of {label}")
    values = {"x": x, "y": y, "mask": mask, "h": h}
    values |= {"r": Shape(y.dims, "residual stream", True)} if kind == "block" else {"W": weight, "b": bias}
    return values, {"input": x, "delta": y, "output": y, "weight": weight, "bias": bias}
