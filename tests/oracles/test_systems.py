"""What combinators and recipes build, against the equations of the papers, written out by hand in float64.

The hand-written models are those of the closed forms. What the compiler makes is looked at in the artifact itself:
its constants, its operators, and what ONNX Runtime answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from oracles.test_closed_forms import (
    BLOCKS,
    EFFECT,
    EVERY,
    FOLDED,
    Array,
    Bench,
    Entry,
    Places,
    folded,
    layer_norm,
    linear,
    prefixed,
    relu,
    sigmoid,
    softmax,
    tensors_at,
)

import peltc
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.spec.combinators import COMBINATORS
from peltc.spec.diagnostics import Place
from peltc.spec.method import shipped

Norm = Callable[[Array], Array]
Block = Callable[[int, str, Array, Array, Array, Norm], Array]
Linear = Callable[[int, str, Array, Array, Array], Array]
PARTS = ("down", "down_bias", "up", "up_bias")


@pytest.fixture(params=["bert", "gpt2"])
def bench(request: pytest.FixtureRequest, toys: Any, close: Any) -> Bench:
    return Bench(toys, close, request.param)


@pytest.fixture
def bert(toys: Any, close: Any) -> Bench:
    return Bench(toys, close, "bert")


class Compiled:
    """An artifact: its graph's constants in float64, its operators, and its answer.

    Args:
        tensors: what it is compiled with; of a bank only where the seed shall not decide.
    """

    def __init__(self, bench: Bench, out: Path, tensors: Mapping[str, Array], *entries: Entry):
        single = {name: value.astype(np.float32) for name, value in tensors.items()}
        self.manifest = peltc.compile(bench.toys.spec(*entries), bench.toys.base(bench.name).folder, out, single,
                                      verify=False, self_contained=True)  # fmt: skip
        graph = ir.load(out / "model.onnx").graph
        self.constants = {
            name: value.const_value.numpy().astype(np.float64)
            for name, value in graph.initializers.items()
            if value.const_value is not None
        }
        self.operators = Counter(node.op_type for node in graph)
        inputs = {name: value.numpy() for name, value in bench.inputs.items()}
        self.answer = peltc.Session(out, threads=1)(**inputs)["last_hidden_state"]

    def own(self) -> dict[str, Array]:
        """The modules' constants, those of sizes and of conditions aside."""
        others = ("pelt.integers", "pelt.condition")
        return {n: a for n, a in self.constants.items() if n.startswith("pelt.") and not n.startswith(others)}

    def adapter(self, name: str, site: str) -> dict[str, Array]:
        """The constants of an adapter, oriented and named as in the method."""
        start = f"pelt.{name}.{site}."
        found = {n.removeprefix(start): a for n, a in self.constants.items() if n.startswith(start)}
        assert set(found) == {"weight", "bias", "weight.1", "bias.1"}
        return {"down": found["weight"].T, "down_bias": found["bias"], "up": found["weight.1"].T,
                "up_bias": found["bias.1"]}  # fmt: skip

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return sorted((name, array.shape) for name, array in self.constants.items())


def adapters(weights: Callable[[int, str], Mapping[str, Array]], reads: str = "normed", only: str = "",
             inner: Callable[[int, Array], Array] = lambda layer, u: u) -> Block:  # fmt: skip
    """Bottleneck adapters with these weights, after all sub-layers or those of one role."""

    def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Norm) -> Array:
        if only and role != only:
            return y
        t = weights(i, role)
        z = {"raw": y, "normed": norm(y + r)}[reads]
        return y + linear(relu(inner(i, linear(z, t["down"], t["down_bias"]))), t["up"], t["up_bias"])

    return adapter


def wrong(bench: Bench, model: Any, places: Places, *, least: float = EFFECT) -> None:
    """A mistake that the comparison must see, and not by a hair."""
    found = bench.toys.answer(model, bench.inputs).numpy()
    with pytest.raises(AssertionError, match="differs by"):
        bench.close(found[bench.real], bench.by_hand(places)[bench.real], least)


# X-PEFT: masks over a bank of adapters

N, K = 20, 7
XPEFT: Entry = {"recipe": "xpeft", "n": N, "k": K, "reduction": 4, "std": 2.0}


def k_hot(z: Array, k: int = K) -> Array:
    """Ones at the k largest; among equals the first."""
    chosen = sorted(range(len(z)), key=lambda i: (-z[i], i))[:k]
    return np.array([float(i in chosen) for i in range(len(z))])


MASKS: dict[str, tuple[Entry, Callable[[Array], Array]]] = {
    "hard": ({}, lambda z: k_hot(z) / K),
    "sum": ({"normalise": "sum"}, k_hot),
    "soft": ({"mask": "soft"}, softmax),
}


def mixture(m: Array, bank: Array) -> Array:
    return np.asarray(sum(m[i] * bank[i] for i in range(len(bank))))


