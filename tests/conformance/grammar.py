"""Specs drawn from the grammar of the method language: formulas for every kind of site and definition, alone and in
stacks, most of which fit, and some of which do not.

`pick` chooses one of a list; the simplest stand first, so that what fails shrinks to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Pick = Callable[[Sequence[Any]], Any]

ROLES = {
    "linear": ["attention.query", "feed_forward.down", "attention.key", "feed_forward.up", "attention.output",
               "attention.value", "feed_forward.*"],
    "norm": ["attention.norm", "feed_forward.norm"],
    "block": ["feed_forward.block", "attention.block", "layer"],
    "attention": ["attention"],
}  # fmt: skip
WIDTHS = {"linear": ("in", "out"), "norm": ("d",), "block": ("d",)}
EFFECTS = {
    "linear": [("delta",), ("output",), ("input",), ("weight",), ("bias",), ("input", "output"), ("weight", "bias"),
               ("input", "weight", "bias", "delta")],
    "norm": [("weight",), ("bias",), ("delta",), ("output",), ("weight", "bias")],
    "block": [("delta",), ("output",)],
    "attention": [("keys", "values"), ("keys",), ("values",)],
}  # fmt: skip
SMOOTH = ["tanh", "sigmoid", "gelu", "relu", "silu", "gelu_tanh", "abs", "identity", "detach", "negate"]

SHIPPED: list[dict[str, Any]] = [
    {"method": "lora", "at": ["attention.query", "feed_forward.down"], "r": 2},
    {"method": "ia3", "at": "feed_forward.down", "position": "input"},
    {"method": "ia3", "at": ["attention.key", "feed_forward.down"]},
    {"method": "dora", "at": "attention.query", "r": 2},
    {"method": "bitfit", "at": ["attention.*", "feed_forward.*"]},
    {"method": "norm_tuning", "at": ["attention.norm", "feed_forward.norm"]},
    {"method": "oft", "at": "attention.query", "block": 8},
    {"method": "lora", "at": "feed_forward.down", "r": 2, "gate": True},
    {"method": "lora", "at": "attention.query", "r": 2, "gate": {"mask_padding": True, "reads": "h"}},
    {"method": "lora", "at": "attention.query", "r": 2, "experts": {"count": 2}},
    {"method": "mole", "at": "feed_forward.down", "r": 2, "experts_count": 2},
    {"method": "ia3", "at": "feed_forward.down", "gate": {"reads": "y", "scales": "result"}},
    {"method": "bottleneck", "at": "feed_forward.block", "size": 4},
    {"method": "bottleneck", "at": "attention.block", "size": 4, "reads": "sum", "gate": True},
    {"method": "bottleneck", "at": "feed_forward.block", "size": 4, "activation": "identity"},
    {"method": "bottleneck", "at": "layer", "size": 4, "bank": {"size": 5, "k": 2}},
    {"method": "prefix", "at": "attention", "length": 2, "hidden": 4},
    {"method": "prefix", "at": "attention", "length": 2, "hidden": 4, "gate": True},
    {"method": "tiny_attention", "at": "feed_forward.block", "size": 4},
]  # fmt: skip


class Writer:
    """Writes one method, and the parameters that its formulas come to need."""

    def __init__(self, pick: Pick, kind: str):
        self.pick, self.kind = pick, kind
        self.parameters: dict[str, dict[str, Any]] = {}
        self.let: dict[str, str] = {}

    def parameter(self, *shape: Any) -> str:
        """A parameter of a shape; one in ten has a name that other kinds of site give to their own values."""
        names = [f"p{len(self.parameters)}"] * 9 + ["q" if self.kind != "attention" else "y"]
        name = self.pick(names)
        while name in self.parameters:
            name = f"p{len(self.parameters)}"
        self.parameters[name] = {"shape": list(shape), "init": "zeros"}
        return name

    def method(self) -> dict[str, Any]:
        """A method with one or several definitions."""
        found = {effect: getattr(self, effect)() for effect in self.pick(EFFECTS[self.kind])}
        if self.kind == "attention" and self.pick([True, True, False]):
            found |= self.together()
        used = words(found.values())
        let = {name: text for name, text in self.let.items() if name in used}
        used |= words(let.values())
        let |= {name: text for name, text in self.let.items() if name in used}
        used |= words(let.values())
        parameters = {name: shape for name, shape in self.parameters.items() if name in used}
        said = {"parameters": parameters, "let": {name: self.let[name] for name in self.let if name in let}}
        return {
            "title": "drawn",
            "source": "grammar",
            "site": self.kind,
            **{k: v for k, v in said.items() if v},
            **found,
        }

    def together(self) -> dict[str, str]:
        """Keys and values that grow by as many positions, on the same sides."""
        form = self.pick(["{0}, {1}", "{1}, {0}", "{0}, {1}, {0}"])
        scale = self.pick(["{}", "{} * 0.5", "tanh({})"])
        found = {}
        for effect, own in (("keys", "k"), ("values", "v")):
            more = self.parameter("kv_heads", 2, "head_dim")
            if self.pick([False, False, True]):
                more = f"unsqueeze({self.summary('h')}, 1) * {more}"
            found[effect] = f"concat({form.format(more, scale.format(own))}, axis=-2)"
        return found

    # definitions

    def delta(self) -> str:
        return self.running(self.outer(), 3)

    def output(self) -> str:
        return self.running(self.outer(), 2)

    def input(self) -> str:
        return self.running("in", 2, names=("x",))

    def weight(self) -> str:
        return self.gain("W") if self.kind == "norm" else self.matrix(2)

    def bias(self) -> str:
        return self.gain("b") if self.kind == "norm" else self.vector(self.outer(), 2)

    def keys(self) -> str:
        return self.heads("k", 2)

    def values(self) -> str:
        return self.heads("v", 2)

    def outer(self) -> str:
        return WIDTHS[self.kind][-1]

    # expressions

    def gain(self, own: str) -> str:
        p = self.parameter("d")
        return self.pick([f"{own} + {p}", f"{own} * {p}", p, f"{own} * {self.parameter(1)}", f"tanh({own}) + {p} / d"])

    def vector(self, size: str, depth: int) -> str:
        """[size], known before the model runs."""
        p = self.parameter(size)
        choices = [p, f"b + {p}" if size == "out" else p, f"{p} / 2", f"tanh({p}) - 1", self.parameter(1)]
        if self.kind == "linear" and size == "out":
            choices += [f"linear({self.parameter('in')}, W)", f"b * {p}", "take(W, 0, axis=1)",
                        f"take(W @ {self.column()}, 0, axis=-1)",
                        f"take({self.parameter(3, 'out')}, 1, axis=0)"]  # fmt: skip
        return str(self.pick(choices))

    def column(self) -> str:
        return self.parameter("in", 2)

    def matrix(self, depth: int) -> str:
        """[out, in], known before the model runs."""
        p, row, column = self.parameter("out", "in"), self.parameter("in"), self.parameter("out")
        low = f"{self.parameter('out', 2)} @ {self.parameter(2, 'in')}"
        choices = [
            f"W + {p}", f"W * {row}", f"W * unsqueeze({column}, -1)", f"W + {low}", p, f"W * (1 + {low})",
            f"W * unsqueeze({column} + b, -1)", f"{self.parameter(1, 'in')}", f"W / (norm2(W) + 1) + {p}",
            f"W + kron({self.parameter(2, 2)}, {self.parameter('out // 2', 'in // 2')})",
            f"W + einsum('oa,ai->oi', {self.parameter('out', 2)}, {self.parameter(2, 'in')})",
            f"W @ inverse(2 * eye(in) + skew({self.parameter('in * (in - 1) // 2')}, in))",
            f"W @ block_diagonal({self.parameter(2, 'in // 2', 'in // 2')})",
            f"W @ butterfly({self.parameter(2, 'in // 2', 2, 2)})", f"W - W @ upper({self.parameter('in', 'in')})",
            f"W @ (orthonormal({self.parameter('in', 2)}) @ {self.parameter(2, 'in')})",
            f"reshape(reshape(W + {p}, [2, out // 2, in]), [out, in])",
            f"W + transpose(reshape({p}, [in, out]))", f"W + softmax({p})", f"W * sum({p}, axis=0)",
            f"put(W, {self.parameter(2, 'in')}, [0, 2], axis=0)", f"W + choose({self.parameter(3, 'out', 'in')})",
            f"W + permute({self.parameter('in', 'out')}, [1, 0])",
            f"W * top_k_mask({row}, 3)", "W + zeros([out, in]) + ones([in])",
        ]  # fmt: skip
        return str(self.pick(choices))

    def summary(self, name: str) -> str:
        """A number per text, read off a value."""
        size = {"x": "in" if self.kind == "linear" else "d", "y": "out" if self.kind == "linear" else "d"}
        width = size.get(name, "d_model")
        mask = self.pick(["", ", mask"]) if self.kind != "norm" else ""
        return f"mean_seq(sigmoid(linear({name}, {self.parameter(1, width)})){mask})"

    def running(self, size: str, depth: int, names: tuple[str, ...] = ("x", "y", "r", "h")) -> str:
        """[B, S, size]."""
        own = {"linear": {"x": "in", "y": "out", "h": "d_model"}, "norm": {"x": "d", "y": "d"},
               "block": {"y": "d", "x": "in", "r": "d", "h": "d_model"}}[self.kind]  # fmt: skip
        if self.kind == "block" and "x" in own:
            own = {**own, "x": "d"}
        own = {name: width for name, width in own.items() if name in names}
        if depth == 0:
            fitting = [name for name, width in own.items() if width == size]
            if fitting and self.pick([True, True, False]):
                return str(self.pick(fitting))
            name = self.pick(list(own))
            return f"linear({name}, {self.parameter(size, own[name])})"
        inner = self.pick(list(dict.fromkeys([*own.values(), size])))

        def some(width: str = size) -> str:
            return self.running(width, depth - 1, names)

        def p(*shape: Any) -> str:
            return self.parameter(*(shape or (size,)))

        forms: list[Callable[[], str]] = [
            lambda: some(),
            lambda: f"linear({some(inner)}, {p(size, inner)})",
            lambda: f"{some()} * {p()}",
            lambda: f"{some()} + {p()}",
            lambda: f"linear({some(inner)}, {p(2, inner)}) @ {p(2, size)}",
            *[lambda: f"{self.pick(SMOOTH[:-1])}({some()})"] * 3,  # so many that a sweep meets each of them
            lambda: f"-({some()})",
            lambda: f"{some()} - 0.5 * {some()}",
            lambda: f"linear({some(inner)}, {p(size, inner)}, {p()}) / 2",
            lambda: f"activation({some()}, 'gelu')",
            lambda: f"dropout({some()}, 0.1)",
            lambda: f"layer_norm({some()}, {p()}, {p()})",
            lambda: f"layer_norm({some()})",
            lambda: f"softmax({some()}) * {p()}",
            lambda: f"{some()} / (norm2({some()}) + 1)",
            lambda: f"mean({some()}) * {p()}",
            lambda: f"{self.summary(self.pick(list(own)))} * {some()}",
            lambda: f"einsum('bsi,oi->bso', {some(inner)}, {p(size, inner)})",
            lambda: f"concat(slice({some()}, 0, 4), slice({some()}, 4, {size}))",
            lambda: f"put({some()}, pick({some()}, [1, 2], axis=-1), [3, 5], axis=-1)",
            lambda: f"take({p(2, size)}, 1, axis=0) * {some()}",
            lambda: f"{some()} if layer == 0 else {some()}",
            lambda: f"{some()} if {size} > 32 else {p()} * {some()}",
            lambda: f"linear({some(inner)}, {p(1, inner)})",
            lambda: f"exp(tanh({some()}))",
            lambda: f"log(1 + abs({some()}))",
            lambda: f"sqrt(1 + {some()} ** 2)",
            lambda: f"abs({some()}) ** 0.5 * {p()}",
            lambda: f"attend(linear({some()}, {p(4, size)}), linear({some()}, {p(4, size)}), {some()}, causal=True)",
            lambda: f"sum({some()}, axis=1)",
            lambda: f"softmax({some()}, axis=1)",
            lambda: f"einsum('bsd,btd->bsd', {some()}, {some()}) / 8",
            lambda: self.bound(some()),
            lambda: p(),
            lambda: p(1),
            lambda: f"{some()} * {p(3)}",
            lambda: f"{some()} + mean({some()}, axis=0)",
        ]
        if self.kind != "norm":
            forms.append(lambda: f"unsqueeze(mask, -1) * {some()}")
            forms.append(
                lambda: f"attend(linear({some()}, {p(4, size)}), linear({some()}, {p(4, size)}), {some()}, mask)"
            )
        if self.kind == "linear" and size == "out":
            forms.append(lambda: f"linear({some('in')}, W)")
            forms.append(lambda: f"{some()} - b")
        if self.kind == "norm":
            forms.append(lambda: f"{some()} * W")
        if self.kind == "block":
            forms.append(lambda: f"norm({some()})")
        return str(self.pick(forms)())

    def bound(self, text: str) -> str:
        name = f"z{len(self.let)}"
        self.let[name] = text
        return f"{name} + {name}"

    def heads(self, own: str, depth: int) -> str:
        """[B, kv_heads, T, head_dim]."""
        p = self.parameter("head_dim")
        other = "v" if own == "k" else "k"
        return str(self.pick([
            f"{own} * {p}", f"{own} + {p}", f"linear({own}, {self.parameter('head_dim', 'head_dim')})",
            f"{own} + {other} * {p}", f"{own} + mean(mean(q, axis=2), axis=1)", f"tanh({own})",
            f"{own} * unsqueeze({self.parameter('kv_heads', 1)}, -1)", f"unsqueeze({self.summary('h')}, 1) * {own}",
            f"softmax({own}, axis=-2)", f"concat({self.parameter('kv_heads', 3, 'head_dim')}, {own}, axis=-2)",
            f"{own} * {self.parameter('kv_heads', 3, 'head_dim')}",
        ]))  # fmt: skip


def words(texts: Iterable[str]) -> set[str]:
    """The words in formulas."""
    return {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", text)}


def spec(pick: Pick) -> dict[str, Any]:
    """A spec of one to five attachments, shipped methods and drawn ones."""
    attach: list[dict[str, Any]] = []
    methods: dict[str, Any] = {}
    for number in range(pick([1, 1, 1, 2, 2, 3, 4, 5])):
        if pick([False, False, True]):
            entry = dict(pick(SHIPPED))
        else:
            kind = pick(["linear", "linear", "block", "norm", "attention"])
            methods[f"m{number}"] = Writer(pick, kind).method()
            entry = {"method": f"m{number}", "at": pick(ROLES[kind])}
        entry["name"] = f"a{number}"
        if (layers := pick(["all", "all", [0], [1, 0]])) != "all":
            entry["layers"] = layers
        if (mode := pick(["", "", "static", "fold"])) != "":
            entry["mode"] = mode
        if attach and pick([True] * 9 + [False]):
            entry["after"] = [earlier["name"] for earlier in attach]
        attach.append(entry)
    return {"pelt": 1, "name": "drawn", "attach": attach, **({"methods": methods} if methods else {})}
