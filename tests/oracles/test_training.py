"""Training: what moves, what does not, and that a model with modules is still an ordinary model of `transformers`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import peltc
from peltc.runtime.verify import TOLERANCE
from peltc.spec.method import shipped

Entry = dict[str, Any]

GRADIENT = 1e-6
"""Largest difference of two gradients as a share of the largest value: the same float32 operations, done twice."""
STEP = 1e-2
"""Learning rate of the one step: far above rounding."""

AT = {"linear": ["attention.query", "attention.value", "feed_forward.down"], "norm": "*norm", "attention": "attention",
      "block": ["attention.block", "feed_forward.block"], "embedding": "embedding"}  # fmt: skip
"""Where a method of each site kind is put; a method that is shipped later is tested here without being named."""
SMALLER: dict[str, Entry] = {"prefix": {"length": 3, "hidden": 8}, "prompt": {"length": 3}, "oft": {"block": 8},
                             "vera": {"r": 8}, "compacter": {"reduction": 4}}  # fmt: skip
VARIANTS: dict[str, Entry] = {
    "lora": {"rank_stabilised": True, "r": 3},
    "ia3": {"position": "input"},
    "bottleneck": {"reads": "normed"},
    "compacter": {"reads": "sum", "reduction": 4},
    "parallel_adapter": {"reads": "residual"},
    "prefix": {"length": 3, "reparameterise": False},
    "lokr": {"r": 0},
    "oft": {"block": 8, "neumann": False},
    "norm_tuning": {"weight": False},
}
CASES: dict[str, Entry] = {
    **{name: {"method": name, "at": AT[m.site], **SMALLER.get(name, {})} for name, m in shipped().items()},
    **{f"{name}-variant": {"method": name, "at": AT[shipped()[name].site], **o} for name, o in VARIANTS.items()},
}
MODELS = ["bert", "gpt2", "llama"]
every_case = pytest.mark.parametrize("case", list(CASES))
every_model = pytest.mark.parametrize("name", MODELS)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def entries(name: str, case: str) -> list[Entry]:
    """The attachment of a case. Gains alone exist in Llama's norms, so a method of biases alone has nothing to train."""
    if name == "llama" and case == "norm_tuning-variant":
        pytest.skip("the norms of Llama have no bias")
    return [CASES[case]]


