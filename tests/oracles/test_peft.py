"""The same weights in Hugging Face PEFT and here: equal outputs, equal gradients, equal folded parameters.

PEFT is the oracle. What it does otherwise by design is said where a case works around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import peltc
from peltc.compiler.pipeline import fold
from peltc.compiler.plan.claims import Plan
from peltc.compiler.survey.anatomy import Site
from peltc.runtime.building.compile import plan_for
from peltc.runtime.running.session import Session
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.specification import load_spec

Array = np.ndarray[Any, Any]
Tensor = torch.Tensor
Entry = dict[str, Any]
Group = list[tuple[Site, dict[str, Tensor]]]
Give = Callable[[Any, Group], None]

MERGED = 1e-6
"""Largest difference of two merged parameters as a share of the largest value: both are float32, computed in
different orders."""
GRADIENT = 1e-4
"""Largest difference of two gradients as a share of the largest value: float32, and gradients add up what cancels:
1e-5 was seen. A norm that is not a constant in the gradient shows by far more."""
EFFECT = 1e-2
"""How much, at least, a method must move the output for the comparison to mean anything."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def rows(site: Site) -> Any:
    """The features of its module that a site owns, to index with."""
    return slice(None) if site.rows is None else torch.cat([torch.arange(a, b) for a, b in site.rows])


def copy(target: Tensor, value: Tensor) -> None:
    """Write into a parameter of PEFT; a shape that merely broadcasts is a mistake of the test."""
    assert target.shape == value.shape, (target.shape, value.shape)
    target.data.copy_(value)


def give_lora(layer: Any, group: Group) -> None:
    """A fused module gets the ranks of its sites one after the other, and B is zero outside a site's own rows."""
    B = torch.zeros_like(layer.lora_B["default"].weight)
    start = 0
    for site, t in group:
        stop = start + len(t["A"])
        B[rows(site), start:stop] = t["B"]
        start = stop
    copy(layer.lora_A["default"].weight, torch.cat([t["A"] for _, t in group]))
    copy(layer.lora_B["default"].weight, B)


def give_dora(layer: Any, group: Group) -> None:
    """Features of a fused module that no site owns keep the norm of their own weights, at which DoRA starts."""
    give_lora(layer, group)
    m = layer.lora_magnitude_vector["default"].weight.detach().clone()
    for site, t in group:
        m[rows(site)] = t["m"][:, 0]
    copy(layer.lora_magnitude_vector["default"].weight, m)


def give_adalora(layer: Any, group: Group) -> None:
    ((_, t),) = group
    copy(layer.lora_A["default"], t["A"])
    copy(layer.lora_B["default"], t["B"])
    copy(layer.lora_E["default"], t["E"][:, None])


def give_loha(layer: Any, group: Group) -> None:
    ((_, t),) = group
    for name, value in t.items():
        copy(getattr(layer, f"hada_{name}")["default"], value)