def mixed(t: Mapping[str, Array], mask: Callable[[Array], Array]) -> dict[str, Array]:
    """Â = Σ mᵢ Aᵢ and B̂ = Σ m'ᵢ Bᵢ; each bias goes with its map."""
    return {name: mixture(mask(t[f"mask_{name.split('_')[0]}"]), t[f"{name}_bank"]) for name in PARTS}


def at_feed_forward(bench: Bench, tensors: Mapping[str, Array]) -> Callable[[int], dict[str, Array]]:
    at = tensors_at(bench, tensors, "bottleneck")
    return lambda layer: at(layer, "feed_forward.block")


@pytest.mark.parametrize("kind", MASKS)
def test_xpeft(bench: Bench, kind: str) -> None:
    """h + B̂ relu(Â LN(h + r)): the block's norm runs on the sum first, as Pfeiffer wires it on post-norm models."""
    options, mask = MASKS[kind]
    model, tensors = bench.attach({**XPEFT, **options})
    at = at_feed_forward(bench, tensors)
    assert at(0)["down_bank"].shape == (N, 8, 32) and at(0)["up_bias_bank"].shape == (N, 32)
    bench.check(model, Places(block=adapters(lambda i, _: mixed(at(i), mask), only="feed_forward")))


def test_xpeft_with_a_norm_of_ones_own(bench: Bench) -> None:
    """Between Â and the non-linearity; its gain and bias are the profile's, not of the bank."""
    model, tensors = bench.attach({**XPEFT, "inner_norm": "affine"})
    at = at_feed_forward(bench, tensors)
    assert at(0)["inner_gain"].shape == (8,)

    def inner(i: int, u: Array) -> Array:
        return layer_norm(u, at(i)["inner_gain"], at(i)["inner_bias"], 1e-5)

    block = adapters(lambda i, _: mixed(at(i), MASKS["hard"][1]), only="feed_forward", inner=inner)
    bench.check(model, Places(block=block))


def test_xpeft_among_equals(bert: Bench) -> None:
    """The lowest index wins: with nothing but zeros the first k, with one above the rest that one and the first."""
    tensors = bert.toys.weights("bert", bert.toys.plan("bert", XPEFT))
    for name in tensors:
        if "mask_" in name:
            tensors[name] = np.zeros(N, np.float32)
            tensors[name][-1] = float(name.endswith("up"))
    model = peltc.attach(bert.toys.model("bert").double(), bert.toys.spec(XPEFT), weights=tensors)
    at = at_feed_forward(bert, {name: value.astype(np.float64) for name, value in tensors.items()})

    def weights(i: int, role: str) -> dict[str, Array]:
        t = at(i)
        chosen = {"down": list(range(K)), "up": [*range(K - 1), N - 1]}
        return {name: t[f"{name}_bank"][chosen[name.split("_")[0]]].mean(0) for name in PARTS}

    bert.check(model, Places(block=adapters(weights, only="feed_forward")))


@pytest.mark.parametrize("kind", MASKS)
def test_xpeft_compiled(bert: Bench, tmp_path: Path, kind: str) -> None:
    """The artifact holds one adapter per layer, the mixture; the bank is gone, and what is answered is what masking at
    run time in torch answers. The bank is random, the same to torch and to the compiler without being handed over."""
    options, mask = MASKS[kind]
    entry = {**XPEFT, **options}
    plan = bert.toys.plan("bert", entry)
    own = {n: a for n, a in bert.toys.weights("bert", plan).items() if not n.endswith("_bank")}
    model = peltc.attach(bert.toys.model("bert").double(), bert.toys.spec(entry), weights=own)
    full = {name: model.pelt.parameter(name).detach().double().numpy() for name in plan.tensors}
    at = at_feed_forward(bert, full)
    found = Compiled(bert, tmp_path / "out", own, entry)
    for i in range(2):
        adapter = found.adapter("bottleneck", bert.site(i, "feed_forward.block"))
        for name, expected in mixed(at(i), mask).items():
            if expected.any():  # biases of a random bank are zero
                bert.close(adapter[name], expected, FOLDED)
            else:
                assert not adapter[name].any()
    assert not any(N in array.shape for array in found.constants.values())
    answer = bert.toys.answer(model, bert.inputs).numpy()
    bert.close(found.answer[bert.real], answer[bert.real], FOLDED)
    bert.check(model, Places(block=adapters(lambda i, _: mixed(at(i), mask), only="feed_forward")))
    plain = {"method": "bottleneck", "at": "feed_forward.block", "reduction": 4, "reads": "normed"}
    weights = bert.toys.weights("bert", bert.toys.plan("bert", plain))
    other = Compiled(bert, tmp_path / "plain", weights, plain)
    assert found.operators == other.operators and found.shapes() == other.shapes()


