"""Training: what moves, what does not, and that a model with modules is still an ordinary model of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import peltc
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.method import shipped

Entry = dict[str, Any]

GRADIENT = 1e-6
"""Largest difference of two gradients as a share of the largest value: the same float32 operations, done twice."""
STEP = 1e-2
"""Learning rate of the one step: far above rounding."""

AT = {"linear": ["attention.query", "attention.value", "feed_forward.down"], "norm": "*norm", "attention": "attention",
      "block": ["attention.block", "feed_forward.block"], "embedding": "embedding.word"}  # fmt: skip
"""Where a method of each site kind is put; a method that is shipped later is tested here without being named."""
SMALLER: dict[str, Entry] = {"prefix": {"length": 3, "hidden": 8}, "prompt": {"length": 3}, "oft": {"block": 8},
                             "vera": {"r": 8}, "compacter": {"reduction": 4}, "c3a": {"block": 8},
                             "road": {"group": 8}, "shira": {"r": 2}, "fourierft": {"n": 60, "scale": 20},
                             "gralora": {"r": 4}, "vblora": {"vectors": 12, "length": 8}, "waveft": {"n": 60},
                             "randlora": {"r": 5, "alpha": 3}, "bat": {"r": 8}}  # fmt: skip
VARIANTS: dict[str, Entry] = {
    "lora": {"rank_stabilised": True, "r": 3},
    "ia3": {"position": "input"},
    "bottleneck": {"reads": "normed"},
    "compacter": {"reads": "sum", "reduction": 4},
    "parallel_adapter": {"reads": "residual"},
    "prefix": {"length": 3, "reparameterise": False},
    "lokr": {"r": 0},
    "adalora": {"kept": 5},
    "boft": {"block": 2, "factors": 3},
    "miss": {"r": 7, "width": 4},
    "oft": {"block": 8, "neumann": False},
    "norm_tuning": {"weight": False},
    "reft": {"first": 0, "last": 2},
    "fusion": {"reads": "raw", "answers": False},
}
CASES: dict[str, Entry] = {
    **{name: {"method": name, "at": AT[m.site], **SMALLER.get(name, {})} for name, m in shipped().items()},
    **{f"{name}-variant": {"method": name, "at": AT[shipped()[name].site], **o} for name, o in VARIANTS.items()},
}
MODELS = ["bert", "gpt2", "llama"]
MODELS = ["bert", "gpt2", "llama"]
# The norms of Llama have no bias: a method of biases alone has nothing to train there.
PAIRS = [(case, name) for case in CASES for name in MODELS if (case, name) != ("norm_tuning-variant", "llama")]
every_case = pytest.mark.parametrize("case", list(CASES))
every_pair = pytest.mark.parametrize("case, name", PAIRS)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def attached(toys: Any, name: str, case: str) -> Any:
    """A model with a case's modules and random weights."""
    weights = toys.weights(name, toys.plan(name, CASES[case]))
    return peltc.attach(toys.model(name), toys.spec(CASES[case]), weights=weights)


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


@every_pair
def test_only_declared_parameters_move(case: str, name: str, toys: Any) -> None:
    model = attached(toys, name, case)
    before = state(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == model.pelt.plan.trained()
    step(model, toys.inputs(name))
    only_declared(model, before)


@every_pair
def test_start_values_change_nothing(case: str, name: str, toys: Any, close: Any) -> None:
    """Unless the method says why they must."""
    inputs = toys.inputs(name)
    expected = toys.answer(toys.model(name), inputs)
    model = peltc.attach(toys.model(name), toys.spec(CASES[case]))
    found = toys.answer(model, inputs)
    if shipped()[CASES[case]["method"]].start:
        with pytest.raises(AssertionError, match="differs by"):
            close(found, expected, TOLERANCE["float32"])
    else:
        close(found, expected, TOLERANCE["float32"])


@every_case
def test_start_values_can_be_trained(case: str, toys: Any) -> None:
    """From its start a module must get off the ground: a step changes the output."""
    if CASES[case]["method"] == "lorahub":
        pytest.skip("composes modules that others have trained, and searches for their weights")
    inputs = toys.inputs("gpt2")
    model = peltc.attach(toys.model("gpt2"), toys.spec(CASES[case]))
    before = toys.answer(model, inputs)
    step(model, inputs)
    assert not torch.allclose(toys.answer(model.eval(), inputs), before, atol=1e-4)


@every_case
def test_save_and_load(case: str, toys: Any, tmp_path: Path) -> None:
    """Equal to the bit: what is saved is what is read."""
    inputs, file = toys.inputs("bert"), tmp_path / "adapter.safetensors"
    model = attached(toys, "bert", case)
    model.save_adapter(file)
    again = peltc.attach(toys.model("bert"), toys.spec(CASES[case]), weights=file)
    assert torch.equal(toys.answer(again, inputs), toys.answer(model, inputs))
    for name in model.pelt.plan.tensors:
        assert torch.equal(again.pelt.parameter(name), model.pelt.parameter(name))


def restored(model: Any, before: dict[str, torch.Tensor], answer: torch.Tensor, expected: torch.Tensor) -> None:
    """The comparison for a model whose modules are gone: what it answers and consists of, and no hook is left."""
    assert torch.equal(answer, expected), "the outputs are not the base's"
    after = state(model)
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), "a hook is left"
    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "pelt")


