"""What modules do to a model beside their mathematics: its mode, its copies, its memory, layers that run again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import answer, batch

import peltc
from peltc.runtime.training import evaluation, reruns
from peltc.spec.diagnostics import PeltError

DROPOUT = {"method": "lora", "at": "attention.query", "r": 2, "dropout": 0.5}
READERS = [
    {"method": "bottleneck", "at": "feed_forward.block", "size": 4, "reads": "normed", "gate": {"mask_padding": True}},
    {"method": "prefix", "at": "attention", "length": 2, "hidden": 4, "gate": {"mask_padding": True, "reads": "h"}},
]
"""Modules that read the mask, the residual stream and the layer's input, which hooks remember."""
ROUTED = {"recipe": "adamix", "size": 4, "share": ""}
CLOSE = 1e-6

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("training", [True, False])
def test_modules_take_the_mode_of_the_model(training: bool, base: Any, cache: Any) -> None:
    model = peltc.attach(copy.deepcopy(base).train(training), {"pelt": 1, "attach": [DROPOUT]})
    assert model.pelt.training is training


def test_a_model_in_evaluation_stays_deterministic(base: Any, cache: Any, inputs: Any) -> None:
    model = peltc.attach(copy.deepcopy(base), {"pelt": 1, "attach": [DROPOUT]})
    for name, parameter in model.pelt.named_parameters():
        torch.nn.init.normal_(parameter) if name.endswith("/B") else None
    assert torch.equal(answer(model, inputs), answer(model, inputs))


def test_a_copy_is_refused(attached: Any) -> None:
    """Its hooks would be the original's, and its own parameters would do nothing."""
    model = attached(DROPOUT)
    with pytest.raises(PeltError, match=r"E209.*cannot be copied") as caught:
        copy.deepcopy(model)
    assert "copy the model first" in str(caught.value)
    model.detach_adapter()
    copy.deepcopy(model)


def test_copies_for_several_devices_are_refused(attached: Any, inputs: Any) -> None:
    """What `nn.DataParallel` calls, and `Trainer` through it where a machine has several devices."""
    with pytest.raises(PeltError, match=r"E209.*DataParallel"):
        attached(DROPOUT)._replicate_for_data_parallel()(**inputs)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector, which hides what refers to itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def remembered(model: Any) -> list[weakref.ref[torch.Tensor]]:
    """What blocks answer from now on, without keeping it."""
    found: list[weakref.ref[torch.Tensor]] = []
    for layer in model.bert.encoder.layer:
        for module in (layer.output.dense, layer.intermediate.dense):
            module.register_forward_pre_hook(lambda m, args: found.append(weakref.ref(args[0])))
    return found


def test_no_activation_outlives_a_pass(attached: Any, inputs: Any, uncollected: None) -> None:
    model = attached(*READERS, {**DROPOUT, "experts": {}})
    seen = remembered(model)
    answer(model, inputs)
    assert len(seen) == 4 and not any(ref() is not None for ref in seen)


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for module in model.modules():  # no dropout beside that of the modules, yet layers are checkpointed
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_no_activation_outlives_a_checkpointed_layer(
    reentrant: bool, attached: Any, inputs: Any, uncollected: None
) -> None:
    """Or checkpointing would save nothing."""
    model = checkpointed(attached(*READERS, {**DROPOUT, "experts": {}}), reentrant)
    seen = remembered(model)
    model(**inputs).logits.square().mean().backward()
    assert len(seen) > 4 and not any(ref() is not None for ref in seen)
    assert not model.pelt.seen


def gradients(model: Any, *batches: Any) -> dict[str, torch.Tensor]:
    """Of one loss over several batches."""
    torch.manual_seed(0)
    sum(model(**inputs).logits.square().mean() for inputs in batches).backward()  # type: ignore[attr-defined]
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(float(g.abs().max()) for g in expected.values())
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max()) / largest
        assert error <= CLOSE, f"the gradient of {name} differs by {error:.1e}"


def plain(model: Any) -> Any:
    checkpointed(model, False).gradient_checkpointing_disable()
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("entries", [READERS, [ROUTED], [DROPOUT]], ids=["readers", "routed", "dropout"])
def test_two_batches_before_one_checkpointed_backward_pass(entries: Any, reentrant: bool, attached: Any) -> None:
    """Layers that run again see the mask and draw the experts of their own batch."""
    batches = batch(padding=2), batch(padding=6)
    expected = gradients(plain(attached(*entries)), *batches)
    same(gradients(checkpointed(attached(*entries), reentrant), *batches), expected)


def test_detaching_leaves_checkpointing_as_it_was(attached: Any, inputs: Any) -> None:
    model = checkpointed(attached(*READERS), False)
    before = model.bert.encoder.layer[0]._gradient_checkpointing_func
    gradients(model, inputs)
    assert isinstance(model.bert.encoder.layer[0]._gradient_checkpointing_func, reruns.Rerun)
    model.detach_adapter()
    assert model.bert.encoder.layer[0]._gradient_checkpointing_func is before


# Witnesses: each of these mistakes must show.


def test_the_mask_of_another_batch_shows(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "remember_reruns", lambda model, attached: None)
    with pytest.raises(AssertionError, match="the gradient of"):
        test_two_batches_before_one_checkpointed_backward_pass(READERS, False, attached)


def test_other_draws_show(attached: Any) -> None:
    expected = gradients(plain(attached(ROUTED)), batch())
    model = checkpointed(attached(ROUTED), False)
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with pytest.raises(AssertionError, match="the gradient of"):
        for _ in range(4):
            model.zero_grad()
            same(gradients(model, batch()), expected)


def test_an_activation_that_is_kept_shows(attached: Any, inputs: Any, uncollected: None) -> None:
    model = attached(*READERS)
    kept: list[torch.Tensor] = []
    model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    seen = remembered(model)
    answer(model, inputs)
    assert [ref() is not None for ref in seen].count(True) == 1