def test_mixing_outputs_is_another_function(bert: Bench) -> None:
    """Σ mᵢ (Bᵢ relu(Aᵢ z + aᵢ) + bᵢ), under one mask for both maps so that it is the fairest rival."""
    tensors = bert.toys.weights("bert", bert.toys.plan("bert", XPEFT))
    for name in [n for n in tensors if n.endswith("mask_up")]:
        tensors[name] = tensors[name.replace("mask_up", "mask_down")]
    model = peltc.attach(bert.toys.model("bert").double(), bert.toys.spec(XPEFT), weights=tensors)
    at = at_feed_forward(bert, {name: value.astype(np.float64) for name, value in tensors.items()})

    def outputs(i: int, role: str, y: Array, x: Array, r: Array, norm: Norm) -> Array:
        if role != "feed_forward":
            return y
        t, z = at(i), norm(y + r)
        m = k_hot(t["mask_down"]) / K
        each = [linear(relu(linear(z, t["down_bank"][n], t["down_bias_bank"][n])), t["up_bank"][n],
                       t["up_bias_bank"][n]) for n in range(N)]  # fmt: skip
        return y + mixture(m, np.stack(each))

    wrong(bert, model, Places(block=outputs))
    weights = adapters(lambda i, _: mixed(at(i), MASKS["hard"][1]), only="feed_forward")
    bert.check(model, Places(block=weights))


def test_mistakes_with_masks_show(bert: Bench) -> None:
    """Biases under the other map's mask, one mask for both maps, one layer's for all, another wiring, no 1 / k."""
    model, tensors = bert.attach(XPEFT)
    at, mask = at_feed_forward(bert, tensors), MASKS["hard"][1]

    def swapped(i: int, role: str) -> dict[str, Array]:
        t = at(i)
        other = {**t, "mask_down": t["mask_up"], "mask_up": t["mask_down"]}
        return {**mixed(t, mask), **{name: mixed(other, mask)[name] for name in ("down_bias", "up_bias")}}

    for weights in (
        swapped,
        lambda i, _: mixed({**at(i), "mask_up": at(i)["mask_down"]}, mask),
        lambda i, _: mixed({**at(i), **{f"mask_{m}": at(0)[f"mask_{m}"] for m in ("down", "up")}}, mask),
        lambda i, _: mixed(at(i), k_hot),
        lambda i, _: mixed(at(i), softmax),
    ):
        wrong(bert, model, Places(block=adapters(weights, only="feed_forward")))
    wrong(bert, model, Places(block=adapters(lambda i, _: mixed(at(i), mask), "raw", "feed_forward")))


@pytest.mark.parametrize("mask", ["hard", "soft"])
def test_mixtures_at_full_size(close: Any, mask: str) -> None:
    """N = 100, b = 48, d = 768, 128 tokens, as the compiler's interpreter computes them in float32: 5e-7 at most, the
    mixture itself and what the adapter makes of it."""
    random = np.random.default_rng(0)
    settings = {**COMBINATORS["bank"].defaults, "size": 100, "k": 50, "mask": mask}
    whole = shipped()["bottleneck"]
    method = whole.chosen({option.name: option.default for option in whole.options})
    let = dict(COMBINATORS["bank"].rewrite(method, settings, Place("<test>")).let)
    single = {
        "mask_down": random.normal(size=100), "mask_up": random.normal(size=100),
        "down_bank": random.normal(0, 0.02, (100, 48, 768)), "down_bias_bank": random.normal(0, 0.02, (100, 48)),
        "up_bank": random.normal(0, 0.02, (100, 768, 48)), "up_bias_bank": random.normal(0, 0.02, (100, 768)),
    }  # fmt: skip
    single = {name: value.astype(np.float32) for name, value in single.items()}
    scope: dict[str, Any] = dict(single)
    interpreter = NumericInterpreter()
    for name in ("weights_down", "weights_up", *PARTS):
        scope[name] = interpreter.evaluate(let[name], scope)
        assert scope[name].dtype == np.float32
    double = {name: value.astype(np.float64) for name, value in single.items()}
    weigh = softmax if mask == "soft" else lambda z: k_hot(z, 50) / 50
    exact = mixed(double, weigh)
    x = random.normal(size=(128, 768)).astype(np.float32)

    def adapter(t: Mapping[str, Array], z: Array) -> Array:
        return linear(relu(linear(z, t["down"], t["down_bias"])), t["up"], t["up_bias"])

    for name in PARTS:
        close(scope[name], exact[name], 5e-7)
    close(adapter(scope, x), adapter(exact, x.astype(np.float64)), 5e-7)
    assert np.abs(adapter(scope, x) - adapter(exact, x.astype(np.float64))).max() < 5e-7
    with pytest.raises(AssertionError, match="differs by"):
        close(mixed(double, lambda z: weigh(z) * (1 + 1e-6))["down"], scope["down"], 5e-7)


# ProPETL: parts of one shared adapter


def how_many(share: str, n: int) -> int:
    """n - ⌊(1 - share) n⌋, as the authors' code rounds."""
    return n - int((1 - Fraction(share)) * n)


