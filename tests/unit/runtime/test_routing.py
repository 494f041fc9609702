"""Experts: AdaMix's random routing in training, and its averaged weights in deployment, against the equations."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import answer, shake
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification

import peltc
from peltc.runtime.training.draws import Draws
from peltc.runtime.training.interpreter import TorchInterpreter
from peltc.runtime.training.loop import consistency_loss

ADAMIX = {"recipe": "adamix", "experts": 2, "size": 4}
APART = {**ADAMIX, "share": ""}
LORA = {"recipe": "adamix_lora", "experts": 4}
LORA_APART = {**LORA, "share": ""}
LAYERS = 2
PASSES = 160
"""So many passes miss one of 16 routes with a probability of 5e-4; the seed is fixed."""

Tensors = dict[str, torch.Tensor]


class Soup(nn.Module):
    """AdaMix's block around the feed-forward network's last map: y = x + Wu_k gelu(Wd_j x + bd_j) + bu_k."""

    def __init__(self, dense: nn.Module, p: Tensors):
        super().__init__()
        self.dense, self.p = dense, p

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x, p = self.dense(hidden), self.p
        return x + F.linear(F.gelu(F.linear(x, p["down"], p["down_bias"])), p["up"], p["up_bias"])


class OutputsAveraged(Soup):
    """The mistake: as many adapters as there are experts, and the mean of what they answer."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x, p = self.dense(hidden), self.p
        experts = zip(p["down"], p["down_bias"], strict=True)
        return x + sum(F.linear(F.gelu(F.linear(x, w, b)), p["up"], p["up_bias"]) for w, b in experts) / len(p["down"])


def tensors(model: Any, layer: int, site: str) -> Tensors:
    """A site's tensors by their names in the method, in the model's type."""
    claim = next(c for c in model.pelt.plan.claims if c.site.name == f"encoder.layers.{layer}.{site}")
    dtype = next(model.bert.parameters()).dtype
    return {name: model.pelt.parameter(t.name).detach().to(dtype) for name, t in claim.tensors.items()}


def averaged(p: Tensors) -> Tensors:
    """The authors' deployment: a softmax over frozen scores of zero weighs the experts."""
    result = {}
    for name, tensor in p.items():
        scores = torch.softmax(torch.zeros(len(tensor), dtype=tensor.dtype), 0)
        weighed = scores.reshape(-1, *[1] * (tensor.dim() - 1)) * tensor
        result[name.removesuffix("_experts")] = weighed.sum(0) if name.endswith("_experts") else tensor
    return result


def drawn(p: Tensors, down: int, up: int) -> Tensors:
    """One expert for each of the two maps."""
    chosen = {"down": down, "down_bias": down, "up": up, "up_bias": up}
    return {
        n.removesuffix("_experts"): t[chosen[n.removesuffix("_experts")]] if n.endswith("_experts") else t
        for n, t in p.items()
    }


def transcribed(model: Any, blocks: list[Tensors], kind: type[Soup] = Soup) -> Any:
    """The model's base with the equations in it, apart from any formula."""
    again = copy.deepcopy(model.bare)
    for layer, p in zip(again.bert.encoder.layer, blocks, strict=True):
        layer.output.dense = kind(layer.output.dense, p)
    return again


@pytest.fixture
def adamix(attached: Any, base: Any) -> Any:
    """`adamix(entry, ...)`: a model in float64, and its bare base as `.bare`."""

    def build(*entries: Any, **more: Any) -> Any:
        model = attached(*entries, dtype="float64", **more)
        object.__setattr__(model, "bare", copy.deepcopy(base).double())
        return model

    return build


@pytest.mark.parametrize("entry", [ADAMIX, APART], ids=["shared-up", "apart"])
def test_deployment_is_the_published_one_to_the_bit(entry: Any, adamix: Any, inputs: Any) -> None:
    model = adamix(entry)
    expected = transcribed(model, [averaged(tensors(model, i, "feed_forward.block")) for i in range(LAYERS)])
    assert torch.equal(answer(model, inputs), answer(expected, inputs))


def routes(model: Any, inputs: Any) -> list[tuple[int, ...]]:
    """For many passes which route each took: (down, up) of the first layer, then of the second; all routes are tried,
    and exactly one must give the same answer to the bit."""
    blocks = [tensors(model, i, "feed_forward.block") for i in range(LAYERS)]
    known = {}
    for route in product(range(2), repeat=2 * LAYERS):
        again = transcribed(model, [drawn(p, *route[2 * i : 2 * i + 2]) for i, p in enumerate(blocks)])
        known[answer(again, inputs).numpy().tobytes()] = route
    assert len(known) == 2 ** (2 * LAYERS), "two routes that cannot be told apart"
    torch.manual_seed(0)
    found = [known.get(answer(model, inputs).numpy().tobytes()) for _ in range(PASSES)]
    assert None not in found, "a pass took none of the routes"
    return found  # type: ignore[return-value]