def state(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer."""
    return {key: value.detach().clone() for key, value in model.state_dict(keep_vars=True).items()}


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    values: torch.Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return values.square().mean() + values[0, 0, 0]


def step(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """One step of AdamW over everything that asks for a gradient, as a trainer takes it."""
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=STEP, weight_decay=0.1)
    loss_of(model, inputs).backward()
    optimiser.step()


def only_declared(model: Any, before: dict[str, torch.Tensor]) -> None:
    """The comparison of law 4: declared parameters have moved, each of them, and not a bit of anything else."""
    after, plan = state(model), model.pelt.plan
    declared = {f"pelt.{name.replace('.', '/')}": tensor for name, tensor in plan.tensors.items()}
    assert set(after) == set(before) and set(declared) <= set(after)
    for key, value in after.items():
        moves = key in declared and not declared[key].frozen
        assert torch.equal(value, before[key]) != moves, f"{key} {'has not' if moves else 'has'} moved"


@every_model
@every_case
def test_only_declared_parameters_move(case: str, name: str, toys: Any) -> None:
    plan = toys.plan(name, *entries(name, case))
    model = peltc.attach(toys.model(name), toys.spec(*entries(name, case)), weights=toys.weights(name, plan))
    before = state(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trained()
    step(model, toys.inputs(name))
    only_declared(model, before)


@every_model
@every_case
def test_start_values_change_nothing(case: str, name: str, toys: Any, close: Any) -> None:
    """Unless the method says why they must."""
    inputs = toys.inputs(name)
    expected = toys.answer(toys.model(name), inputs)
    model = peltc.attach(toys.model(name), toys.spec(*entries(name, case)))
    found = toys.answer(model, inputs)
    if shipped()[CASES[case]["method"]].start:
        with pytest.raises(AssertionError, match="differs by"):
            close(found, expected, TOLERANCE["float32"])
    else:
        close(found, expected, TOLERANCE["float32"])


@every_model
@every_case
def test_start_values_can_be_trained(case: str, name: str, toys: Any) -> None:
    """From its start a module must get off the ground: some gradient is not zero, and a step changes the output."""
    inputs = toys.inputs(name)
    model = peltc.attach(toys.model(name), toys.spec(*entries(name, case)))
    before = toys.answer(model, inputs)
    step(model, inputs)
    assert any(bool(p.grad.abs().max() > 1e-6) for p in model.parameters() if p.grad is not None)
    assert not torch.allclose(toys.answer(model.eval(), inputs), before, atol=1e-4)


@every_model
@every_case
def test_save_and_load(case: str, name: str, toys: Any, tmp_path: Path) -> None:
    """Equal to the bit: what is saved is what is read."""
    inputs, spec = toys.inputs(name), toys.spec(*entries(name, case))
    weights = toys.weights(name, toys.plan(name, *entries(name, case)))
    model = peltc.attach(toys.model(name), spec, weights=weights)
    model.save_adapter(tmp_path / "adapter.safetensors")
    again = peltc.attach(toys.model(name), spec, weights=tmp_path / "adapter.safetensors")
    assert torch.equal(toys.answer(again, inputs), toys.answer(model, inputs))
    for key, value in weights.items():
        assert np.array_equal(again.pelt.parameter(key).detach().numpy(), value)


@every_model
@every_case
def test_detach_restores_the_base(case: str, name: str, toys: Any) -> None:
    """Equal to the bit, in outputs and in what the model consists of; and modules can be attached again."""
    inputs, spec = toys.inputs(name), toys.spec(*entries(name, case))
    base = toys.model(name)
    expected, before = toys.answer(base, inputs), state(base)
    weights = toys.weights(name, toys.plan(name, *entries(name, case)))
    with_modules = toys.answer(peltc.attach(base, spec, weights=weights), inputs)
    assert not torch.allclose(with_modules, expected, atol=1e-3)
    base.detach_adapter()
    assert torch.equal(toys.answer(base, inputs), expected)
    assert base.config._attn_implementation == "sdpa" and not hasattr(base, "pelt")
    after = state(base)
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert torch.equal(toys.answer(peltc.attach(base, spec, weights=weights), inputs), with_modules)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@every_model
@every_case
def test_gradient_checkpointing(case: str, name: str, reentrant: bool, toys: Any, close: Any) -> None:
    """Layers that run a second time during the backward pass give the same gradients."""
    inputs, spec = toys.inputs(name), toys.spec(*entries(name, case))
    weights = toys.weights(name, toys.plan(name, *entries(name, case)))
    gradients = []
    for checkpointing in (False, True):
        model = peltc.attach(toys.model(name), spec, weights=weights).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        loss_of(model, inputs).backward()
        gradients.append({key: p.grad for key, p in model.pelt.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert all(value is not None for value in (*plain.values(), *checkpointed.values()))
    largest = max(float(value.abs().max()) for value in plain.values())
    for key, value in plain.items():
        difference = float((checkpointed[key] - value).abs().max())
        assert difference <= GRADIENT * largest, f"the gradient of {key} differs by {difference / largest:.1e}"


def test_a_gate_that_reads_the_mask_survives_checkpointing(toys: Any, close: Any) -> None:
    """The mask is given to the model once, and read again when a layer runs a second time."""
    gated = {
        "site": "block",
        "parameters": {"w": {"shape": [1, "d"], "init": "normal(0.1)"}, "u": {"shape": ["d"], "init": "zeros"}},
        "delta": "mean_seq(sigmoid(linear(x, w)), mask) * u * y",
    }
    entry, inputs = {"method": "gated", "at": "feed_forward.block"}, toys.inputs("bert")
    weights = toys.weights("bert", toys.plan("bert", entry, methods={"gated": gated}))
    gradients = []
    for checkpointing in (False, True):
        model = peltc.attach(toys.model("bert"), toys.spec(entry, methods={"gated": gated}), weights=weights).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(model, inputs).backward()
        gradients.append([p.grad for p in model.pelt.parameters()])
    for found, expected in zip(*reversed(gradients), strict=True):
        close(found, expected, GRADIENT)


TRAINED = [
    {"method": "lora", "at": ["attention.query", "attention.value"], "dropout": 0.1},
    {"method": "bottleneck", "at": "feed_forward.block", "dropout": 0.1},
    {"method": "prefix", "at": "attention", "length": 3, "hidden": 8},
    {"method": "norm_tuning", "at": "final_norm"},
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_trainer(name: str, checkpointing: bool, toys: Any, tmp_path: Path) -> None:
    """Two steps of `transformers.Trainer`, which knows nothing of modules."""
    pytest.importorskip("accelerate")
    inputs = toys.inputs(name, width=4, padding=0)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in inputs["input_ids"]]
    model = peltc.attach(toys.model(name), toys.spec(*TRAINED))
    before = state(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=STEP, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_num_workers=0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    result = transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.global_step == 2 and np.isfinite(result.training_loss)
    only_declared(model, before)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_learns(name: str, toys: Any) -> None:
    """A few steps on one batch: the loss falls, so gradients point where they should."""
    inputs = toys.inputs(name, padding=0)
    model = peltc.attach(toys.model(name), toys.spec(*({**e, "dropout": 0} if "dropout" in e else e for e in TRAINED)))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=STEP)
    losses = []
    for _ in range(12):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0], losses


# Witnesses: each of these mistakes must show.


def test_a_moved_base_parameter_shows(toys: Any) -> None:
    model = peltc.attach(toys.model("bert"), toys.spec(CASES["lora"]))
    before = state(model)
    model.get_parameter("encoder.layer.1.output.LayerNorm.bias").requires_grad_(True)
    step(model, toys.inputs("bert"))
    with pytest.raises(AssertionError, match=r"encoder\.layer\.1\.output\.LayerNorm\.bias has moved"):
        only_declared(model, before)


def test_a_declared_parameter_that_stays_shows(toys: Any) -> None:
    plan = toys.plan("bert", CASES["lora"])
    model = peltc.attach(toys.model("bert"), toys.spec(CASES["lora"]), weights=toys.weights("bert", plan))
    before = state(model)
    next(p for key, p in model.pelt.named_parameters() if key.endswith("value/B")).requires_grad_(False)
    step(model, toys.inputs("bert"))
    with pytest.raises(AssertionError, match=r"value/B has not moved"):
        only_declared(model, before)


def test_a_moved_frozen_bank_shows(toys: Any) -> None:
    """VeRA's projections are declared and frozen; training them is a mistake too."""
    plan = toys.plan("bert", CASES["vera"])
    model = peltc.attach(toys.model("bert"), toys.spec(CASES["vera"]), weights=toys.weights("bert", plan))
    before = state(model)
    model.pelt.parameter("vera.A").requires_grad_(True)
    step(model, toys.inputs("bert"))
    with pytest.raises(AssertionError, match=r"vera/A has moved"):
        only_declared(model, before)


def test_a_start_that_is_not_neutral_shows(toys: Any, close: Any) -> None:
    wrong = {"site": "linear", "parameters": {"s": {"shape": ["out"], "init": "normal(0.01)"}}, "delta": "s"}
    spec = toys.spec({"method": "wrong", "at": "attention.query"}, methods={"wrong": wrong})
    model, inputs = peltc.attach(toys.model("bert"), spec), toys.inputs("bert")
    with pytest.raises(AssertionError, match="differs by"):
        close(toys.answer(model, inputs), toys.answer(toys.model("bert"), inputs), TOLERANCE["float32"])


def test_a_hook_that_is_left_shows(toys: Any) -> None:
    """The inverse of `test_detach_restores_the_base`: with modules on, the answer is another one."""
    model, inputs = toys.model("bert"), toys.inputs("bert")
    expected = toys.answer(model, inputs)
    weights = toys.weights("bert", toys.plan("bert", CASES["lora"]))
    peltc.attach(model, toys.spec(CASES["lora"]), weights=weights)
    model.pelt.handles.pop(-2)  # forgotten by `remove`
    forgotten = copy.copy(model)
    model.detach_adapter()
    with pytest.raises(Exception):
        assert torch.equal(toys.answer(forgotten, inputs), expected)
