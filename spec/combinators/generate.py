"""`generate:` lets a small network write a method's parameters, from embeddings of the task, the layer and the role.

I = W₂ relu(W₁ [z_task ; l_layer ; b_role])        W = reshape(U_W I)        (HyperPELT)
"""

from __future__ import annotations

from dataclasses import replace

from peltc.spec.combinators.combinator import Combinator, Settings, add, formula, number, option, refused
from peltc.spec.combinators.prototype import product
from peltc.spec.diagnostics import Place
from peltc.spec.formula.syntax import Call, Expr, Items, Number
from peltc.spec.method import Method, Parameter, initialiser


def rewrite(method: Method, settings: Settings, place: Place) -> Method:
    """The method whose parameters a network writes."""
    size, hidden, tasks, task = (settings[key] for key in ("size", "hidden", "tasks", "task"))
    if task >= tasks:
        raise refused("generate", method, f"there is no task {task} among {tasks}", place)
    written = [p for p in method.parameters if not p.frozen]
    network = settings["network"]

    def shared(name: str, shape: str, init: str, owner: str = "") -> Parameter:
        axes = formula(f"[{shape}]")
        assert isinstance(axes, Items)
        return Parameter(name, axes.elements, formula(init), "model", owner=owner)

    parameters = [
        shared("task_embedding", f"{tasks}, {size}", "normal(1)", network),
        shared("layer_embedding", f"layers, {size}", "normal(1)", network),
        shared("role_embedding", f"roles, {size}", "normal(1)"),
        shared("hyper_down", f"{hidden}, {3 * size}", "kaiming_uniform"),
        shared("hyper_down_bias", f"{hidden}", "zeros"),
        shared("hyper_up", f"{size}, {hidden}", "kaiming_uniform"),
        shared("hyper_up_bias", f"{size}", "zeros"),
    ]
    where = f"concat(take(task_embedding, {task}), take(layer_embedding, layer), take(role_embedding, role), axis=-1)"
    text = f"linear(relu(linear(unsqueeze({where}, 0), hyper_down, hyper_down_bias)), hyper_up, hyper_up_bias)"
    let: list[tuple[str, Expr]] = [("hyper", formula(text))]
    for p in written:
        named = initialiser(p.init)
        constant = {"zeros": "0", "ones": "1"}.get(named[0] if named else "", "")
        if named is None:
            if not isinstance(p.init, Number):
                raise refused(
                    "generate", method, f"'{p.name}' starts at {p.init.text!r}, which a network cannot", place
                )
            constant = repr(p.init.value)
        init = formula("zeros" if constant else f"normal({settings['std']})")
        parameters.append(replace(p, name=f"{p.name}_generator", shape=(product(p.shape), number(size)), init=init,
                                  scope="model"))  # fmt: skip
        value: Expr = Call("reshape", (formula(f"linear(hyper, {p.name}_generator)"), Items(p.shape)), (), p.name)
        let.append(
            (p.name, Call("add", (formula(constant), value), (), p.name) if constant not in ("", "0") else value)
        )
    return add(method, tuple(parameters), tuple(let), place, frozenset(p.name for p in written))


GENERATE = Combinator(
    "generate",
    "a network shared by all sites writes the parameters",
    "arXiv:2203.03878, section 3",
    (
        option("tasks", "number of tasks that share the network", 1, type="integer", minimum=1),
        option("task", "the task that the modules are for; a compilation is for one", 0, type="integer", minimum=0),
        option("size", "width of the embeddings", 64, type="integer", minimum=1),
        option("hidden", "width inside the network", 128, type="integer", minimum=1),
        option("network", "attachments that name one network share its task and layer embeddings", "", type="string",
               pattern="^([A-Za-z][A-Za-z0-9_-]*)?$"),
        option("std", "standard deviation of the generators' start values", 0.02, type="number", exclusiveMinimum=0),
    ),
    rewrite,
    notes="Each attachment has a network of its own, as adapters and prefixes do in the paper. Compiled for a text task"
    " everything that the network writes is a constant, and the network is gone.",
)  # fmt: skip