def kept(scores: Array, share: str) -> Array:
    """1 at the scores that are largest in size."""
    count = how_many(share, scores.size)
    order = sorted(range(scores.size), key=lambda i: (-abs(scores.flat[i]), i))
    return np.isin(np.arange(scores.size), order[:count]).astype(float).reshape(scores.shape)


def parts(bench: Bench, tensors: Mapping[str, Array], share: str) -> Callable[[int, str], dict[str, Array]]:
    """The adapter of each layer: elements of the one prototype, and its biases whole."""
    at = at_feed_forward(bench, tensors)

    def weights(i: int, role: str) -> dict[str, Array]:
        t = at(i)
        matrices = {n: tensors[f"bottleneck.{n}_prototype"] * kept(t[f"{n}_scores"], share) for n in ("down", "up")}
        return {**matrices, **{n: tensors[f"bottleneck.{n}"] for n in ("down_bias", "up_bias")}}

    return weights


@pytest.mark.parametrize("share", ["0.5", "0.3", "0.29", "1"])
def test_propetl(bench: Bench, share: str) -> None:
    model, tensors = bench.attach({"recipe": "propetl", "reduction": 8, "keep": float(share)})
    prototypes = {name: value.shape for name, value in tensors.items() if name.endswith("prototype")}
    assert prototypes == {"bottleneck.down_prototype": (4, 32), "bottleneck.up_prototype": (32, 4)}
    weights = parts(bench, tensors, share)
    assert np.count_nonzero(weights(0, "")["down"]) == how_many(share, 128)
    bench.check(model, Places(block=adapters(weights, only="feed_forward")))


@pytest.mark.parametrize("share", ["0.5", "0.3"])
def test_propetl_compiled(bert: Bench, tmp_path: Path, share: str) -> None:
    """Masks are multiplied in, to the bit; neither prototype nor scores are left, and layers keep different parts."""
    entry = {"recipe": "propetl", "reduction": 8, "keep": float(share)}
    _, tensors = bert.attach(entry)
    found, weights = Compiled(bert, tmp_path / "out", tensors, entry), parts(bert, tensors, share)
    adapter = [found.adapter("bottleneck", bert.site(i, "feed_forward.block")) for i in range(2)]
    for i in range(2):
        for name in PARTS:
            assert np.array_equal(adapter[i][name], weights(i, "")[name])
            if not name.endswith("bias"):
                assert np.count_nonzero(adapter[i][name]) == how_many(share, 128)
    both = (adapter[0]["down"] != 0) & (adapter[1]["down"] != 0)
    assert 0 < both.sum() < how_many(share, 128)
    assert np.array_equal(adapter[0]["down"][both], adapter[1]["down"][both])
    assert len(found.own()) == 8
    expected = bert.by_hand(Places(block=adapters(weights, only="feed_forward")))
    bert.close(found.answer[bert.real], expected[bert.real], FOLDED)


def test_mistakes_with_prototypes_show(bert: Bench) -> None:
    """The smallest scores, signed ones, one element more, masked biases, one layer's mask for all."""
    model, tensors = bert.attach({"recipe": "propetl", "reduction": 8, "keep": 0.3})
    right = parts(bert, tensors, "0.3")

    def scores(change: Callable[[Array], Array], share: str = "0.3") -> Callable[[int, str], dict[str, Array]]:
        changed = {name: change(value) if name.endswith("scores") else value for name, value in tensors.items()}
        return parts(bert, changed, share)

    def masked(i: int, role: str) -> dict[str, Array]:
        t = right(i, role)
        return {**t, **{f"{n}_bias": t[f"{n}_bias"] * (np.arange(len(t[f"{n}_bias"])) % 2) for n in ("down", "up")}}

    for weights, least in (
        (scores(lambda s: 1 / s), EFFECT),
        (scores(lambda s: np.exp(s)), EFFECT),
        (scores(lambda s: s, "0.31"), 1e-4),
        (masked, EFFECT),
        (lambda i, role: right(0, role), EFFECT),
    ):
        wrong(bert, model, Places(block=adapters(weights, only="feed_forward")), least=least)


# HyperPELT: networks that write adapters and prefixes

HYPER: Entry = {"recipe": "hyperpelt", "tasks": 3, "size": 6, "hidden": 10, "length": 3, "reduction": 8}
ROLES = ("attention", "feed_forward")


def written(t: Mapping[str, Array], name: str, task: int, layer: int, role: int) -> dict[str, Array]:
    """What an attachment's network writes: I = W₂ relu(W₁ [z ; l ; b] + c₁) + c₂ and W = U I, still flat."""
    where = [t["hyper.task_embedding"][task], t["hyper.layer_embedding"][layer], t[f"{name}.role_embedding"][role]]
    inner = relu(t[f"{name}.hyper_down"] @ np.concatenate(where) + t[f"{name}.hyper_down_bias"])
    hyper = t[f"{name}.hyper_up"] @ inner + t[f"{name}.hyper_up_bias"]
    start, end = f"{name}.", "_generator"
    return {key.removeprefix(start).removesuffix(end): U @ hyper for key, U in t.items()
            if key.startswith(start) and key.endswith(end)}  # fmt: skip


