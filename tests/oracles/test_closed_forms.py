"""Every method against its closed form, written out by hand in float64.

Two models are written out too, a post-norm and a pre-norm one, in numpy and from their weights alone. A method's
closed form is a function put at one place of them; nothing of peltc's formulas or interpreters is on that side. The
models under test compute in float64 as well, so what is compared is the mathematics, not the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import peltc
from peltc.compiler.pipeline import fold
from peltc.runtime.building.compile import plan_for
from peltc.spec.specification import load_spec

Array = np.ndarray[Any, Any]
Entry = dict[str, Any]

EXACT = 1e-12
"""Largest difference as a share of the largest value: float64, a few hundred operations in a row."""
EFFECT = 1e-2
"""How much, at least, a method must move the output for the comparison to mean anything."""


# What the closed forms are made of


def linear(x: Array, W: Array, b: Array | None = None) -> Array:
    return x @ W.T if b is None else x @ W.T + b


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def gelu(x: Array) -> Array:
    return x * np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(x)


def gelu_tanh(x: Array) -> Array:
    return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def layer_norm(x: Array, gain: Array, shift: Array, epsilon: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * gain + shift


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def split(x: Array, heads: int) -> Array:
    """[B, S, D] → [B, H, S, Dh]"""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Attention over the keys that are seen, [B, 1, S or 1, T]; back to [B, S, D]."""
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
    context = softmax(np.where(seen, scores, -np.inf)) @ v
    return context.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def same_linear(layer: int, role: str, x: Array, W: Array, b: Array) -> Array:
    return linear(x, W, b)


