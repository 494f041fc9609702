"""A second, naive interpreter of specs on torch models: formulas are evaluated by Python itself, modules are hooks
of the plainest kind, and nothing of the project's own evaluation takes part. What it gives is what a spec means.

It knows where the sites of a few families lie, since discovery is one of the things that it is held against.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
NAIVE = "naive"

ENCODER = {
    "attention.query": "attention.self.query", "attention.key": "attention.self.key",
    "attention.value": "attention.self.value", "attention.output": "attention.output.dense",
    "attention.block": "attention.output.dropout", "attention.norm": "attention.output.LayerNorm",
    "attention": "attention.self", "feed_forward.up": "intermediate.dense", "feed_forward.down": "output.dense",
    "feed_forward.block": "output.dropout", "feed_forward.norm": "output.LayerNorm", "layer": "",
}  # fmt: skip
DECODER = {
    **{f"attention.{name}": f"self_attn.{short}_proj"
       for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))},
    "attention.block": "self_attn", "attention.norm": "input_layernorm", "attention": "self_attn",
    **{f"feed_forward.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "feed_forward.block": "mlp", "feed_forward.norm": "post_attention_layernorm", "layer": "",
}  # fmt: skip
T5 = {
    **{f"attention.{name}": f"layer.0.SelfAttention.{short}"
       for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))},
    "attention": "layer.0.SelfAttention", "attention.norm": "layer.0.layer_norm",
    "attention.block": "layer.0.dropout", "layer": "",
}  # fmt: skip
CROSS = {
    **{f"cross_attention.{name}": f"layer.1.EncDecAttention.{short}"
       for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))},
    "cross_attention": "layer.1.EncDecAttention", "cross_attention.norm": "layer.1.layer_norm",
    "cross_attention.block": "layer.1.dropout",
}  # fmt: skip


def _t5(place: int) -> dict[str, str]:
    return {
        "feed_forward.up": f"layer.{place}.DenseReluDense.wi", "feed_forward.down": f"layer.{place}.DenseReluDense.wo",
        "feed_forward.block": f"layer.{place}.dropout", "feed_forward.norm": f"layer.{place}.layer_norm",
    }  # fmt: skip


LAYERS: dict[str, tuple[tuple[str, str, dict[str, str]], ...]] = {
    "bert": (("encoder", "bert.encoder.layer", ENCODER),),
    "llama": (("decoder", "model.layers", DECODER),),
    "t5": (("encoder", "encoder.block", {**T5, **_t5(1)}), ("decoder", "decoder.block", {**T5, **CROSS, **_t5(2)})),
}
"""By family: the stacks, where their layers lie, and where sites lie in a layer."""


@dataclass(frozen=True)
class Use:
    """One attachment at one place: definitions as Python code, and the names they may read but running ones."""

    site: str
    kind: str
    definitions: Mapping[str, CodeType]
    bindings: tuple[tuple[str, CodeType], ...]
    known: Mapping[str, Any]

    def value(self, effect: str, running: Mapping[str, Any]) -> Any:
        """A definition's value."""
        scope = _Scope(
            {
                **{f"call_{name}": f for name, f in FUNCTIONS.items()},
                **self.known,
                **{_safe(k): v for k, v in running.items()},
            }
        )
        scope.bindings = dict(self.bindings)
        return eval(self.definitions[effect], {"__builtins__": {}}, scope)


class _Scope(dict[str, Any]):
    """Names, those of `let:` evaluated when they are read."""

    bindings: Mapping[str, CodeType]

    def __missing__(self, name: str) -> Any:
        if name not in self.bindings:
            raise KeyError(name)
        self[name] = eval(self.bindings[name], {"__builtins__": {}}, self)
        return self[name]


def _safe(name: str) -> str:
    return "in_" if name == "in" else name