def hyper_adapter(t: Mapping[str, Array], task: int, layer: int, role: str) -> dict[str, Array]:
    flat = written(t, "adapter", task, layer, ROLES.index(role))
    return {"down": flat["down"].reshape(4, 32), "down_bias": flat["down_bias"], "up": flat["up"].reshape(32, 4),
            "up_bias": flat["up_bias"]}  # fmt: skip


def hyper_prefix(t: Mapping[str, Array], task: int, layer: int) -> tuple[Array, Array]:
    """[heads, length, width of a head]"""
    flat = written(t, "prefix", task, layer, 0)
    return flat["K"].reshape(4, 3, 8), flat["V"].reshape(4, 3, 8)


def hyper_places(bench: Bench, t: Mapping[str, Array], task: int) -> Places:
    """Adapters after both sub-layers, prefixes, and norms that are trained beside them."""

    def norm(i: int, role: str, gain: Array, shift: Array) -> tuple[Array, Array]:
        place = f"{'embedding' if role == 'embedding' else bench.site(i, role)}.norm"
        if role == "final":
            place = "final_norm"
        if not any(name.startswith("norm_tuning.") for name in t):
            return gain, shift
        return t[f"norm_tuning.{place}.gain"], t[f"norm_tuning.{place}.shift"]

    return Places(block=adapters(lambda i, role: hyper_adapter(t, task, i, role), "raw"), norm=norm,
                  attention=prefixed(lambda i: hyper_prefix(t, task, i)).attention)  # fmt: skip


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("task", [0, 2])
def test_hyperpelt(bench: Bench, task: int, norms: bool) -> None:
    model, tensors = bench.attach({**HYPER, "task": task, "norms": norms})
    bench.check(model, hyper_places(bench, tensors, task))


def test_hyperpelt_writes_each_place_its_own(bert: Bench) -> None:
    _, t = bert.attach(HYPER)
    everywhere = [hyper_adapter(t, task, i, role)["down"] for task in range(2) for i in range(2) for role in ROLES]
    everywhere += [hyper_prefix(t, task, i)[0] for task in range(2) for i in range(2)]
    assert len({array.tobytes() for array in everywhere}) == len(everywhere) == 12


def test_hyperpelt_compiled(bert: Bench, tmp_path: Path) -> None:
    """Two tasks, two artifacts: of each the constants are what the network writes, and the network is gone. What is
    left, operator by operator and constant by constant, is adapters, prefixes and norms that nobody wrote."""
    entries = [{**HYPER, "task": task} for task in range(2)]
    _, t = bert.attach(entries[0])
    # Smaller than elsewhere: large prefixes and adapters magnify what float32 rounds in every layer before.
    t = {name: value * (0.3 if name.endswith("_generator") else 1) for name, value in t.items()}
    t = {name: value.astype(np.float32).astype(np.float64) for name, value in t.items()}
    artifacts = [Compiled(bert, tmp_path / f"task{task}", t, entry) for task, entry in enumerate(entries)]
    for task, found in enumerate(artifacts):
        for i in range(2):
            for role in ROLES:
                adapter = found.adapter("adapter", bert.site(i, f"{role}.block"))
                for name, expected in hyper_adapter(t, task, i, role).items():
                    bert.close(adapter[name], expected, FOLDED)
            start = f"pelt.prefix.{bert.site(i, 'attention')}.constant"
            prefix = [a for n, a in sorted(found.constants.items()) if n.startswith(start) and a.ndim == 3]
            for array, expected in zip(prefix, hyper_prefix(t, task, i), strict=True):
                bert.close(array, expected, FOLDED)
        bert.close(found.answer[bert.real], bert.by_hand(hyper_places(bert, t, task))[bert.real], FOLDED)
        network = {value.shape for name, value in t.items() if name.split(".")[0] != "norm_tuning"}
        assert not network & {array.shape for array in found.own().values()}
        assert not any(word in name for name in found.constants for word in ("hyper", "generator", "embedding_"))
    one, two = artifacts
    assert one.shapes() == two.shapes() and one.operators == two.operators
    assert {n for n in one.own() if one.own()[n].ndim and np.array_equal(one.own()[n], two.own()[n])} == set()
    with pytest.raises(AssertionError, match="differs by"):
        bert.close(one.answer, two.answer, EFFECT)
    plain = (
        {"method": "bottleneck", "name": "adapter", "at": BLOCKS, "reduction": 8},
        {"method": "prefix", "at": "attention", "length": 3, "reparameterise": False},
        {"method": "norm_tuning", "at": "*norm"},
    )
    weights = bert.toys.weights("bert", bert.toys.plan("bert", *plain))
    rest = Compiled(bert, tmp_path / "plain", weights, *plain)
    assert rest.operators == one.operators and rest.shapes() == one.shapes()