@every_pair
def test_detach_restores_the_base(case: str, name: str, toys: Any) -> None:
    """Equal to the bit; and modules can be attached again."""
    inputs, spec, base = toys.inputs(name), toys.spec(CASES[case]), toys.model(name)
    expected, before = toys.answer(base, inputs), state(base)
    weights = toys.weights(name, toys.plan(name, CASES[case]))
    with_modules = toys.answer(peltc.attach(base, spec, weights=weights), inputs)
    assert not torch.allclose(with_modules, expected, atol=1e-3)
    base.detach_adapter()
    restored(base, before, toys.answer(base, inputs), expected)
    assert torch.equal(toys.answer(peltc.attach(base, spec, weights=weights), inputs), with_modules)


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of everything trained; none is missing."""
    loss_of(model.train(), inputs).backward()
    found = {key: p.grad for key, p in model.pelt.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found


def same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The comparison of gradients: some are zero but for rounding, so the largest of all is the measure."""
    assert set(found) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        difference = float((found[key] - gradient).abs().max())
        assert difference <= GRADIENT * largest, f"the gradient of {key} differs by {difference / largest:.1e}"


@every_pair
def test_gradient_checkpointing(case: str, name: str, toys: Any) -> None:
    """Layers that run a second time during the backward pass give the same gradients."""
    inputs = toys.inputs(name)
    model = attached(toys, name, case)
    model.gradient_checkpointing_enable()
    same_gradients(gradients(model, inputs), gradients(attached(toys, name, case), inputs))


@every_case
def test_reentrant_checkpointing(case: str, toys: Any) -> None:
    """The older kind, which needs an input that asks for a gradient."""
    inputs = toys.inputs("gpt2")
    model = attached(toys, "gpt2", case)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    same_gradients(gradients(model, inputs), gradients(attached(toys, "gpt2", case), inputs))


def test_a_gate_that_reads_the_mask_survives_checkpointing(toys: Any) -> None:
    """The mask is given to the model once, and read again when a layer runs a second time."""
    gated = {
        "site": "block",
        "parameters": {"w": {"shape": [1, "d"], "init": "normal(0.1)"}, "u": {"shape": ["d"], "init": "zeros"}},
        "delta": "mean_seq(sigmoid(linear(x, w)), mask) * u * y",
    }
    entry, methods = {"method": "gated", "at": "feed_forward.block"}, {"gated": gated}
    weights = toys.weights("bert", toys.plan("bert", entry, methods=methods))
    plain, again = (
        peltc.attach(toys.model("bert"), toys.spec(entry, methods=methods), weights=weights) for _ in range(2)
    )
    again.gradient_checkpointing_enable()
    inputs = toys.inputs("bert")
    same_gradients(gradients(again, inputs), gradients(plain, inputs))


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
        losses.append(loss.item())
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
    model = attached(toys, "bert", "lora")
    before = state(model)
    next(p for key, p in model.pelt.named_parameters() if key.endswith("value/B")).requires_grad_(False)
    step(model, toys.inputs("bert"))
    with pytest.raises(AssertionError, match=r"value/B has not moved"):
        only_declared(model, before)


def test_a_moved_frozen_bank_shows(toys: Any) -> None:
    """VeRA's projections are declared and frozen; training them is a mistake too."""
    model = attached(toys, "bert", "vera")
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
    model, inputs = toys.model("bert"), toys.inputs("bert")
    expected, before = toys.answer(model, inputs), state(model)
    weights = toys.weights("bert", toys.plan("bert", CASES["lora"]))
    peltc.attach(model, toys.spec(CASES["lora"]), weights=weights).pelt.handles.pop(-2)
    model.detach_adapter()
    with pytest.raises(AssertionError, match="the outputs are not the base's"):
        restored(model, before, toys.answer(model, inputs), expected)
    with pytest.raises(AssertionError, match="a hook is left"):
        restored(model, before, expected, expected)


def test_a_wrong_gradient_shows(toys: Any) -> None:
    inputs = toys.inputs("bert")
    found, expected = (gradients(attached(toys, "bert", "lora"), inputs) for _ in range(2))
    same_gradients(found, expected)
    next(iter(found.values())).mul_(1.001)
    with pytest.raises(AssertionError, match="the gradient of"):
        same_gradients(found, expected)