def give_lokr(layer: Any, group: Group) -> None:
    ((_, t),) = group
    for name, value in t.items():
        copy(getattr(layer, f"lokr_{name}")["default"], value)
    held = {n for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2") if "default" in getattr(layer, f"lokr_{n}")}
    assert held == set(t)


def give_vera(layer: Any, group: Group) -> None:
    """The projections are buffers, as wide as the widest module; every layer refers to the same two."""
    ((_, t),) = group
    copy(layer.vera_A["default"], t["A"])
    copy(layer.vera_B["default"], t["B"])
    copy(layer.vera_lambda_d["default"], t["d"])
    copy(layer.vera_lambda_b["default"], t["b_scale"])


def give_ia3(layer: Any, group: Group) -> None:
    scale = torch.ones(layer.ia3_l["default"].numel())
    for site, t in group:
        scale[rows(site)] = t["l"]
    copy(layer.ia3_l["default"], scale.reshape(layer.ia3_l["default"].shape))


def give_oft(layer: Any, group: Group) -> None:
    ((_, t),) = group
    copy(layer.oft_R["default"].weight, t["R"])


def give_named(prefix: str) -> Give:
    """Tensors that have our names after a prefix."""

    def give(layer: Any, group: Group) -> None:
        ((_, t),) = group
        for name, value in t.items():
            copy(getattr(layer, f"{prefix}{name}")["default"], value)

    return give


def give_beft(layer: Any, group: Group) -> None:
    ((_, t),) = group
    copy(layer.beft_bias["default"], t["change"][None])


def give_norms(layer: Any, group: Group) -> None:
    ((_, t),) = group
    tuned = layer.ln_tuning_layers["default"]
    copy(tuned.weight, t["gain"])
    if "shift" in t:
        copy(tuned.bias, t["shift"])


@dataclass(frozen=True)
class Case:
    """A method said twice: as entries of a spec, and as a config of PEFT with a way to bring the weights over."""

    name: str
    model: str
    entries: Sequence[Entry]
    config: Callable[..., Any]
    give: Give
    settings: Mapping[str, Any] = field(default_factory=dict)

    def peft(self, model: Any, plan: Plan, tensors: Mapping[str, Array]) -> Any:
        """The model with PEFT's modules at the plan's sites, the plan's tensors inside."""
        groups: dict[str, Group] = {}
        for claim in plan.claims:
            path = claim.site.parameters["weight"].rpartition(".")[0]
            own = {name: torch.from_numpy(tensors[t.name]) for name, t in claim.tensors.items()}
            groups.setdefault(path, []).append((claim.site, own))
        settings = dict(self.settings)
        if "feedforward_modules" in settings:
            ends = settings["feedforward_modules"]
            settings["feedforward_modules"] = [path for path in groups if path.endswith(ends)]
            assert settings["feedforward_modules"]
        found = peft.get_peft_model(model, self.config(target_modules=list(groups), **settings)).eval()
        for path, group in groups.items():
            self.give(found.base_model.model.get_submodule(path), group)
        return found


def entry(method: str, at: str | list[str], **options: Any) -> Entry:
    return {"method": method, "at": at, **options}


QV = ["attention.query", "attention.value"]
FEW = [*QV, "attention.output", "feed_forward.up", "feed_forward.down"]
FFN = ["feed_forward.up", "feed_forward.down"]
CONV = {"fan_in_fan_out": True}
ADALORA = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}
IA3 = [
    entry("ia3", ["attention.key", "attention.value"]),
    entry("ia3", "feed_forward.down", name="ff", position="input"),
]