def test_mistakes_with_networks_show(bert: Bench) -> None:
    """Another task, roles or layers swapped, keys in place of values, a matrix filled column by column."""
    model, t = bert.attach(HYPER)
    right = hyper_places(bert, t, 0)

    def blocks(weights: Callable[[int, str], Mapping[str, Array]]) -> Places:
        return Places(block=adapters(weights, "raw"), norm=right.norm, attention=right.attention)

    def columns(i: int, role: str) -> dict[str, Array]:
        flat = written(t, "adapter", 0, i, ROLES.index(role))
        return {**hyper_adapter(t, 0, i, role), "down": flat["down"].reshape(32, 4).T}

    def prefix(keys: Callable[[int], tuple[Array, Array]]) -> Places:
        return Places(block=right.block, norm=right.norm, attention=prefixed(keys).attention)

    for places in (
        hyper_places(bert, t, 1),
        blocks(lambda i, role: hyper_adapter(t, 0, i, ROLES[1 - ROLES.index(role)])),
        blocks(lambda i, role: hyper_adapter(t, 0, 1 - i, role)),
        blocks(columns),
        prefix(lambda i: hyper_prefix(t, 0, 1 - i)),
        prefix(lambda i: hyper_prefix(t, 0, i)[::-1]),
        Places(block=right.block, attention=right.attention),
    ):
        wrong(bert, model, places)


# Gates