def code(text: str) -> CodeType:
    """A formula as Python: `in`, which is a word of Python's, is `in_`, and a function `f` is `call_f`, since options
    may have its name."""
    calls = rf"\b({'|'.join((*FUNCTIONS, 'norm'))})(?=\s*\()"
    parts = re.split(r"('[^']*'|\"[^\"]*\")", text)
    parts[::2] = [re.sub(calls, r"call_\1", re.sub(r"\bin\b", "in_", part)) for part in parts[::2]]
    return compile("".join(parts).strip(), text[:40], "eval")


def _concat(*tensors: Tensor, axis: int = -1) -> Tensor:
    lead = max(tensors, key=Tensor.dim).shape
    return torch.cat([t.expand(*lead[: len(lead) - t.dim()], *t.shape) for t in tensors], axis)


def _mean_seq(x: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is None:
        return x.mean(1, keepdim=True)
    m = mask.reshape(*mask.shape, *[1] * (x.dim() - 2))
    return (x * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    scores = torch.einsum("bse,bte->bst", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = torch.where(mask[:, None, :] > 0, scores, torch.tensor(-1e4))
    if causal:
        later = torch.arange(k.shape[1])[None, :] > torch.arange(q.shape[1])[:, None]
        scores = torch.where(later, torch.tensor(-1e4), scores)
    return torch.einsum("bst,btf->bsf", scores.softmax(-1), v)


def _layer_norm(x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    y = y if gain is None else y * gain
    return y if bias is None else y + bias


def _put(x: Tensor, values: Tensor, index: list[int], axis: int = 0) -> Tensor:
    x = x.clone().transpose(0, axis)
    x[index] = values.transpose(0, axis)
    return x.transpose(0, axis)


def _skew(x: Tensor, n: int) -> Tensor:
    full = torch.zeros(*x.shape[:-1], n, n)
    place = 0
    for i in range(n):
        for j in range(i + 1, n):
            full[..., i, j], full[..., j, i] = x[..., place], -x[..., place]
            place += 1
    return full


def _butterfly(x: Tensor) -> Tensor:
    product = torch.eye(x.shape[1] * x.shape[2])
    for level, blocks in enumerate(x):
        order = torch.arange(len(product))
        if level:
            order = torch.cat([torch.cat([half for part in (0, 1) for half in run.split(x.shape[2] // 2)[part::2]])
                               for run in order.split(x.shape[2] * 2**level)])  # fmt: skip
        product = torch.block_diag(*blocks)[order][:, order] @ product
    return product


def _orthonormal(x: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for column in x.unbind(-1):
        for other in columns:
            column = column - (other * column).sum(-1, keepdim=True) * other
        columns.append(column / (column * column).sum(-1, keepdim=True).sqrt())
    return torch.stack(columns, -1)


def _scatter(values: Tensor, places: Tensor, shape: list[int]) -> Tensor:
    full = torch.zeros(shape)
    for value, (row, column) in zip(values, places, strict=True):
        full[int(row), int(column)] = value
    return full


def _inverse_fourier(x: Tensor) -> Tensor:
    """By the definition: sums of cosines and sines."""
    angle = [2 * math.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / n for n in x.shape[-2:]]
    (c, s), (p, q) = ((a.cos(), a.sin()) for a in angle)
    wide = x.double()
    return ((c @ wide @ p - s @ wide @ q) / (x.shape[-2] * x.shape[-1])).to(x.dtype)


def _top_k(z: Tensor, k: int) -> Tensor:
    order = z.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(z).scatter(-1, order, 1.0)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0), "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)), "tanh": torch.tanh, "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "identity": lambda x: x,
}  # fmt: skip
FUNCTIONS: dict[str, Any] = {
    **ACTIVATIONS, "activation": lambda x, name: ACTIVATIONS[name](x),
    "linear": lambda x, weight, bias=None: torch.einsum("...i,oi->...o", x, weight) + (0 if bias is None else bias),
    "einsum": lambda equation, *operands: torch.einsum(equation, *operands),
    "kron": torch.kron, "inverse": torch.linalg.inv, "eye": torch.eye, "skew": _skew,
    "block_diagonal": lambda x: torch.block_diag(*x), "scatter": _scatter, "inverse_fourier": _inverse_fourier,
    "circulant": lambda x: torch.stack([x.roll(i, -1) for i in range(x.shape[-1])], -2), "cos": torch.cos,
    "upper": lambda x: x * torch.ones_like(x).triu(1), "butterfly": _butterfly, "orthonormal": _orthonormal,
    "sin": torch.sin,
    "norm2": lambda x, axis=-1: (x * x).sum(axis, keepdim=True).sqrt(),
    "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "abs": torch.abs,
    "softmax": lambda x, axis=-1: x.softmax(axis), "detach": lambda x: x, "dropout": lambda x, p: x,
    "layer_norm": _layer_norm, "attend": _attend, "mean_seq": _mean_seq,
    "running_sum": lambda x, axis=-1: torch.stack(
        [x.narrow(axis, 0, i + 1).sum(axis) for i in range(x.shape[axis])], axis
    ),
    "mean": lambda x, axis=-1: x.mean(axis, keepdim=True), "sum": lambda x, axis=-1: x.sum(axis, keepdim=True),
    "reshape": lambda x, shape: x.reshape(shape), "transpose": lambda x: x.transpose(-1, -2),
    "permute": lambda x, axes: x.permute(axes), "concat": _concat,
    "take": lambda x, index, axis=0: x.select(axis, index),
    "slice": lambda x, start, stop, axis=-1: x.narrow(axis, start, stop - start),
    "pick": lambda x, index, axis=0: torch.stack([x.select(axis, i) for i in index], axis), "put": _put,
    "length": len, "unsqueeze": lambda x, axis=-1: x.unsqueeze(axis), "zeros": torch.zeros, "ones": torch.ones,
    "choose": lambda stack, draw=0, scope="site": stack.mean(0), "top_k_mask": _top_k,
    "min": min, "max": max, "floor": math.floor,
}  # fmt: skip
"""The functions of the method language, written down a second time."""


class Naive:
    """A model with modules, as their formulas say.

    Args:
        uses: in order of the spec.
    """

    def __init__(self, model: nn.Module, family: str, uses: list[Use]):
        self.model, self.family, self.uses = model, family, uses
        self.running: dict[Any, dict[str, Any]] = {}
        self.sites: dict[Any, Mapping[str, str]] = {}
        self.aside = False  # whether a module runs for a formula, beside the model's own pass
        self.stack = ExitStack()

    def __enter__(self) -> Naive:
        places: dict[tuple[str, str], list[Use]] = {}
        for use in self.uses:
            places.setdefault((use.site, use.kind), []).append(use)
        self.hook(self.model.register_forward_pre_hook(self.begin, with_kwargs=True))
        order = {"linear": 0, "norm": 0, "attention": 0, "block": 1}
        for stack, path, sites in LAYERS[self.family]:
            for layer in self.model.get_submodule(path):
                self.hook(layer.register_forward_pre_hook(self.enter(stack, layer), with_kwargs=True))
                self.sites[layer] = sites
                self.watch(layer, sites)
        for (site, kind), uses in sorted(
            places.items(), key=lambda item: (order[item[0][1]], item[0][0][-5:] == "layer")
        ):
            module, layer, role = self.find(site)
            getattr(self, kind)(module, uses, layer, role, site)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def hook(self, handle: Any) -> None:
        self.stack.callback(handle.remove)

    def find(self, site: str) -> tuple[nn.Module, nn.Module, str]:
        """The torch module of a site, that of its layer, and what the site is called there."""
        for stack, path, sites in LAYERS[self.family]:
            found = re.fullmatch(stack + r"\.layers\.(\d+)(?:\.(.*))?", site)
            if found:
                layer = self.model.get_submodule(path)[int(found[1])]
                role = found[2] or "layer"
                return layer.get_submodule(sites[role]), layer, role
        raise KeyError(site)

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.given = kwargs

    def enter(self, stack: str, layer: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            h = args[0] if args else kwargs["hidden_states"]
            name = "decoder_attention_mask" if self.family == "t5" and stack == "decoder" else "attention_mask"
            mask = self.given.get(name)
            self.running[layer] = {"h": h, "mask": torch.ones(h.shape[:2]) if mask is None else mask.to(h.dtype)}

        return hook

    def watch(self, layer: nn.Module, sites: Mapping[str, str]) -> None:
        """Remember what sub-layers read, and the residual stream beside them."""
        for part in ("attention", "cross_attention", "feed_forward"):
            first = sites.get("feed_forward.up" if part == "feed_forward" else f"{part}.query")
            if first is None:
                continue

            def read(module: nn.Module, args: Any, part: str = part) -> None:
                if self.aside:
                    return
                self.running[layer][f"x {part}"] = args[0]
                if self.family == "bert":
                    self.running[layer][f"r {part}"] = args[0]

            def before(module: nn.Module, args: Any, part: str = part) -> None:
                if not self.aside:
                    self.running[layer][f"r {part}"] = args[0]

            self.hook(layer.get_submodule(first).register_forward_pre_hook(read))
            if self.family != "bert":
                self.hook(layer.get_submodule(sites[f"{part}.norm"]).register_forward_pre_hook(before))

    def of(self, layer: nn.Module, role: str) -> dict[str, Any]:
        """The running values of a site that is no map."""
        values = self.running[layer]
        part = role.partition(".")[0]
        found = {"h": values["h"], "mask": values["mask"]}
        if role == "layer":
            found["x"] = values["h"]
        found |= {name: values[f"{name} {part}"] for name in "xr" if f"{name} {part}" in values}
        return found

    # kinds

    def linear(self, module: nn.Module, uses: list[Use], layer: nn.Module, role: str, site: str) -> None:
        behind = role in ("cross_attention.key", "cross_attention.value")

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            x, W, b = args[0], module.weight, module.bias
            around = {"h": self.running[layer]["h"], "mask": self.running[layer]["mask"]}
            if behind:
                around["mask"] = self.given["attention_mask"].to(x.dtype)
            zero = torch.zeros(len(W))
            for use in uses:
                if "input" in use.definitions:
                    x = use.value(
                        "input", {"x": x, "W": W, "b": zero if b is None else b, **around}
                    ) + torch.zeros_like(x)
            for use in uses:
                if "weight" in use.definitions:
                    W = use.value("weight", {"W": W, "b": zero if b is None else b}) + torch.zeros_like(W)
            for use in uses:
                if "bias" in use.definitions:
                    b = use.value("bias", {"b": zero if b is None else b, "W": W}) + zero
            y = F.linear(x, W, b)
            return self.late(uses, y, {"x": x, "W": W, "b": zero if b is None else b, **around})

        self.hook(module.register_forward_hook(hook))

    @staticmethod
    def late(uses: list[Use], y: Tensor, running: Mapping[str, Any]) -> Tensor:
        for use in uses:
            if "delta" in use.definitions:
                y = y + use.value("delta", {**running, "y": y})
            if "output" in use.definitions:
                y = use.value("output", {**running, "y": y}) + torch.zeros_like(y)
        return y

    def norm(self, module: nn.Module, uses: list[Use], layer: nn.Module, role: str, site: str) -> None:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            own = {name: value for name, value in module.named_parameters()}
            new = dict(own)
            for name in ("weight", "bias"):
                for use in uses:
                    if name in use.definitions and name in own:
                        both = {"W": new["weight"], "b": new.get("bias", torch.zeros_like(new["weight"]))}
                        new[name] = use.value(name, both) + torch.zeros_like(new[name])
            y = (output - own.get("bias", 0)) / own["weight"] * new["weight"] + new.get("bias", 0)
            return self.late(
                uses, y, {"x": args[0], "W": new["weight"], "b": new.get("bias", torch.zeros_like(new["weight"]))}
            )

        self.hook(module.register_forward_hook(hook))

    def block(self, module: nn.Module, uses: list[Use], layer: nn.Module, role: str, site: str) -> None:
        def norm(z: Tensor) -> Tensor:
            before, self.aside = self.aside, True
            try:
                found: Tensor = layer.get_submodule(self.sites[layer][f"{role.partition('.')[0]}.norm"])(z)
                return found
            finally:
                self.aside = before

        def hook(module: Any, args: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            around = self.of(layer, role) if role == "layer" else {**self.of(layer, role), "call_norm": norm}
            y = self.late(uses, y, around)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        self.hook(module.register_forward_hook(hook))

    def attention(self, module: nn.Module, uses: list[Use], layer: nn.Module, role: str, site: str) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        def masks(*args: Any, **kwargs: Any) -> Any:
            return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

        AttentionInterface.register(NAIVE, _core)
        AttentionMaskInterface.register(NAIVE, masks)
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAIVE)
        self.stack.callback(lambda: self.model.set_attn_implementation(before))

        def change(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
            shown = [False] * k.shape[-2]  # whether a position is one that modules added
            for use in uses:
                running = {**self.of(layer, role), "q": q, "k": k, "v": v}
                if "keys" in use.definitions:
                    nothing = torch.full_like(k, math.nan)
                    text = use.value("keys", {**running, "k": nothing}).isnan().any(-1).flatten(0, 1).any(0)
                    new = use.value("keys", running)
                    old = iter(shown)
                    shown = [next(old) if own else True for own in text.tolist()]
                    k = new
                if "values" in use.definitions:
                    v = use.value("values", running)
            return k, v, shown

        module.naive_change = change
        self.stack.callback(lambda: delattr(module, "naive_change"))


def _core(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Attention, a mask being added to its scores; keys that modules added are seen by all."""
    scale = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = kwargs.get("position_bias")
    total = torch.zeros(()) if mask is None else mask
    if total.dtype == torch.bool:
        total = torch.zeros(total.shape).masked_fill(~total, -math.inf)
    total = total if bias is None else total + bias
    change = getattr(module, "naive_change", None)
    shown = [False] * k.shape[-2]
    if change is not None:
        k, v, shown = change(q, k, v)
    if total.dim() and len(shown) > total.shape[-1]:
        wide = torch.zeros(*total.shape[:-1], len(shown))
        wide[..., [not new for new in shown]] = total
        total = wide
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) * scale + total
    # Who sees nothing gets nothing, as from torch's own attention.
    return torch.einsum("bhst,bhtd->bshd", scores.softmax(-1).nan_to_num(0.0), v), None


def uses_of(claims: Any, values: Mapping[str, Any]) -> list[Use]:
    """A plan's claims as plain Python: where, which formulas as the method's file has them, and what its names are."""
    found = []
    for claim in claims:
        method = claim.method
        texts = {name: expr.text for name, expr in method.effects}
        known = {_safe(name): value for name, value in claim.constants.items()}
        known |= {_safe(name): torch.as_tensor(values[t.name]) for name, t in claim.tensors.items()}
        known = {n: list(v) if isinstance(v, tuple) else v for n, v in known.items()}
        bindings = tuple((name, code(expr.text)) for name, expr in method.let)
        found.append(Use(claim.site.name, claim.site.kind, {n: code(t) for n, t in texts.items()}, bindings, known))
    return found


@contextmanager
def attached(model: nn.Module, family: str, claims: Any, values: Mapping[str, Any]) -> Iterator[nn.Module]:
    """A model that computes what a plan says, as long as the block runs."""
    with torch.no_grad(), Naive(model, family, uses_of(claims, values)):
        yield model