CASES = [
    *(
        Case(f"{m}-{name}", m, [entry("lora", at, r=r, alpha=a, **ours)], peft.LoraConfig, give_lora,
             {"r": r, "lora_alpha": a, **theirs})
        for m, at in (("bert", FEW), ("llama", FEW), ("gpt2", ["attention.output", *FFN]))
        for name, r, a, ours, theirs in (
            ("lora", 4, 12, {}, {}),
            ("rslora", 6, 5, {"rank_stabilised": True}, {"use_rslora": True}),
        )
    ),
    *(
        Case(f"{m}-{name}", m, [entry("dora", at, r=r, alpha=a, **ours)], peft.LoraConfig, give_dora,
             {"r": r, "lora_alpha": a, "use_dora": True, **theirs})
        for m, at in (("bert", FEW), ("llama", FEW), ("gpt2", ["attention.output", *FFN]))
        for name, r, a, ours, theirs in (
            ("dora", 4, 12, {}, {}),
            ("rsdora", 6, 5, {"rank_stabilised": True}, {"use_rslora": True}),
        )
    ),
    # One module of PEFT holds what are two sites here: twice the rank, and twice alpha keeps the scale.
    Case("gpt2-fused-lora", "gpt2", [entry("lora", QV, r=4, alpha=12)], peft.LoraConfig, give_lora,
         {"r": 8, "lora_alpha": 24, **CONV}),
    Case("gpt2-fused-dora", "gpt2", [entry("dora", QV, r=4, alpha=12)], peft.LoraConfig, give_dora,
         {"r": 8, "lora_alpha": 24, "use_dora": True, **CONV}),
    *(
        Case(f"{m}-adalora", m, [entry("adalora", at, r=4, alpha=6)], peft.AdaLoraConfig, give_adalora, ADALORA)
        for m, at in (("bert", FEW), ("llama", FEW), ("gpt2", ["attention.output", *FFN]))
    ),
    *(
        Case(f"{m}-loha", m, [entry("loha", FEW, r=3, alpha=7)], peft.LoHaConfig, give_loha, {"r": 3, "alpha": 7})
        for m in ("bert", "llama")
    ),
    # PEFT takes a full w2 where the rank would not save anything, and scales it by alpha / r all the same; ours has
    # the scale 1 there, unless it is told `full`.
    *(
        Case(f"{m}-lokr-{name}", m, [entry("lokr", FEW, factor=4, **ours)], peft.LoKrConfig, give_lokr,
             {"decompose_factor": 4, **theirs})
        for m in ("bert", "llama")
        for name, ours, theirs in (
            ("rank", {"r": 2, "alpha": 5}, {"r": 2, "alpha": 5}),
            ("full", {"r": 0}, {"r": 64, "alpha": 64}),
            ("full-scaled", {"r": 64, "alpha": 48, "full": True}, {"r": 64, "alpha": 48}),
            ("both", {"r": 1, "alpha": 3, "decompose_both": True}, {"r": 1, "alpha": 3, "decompose_both": True}),
        )
    ),
    *(
        Case(f"{m}-vera", m, [entry("vera", at, r=24)], peft.VeraConfig, give_vera, {"r": 24, "save_projection": True})
        for m, at in (("bert", FEW), ("llama", FEW), ("gpt2", ["attention.output", *FFN]))
    ),
    Case("bert-ia3", "bert", IA3, peft.IA3Config, give_ia3, {"feedforward_modules": ("output.dense",)}),
    Case("llama-ia3", "llama", IA3, peft.IA3Config, give_ia3, {"feedforward_modules": ("down_proj",)}),
    Case("gpt2-fused-ia3", "gpt2", IA3, peft.IA3Config, give_ia3, {"feedforward_modules": ("mlp.c_proj",), **CONV}),
    *(
        Case(f"{m}-oft-{name}", m, [entry("oft", FEW, block=8, neumann=n)], peft.OFTConfig, give_oft,
             {"oft_block_size": 8, "r": 0, "use_cayley_neumann": n})
        for m in ("bert", "llama")
        for name, n in (("neumann", True), ("exact", False))
    ),
    *(
        Case(f"{m}-{name}", m, [entry(method, FEW, **ours)], config, give_named(prefix), theirs)
        for m in ("bert", "llama")
        for name, method, ours, config, prefix, theirs in (
            ("boft", "boft", {"block": 8}, peft.BOFTConfig, "boft_", {"boft_block_size": 8}),
            ("hra", "hra", {"r": 5}, peft.HRAConfig, "hra_", {"r": 5}),
            ("hra-orthogonal", "hra_orthogonal", {"r": 5}, peft.HRAConfig, "hra_", {"r": 5, "apply_GS": True}),
            ("miss", "miss", {"r": 7}, peft.MissConfig, "miss_", {"r": 7}),
            ("miss-repeated", "miss", {"r": 4, "width": 8}, peft.MissConfig, "miss_",
             {"r": 4, "mini_r": 8, "init_weights": "mini"}),
            ("bat", "bat", {"r": 8}, peft.MissConfig, "miss_", {"r": 8, "init_weights": "bat"}),
            ("hira", "hira", {"r": 4}, peft.HiraConfig, "hira_", {"r": 4}),
        )
    ),
    Case("gpt2-hira", "gpt2", [entry("hira", ["attention.output", *FFN], r=4)], peft.HiraConfig, give_named("hira_"),
         {"r": 4, **CONV}),
    Case("bert-beft", "bert", [entry("bitfit", FEW)], peft.BeftConfig, give_beft),
    *(
        Case(f"{m}-norms", m, [entry("norm_tuning", "*norm")], peft.LNTuningConfig, give_norms)
        for m in ("bert", "llama", "gpt2")
    ),
]  # fmt: skip
NAMED = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def prepared(case: Case, toys: Any) -> tuple[Plan, dict[str, Array], Any]:
    """The plan, random tensors for it, and PEFT's model with the same tensors."""
    plan = toys.plan(case.model, *case.entries)
    tensors = toys.weights(case.model, plan)
    return plan, tensors, case.peft(toys.model(case.model), plan, tensors)