def lora_places(bench: Bench, tensors: Mapping[str, Array], factor: Callable[[Mapping[str, Array], Array], Any],
                name: str = "lora") -> Places:  # fmt: skip
    """LoRA whose change is multiplied by a factor, of its tensors and the map's input."""
    at = tensors_at(bench, tensors, name)

    def lora(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
        t = at(i, role)
        return linear(x, W, b) + factor(t, x) * linear(linear(x, t["A"]), t["B"])

    return Places(linear=lora)


def gate_of(bench: Bench, t: Mapping[str, Array], z: Array, padding: bool) -> Array:
    """σ of every token, and then the mean over the sequence; over its tokens alone, where padding is left out."""
    each = sigmoid(linear(z, t["gate_weight"], t["gate_bias"]))
    if padding:
        return np.asarray(each.mean(1, keepdims=True))
    return np.stack([row[real].mean(0, keepdims=True) for row, real in zip(each, bench.real, strict=True)])


@pytest.mark.parametrize("replaces", [True, False])
def test_a_constant_gate(bench: Bench, replaces: bool) -> None:
    """One number in place of the scale or beside it; folded into the base's weights like any other."""
    entry = {"method": "lora", "at": EVERY, "r": 4, "gate": {"constant": True, "replaces_scale": replaces}}
    model, tensors = bench.attach(entry)
    alpha = 16
    scale = 1.0 if replaces else alpha / 4
    bench.check(model, lora_places(bench, tensors, lambda t, x: scale * t["gate"]))
    wrong(bench, model, lora_places(bench, tensors, lambda t, x: (alpha / 4 if replaces else 1.0) * t["gate"]))
    found, own, tensors = folded(bench, entry)
    at = tensors_at(bench, tensors, "lora")
    for i in range(2):
        t = at(i, "output")
        name = f"encoder.layer.{i}.attention.output.dense" if bench.name == "bert" else f"transformer.h.{i}.attn.c_proj"
        turn = (lambda a: a.T) if bench.name == "gpt2" else (lambda a: a)
        expected = turn(own[f"{name}.weight"]) + scale * t["gate"] * t["B"] @ t["A"]
        bench.close(turn(found[f"{name}.weight"]), expected, FOLDED)


def test_a_constant_gate_on_an_adapter(bert: Bench, tmp_path: Path) -> None:
    """F8: what is deployed is the adapter with Wu' = g Wu and bu' = g bu, and not an operator more."""
    plain = {"method": "bottleneck", "at": BLOCKS, "size": 6}
    entry = {**plain, "gate": {"constant": True}}
    model, tensors = bert.attach(entry)
    at = tensors_at(bert, tensors, "bottleneck")

    def scaled(i: int, role: str, own: float = 1.0) -> dict[str, Array]:
        t = at(i, f"{role}.block")
        return {**t, "up": own * t["gate"] * t["up"], "up_bias": own * t["gate"] * t["up_bias"]}

    bert.check(model, Places(block=adapters(scaled, "raw")))
    wrong(bert, model, Places(block=adapters(lambda i, role: scaled(i, role, 0.7), "raw")))

    def unscaled_bias(i: int, role: str) -> dict[str, Array]:
        return {**scaled(i, role), "up_bias": at(i, f"{role}.block")["up_bias"]}

    wrong(bert, model, Places(block=adapters(unscaled_bias, "raw")))
    found = Compiled(bert, tmp_path / "gated", tensors, entry)
    bare = Compiled(bert, tmp_path / "plain", {n: a for n, a in tensors.items() if not n.endswith(".gate")}, plain)
    assert found.operators == bare.operators and found.shapes() == bare.shapes()
    for i in range(2):
        for role in ("attention", "feed_forward"):
            adapter = found.adapter("bottleneck", bert.site(i, f"{role}.block"))
            for name in PARTS:
                bert.close(adapter[name], scaled(i, role)[name], FOLDED)


def test_a_constant_gate_on_a_prefix(bench: Bench) -> None:
    """It scales the prefix's keys and values, and not the sequence's own."""
    entry = {"method": "prefix", "at": "attention", "length": 3, "reparameterise": False, "gate": {"constant": True}}
    model, tensors = bench.attach(entry)
    at = tensors_at(bench, tensors, "prefix")

    def keys(scales: tuple[bool, bool]) -> Callable[[int], tuple[Array, Array]]:
        def find(i: int) -> tuple[Array, Array]:
            t = at(i, "attention")
            g = t["gate"].item()
            return (g if scales[0] else 1) * t["K"], (g if scales[1] else 1) * t["V"]

        return find

    bench.check(model, prefixed(keys((True, True))))
    wrong(bench, model, prefixed(keys((True, False))), least=1e-4)
    wrong(bench, model, prefixed(keys((False, True))), least=1e-4)


@pytest.mark.parametrize("scales", ["change", "result"])
@pytest.mark.parametrize("constant", [True, False])
def test_what_a_gate_scales(bert: Bench, scales: str, constant: bool) -> None:
    """(IA)³ replaces an output y by l ⊙ y: its change, y + g (l ⊙ y - y), or its result, g l ⊙ y."""
    model, tensors = bert.attach({"method": "ia3", "at": ["attention.key", "feed_forward.up"],
                                  "gate": {"scales": scales, "constant": constant}})  # fmt: skip
    at = tensors_at(bert, tensors, "ia3")

    def ia3(scales: str) -> Places:
        def place(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
            t, y = at(i, role), linear(x, W, b)
            if role not in ("key", "up"):
                return y
            g = t["gate"] if constant else gate_of(bert, t, x, True)
            return y + g * (t["l"] * y - y) if scales == "change" else g * t["l"] * y

        return Places(linear=place)

    bert.check(model, ia3(scales))
    wrong(bert, model, ia3({"change": "result", "result": "change"}[scales]))


@pytest.mark.parametrize("padding", [True, False])
def test_padding_in_a_gate(bert: Bench, padding: bool) -> None:
    """The authors' code averages over padding too; `mask_padding` leaves it out. Each is seen to be the other's
    mistake, and so is the sigmoid of the mean in place of the mean of sigmoids."""
    gate = {"mask_padding": not padding}
    model, tensors = bert.attach({"method": "lora", "at": EVERY, "r": 4, "gate": gate})
    bert.check(model, lora_places(bert, tensors, lambda t, x: gate_of(bert, t, x, padding)))
    wrong(bert, model, lora_places(bert, tensors, lambda t, x: gate_of(bert, t, x, not padding)), least=1e-4)

    def late(t: Mapping[str, Array], x: Array) -> Array:
        return sigmoid(linear(x.mean(1, keepdims=True), t["gate_weight"], t["gate_bias"]))

    wrong(bert, model, lora_places(bert, tensors, late), least=1e-4)


def test_padding_left_out_of_gates(bench: Bench) -> None:
    """On maps that stand side by side, adapters, and prefixes, whose gates read what the attention reads."""
    gate = {"gate": {"mask_padding": True}}
    model, tensors = bench.attach(
        {"method": "lora", "at": EVERY, "r": 4, **gate},
        {"method": "bottleneck", "at": BLOCKS, "size": 6, "reads": "normed", **gate},
    )
    at = tensors_at(bench, tensors, "bottleneck")

    def block(padding: bool) -> Block:
        def adapter(i: int, role: str, y: Array, x: Array, r: Array, norm: Norm) -> Array:
            t, z = at(i, f"{role}.block"), norm(y + r)
            delta = linear(relu(linear(z, t["down"], t["down_bias"])), t["up"], t["up_bias"])
            return y + gate_of(bench, t, z, padding) * delta

        return adapter

    lora = lora_places(bench, tensors, lambda t, x: gate_of(bench, t, x, False)).linear
    bench.check(model, Places(linear=lora, block=block(False)))
    wrong(bench, model, Places(linear=lora, block=block(True)), least=1e-4)


# AdaMix over LoRA


def averaged(t: Mapping[str, Array], products: bool = False) -> Array:
    """What is deployed: the mean of B times the mean of A. The rival is the mean of products."""
    A, B = (t.get(f"{name}_experts", t.get(name, np.zeros(0))[None] if name in t else None) for name in ("A", "B"))
    assert A is not None and B is not None
    if products:
        count = max(len(A), len(B))
        return np.asarray(sum(B[j % len(B)] @ A[j % len(A)] for j in range(count)) / count)
    return np.asarray((sum(B) / len(B)) @ (sum(A) / len(A)))


@pytest.mark.parametrize("share", ["B", "A", ""])
def test_adamix_lora(bench: Bench, share: str) -> None:
    """s · B̄ Ā. With one factor shared that is the mean of products as well; with none it is not."""
    entry = {"recipe": "adamix_lora", "experts": 5, "r": 3, "alpha": 7, "share": share}
    model, tensors = bench.attach(entry)
    at = tensors_at(bench, tensors, "lora")
    assert set(at(0, "query")) == {name if name == share else f"{name}_experts" for name in "AB"}

    def lora(products: bool) -> Places:
        def place(i: int, role: str, x: Array, W: Array, b: Array) -> Array:
            change = 7 / 3 * averaged(at(i, role), products) if role in ("query", "value") else 0
            return linear(x, W + change, b)

        return Places(linear=place)

    bench.check(model, lora(False))
    if share:
        bench.check(model, lora(True))
    else:
        wrong(bench, model, lora(True))


@pytest.mark.parametrize("share", ["B", ""])
def test_adamix_lora_is_folded(bench: Bench, share: str) -> None:
    found, own, tensors = folded(bench, {"recipe": "adamix_lora", "experts": 5, "r": 3, "alpha": 7, "share": share})
    at = tensors_at(bench, tensors, "lora")
    for i in range(2):
        for place, role in ((0, "query"), (2, "value")):
            if bench.name == "bert":
                name = f"encoder.layer.{i}.attention.self.{role}.weight"
                W, new = own[name], found[name]
            else:
                name = f"transformer.h.{i}.attn.c_attn.weight"
                W, new = (source[name].T[32 * place : 32 * place + 32] for source in (own, found))
            bench.close(new, W + 7 / 3 * averaged(at(i, role)), FOLDED)
            rival = W + 7 / 3 * averaged(at(i, role), products=True)
            if share:
                bench.close(new, rival, FOLDED)
            else:
                with pytest.raises(AssertionError, match="differs by"):
                    bench.close(new, rival, EFFECT)


def test_adamix_lora_compiled(bert: Bench, tmp_path: Path) -> None:
    """Experts are gone: the artifact has the base's operators, and its answer is that of the averaged weights."""
    entry = {"recipe": "adamix_lora", "experts": 5, "r": 3, "alpha": 7, "share": ""}
    model, tensors = bert.attach(entry)
    found = Compiled(bert, tmp_path / "out", tensors, entry)
    assert not found.own() and all(module["absorbed"] for module in found.manifest["modules"])
    answer = bert.toys.answer(model, bert.inputs)
    assert answer.dtype == torch.float64
    bert.close(found.answer[bert.real], answer.numpy()[bert.real], FOLDED)


# Methods with a closed form, compiled

METHODS: dict[str, Entry] = {
    "mole": {"method": "mole", "at": "attention.query", "experts_count": 3, "r": 3, "alpha": 7},
    "lorahub": {"method": "lorahub", "at": "attention.query", "modules": 5, "r": 3, "alpha": 7},
    "lorahub-delta": {"method": "lorahub", "at": "attention.query", "modules": 5, "r": 3, "rule": "delta_linear"},
    "tiny_attention": {"method": "tiny_attention", "at": "feed_forward.block", "size": 3},
    "tiny_attention-early": {"method": "tiny_attention", "at": "attention.block", "size": 3},
    "inner_norm-plain": {"method": "bottleneck", "at": "feed_forward.block", "size": 6, "inner_norm": "plain"},
    "inner_norm-affine": {"method": "bottleneck", "at": "feed_forward.block", "size": 6, "inner_norm": "affine"},
    "replace": {"method": "replace", "at": "attention.query"},
    "gate": {"method": "lora", "at": "attention.query", "gate": True},
    "gate-masked": {"method": "lora", "at": "attention.query", "gate": {"mask_padding": True}},
    "gate-result": {"method": "ia3", "at": "attention.key", "gate": {"scales": "result"}},
    "gate-change": {"method": "ia3", "at": "attention.key", "gate": {"scales": "change"}},
}


@pytest.mark.parametrize("case", METHODS)
def test_compiled_methods(bert: Bench, tmp_path: Path, case: str) -> None:
    """On ONNX Runtime: float32 against what torch, which is held against the closed forms, computes in float64."""
    entry = METHODS[case]
    model, tensors = bert.attach(entry)
    found = Compiled(bert, tmp_path / "out", tensors, entry)
    answer = bert.toys.answer(model, bert.inputs).numpy()
    bert.close(found.answer[bert.real], answer[bert.real], FOLDED)
    other = Compiled(bert, tmp_path / "other", {name: 1.001 * value for name, value in tensors.items()}, entry)
    with pytest.raises(AssertionError, match="differs by"):
        bert.close(other.answer[bert.real], answer[bert.real], FOLDED)