def test_every_route_is_taken(adamix: Any, inputs: Any) -> None:
    """Down and up, and the two blocks, are drawn apart; a weight and its bias together; anew in every pass."""
    taken = routes(adamix(APART, training=True), inputs)
    assert len(set(taken)) == 16
    assert max(taken.count(route) for route in set(taken)) < 3 * PASSES / 16


def test_a_shared_projection_is_not_drawn(adamix: Any, inputs: Any) -> None:
    model = adamix(ADAMIX, training=True)
    assert set(tensors(model, 0, "feed_forward.block")) == {"down_experts", "down_bias_experts", "up", "up_bias"}
    torch.manual_seed(0)
    assert len({answer(model, inputs).numpy().tobytes() for _ in range(60)}) == 4


def test_deployment_draws_nothing(adamix: Any, inputs: Any) -> None:
    model, state = adamix(APART), torch.get_rng_state()
    first = answer(model, inputs)
    assert torch.equal(first, answer(model, inputs)) and torch.equal(state, torch.get_rng_state())


def test_evaluating_twice_with_training_between_is_not_stale(adamix: Any, inputs: Any) -> None:
    """The authors' LoRA keeps the first average that it made; see `methods.md`, 2.6."""
    for entry in (ADAMIX, LORA):
        model = adamix(entry)
        before = answer(model.eval(), inputs)
        model.train()
        optimiser = torch.optim.SGD(model.pelt.parameters(), lr=0.1)
        model(**inputs).logits.square().mean().backward()
        optimiser.step()
        after = answer(model.eval(), inputs)
        fresh = adamix(entry)
        fresh.pelt.load_state_dict(model.pelt.state_dict())
        assert torch.equal(after, answer(fresh, inputs))
        assert (after - before).abs().max() > 1e-4


class LoraSum(nn.Module):
    """y = W x + s · B A x, for one product or for the mean over several."""

    def __init__(self, linear: nn.Module, scale: float, pairs: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        self.linear, self.scale, self.pairs = linear, scale, pairs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + sum(self.scale * F.linear(F.linear(x, a), b) for a, b in self.pairs) / len(self.pairs)


def lora_transcribed(model: Any, products: bool = False) -> Any:
    """The base with s · B̄ Ā beside query and value; or, by mistake, with the mean of the products."""
    again = copy.deepcopy(model.bare)
    for i, layer in enumerate(again.bert.encoder.layer):
        attention = layer.attention.self
        for role in ("query", "value"):
            p = tensors(model, i, f"attention.{role}")
            mean = averaged(p)
            pairs = [(mean["A"], mean["B"])]
            if products:
                pairs = list(zip(p["A_experts"], p["B_experts"], strict=True))
            setattr(attention, role, LoraSum(getattr(attention, role), 32 / 4, pairs))
    return again


@pytest.mark.parametrize("entry", [LORA, LORA_APART], ids=["shared-B", "apart"])
def test_lora_is_deployed_as_the_product_of_the_means_to_the_bit(entry: Any, adamix: Any, inputs: Any) -> None:
    model = adamix(entry)
    assert torch.equal(answer(model, inputs), answer(lora_transcribed(model), inputs))


def test_lora_folded_is_the_product_of_the_means(adamix: Any, inputs: Any) -> None:
    """W + s · B̄ Ā as a weight."""
    model = adamix(LORA_APART)
    again = copy.deepcopy(model.bare)
    with torch.no_grad():
        for i, layer in enumerate(again.bert.encoder.layer):
            for role in ("query", "value"):
                p = averaged(tensors(model, i, f"attention.{role}"))
                getattr(layer.attention.self, role).weight += 32 / 4 * p["B"] @ p["A"]
    assert (answer(model, inputs) - answer(again, inputs)).abs().max() <= 1e-13


def test_averaged_products_with_a_shared_factor_do_not_differ(adamix: Any, inputs: Any) -> None:
    """mean(B A_j) = B Ā: why the shared factor needs no mean of its own."""
    model = adamix(LORA)
    for i in range(LAYERS):
        assert tensors(model, i, "attention.query")["A_experts"].shape[0] == 4
    with_shared = copy.deepcopy(model.bare)
    for i, layer in enumerate(with_shared.bert.encoder.layer):
        for role in ("query", "value"):
            p = tensors(model, i, f"attention.{role}")
            pairs = [(a, p["B"]) for a in p["A_experts"]]
            setattr(layer.attention.self, role, LoraSum(getattr(layer.attention.self, role), 32 / 4, pairs))
    assert (answer(with_shared, inputs) - answer(model, inputs)).abs().max() <= 1e-13


def test_two_experts_of_one_prefix_are_not_mixed(attached: Any, inputs: Any) -> None:
    """Keys and values come from one network, of which a pass draws one expert, not one for each."""
    entry = {"method": "prefix", "at": "attention", "length": 2, "hidden": 4, "experts": {"count": 4}}
    model = attached(entry, training=True)
    calls: list[tuple[str, int]] = []
    choose = TorchInterpreter.choose

    def noted(self: TorchInterpreter, stack: torch.Tensor, draw: Any, scope: str) -> torch.Tensor:
        chosen = choose(self, stack, draw, scope)
        calls.append((draw, next(i for i, expert in enumerate(stack) if torch.equal(expert, chosen))))
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchInterpreter, "choose", noted)
        torch.manual_seed(0)
        answer(model, inputs)
    parameters = sum(p.name.endswith("_experts") for p in model.pelt.plan.claims[0].method.parameters)
    assert len(calls) == LAYERS * 2 * parameters  # keys and values, in each layer
    layers = [calls[i * 2 * parameters : (i + 1) * 2 * parameters] for i in range(LAYERS)]
    assert all(len(set(layer)) == len(dict(layer)) == 3 for layer in layers)  # the input's table, and two maps
    assert dict(layers[0]) != dict(layers[1])