@every_case
def test_outputs(case: Case, toys: Any, close: Any) -> None:
    _, tensors, theirs = prepared(case, toys)
    inputs = toys.inputs(case.model)
    expected = toys.answer(theirs, inputs)
    ours = peltc.attach(toys.model(case.model), toys.spec(*case.entries), weights=tensors)
    close(toys.answer(ours, inputs), expected, TOLERANCE["float32"])
    with pytest.raises(AssertionError):
        close(toys.answer(toys.model(case.model), inputs), expected, EFFECT)


def differences(case: Case, toys: Any, close: Any, expected: Any, folded: Mapping[str, Array]) -> None:
    """Hold every parameter of a merged model against what is folded here, and the rest against the base, bit by bit."""
    base = dict(toys.model(case.model).named_parameters())
    names = set(base)
    assert set(folded) <= names
    for name, parameter in expected.named_parameters():
        names.remove(name)
        if name in folded:
            close(folded[name], parameter, MERGED)
        else:
            assert torch.equal(parameter, base[name]), f"PEFT changes {name}"
    assert not names


@every_case
def test_folded_parameters(case: Case, toys: Any, close: Any) -> None:
    _, tensors, theirs = prepared(case, toys)
    base = toys.base(case.model)
    plan, _ = plan_for(load_spec(toys.spec(*case.entries)), base.folder)
    assert all(claim.absorbed for claim in plan.claims)
    folded = {f.name: f.array for f in fold(plan, base, tensors)}
    differences(case, toys, close, theirs.merge_and_unload(), folded)


@pytest.mark.parametrize("name", ["bert-lora", "bert-dora", "llama-rsdora", "bert-adalora", "llama-vera", "bert-ia3"])
def test_gradients(name: str, toys: Any, close: Any) -> None:
    """Training here is training there. DoRA's norm, for one, is a constant in the gradient."""
    case = NAMED[name]
    plan, tensors, theirs = prepared(case, toys)
    ours = peltc.attach(toys.model(case.model), toys.spec(*case.entries), weights=tensors)
    inputs = toys.inputs(case.model)
    for model in (ours, theirs):
        output = model(**inputs)
        (output["logits"] if "logits" in output else output["last_hidden_state"]).square().mean().backward()
    claim = plan.claims[0]
    layer = theirs.base_model.model.get_submodule(claim.site.parameters["weight"].rpartition(".")[0])
    found = {n: ours.pelt.parameter(t.name).grad for n, t in claim.tensors.items() if not t.frozen}
    expected = {n: p.grad.reshape(found[n].shape) for n, p in trained(layer).items()}
    assert set(found) == set(expected)
    for key, gradient in found.items():
        close(gradient, expected[key], GRADIENT)


def trained(layer: Any) -> dict[str, Tensor]:
    """PEFT's trained parameters of a layer, by the names that they have here."""
    words = {"lora_A": "A", "lora_B": "B", "lora_E": "E", "lora_magnitude_vector": "m", "vera_lambda_b": "b_scale",
             "vera_lambda_d": "d", "ia3_l": "l"}  # fmt: skip
    return {
        words[n.split(".")[0]]: p for n, p in layer.named_parameters() if n.split(".")[0] in words and p.requires_grad
    }


