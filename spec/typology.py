"""The typology interpreter: a method's row in the reference architecture PEFT-Ref, derived from its formulas.

Terms as in arXiv:2304.12410: inter- and intra-connectivity, parameters adapted, sharing, input type, insertion form,
integration form, workspace; and the binding time of the weights, which a compiler needs besides.
"""

from __future__ import annotations

from peltc.spec.formula import Call, Expr, Name, calls, names, walk
from peltc.spec.functions import ACTIVATIONS
from peltc.spec.method import Method

NONLINEAR = {*ACTIVATIONS, "activation", "softmax", "exp", "log"} - {"identity"}


def row_of(method: Method) -> dict[str, str]:
    """The method's row, property by property."""
    effects, reads = dict(method.effects), method.reads()
    return {
        "intra_connectivity": _intra(method),
        "inter_connectivity": "dynamic" if _gated(method) else "fixed",
        "parameters_adapted": "reparameterisation"
        if {"weight", "bias"} & set(effects) or _low_rank(method)
        else "addition",
        "parameter_sharing": _sharing(method),
        "input_type": _input(method, reads),
        "insertion_form": "sequential" if ("y" in reads or "input" in effects or method.site == "norm") else "parallel",
        "integration_form": _integration(method, effects),
        "workspace": {"linear": "linear maps", "norm": "norms", "attention": "attention keys and values",
                      "block": "sub-layer outputs", "embedding": "embedding"}[method.site],
        "binding_time": "run time" if _gated(method) else "compile time",
    }  # fmt: skip


def formulas(method: Method) -> list[Expr]:
    """Every formula that takes part at a site."""
    return [*(expr for _, expr in method.let), *(expr for _, expr in method.effects)]


def _functions(method: Method) -> set[str]:
    return {name for expr in formulas(method) for name in calls(expr)}


def _intra(method: Method) -> str:
    functions = _functions(method)
    if functions & {"softmax"}:
        return "dense: attention"
    if functions & NONLINEAR:
        return "dense: non-linear MLP"
    if functions & {"linear", "matmul", "einsum", "kron"}:
        return "dense: linear MLP"
    return "dense: embedding" if method.site == "embedding" else "none: vectors"


def _gated(method: Method) -> bool:
    """Whether a factor of the result depends on the input: a product of two things that both read it."""
    runtime = {"x", "y", "r", "h", "q", "k", "v"}
    bindings = dict(method.let)

    def reads(expr: Expr) -> bool:
        found = names(expr)
        return bool(found & runtime & set(_scope(method))) or any(reads(bindings[n]) for n in found if n in bindings)

    return any(
        isinstance(node, Call) and node.function == "multiply" and all(reads(arg) for arg in node.args)
        for expr in formulas(method)
        for node in walk(expr)
    )


def _scope(method: Method) -> tuple[str, ...]:
    from peltc.spec.method import NAMES

    return NAMES[method.site]


def _low_rank(method: Method) -> bool:
    """A parallel change of a linear map that is itself linear in its input changes the map's parameters."""
    return method.site == "linear" and "delta" in dict(method.effects) and not _functions(method) & NONLINEAR


def _sharing(method: Method) -> str:
    shared = [p.name for p in method.parameters if p.scope == "model"]
    return f"shared by all sites: {', '.join(shared)}" if shared else "none"


def _input(method: Method, reads: set[str]) -> str:
    if method.site == "attention":
        return "weights (learned keys and values)"
    if method.site == "embedding":
        return "task embeddings"
    hidden = reads & {"x", "y", "r", "h"} & set(_scope(method))
    if not hidden:
        return "weights"
    return "hidden representation"


def _integration(method: Method, effects: dict[str, Expr]) -> str:
    if {"keys", "values", "prepend"} & set(effects):
        return "concatenation"
    if _gated(method):
        return "gated addition"
    if "delta" in effects:
        expr = effects["delta"]
        scaled = isinstance(expr, Call) and expr.function == "multiply" and not _is_runtime(expr.args[0], method)
        return "scaled addition" if scaled else "direct addition"
    if {"output", "input"} & set(effects):
        rescales = any(
            isinstance(node, Call)
            and node.function == "multiply"
            and any(isinstance(a, Name) and a.id in ("x", "y") for a in node.args)
            for expr in effects.values()
            for node in walk(expr)
        )
        return "rescaling" if rescales else "direct addition"
    return "replacement of parameters"


def _is_runtime(expr: Expr, method: Method) -> bool:
    return bool(names(expr) & {"x", "y", "r", "h"} & set(_scope(method)))