# One draw for a layer


def experts_of(model: Any, inputs: Any, count: int) -> list[dict[str, int]]:
    """For many passes which expert of A each site used, told by its gradient, which no other expert of it may have."""
    torch.manual_seed(0)
    found = []
    for _ in range(count):
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        used = {}
        for claim in model.pelt.plan.claims:
            name = next(n for n in claim.tensors if n.startswith("A_experts"))
            moved = model.pelt.parameter(claim.tensors[name].name).grad.abs().flatten(1).amax(1) > 0
            assert moved.sum() == 1, "a gradient to experts that were not drawn"
            used[claim.site.name] = int(moved.nonzero())
        found.append(used)
    return found


def apart(passes: list[dict[str, int]], one: str, other: str) -> int:
    """In how many passes two sites used different experts."""
    return sum(used[f"encoder.layers.{one}"] != used[f"encoder.layers.{other}"] for used in passes)


def test_the_sites_of_a_layer_use_one_draw(adamix: Any, inputs: Any) -> None:
    passes = experts_of(adamix(LORA, training=True), inputs, 40)
    for layer in range(LAYERS):
        assert apart(passes, f"{layer}.attention.query", f"{layer}.attention.value") == 0
        assert len({used[f"encoder.layers.{layer}.attention.query"] for used in passes}) == 4, "drawn anew"
    assert apart(passes, "0.attention.query", "1.attention.query") > 20  # 30 of 40 where they are independent


def test_by_itself_each_site_draws(adamix: Any, inputs: Any) -> None:
    passes = experts_of(adamix({**LORA, "draw": "site"}, training=True), inputs, 40)
    assert apart(passes, "0.attention.query", "0.attention.value") > 20


def test_factors_are_drawn_apart_in_a_layer_too(adamix: Any, inputs: Any) -> None:
    """A and B of one layer have a draw each."""
    model = adamix(LORA_APART, training=True)
    pairs = set()
    torch.manual_seed(0)
    for _ in range(40):
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        p = {n: model.pelt.parameter(t.name).grad for n, t in model.pelt.plan.claims[0].tensors.items()}
        pairs.add(tuple(int((p[f"{name}_experts"].flatten(1).abs().amax(1) > 0).nonzero()) for name in "AB"))
    assert len(pairs) > 8  # of 16; 4 where they were one draw