def same_block(layer: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
    return y


def same_attention(layer: int, q: Array, k: Array, v: Array, seen: Array) -> Array:
    return attend(q, k, v, seen)


def same_layer(layer: int, y: Array) -> Array:
    return y


def same_norm(layer: int, role: str, gain: Array, shift: Array) -> tuple[Array, Array]:
    return gain, shift


@dataclass(frozen=True)
class Places:
    """What happens at the places of a model written by hand.

    Attributes:
        linear: the output of a linear map, from its input, weight [O, I] and bias.
        block: the output of a sub-layer, from its output, what its first map reads, the residual stream, and the norm
            that belongs to it.
        attention: attention's result, from queries, keys, values and which keys each query sees.
        norm: gain and shift of a norm.
        layer: the output of a layer, from its output.
        prompt: tokens before the sequence.
    """

    linear: Callable[[int, str, Array, Array, Array], Array] = same_linear
    block: Callable[[int, str, Array, Array, Array, Callable[[Array], Array]], Array] = same_block
    attention: Callable[[int, Array, Array, Array, Array], Array] = same_attention
    norm: Callable[[int, str, Array, Array], tuple[Array, Array]] = same_norm
    layer: Callable[[int, Array], Array] = same_layer
    prompt: Array = field(default_factory=lambda: np.zeros((0, 32)))


def before(rows: Array, batch: Array) -> Array:
    """Rows put before each sequence of a batch."""
    return np.concatenate([np.stack([rows] * len(batch)), batch], 1)


def bert_by_hand(model: Any, inputs: Mapping[str, torch.Tensor], at: Places) -> Array:
    """A post-norm encoder: x ← norm(x + block(x)), twice per layer."""
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    config = model.config
    ids, mask, types = (inputs[k].numpy() for k in ("input_ids", "attention_mask", "token_type_ids"))

    def norm(layer: int, role: str, name: str) -> Callable[[Array], Array]:
        gain, shift = at.norm(layer, role, w[f"{name}.weight"], w[f"{name}.bias"])
        return lambda z: layer_norm(z, gain, shift, config.layer_norm_eps)

    x = before(at.prompt, w["embeddings.word_embeddings.weight"][ids])
    mask, types = before(np.ones(len(at.prompt), int), mask), before(np.zeros(len(at.prompt), int), types)
    x = x + w["embeddings.position_embeddings.weight"][: x.shape[1]]
    x = x + w["embeddings.token_type_embeddings.weight"][types]
    x = norm(-1, "embedding", "embeddings.LayerNorm")(x)
    seen = mask[:, None, None, :] > 0
    for i in range(config.num_hidden_layers):
        path = f"encoder.layer.{i}"

        def project(role: str, name: str, z: Array, i: int = i, path: str = path) -> Array:
            return at.linear(i, role, z, w[f"{path}.{name}.weight"], w[f"{path}.{name}.bias"])

        q, k, v = (split(project(role, f"attention.self.{role}", x), config.num_attention_heads)
                   for role in ("query", "key", "value"))  # fmt: skip
        y = project("output", "attention.output.dense", at.attention(i, q, k, v, seen))
        first = norm(i, "attention", f"{path}.attention.output.LayerNorm")
        x = first(x + at.block(i, "attention", y, x, x, first))
        y = project("down", "output.dense", gelu(project("up", "intermediate.dense", x)))
        second = norm(i, "feed_forward", f"{path}.output.LayerNorm")
        x = second(x + at.block(i, "feed_forward", y, x, x, second))
        x = at.layer(i, x)
    return x[:, len(at.prompt) :]


def gpt2_by_hand(model: Any, inputs: Mapping[str, torch.Tensor], at: Places) -> Array:
    """A pre-norm decoder: x ← x + block(norm(x)), twice per layer; q, k and v are thirds of one map."""
    w = {name.removeprefix("transformer."): p.detach().double().numpy() for name, p in model.named_parameters()}
    config = model.config
    x = before(at.prompt, w["wte.weight"][inputs["input_ids"].numpy()])
    mask = before(np.ones(len(at.prompt), int), inputs["attention_mask"].numpy())
    length = x.shape[1]
    seen = np.tril(np.ones((length, length), bool))[None, None] & (mask[:, None, None, :] > 0)
    # A query that sees nothing gives nothing to anyone: whatever it attends to, no other position reads it.
    seen = seen | ~seen.any(-1, keepdims=True)

    def norm(layer: int, role: str, name: str) -> Callable[[Array], Array]:
        gain, shift = at.norm(layer, role, w[f"{name}.weight"], w[f"{name}.bias"])
        return lambda z: layer_norm(z, gain, shift, config.layer_norm_epsilon)

    x = x + w["wpe.weight"][:length]
    for i in range(config.n_layer):
        path, d = f"h.{i}", config.n_embd
        first = norm(i, "attention", f"{path}.ln_1")
        z = first(x)
        W, b = w[f"{path}.attn.c_attn.weight"], w[f"{path}.attn.c_attn.bias"]
        q, k, v = (split(at.linear(i, role, z, W[:, n * d : (n + 1) * d].T, b[n * d : (n + 1) * d]), config.n_head)
                   for n, role in enumerate(("query", "key", "value")))  # fmt: skip
        context = at.attention(i, q, k, v, seen)
        y = at.linear(i, "output", context, w[f"{path}.attn.c_proj.weight"].T, w[f"{path}.attn.c_proj.bias"])
        x = x + at.block(i, "attention", y, z, x, first)
        second = norm(i, "feed_forward", f"{path}.ln_2")
        z = second(x)
        y = gelu_tanh(at.linear(i, "up", z, w[f"{path}.mlp.c_fc.weight"].T, w[f"{path}.mlp.c_fc.bias"]))
        y = at.linear(i, "down", y, w[f"{path}.mlp.c_proj.weight"].T, w[f"{path}.mlp.c_proj.bias"])
        x = at.layer(i, x + at.block(i, "feed_forward", y, z, x, second))
    return (norm(-1, "final", "ln_f")(x) @ w["wte.weight"].T)[:, len(at.prompt) :]


BY_HAND = {"bert": bert_by_hand, "gpt2": gpt2_by_hand}
PREFIX = {"bert": "encoder", "gpt2": "decoder"}


class Bench:
    """One model under test beside the same model by hand."""

    def __init__(self, toys: Any, close: Any, name: str):
        self.toys, self.close, self.name = toys, close, name
        self.inputs = toys.inputs(name)
        self.real = self.inputs["attention_mask"].numpy() > 0
        self.plain = toys.model(name).double()

    def attach(self, *entries: Entry) -> tuple[Any, dict[str, Array]]:
        """The model with modules, and their tensors in float64."""
        tensors = self.toys.weights(self.name, self.toys.plan(self.name, *entries))
        model = peltc.attach(self.toys.model(self.name).double(), self.toys.spec(*entries), weights=tensors)
        return model, {key: value.astype(np.float64) for key, value in tensors.items()}

    def by_hand(self, at: Places) -> Array:
        return BY_HAND[self.name](self.plain, self.inputs, at)

    def compare(self, found: Any, expected: Array) -> float:
        """Positions of padding aside: what a masked query answers is nobody's business."""
        return float(self.close(found.detach().numpy()[self.real], expected[self.real], EXACT))

    def check(self, model: Any, at: Places) -> None:
        """The model under test equals the closed form, and the closed form is not the plain model."""
        expected = self.by_hand(at)
        self.compare(self.toys.answer(model, self.inputs), expected)
        with pytest.raises(AssertionError):
            self.close(expected, self.by_hand(Places()), EFFECT)

    def site(self, layer: int, role: str) -> str:
        return f"{PREFIX[self.name]}.layers.{layer}.{role}"


@pytest.fixture(params=["bert", "gpt2"])
def bench(request: pytest.FixtureRequest, toys: Any, close: Any) -> Bench:
    return Bench(toys, close, request.param)


@pytest.fixture
def bert(toys: Any, close: Any) -> Bench:
    return Bench(toys, close, "bert")


def test_the_models_by_hand(bench: Bench) -> None:
    """Without a module the hand-written models are the models; all else rests on this."""
    bench.compare(bench.toys.answer(bench.plain, bench.inputs), bench.by_hand(Places()))


ROLES = {"query": "attention.query", "key": "attention.key", "value": "attention.value",
         "output": "attention.output", "up": "feed_forward.up", "down": "feed_forward.down"}  # fmt: skip
EVERY = list(ROLES.values())
BLOCKS = ["attention.block", "feed_forward.block"]


def tensors_at(bench: Bench, tensors: Mapping[str, Array], name: str) -> Callable[[int, str], dict[str, Array]]:
    """The tensors of an attachment at a site of a layer, by their names in the method."""

    def find(layer: int, role: str) -> dict[str, Array]:
        start = f"{name}.{bench.site(layer, ROLES.get(role, role))}."
        return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}

    return find


# Linear sites