@pytest.mark.parametrize("name, task", [("bert", "FEATURE_EXTRACTION"), ("gpt2", "CAUSAL_LM"), ("llama", "CAUSAL_LM")])
def test_prompt(name: str, task: str, toys: Any, close: Any) -> None:
    """PEFT's outputs begin with the prompt's; ours keep the length of the text. PEFT drops token types."""
    length = 5
    spec = [entry("prompt", "embedding.word", length=length)]
    tensors = toys.weights(name, toys.plan(name, *spec))
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=length)
    theirs = peft.get_peft_model(toys.model(name), config).eval()
    (prompt,) = tensors.values()
    copy(theirs.prompt_encoder["default"].embedding.weight, torch.from_numpy(prompt))
    inputs = {key: value for key, value in toys.inputs(name).items() if key != "token_type_ids"}
    expected = toys.answer(theirs, inputs)[:, length:]
    ours = peltc.attach(toys.model(name), toys.spec(*spec), weights=tensors)
    close(toys.answer(ours, inputs), expected, TOLERANCE["float32"])
    with pytest.raises(AssertionError):
        close(toys.answer(toys.model(name), inputs), expected, EFFECT)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompt_loss(name: str, toys: Any, close: Any) -> None:
    """What `Trainer` asks for: the prompt's own positions predict nothing, its last one the first token of the text."""
    spec, inputs = [entry("prompt", "embedding.word", length=5)], toys.inputs(name, padding=0)
    tensors = toys.weights(name, toys.plan(name, *spec))
    theirs = peft.get_peft_model(
        toys.model(name), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    (prompt,) = tensors.values()
    copy(theirs.prompt_encoder["default"].embedding.weight, torch.from_numpy(prompt))
    ours = peltc.attach(toys.model(name), toys.spec(*spec), weights=tensors)
    found, expected = (model(**inputs, labels=inputs["input_ids"]).loss for model in (ours, theirs))
    close(found, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prefix(name: str, projection: bool, toys: Any, close: Any) -> None:
    """PEFT puts prefixes into the cache, so the text's positions begin after them; here they take no position. The
    difference is one of positions alone: where PEFT is told positions that are lower by the prefix, both agree."""
    length, hidden = 5, 24
    sizes = toys.plan(name, entry("prefix", "attention")).claims[0].site.sizes
    width = sizes["kv_heads"] * sizes["head_dim"]
    spec = [entry("prefix", "attention", length=length, reparameterise=projection, hidden=hidden, width=width)]
    plan = toys.plan(name, *spec)
    tensors = toys.weights(name, plan)
    given = {key: torch.from_numpy(value) for key, value in tensors.items()}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, prefix_projection=projection,
                                     encoder_hidden_size=hidden)  # fmt: skip
    theirs = peft.get_peft_model(toys.model(name), config).eval()
    encoder = theirs.prompt_encoder["default"]
    if projection:
        copy(encoder.embedding.weight, given["prefix.embedding"])
        copy(encoder.transform[0].weight, given["prefix.down"])
        copy(encoder.transform[0].bias, given["prefix.down_bias"])
        copy(encoder.transform[2].weight, given["prefix.up"])
        copy(encoder.transform[2].bias, given["prefix.up_bias"])
    else:
        flat = [given[t.name] for claim in plan.claims for t in claim.tensors.values()]  # [heads, length, head_dim]
        copy(encoder.embedding.weight, torch.cat([f.permute(1, 0, 2).reshape(length, width) for f in flat], 1))
    inputs = toys.inputs(name)
    positions = torch.arange(inputs["input_ids"].shape[1])[None].expand(len(inputs["input_ids"]), -1)
    expected = toys.answer(theirs, inputs, position_ids=positions - length)
    ours = peltc.attach(toys.model(name), toys.spec(*spec), weights=tensors)
    found = toys.answer(ours, inputs, use_cache=False)
    close(found, expected, TOLERANCE["float32"])
    with pytest.raises(AssertionError):
        close(found, toys.answer(theirs, inputs), EFFECT)


def test_compiled_against_peft(toys: Any, close: Any, tmp_path: Path) -> None:
    """The whole way: the artifact on ONNX Runtime answers as PEFT's model does."""
    case = NAMED["bert-dora"]
    _, tensors, theirs = prepared(case, toys)
    folder = toys.base(case.model).folder
    peltc.compile(toys.spec(*case.entries), folder, tmp_path / "out", weights=tensors, mode="fold", verify=False)
    inputs = toys.inputs(case.model)
    found = Session(tmp_path / "out", ["CPUExecutionProvider"])(**{k: v.numpy() for k, v in inputs.items()})
    close(found["last_hidden_state"], toys.answer(theirs, inputs), TOLERANCE["float32"])


# Witnesses: each of these mistakes must show.


def wrong_scale(case: Case, plan: Plan, tensors: dict[str, Array]) -> tuple[list[Entry], dict[str, Array]]:
    return [{**e, "alpha": e["alpha"] * 1.01} for e in case.entries], tensors


def transposed(case: Case, plan: Plan, tensors: dict[str, Array]) -> tuple[list[Entry], dict[str, Array]]:
    turned = {k: np.ascontiguousarray(v.T).reshape(v.shape) if k.endswith(".A") else v for k, v in tensors.items()}
    return list(case.entries), turned


def missing_site(case: Case, plan: Plan, tensors: dict[str, Array]) -> tuple[list[Entry], dict[str, Array]]:
    fewer = [{**e, "at": e["at"][1:]} for e in case.entries]
    return fewer, {k: v for k, v in tensors.items() if "attention.query" not in k}


MISTAKES = [wrong_scale, transposed, missing_site]
every_mistake = pytest.mark.parametrize("mistake", MISTAKES, ids=[m.__name__ for m in MISTAKES])


@every_mistake
@pytest.mark.parametrize("name", ["bert-lora", "llama-dora", "gpt2-fused-lora"])
def test_outputs_can_differ(name: str, mistake: Callable[..., Any], toys: Any, close: Any) -> None:
    case = NAMED[name]
    plan, tensors, theirs = prepared(case, toys)
    inputs = toys.inputs(case.model)
    entries, changed = mistake(case, plan, tensors)
    ours = peltc.attach(toys.model(case.model), toys.spec(*entries), weights=changed)
    with pytest.raises(AssertionError, match="differs by"):
        close(toys.answer(ours, inputs), toys.answer(theirs, inputs), TOLERANCE["float32"])


@every_mistake
def test_folds_can_differ(mistake: Callable[..., Any], toys: Any, close: Any) -> None:
    case = NAMED["bert-lora"]
    plan, tensors, theirs = prepared(case, toys)
    base = toys.base(case.model)
    entries, changed = mistake(case, plan, tensors)
    plan, _ = plan_for(load_spec(toys.spec(*entries)), base.folder)
    folded = {f.name: f.array for f in fold(plan, base, changed)}
    with pytest.raises(AssertionError, match=r"differs by|PEFT changes"):
        differences(case, toys, close, theirs.merge_and_unload(), folded)


def test_a_forgotten_bias_shows(toys: Any, close: Any) -> None:
    """(IA)³ scales biases when it is merged; who leaves them alone is found out."""
    case = NAMED["bert-ia3"]
    _, tensors, theirs = prepared(case, toys)
    base = toys.base(case.model)
    plan, _ = plan_for(load_spec(toys.spec(*case.entries)), base.folder)
    folded = {f.name: f.array for f in fold(plan, base, tensors) if f.name.endswith("weight")}
    with pytest.raises(AssertionError, match=r"PEFT changes .*\.bias"):
        differences(case, toys, close, theirs.merge_and_unload(), folded)