def test_attachments_of_a_layer_draw_apart(adamix: Any, inputs: Any) -> None:
    entries = [{"method": "lora", "name": name, "at": f"attention.{name}", "r": 2,
                "experts": {"count": 4, "draw": "layer"}} for name in ("query", "value")]  # fmt: skip
    passes = experts_of(adamix(*entries, training=True), inputs, 40)
    assert apart(passes, "0.attention.query", "0.attention.value") > 20


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_runs_again_in_the_backward_pass_draws_the_same(reentrant: bool, adamix: Any, inputs: Any) -> None:
    """With gradient checkpointing, two passes before one backward pass: gradients are those without checkpointing."""

    def both(model: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        first, second = (model(**inputs).logits for _ in range(2))
        (first.square().mean() + (first - second).square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.pelt.named_parameters() if p.grad is not None}

    plain, checkpointed = (adamix(LORA_APART).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    expected, found = both(plain), both(checkpointed)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=0, atol=1e-12), name


def test_two_passes_of_a_batch_draw_anew(adamix: Any, inputs: Any) -> None:
    """Otherwise the consistency loss would be zero."""
    model = adamix(LORA, training=True)
    torch.manual_seed(0)
    losses = [consistency_loss(model(**inputs), model(**inputs)).item() for _ in range(20)]
    assert sum(loss > 0 for loss in losses) >= 15  # the same 2 draws of 4 come again once in 16


def test_a_layer_that_runs_several_times_in_a_pass_draws_each_time(inputs: Any) -> None:
    """ALBERT's one layer runs as often as others have layers."""
    entry = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 2,
             "experts": {"count": 64, "draw": "layer"}}  # fmt: skip
    config = AlbertConfig(vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=4,
                          num_attention_heads=4, intermediate_size=48)  # fmt: skip
    model = AlbertForSequenceClassification(config).eval()
    peltc.attach(model, {"pelt": 1, "attach": [entry]})
    shake(model.pelt, 0.2)
    model.pelt.train()
    used: list[int] = []
    choose = TorchInterpreter.choose

    def noted(self: TorchInterpreter, stack: torch.Tensor, draw: Any, scope: str) -> torch.Tensor:
        chosen = choose(self, stack, draw, scope)
        if draw == 0:
            used.append(next(i for i, expert in enumerate(stack) if torch.equal(expert, chosen)))
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchInterpreter, "choose", noted)
        torch.manual_seed(0)
        model(**inputs)
    pairs = list(zip(used[::2], used[1::2], strict=True))
    assert len(pairs) == 4 and all(query == value for query, value in pairs) and len(set(pairs)) > 1


@pytest.mark.parametrize("entry", [LORA, LORA_APART], ids=["shared-B", "apart"])
def test_how_experts_are_drawn_is_no_part_of_what_is_deployed(entry: Any, adamix: Any, inputs: Any) -> None:
    one, other = adamix(entry), adamix({**entry, "draw": "site"})
    other.pelt.load_state_dict(one.pelt.state_dict())
    assert torch.equal(answer(one, inputs), answer(other, inputs))
    assert one.pelt.mathematics == other.pelt.mathematics


# Witnesses: each of these mistakes must show.


def test_a_draw_that_stays_shows(adamix: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer's draw were never made anew, the backward pass would run the first pass's layers with others."""
    monkeypatch.setattr(Draws, "clear", lambda self: None)
    monkeypatch.setattr(Draws, "enter", lambda self, site: None)
    passes = experts_of(adamix(LORA, training=True), inputs, 10)
    assert all(used == passes[0] for used in passes)


def test_averaged_outputs_show(adamix: Any, inputs: Any) -> None:
    model = adamix(ADAMIX)
    blocks = [tensors(model, i, "feed_forward.block") for i in range(LAYERS)]
    wrong = [{n.removesuffix("_experts"): t for n, t in p.items()} for p in blocks]
    found = answer(transcribed(model, wrong, OutputsAveraged), inputs)
    assert (found - answer(model, inputs)).abs().max() > 1e-4


def test_averaged_products_show(adamix: Any, inputs: Any) -> None:
    model = adamix(LORA_APART)
    assert (answer(lora_transcribed(model, products=True), inputs) - answer(model, inputs)).abs().max() > 1e-3


def test_drawing_down_and_up_together_shows(adamix: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = TorchInterpreter.choose
    monkeypatch.setattr(TorchInterpreter, "choose", lambda self, stack, draw, scope: choose(self, stack, 0, scope))
    assert len(set(routes(adamix(APART, training=True), inputs))) == 4


def test_drawing_a_bias_apart_from_its_weight_shows(adamix: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = TorchInterpreter.choose
    monkeypatch.setattr(
        TorchInterpreter, "choose", lambda self, stack, draw, scope: choose(self, stack, object(), scope)
    )
    with pytest.raises(AssertionError, match="none of the routes"):
        routes(adamix(APART, training=True), inputs)