def test_lora(bench: Bench) -> None:
    """y + α/r · B A x, on slices of a fused map too."""
    model, tensors = bench.attach({"method": "lora", "at": EVERY, "r": 4, "alpha": 6})
    at = tensors_at(bench, tensors, "lora")

    def lora(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        return linear(x, W + 6 / 4 * t["B"] @ t["A"], b)

    bench.check(model, Places(linear=lora))


def test_dora(bench: Bench) -> None:
    """m · V / ‖V‖ with V = W + α/√r · B A, the norm over inputs, the bias as it was."""
    model, tensors = bench.attach({"method": "dora", "at": EVERY, "r": 4, "alpha": 6, "rank_stabilised": True})
    at = tensors_at(bench, tensors, "dora")

    def dora(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        V = W + 6 / math.sqrt(4) * t["B"] @ t["A"]
        return linear(x, t["m"] * V / np.sqrt((V * V).sum(1))[:, None], b)

    bench.check(model, Places(linear=dora))


def test_adalora(bench: Bench) -> None:
    model, tensors = bench.attach({"method": "adalora", "at": EVERY, "r": 4, "alpha": 6})
    at = tensors_at(bench, tensors, "adalora")

    def adalora(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        return linear(x, W + 6 / (4 + 1e-5) * t["B"] @ np.diag(t["E"]) @ t["A"], b)

    bench.check(model, Places(linear=adalora))


def test_linear_adapter(bench: Bench) -> None:
    """A map of the output, bias included: (I + U D) (W x + b) + U b_d + b_u."""
    model, tensors = bench.attach({"method": "linear_adapter", "at": EVERY, "size": 5})
    at = tensors_at(bench, tensors, "linear_adapter")

    def adapter(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        M = np.eye(len(W)) + t["up"] @ t["down"]
        return linear(x, M @ W, M @ b + t["up"] @ t["down_bias"] + t["up_bias"])

    bench.check(model, Places(linear=adapter))


def test_ia3(bench: Bench) -> None:
    """Keys and values are scaled with their biases, the inner activations before the last map."""
    model, tensors = bench.attach(
        {"method": "ia3", "at": ["attention.key", "attention.value"]},
        {"method": "ia3", "name": "ff", "at": "feed_forward.down", "position": "input"},
    )
    kv, ff = tensors_at(bench, tensors, "ia3"), tensors_at(bench, tensors, "ff")

    def ia3(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        if role in ("key", "value"):
            scale = kv(i, role)["l"]
            return linear(x, scale[:, None] * W, scale * b)
        return linear(x, W * ff(i, role)["l"], b) if role == "down" else linear(x, W, b)

    bench.check(model, Places(linear=ia3))


def test_bitfit(bench: Bench) -> None:
    model, tensors = bench.attach({"method": "bitfit", "at": EVERY})
    at = tensors_at(bench, tensors, "bitfit")

    def bitfit(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        return linear(x, W, b + at(i, role)["change"])

    bench.check(model, Places(linear=bitfit))


def test_bitfit_without_a_bias(toys: Any, close: Any) -> None:
    """A map that has no bias gets one. A single map of Llama: its input goes in, its own output comes out."""
    entry = {"method": "bitfit", "at": ["attention.query", "feed_forward.up"]}
    tensors = toys.weights("llama", toys.plan("llama", entry))
    model = peltc.attach(toys.model("llama").double(), toys.spec(entry), weights=tensors)
    x = np.random.default_rng(1).normal(size=(2, 5, 32))
    for site, path in (("attention.query", "self_attn.q_proj"), ("feed_forward.up", "mlp.up_proj")):
        module = model.get_submodule(f"model.layers.1.{path}")
        change = tensors[f"bitfit.decoder.layers.1.{site}.change"].astype(np.float64)
        W = module.weight.detach().numpy()
        close(module(torch.from_numpy(x)), linear(x, W) + change, EXACT)


def test_vera(bench: Bench) -> None:
    """b ⊙ B (d ⊙ A x): one A and one B for all sites, of which each takes the leading columns or rows."""
    model, tensors = bench.attach({"method": "vera", "at": EVERY, "r": 7})
    at, A, B = tensors_at(bench, tensors, "vera"), tensors["vera.A"], tensors["vera.B"]
    assert A.shape == (7, 64) and B.shape == (64, 7)

    def vera(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t, (outputs, inputs) = at(i, role), W.shape
        change = np.diag(t["b_scale"]) @ B[:outputs] @ np.diag(t["d"]) @ A[:, :inputs]
        return linear(x, W + change, b)

    bench.check(model, Places(linear=vera))


def test_loha(bench: Bench) -> None:
    model, tensors = bench.attach({"method": "loha", "at": EVERY, "r": 3, "alpha": 7})
    at = tensors_at(bench, tensors, "loha")

    def loha(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        change = np.zeros_like(W)
        for m in range(3):
            for n in range(3):
                change += np.outer(t["w1_a"][:, m] * t["w2_a"][:, n], t["w1_b"][m] * t["w2_b"][n])
        return linear(x, W + 7 / 3 * change, b)

    bench.check(model, Places(linear=loha))


@pytest.mark.parametrize("r", [0, 2])
def test_lokr(bench: Bench, r: int) -> None:
    model, tensors = bench.attach({"method": "lokr", "at": EVERY, "r": r, "alpha": 5, "factor": 4})
    at = tensors_at(bench, tensors, "lokr")

    def lokr(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        change = 5 / r * np.kron(t["w1"], t["w2_a"] @ t["w2_b"]) if r else np.kron(t["w1"], t["w2"])
        return linear(x, W + change, b)

    bench.check(model, Places(linear=lokr))


def rotation(R: Array, size: int, exact: bool) -> Array:
    """The rotation of one block: its upper triangle, row by row, is R; Cayley's transform, or PEFT's series."""
    Q = np.zeros((size, size))
    entries = iter(R)
    for row in range(size):
        for column in range(row + 1, size):
            Q[row, column] = next(entries)
            Q[column, row] = -Q[row, column]
    if exact:
        return np.linalg.solve((np.eye(size) + Q).T, (np.eye(size) - Q).T).T
    return sum((2 * np.linalg.matrix_power(Q, n) for n in (1, 2, 3)), np.eye(size) + np.linalg.matrix_power(Q, 4))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "neumann"])
def test_oft(bench: Bench, exact: bool) -> None:
    """Blocks of the input are turned before the map reads them."""
    model, tensors = bench.attach({"method": "oft", "at": EVERY, "block": 8, "neumann": not exact})
    at = tensors_at(bench, tensors, "oft")

    def oft(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        turned = x.copy()
        for n, R in enumerate(at(i, role)["R"]):
            part = slice(8 * n, 8 * n + 8)
            turned[..., part] = x[..., part] @ rotation(R, 8, exact)
        return linear(turned, W, b)

    bench.check(model, Places(linear=oft))


def test_oft_is_a_rotation(bert: Bench) -> None:
    """W' = W Rᵀ with R orthogonal: lengths and angles between the rows of W stay as they are. The series is not."""
    model, _ = bert.attach({"method": "oft", "at": "attention.query", "block": 8, "neumann": False})
    loose, _ = bert.attach({"method": "oft", "at": "attention.query", "block": 8, "neumann": True})
    for i in range(2):
        path = f"encoder.layer.{i}.attention.self.query"
        W = bert.plain.get_submodule(path).weight.detach().numpy()
        turned = effective_weight(model.get_submodule(path))
        bert.close(turned @ turned.T, W @ W.T, EXACT)
        with pytest.raises(AssertionError):
            bert.close(turned, W, EFFECT)
        stretched = effective_weight(loose.get_submodule(path))
        with pytest.raises(AssertionError):
            bert.close(stretched @ stretched.T, W @ W.T, EFFECT)


def effective_weight(module: torch.nn.Module) -> Array:
    """The weight of a map with modules on it, read off what it does to the unit vectors and to zero."""
    size = module.weight.shape[1]
    with torch.no_grad():
        outputs = module(torch.eye(size, dtype=torch.float64)[None])[0] - module(torch.zeros(1, 1, size).double())[0]
    return outputs.T.numpy()


COMPOSED = {
    # as the authors' code does it: every tensor of a module is scaled, then modules are summed tensor by tensor
    "factor_linear": lambda w, A, B: sum(w[n] * B[n] for n in range(len(w))) @ sum(w[n] * A[n] for n in range(len(w))),
    "delta_linear": lambda w, A, B: sum(w[n] * (B[n] @ A[n]) for n in range(len(w))),
}


@pytest.mark.parametrize("rule", COMPOSED)
def test_lorahub(bench: Bench, rule: str) -> None:
    """One set of weights for the model, modules of each map's own."""
    model, tensors = bench.attach({"method": "lorahub", "at": EVERY, "modules": 5, "r": 3, "alpha": 7, "rule": rule})
    at, w = tensors_at(bench, tensors, "lorahub"), tensors["lorahub.w"]
    assert w.shape == (5,)

    def lorahub(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        return linear(x, W + 7 / 3 * COMPOSED[rule](w, t["A"], t["B"]), b)

    bench.check(model, Places(linear=lorahub))


def mole_delta(t: Mapping[str, Array], x: Array, gates: Array) -> Array:
    """Σ G_i · s · B_i A_i x with s = 7 / 3; gates [..., experts]."""
    experts = [linear(linear(x, A), B) for A, B in zip(t["A"], t["B"], strict=True)]
    return sum(7 / 3 * gates[..., [n]] * experts[n] for n in range(len(experts)))


MOLE = {"method": "mole", "at": EVERY, "experts_count": 3, "r": 3, "alpha": 7}


def test_mole(bench: Bench) -> None:
    """A softmax over experts for each token, of the map's input and over a temperature."""
    model, tensors = bench.attach(MOLE)
    at = tensors_at(bench, tensors, "mole")

    def mole(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        assert abs(t["temperature"].item() - 1) > EFFECT
        return linear(x, W, b) + mole_delta(t, x, softmax(x @ t["router"].T / t["temperature"]))

    bench.check(model, Places(linear=mole))


def test_replace(bench: Bench) -> None:
    """The base's weight and bias have no part in the result."""
    model, tensors = bench.attach({"method": "replace", "at": EVERY})
    at = tensors_at(bench, tensors, "replace")

    def replace(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        return linear(x, at(i, role)["weight"], at(i, role)["bias"])

    bench.check(model, Places(linear=replace))


@pytest.mark.parametrize("gain, shift", [(True, True), (True, False), (False, True)])
def test_norm_tuning(bench: Bench, gain: bool, shift: bool) -> None:
    model, tensors = bench.attach({"method": "norm_tuning", "at": ["attention.norm", "feed_forward.norm"],
                                   "weight": gain, "bias": shift})  # fmt: skip

    def norm(i: int, role: str, g: Array, s: Array) -> tuple[Array, Array]:
        start = f"norm_tuning.{bench.site(i, f'{role}.norm')}"
        return tensors.get(f"{start}.gain", g), tensors.get(f"{start}.shift", s)

    assert len(tensors) == 4 * (gain + shift)
    bench.check(model, Places(norm=norm))


# Blocks


ACTIVATIONS = {"relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu, "tanh": np.tanh, "sigmoid": sigmoid}


@pytest.mark.parametrize("reads", ["raw", "sum", "normed"])
def test_bottleneck(bench: Bench, reads: str) -> None:
    """`normed` runs the block's own norm on the sum: Pfeiffer's wiring, where a post-norm layer's norm runs twice."""
    model, tensors = bench.attach({"method": "bottleneck", "at": BLOCKS, "size": 6, "reads": reads, "scale": 0.7})
    at = tensors_at(bench, tensors, "bottleneck")

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        t = at(i, f"{role}.block")
        z = {"raw": y, "sum": y + r, "normed": norm(y + r)}[reads]
        return y + 0.7 * linear(relu(linear(z, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    bench.check(model, Places(block=adapter))


def test_bottleneck_after_a_layer(bench: Bench) -> None:
    """On a whole layer: its output is what the next one reads."""
    model, tensors = bench.attach({"method": "bottleneck", "at": "layer", "size": 6})

    def adapter(i: int, y: Array) -> Array:
        t = {
            key: tensors[f"bottleneck.{PREFIX[bench.name]}.layers.{i}.{key}"]
            for key in ("down", "down_bias", "up", "up_bias")
        }
        return y + linear(relu(linear(y, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    bench.check(model, Places(layer=adapter))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(bert: Bench, activation: str) -> None:
    model, tensors = bert.attach({"method": "bottleneck", "at": "feed_forward.block", "reduction": 8,
                                  "activation": activation})  # fmt: skip
    at = tensors_at(bert, tensors, "bottleneck")

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        if role == "attention":
            return y
        t = at(i, f"{role}.block")
        return y + linear(ACTIVATIONS[activation](linear(y, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    bert.check(model, Places(block=adapter))


@pytest.mark.parametrize("reads", ["x", "residual"])
def test_parallel_adapter(bench: Bench, reads: str) -> None:
    """`x` and `residual` are one and the same where the norm comes last, and two where it comes first."""
    model, tensors = bench.attach({"method": "parallel_adapter", "at": BLOCKS, "size": 6, "reads": reads, "scale": 1.5})
    at = tensors_at(bench, tensors, "parallel_adapter")

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        t = at(i, f"{role}.block")
        z = x if reads == "x" else r
        return y + 1.5 * linear(relu(linear(z, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    bench.check(model, Places(block=adapter))


@pytest.mark.parametrize("reads", ["raw", "sum", "normed"])
@pytest.mark.parametrize("rank", [1, 2])
def test_compacter(bench: Bench, reads: str, rank: int) -> None:
    """Sums of Kronecker products, one of whose factors all adapters share; weights lie as [inputs, outputs]."""
    model, tensors = bench.attach({"method": "compacter", "at": BLOCKS, "reduction": 4, "n": 4, "rank": rank,
                                   "reads": reads})  # fmt: skip
    at, rule = tensors_at(bench, tensors, "compacter"), tensors["compacter.rule"]

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        t = at(i, f"{role}.block")
        down = sum(np.kron(rule[n], t["down_l"][n] @ t["down_r"][n]) for n in range(4))
        up = sum(np.kron(rule[n], t["up_l"][n] @ t["up_r"][n]) for n in range(4))
        z = {"raw": y, "sum": y + r, "normed": norm(y + r)}[reads]
        return y + gelu(z @ down + t["down_bias"]) @ up + t["up_bias"]

    bench.check(model, Places(block=adapter))


INNER = {
    "plain": lambda t, u: layer_norm(u, np.ones(6), np.zeros(6), 1e-5),
    "affine": lambda t, u: layer_norm(u, t["inner_gain"], t["inner_bias"], 1e-5),
}


@pytest.mark.parametrize("kind", INNER)
def test_a_norm_inside(bench: Bench, kind: str) -> None:
    """Between the down-projection, bias included, and the non-linearity."""
    model, tensors = bench.attach({"method": "bottleneck", "at": BLOCKS, "size": 6, "inner_norm": kind,
                                   "activation": "gelu"})  # fmt: skip
    at = tensors_at(bench, tensors, "bottleneck")

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        t = at(i, f"{role}.block")
        assert ("inner_gain" in t) == ("inner_bias" in t) == (kind == "affine")
        return y + linear(gelu(INNER[kind](t, linear(y, t["down"], t["down_bias"]))), t["up"], t["up_bias"])

    bench.check(model, Places(block=adapter))


def tiny_attention(t: Mapping[str, Array], z: Array, mask: Array, causal: bool) -> Array:
    """Attention of one narrow head over the tokens that the mask shows, written with torch's own."""
    q, k, v = (torch.from_numpy(z @ t[name].T) for name in ("query", "key", "value"))
    seen = torch.from_numpy(mask > 0)[:, None, :].expand(-1, z.shape[1], -1)
    if causal:
        seen = seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril()
    seen = seen | ~seen.any(-1, keepdim=True)  # a query that sees nothing: of padding, which nobody reads
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).numpy() @ t["up"].T


def with_tiny_attention(
    bench: Bench, entry: Entry, mask: Array, causal: bool | None = None
) -> tuple[Any, Places]:  # fmt: skip
    """A model with tiny attention after every sub-layer, and what it should be: in decoders it does not look ahead."""
    causal = bench.name != "bert" if causal is None else causal
    model, tensors = bench.attach({"method": "tiny_attention", "at": BLOCKS, "size": 3, **entry})
    at = tensors_at(bench, tensors, "tiny_attention")

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        z = {"raw": y, "sum": y + r, "normed": norm(y + r)}[entry.get("reads", "raw")]
        t = at(i, f"{role}.block")
        if "experts" in entry:  # heads of a mixture, whose weights are averaged
            t = {name.removesuffix("_experts"): value.mean(0) for name, value in t.items()}
        return y + tiny_attention(t, z, mask, causal)

    return model, Places(block=adapter)


@pytest.mark.parametrize("entry", [{"reads": "raw"}, {"reads": "sum"}, {"reads": "normed"}, {"experts": {"count": 3}}],
                         ids=["raw", "sum", "normed", "experts"])  # fmt: skip
def test_tiny_attention(bench: Bench, entry: Entry) -> None:
    """softmax(q kᵀ / √size) v, then the way up; padding is not seen."""
    mask = bench.inputs["attention_mask"].numpy()
    bench.check(*with_tiny_attention(bench, entry, mask))


# Attention and embedding


def prefixed(keys: Callable[[int], tuple[Array, Array]], masked: int = 0) -> Places:
    """Attention over a prefix, which every query sees, and the sequence's own keys. Of the prefix's tokens, `masked`
    are wrongly hidden."""

    def attention(i: int, q: Array, k: Array, v: Array, seen: Array) -> Array:
        K, V = (np.stack([part] * len(q)) for part in keys(i))
        ones = np.ones((*seen.shape[:3], K.shape[2]), bool)
        ones[..., :masked] = False
        return attend(q, np.concatenate([K, k], 2), np.concatenate([V, v], 2), np.concatenate([ones, seen], 3))

    return Places(attention=attention)


def test_prefix_flat(bench: Bench) -> None:
    model, tensors = bench.attach({"method": "prefix", "at": "attention", "length": 5, "reparameterise": False})
    at = tensors_at(bench, tensors, "prefix")
    bench.check(model, prefixed(lambda i: (at(i, "attention")["K"], at(i, "attention")["V"])))


def test_prefix_by_a_network(bench: Bench) -> None:
    """One network for all layers: of its outputs, [length, layer, key or value, head, width of a head]."""
    model, tensors = bench.attach({"method": "prefix", "at": "attention", "length": 5, "hidden": 24, "width": 12})
    t = {name.removeprefix("prefix."): value for name, value in tensors.items()}
    hidden = np.tanh(linear(t["embedding"], t["down"], t["down_bias"]))
    both = linear(hidden, t["up"], t["up_bias"]).reshape(5, 2, 2, 4, 8)

    def keys(i: int) -> tuple[Array, Array]:
        return both[:, i, 0].transpose(1, 0, 2), both[:, i, 1].transpose(1, 0, 2)

    bench.check(model, prefixed(keys))


def with_a_central_gate(bench: Bench, swapped: bool = False, after: bool = True) -> tuple[Any, Places]:
    """LoRA and a prefix that share a gate in each layer; wrongly `swapped`, or with the softmax not `after` the mean.
    What a decoder computes where padding comes first is nobody's business, so that its mean leaves padding out."""
    masked = bench.name == "gpt2"
    gate = {"central": "gates", "mask_padding": masked}
    weights = bench.real if masked else np.ones_like(bench.real)
    weights = (weights / weights.sum(1, keepdims=True))[..., None]
    model, tensors = bench.attach(
        {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4, "gate": {**gate, "output": 0}},
        {"method": "prefix", "at": "attention", "length": 3, "reparameterise": False, "gate": {**gate, "output": 1}},
    )
    lora, prefix = tensors_at(bench, tensors, "lora"), tensors_at(bench, tensors, "prefix")
    read: dict[int, Array] = {}

    def gates(i: int) -> Array:
        """[B, 2]"""
        start = f"gates.{PREFIX[bench.name]}.layers.{i}.gate"
        z = relu(linear(read[i], tensors[f"{start}_weight"], tensors[f"{start}_bias"]))
        g = softmax((weights * z).sum(1)) if after else (weights * softmax(z)).sum(1)
        return g[:, ::-1] if swapped else g

    def linear_(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        if role not in ("query", "value"):
            return linear(x, W, b)
        read[i] = x
        t = lora(i, role)
        return linear(x, W, b) + gates(i)[:, :1, None] * linear(linear(x, t["A"]), t["B"])

    def attention(i: int, q: Array, k: Array, v: Array, seen: Array) -> Array:
        t, g = prefix(i, "attention"), gates(i)[:, 1][:, None, None, None]
        K, V = g * t["K"], g * t["V"]
        ones = np.ones((*seen.shape[:3], K.shape[2]), bool)
        return attend(q, np.concatenate([K, k], 2), np.concatenate([V, v], 2), np.concatenate([ones, seen], 3))

    return model, Places(linear=linear_, attention=attention)


def test_a_central_gate(bench: Bench) -> None:
    """g = softmax(mean_S relu(x Wᵀ + c)): g₀ in place of LoRA's α/r, g₁ on the prefix's keys and values."""
    bench.check(*with_a_central_gate(bench))


@pytest.mark.parametrize("wrong", [{"swapped": True}, {"after": False}], ids=["swapped", "softmax-first"])
def test_another_central_gate_shows(bench: Bench, wrong: dict[str, bool]) -> None:
    with pytest.raises(AssertionError, match="differs by"):
        bench.check(*with_a_central_gate(bench, **wrong))


def test_prompt(bench: Bench) -> None:
    """Tokens before the sequence, before positions and the embedding's norm; outputs keep the length of the text."""
    model, tensors = bench.attach({"method": "prompt", "at": "embedding.word", "length": 5})
    (prompt,) = tensors.values()
    bench.check(model, Places(prompt=prompt))


# Two methods at a time


def test_order_on_one_map(bench: Bench) -> None:
    """LoRA and then (IA)³ scales what LoRA added; both orders of the file are obeyed."""
    lora = {"method": "lora", "at": "attention.value", "r": 4, "alpha": 6}
    ia3 = {"method": "ia3", "at": "attention.value"}
    for entries, scaled in (((lora, {**ia3, "after": "lora"}), True), ((ia3, {**lora, "after": "ia3"}), False)):
        model, tensors = bench.attach(*entries)
        at, scale = tensors_at(bench, tensors, "lora"), tensors_at(bench, tensors, "ia3")

        def both(i: int, role: str, x: Array, W: Array, b: Array, at: Any = at, scale: Any = scale,
                 scaled: bool = scaled) -> Array:  # fmt: skip
            if role != "value":
                return linear(x, W, b)
            t, s = at(i, role), scale(i, role)["l"]
            more = 6 / 4 * linear(linear(x, t["A"]), t["B"])
            return s * (linear(x, W, b) + more) if scaled else s * linear(x, W, b) + more

        bench.check(model, Places(linear=both))


def test_everywhere_at_once(bench: Bench) -> None:
    """Modules at all kinds of site together: each finds its place among the others."""
    model, tensors = bench.attach(
        {"method": "lora", "at": ["attention.query", "feed_forward.down"], "r": 4, "alpha": 6},
        {"method": "norm_tuning", "at": "feed_forward.norm"},
        {"method": "prefix", "at": "attention", "length": 3, "reparameterise": False},
        {"method": "bottleneck", "at": BLOCKS, "size": 6, "reads": "normed"},
    )
    at = {name: tensors_at(bench, tensors, name) for name in ("lora", "norm_tuning", "prefix", "bottleneck")}

    def lora(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at["lora"](i, role)
        return linear(x, W + 6 / 4 * t["B"] @ t["A"], b) if t else linear(x, W, b)

    def norm(i: int, role: str, gain: Array, shift: Array) -> tuple[Array, Array]:
        t = at["norm_tuning"](i, f"{role}.norm") if i >= 0 else {}
        return t.get("gain", gain), t.get("shift", shift)

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        t = at["bottleneck"](i, f"{role}.block")
        return y + linear(relu(linear(norm(y + r), t["down"], t["down_bias"])), t["up"], t["up_bias"])

    prefix = prefixed(lambda i: (at["prefix"](i, "attention")["K"], at["prefix"](i, "attention")["V"]))
    bench.check(model, Places(linear=lora, norm=norm, block=adapter, attention=prefix.attention))


# What is folded


FOLDED = 1e-6
"""Largest difference of a folded parameter as a share of the largest value: it is computed in float32."""


def folded(bench: Bench, *entries: Entry) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Folded parameters, the base's own, and the tensors, all in float64."""
    base = bench.toys.base(bench.name)
    plan, _ = plan_for(load_spec(bench.toys.spec(*entries)), base.folder)
    assert all(claim.absorbed for claim in plan.claims)
    tensors = bench.toys.weights(bench.name, plan)
    found = {f.name: f.array.astype(np.float64) for f in fold(plan, base, tensors)}
    own = {name: p.detach().double().numpy() for name, p in bench.toys.model(bench.name).named_parameters()}
    return found, own, {name: value.astype(np.float64) for name, value in tensors.items()}


LAST = {"bert": ("encoder.layer.1.attention.output.dense", "encoder.layer.1.attention.self.value"),
        "gpt2": ("transformer.h.1.attn.c_proj", "transformer.h.1.attn.c_attn")}  # fmt: skip


def oriented(bench: Bench, W: Array) -> Array:
    """A weight as [O, I]: GPT-2 stores [I, O]."""
    return W.T if bench.name == "gpt2" else W


@pytest.mark.parametrize("kind", ["linear_adapter", "bottleneck"])
def test_a_linear_map_after_a_map_is_folded(bench: Bench, kind: str) -> None:
    """W' = (I + s U D) W and b' = (I + s U D) b + s (U b_d + b_u), for a map of its own and for one after a block."""
    scale, site, name = (1.0, "attention.output", LAST[bench.name][0])
    entry: Entry = {"method": kind, "at": site, "size": 5}
    if kind == "bottleneck":
        scale, site = 0.7, "attention.block"
        entry |= {"at": site, "activation": "identity", "scale": scale}
    found, own, tensors = folded(bench, entry)
    t = {key: tensors[f"{kind}.{bench.site(1, site)}.{key}"] for key in ("down", "down_bias", "up", "up_bias")}
    M = np.eye(32) + scale * t["up"] @ t["down"]
    bias = M @ own[f"{name}.bias"] + scale * (t["up"] @ t["down_bias"] + t["up_bias"])
    bench.close(oriented(bench, found[f"{name}.weight"]), M @ oriented(bench, own[f"{name}.weight"]), FOLDED)
    bench.close(found[f"{name}.bias"], bias, FOLDED)


def test_an_order_is_folded(bench: Bench) -> None:
    """LoRA, (IA)³ and a linear adapter one after the other on values, the last third of GPT-2's fused map; the other
    thirds stay as they are, to the bit."""
    found, own, tensors = folded(
        bench,
        {"method": "lora", "at": "attention.value", "r": 4, "alpha": 6},
        {"method": "ia3", "at": "attention.value", "after": "lora"},
        {"method": "linear_adapter", "at": "attention.value", "size": 5, "after": "ia3"},
    )
    name, rest = LAST[bench.name][1], 64 if bench.name == "gpt2" else 0
    t = {key.split(f".{bench.site(1, 'attention.value')}.")[-1]: value for key, value in tensors.items()}
    W, b = oriented(bench, own[f"{name}.weight"]), own[f"{name}.bias"]
    M = (np.eye(32) + t["up"] @ t["down"]) @ np.diag(t["l"])
    bias = M @ b[rest:] + t["up"] @ t["down_bias"] + t["up_bias"]
    new_W, new_b = oriented(bench, found[f"{name}.weight"]), found[f"{name}.bias"]
    bench.close(new_W[rest:], M @ (W[rest:] + 6 / 4 * t["B"] @ t["A"]), FOLDED)
    bench.close(new_b[rest:], bias, FOLDED)
    assert np.array_equal(new_W[:rest], W[:rest]) and np.array_equal(new_b[:rest], b[:rest])


def test_a_bias_that_is_new_is_folded(toys: Any, close: Any) -> None:
    """Llama's maps have none; the file of the base has no name for it."""
    base = toys.base("llama")
    plan, _ = plan_for(load_spec(toys.spec({"method": "bitfit", "at": "attention.query"})), base.folder)
    tensors = toys.weights("llama", plan)
    found = {f.name: f.array for f in fold(plan, base, tensors)}
    for i in range(2):
        change = tensors[f"bitfit.decoder.layers.{i}.attention.query.change"]
        close(found[f"model.layers.{i}.self_attn.q_proj.weight.pelt_bias"], change, FOLDED)


@pytest.mark.parametrize("method, kind", [("bitfit", "bias"), ("lora", "weight")])
def test_only_what_changes_is_folded(bert: Bench, method: str, kind: str) -> None:
    found, own, _ = folded(bert, {"method": method, "at": "attention.query"})
    assert {name.rpartition(".")[2] for name, value in found.items() if not np.array_equal(value, own[name])} == {kind}
    assert {name.rpartition(".")[2] for name in found} == {kind}


@pytest.mark.parametrize("rule", COMPOSED)
def test_lorahub_is_folded(bench: Bench, rule: str) -> None:
    """By its own rule: on random weights the two are far apart."""
    entry = {"method": "lorahub", "at": "attention.value", "modules": 20, "r": 4, "alpha": 6, "rule": rule}
    found, own, tensors = folded(bench, entry)
    name, rest = LAST[bench.name][1], 64 if bench.name == "gpt2" else 0
    site = f"lorahub.{bench.site(1, 'attention.value')}"
    change = {key: 6 / 4 * f(tensors["lorahub.w"], tensors[f"{site}.A"], tensors[f"{site}.B"])
              for key, f in COMPOSED.items()}  # fmt: skip
    W, new = (oriented(bench, source[f"{name}.weight"])[rest:] for source in (own, found))
    bench.close(new, W + change[rule], FOLDED)
    assert f"{name}.bias" not in found
    apart = np.linalg.norm(change["factor_linear"] - change["delta_linear"]) / np.linalg.norm(change["delta_linear"])
    assert apart > 0.5
    with pytest.raises(AssertionError, match="differs by"):
        (other,) = set(change) - {rule}
        bench.close(new, W + change[other], EFFECT)


def test_a_replaced_map_is_folded(bench: Bench) -> None:
    """To the bit: nothing is computed."""
    found, _, tensors = folded(bench, {"method": "replace", "at": ["attention.output", "feed_forward.up"]})
    name, site = LAST[bench.name][0], f"replace.{bench.site(1, 'attention.output')}"
    assert len(found) == 8
    assert np.array_equal(oriented(bench, found[f"{name}.weight"]), tensors[f"{site}.weight"])
    assert np.array_equal(found[f"{name}.bias"], tensors[f"{site}.bias"])


def test_a_replaced_map_gets_no_bias(toys: Any) -> None:
    """Llama's maps have none: neither has what is trained, nor what is folded."""
    base = toys.base("llama")
    plan, _ = plan_for(load_spec(toys.spec({"method": "replace", "at": "attention.query"})), base.folder)
    tensors = toys.weights("llama", plan)
    assert {name.rpartition(".")[2] for name in tensors} == {"weight"}
    found = {f.name: f.array for f in fold(plan, base, tensors)}
    assert set(found) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    for i in range(2):
        expected = tensors[f"replace.decoder.layers.{i}.attention.query.weight"]
        assert np.array_equal(found[f"model.layers.{i}.self_attn.q_proj.weight"], expected)


# Witnesses: each of these mistakes must show.


def test_a_wrong_scale_shows(bench: Bench) -> None:
    model, tensors = bench.attach({"method": "parallel_adapter", "at": BLOCKS, "size": 6, "scale": 1.0001})
    at = tensors_at(bench, tensors, "parallel_adapter")

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        t = at(i, f"{role}.block")
        return y + linear(relu(linear(x, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    with pytest.raises(AssertionError, match="differs by"):
        bench.check(model, Places(block=adapter))


def test_swapped_factors_show(bench: Bench) -> None:
    model, tensors = bench.attach({"method": "lokr", "at": EVERY, "r": 0, "factor": 4})
    at = tensors_at(bench, tensors, "lokr")

    def lokr(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        return linear(x, W + np.kron(at(i, role)["w2"], at(i, role)["w1"]), b)

    with pytest.raises(AssertionError, match="differs by"):
        bench.check(model, Places(linear=lokr))


def test_a_missing_site_shows(bench: Bench) -> None:
    model, tensors = bench.attach({"method": "bitfit", "at": EVERY})
    at = tensors_at(bench, tensors, "bitfit")

    def bitfit(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        return linear(x, W, b) if (i, role) == (1, "down") else linear(x, W, b + at(i, role)["change"])

    with pytest.raises(AssertionError, match="differs by"):
        bench.check(model, Places(linear=bitfit))


def test_a_masked_prefix_shows(bench: Bench) -> None:
    model, tensors = bench.attach({"method": "prefix", "at": "attention", "length": 5, "reparameterise": False})
    at = tensors_at(bench, tensors, "prefix")
    with pytest.raises(AssertionError, match="differs by"):
        bench.check(model, prefixed(lambda i: (at(i, "attention")["K"], at(i, "attention")["V"]), masked=1))


def test_what_tiny_attention_sees_shows(bench: Bench) -> None:
    """Padding in sight, and the future where it should be hidden or the other way round."""
    mask = bench.inputs["attention_mask"].numpy()
    causal = bench.name != "bert"
    for seen, ahead in ((mask, not causal), (np.ones_like(mask), causal)):
        model, wrong = with_tiny_attention(bench, {}, seen, ahead)
        expected = bench.toys.answer(model, bench.inputs).numpy()[bench.real]
        with pytest.raises(AssertionError, match="differs by"):
            bench.close(bench.by_hand(wrong)[bench.real], expected, 1e-4)


def test_gates_of_a_whole_sequence_show(bench: Bench) -> None:
    """MoLE's are a token's own, and after a temperature."""
    model, tensors = bench.attach(MOLE)
    at = tensors_at(bench, tensors, "mole")

    def mole(sequence: bool, tempered: bool) -> Callable[[int, str, Array, Array, Array], Array]:
        def place(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
            t = at(i, role)
            gates = softmax(x @ t["router"].T / (t["temperature"] if tempered else 1))
            gates = gates.mean(1, keepdims=True) if sequence else gates
            return linear(x, W, b) + mole_delta(t, x, gates)

        return place

    for wrong in (mole(True, True), mole(False, False)):
        with pytest.raises(AssertionError, match="differs by"):
            bench.check(model, Places(linear=wrong))


def test_a_norm_after_the_activation_shows(bert: Bench) -> None:
    model, tensors = bert.attach({"method": "bottleneck", "at": BLOCKS, "size": 6, "inner_norm": "plain"})
    at = tensors_at(bert, tensors, "bottleneck")

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Callable[[Array], Array]) -> Array:
        t = at(i, f"{role}.block")
        return y + linear(INNER["plain"](t, relu(linear(y, t["down"], t["down_bias"]))), t["up"], t["up_bias"])

    with pytest.raises(AssertionError, match="differs by"):
        bert.check(model, Places(block=adapter))


def test_a_bias_that_stays_shows(bert: Bench) -> None:
    """A replaced map whose base's bias is still added."""
    model, tensors = bert.attach({"method": "replace", "at": EVERY})
    at = tensors_at(bert, tensors, "replace")

    def replace(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        return linear(x, at(i, role)["weight"], at(i, role)["bias"] + b)

    with pytest.raises(AssertionError, match="differs by"):
        bert.check(model, Places(linear=replace))
