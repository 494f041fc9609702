"""Models with modules in other people's training loops: `Trainer`, accelerate, checkpoints, `torch.compile`; and from
there to an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load, load_file, save

import peltc
from peltc.spec.diagnostics import PeltError

accelerate = pytest.importorskip("accelerate")

STEP = 2e-2
"""Learning rate: far above rounding, so that a few steps show."""
CLOSE = 1e-6
ROUTED = {
    "pelt": 1,
    "attach": [
        {"method": "lora", "at": ["attention.query", "attention.value"], "r": 2, "dropout": 0.1, "gate": {}},
        {"method": "bottleneck", "at": "feed_forward.block", "size": 4, "activation": "gelu", "experts": {"count": 3}},
    ],
}
"""Everything that is random in training, dropout and experts, and a gate."""
XPEFT: dict[str, Any] = {"pelt": 1, "attach": [{"recipe": "xpeft", "n": 100, "k": 50}]}

Rows = list[dict[str, torch.Tensor]]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No bars and tables; and accelerate, which keeps its state for the whole process, starts afresh."""
    from accelerate.state import AcceleratorState, GradientState

    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def task() -> Rows:
    """Sixteen texts of two classes: those with the word 7 and those with the word 8."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for i in range(16):
        ids = torch.randint(10, 100, (8,), generator=random)
        ids[:4] = 7 + i % 2
        mask = torch.ones_like(ids)
        if i % 4 == 3:
            ids[6:], mask[6:] = 0, 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 2)})
    return rows


def whole(rows: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def fresh(spec: dict[str, Any] = ROUTED, family: str = "bert") -> Any:
    torch.manual_seed(0)
    return peltc.attach(models.build(family), spec)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    """What differs by a bit."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def declared(model: Any) -> set[str]:
    return {f"pelt.{name.replace('.', '/')}" for name, t in model.pelt.plan.tensors.items() if not t.frozen}


def same_modules(one: Any, other: Any) -> bool:
    """To the bit."""
    a, b = (dict(m.pelt.named_parameters()) for m in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def loss_of(model: Any, rows: Rows) -> float:
    with torch.no_grad():
        return float(model.eval()(**whole(rows)).loss)


def logits(model: Any, rows: Rows) -> np.ndarray:
    with torch.no_grad():
        inputs = {k: v for k, v in whole(rows).items() if k != "labels"}
        return model.eval()(**inputs).logits.numpy()


def learn(model: Any, inputs: dict[str, torch.Tensor], steps: int = 10, rate: float = STEP) -> tuple[float, float]:
    """A plain loop; the first loss and the last."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    return losses[0], losses[-1]


def session(folder: Path, rows: Rows) -> np.ndarray:
    inputs = {k: v.numpy() for k, v in whole(rows).items() if k != "labels"}
    if "token_type_ids" in json.dumps(json.loads((folder / "pelt.json").read_text())):
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    return peltc.Session(folder, ["CPUExecutionProvider"])(**inputs)["logits"]


def differ(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# transformers.Trainer


@pytest.fixture
def trainer(task: Rows, tmp_path: Path) -> Callable[..., Any]:
    def build(model: Any, steps: int = 6, **more: Any) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"), max_steps=steps, per_device_train_batch_size=8, learning_rate=STEP,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
            save_strategy="steps", save_steps=3, dataloader_num_workers=0, seed=1, **more,
        )  # fmt: skip
        return transformers.Trainer(model=model, args=arguments, train_dataset=task, eval_dataset=task)

    return build


def test_trainer_learns_and_moves_only_what_is_declared(trainer: Any, task: Rows) -> None:
    model = fresh()
    before, first = state(model), loss_of(model, task)
    result = trainer(model, steps=12).train()
    assert result.global_step == 12
    assert moved(model, before) == declared(model)
    assert loss_of(model, task) < 0.8 * first


def test_trainer_resumes_to_the_bit(trainer: Any, task: Rows, tmp_path: Path) -> None:
    """Modules, their optimiser's state, and what is drawn at random: as if it had never stopped."""
    straight = fresh()
    trainer(straight).train()
    resumed = fresh()
    assert not same_modules(resumed, straight)
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-3"))
    assert same_modules(resumed, straight)


def test_trainer_keeps_the_best_checkpoint(trainer: Any, task: Rows) -> None:
    """`load_best_model_at_end` loads modules too."""
    model = fresh()
    run = trainer(model, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, metric_for_best_model="loss")
    run.train()
    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert best.keys() >= declared(model)
    assert all(np.array_equal(best[name], tensor.numpy()) for name, tensor in model.state_dict().items())


def test_a_trainers_checkpoint_is_the_base_to_others(trainer: Any, tmp_path: Path) -> None:
    """Whoever reads it without peltc gets the base: the modules' tensors stand apart, in names of their own."""
    model, base = fresh(), models.build("bert")
    run = trainer(model, steps=3)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    plain, report = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not moved(plain, state(base)) and not hasattr(plain, "pelt")
    assert set(report["unexpected_keys"]) == set(model.state_dict()) - set(base.state_dict())
    assert not report["missing_keys"]


def test_from_training_to_an_artifact(
    trainer: Any, task: Rows, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """What was trained, saved and compiled answers as the trained model does; and so does a compiled live model."""
    model = fresh()
    trainer(model).train()
    expected = logits(model, task)
    model.save_adapter(tmp_path / "adapter.safetensors")
    peltc.compile(ROUTED, model_folder("bert"), tmp_path / "out", weights=tmp_path / "adapter.safetensors")
    assert differ(session(tmp_path / "out", task), expected) <= 1e-5
    peltc.compile(ROUTED, model, tmp_path / "live")
    assert np.array_equal(session(tmp_path / "live", task), session(tmp_path / "out", task))


def test_half_of_the_adapter_shows(task: Rows, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Witness: a file from before the last steps is not taken for the trained one."""
    model = fresh()
    learn(model, whole(task), 3)
    model.save_adapter(tmp_path / "early.safetensors")
    learn(model, whole(task), 3)
    peltc.compile(ROUTED, model_folder("bert"), tmp_path / "out", weights=tmp_path / "early.safetensors")
    assert differ(session(tmp_path / "out", task), logits(model, task)) > 1e-3


# accelerate


GATED = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2, "gate": {}}]}


def noisy() -> Any:
    """A model in training with random modules and no dropout."""
    model = fresh(GATED)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.pelt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def accelerated(rows: Rows, size: int, accumulate: int = 1, **more: Any) -> tuple[Any, Any]:
    """A plain loop over sixteen texts, twice; the model and its accelerator."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **more)
    model = noisy()
    optimiser = torch.optim.SGD(peltc.parameter_groups(model, 1.0, weight_decay=0.0), lr=1.0)
    loader = torch.utils.data.DataLoader([*rows, *rows], batch_size=size)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    for inputs in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**inputs).loss)
            optimiser.step()
            optimiser.zero_grad()
    return model, accelerator


def apart(found: Any, expected: Any) -> float:
    """How far two models are from each other, as a share of how far training took them."""
    start = torch.cat([p.flatten() for p in noisy().pelt.parameters()])
    one, two = (torch.cat([p.detach().flatten() for p in m.pelt.parameters()]) for m in (found, expected))
    assert one.dtype == torch.float32 and (two - start).abs().max() > 1e-3
    return float((one - two).abs().max() / (two - start).abs().max())


def test_accelerate_trains(task: Rows, tmp_path: Path) -> None:
    """And the modules are reached as ever."""
    model, accelerator = accelerated(task, 16)
    inner = accelerator.unwrap_model(model)
    assert moved(inner, state(noisy())) == declared(inner)
    inner.save_adapter(tmp_path / "adapter.safetensors")
    again = peltc.attach(models.build("bert"), GATED, weights=tmp_path / "adapter.safetensors")
    assert same_modules(again, inner)


def test_gradients_accumulate(task: Rows) -> None:
    at_once, _ = accelerated(task, 16)
    assert apart(accelerated(task, 4, accumulate=4)[0], at_once) <= 1e-4
    assert apart(accelerated(task, 4)[0], at_once) > 1e-2, "a witness: more steps show"


def test_mixed_precision_trains(task: Rows) -> None:
    """bfloat16 inside, float32 parameters: close to training without, and not equal to it."""
    exact, _ = accelerated(task, 16)
    accelerate.state.AcceleratorState._reset_state(True)
    mixed, _ = accelerated(task, 16, mixed_precision="bf16")
    assert 0 < apart(mixed, exact) <= 0.05


def test_accelerate_restores_its_own_checkpoint(task: Rows, tmp_path: Path) -> None:
    model, accelerator = accelerated(task, 16)
    accelerator.save_state(str(tmp_path))
    before = state(model)
    learn(model, whole(task), 1)
    assert moved(model, before)
    accelerator.load_state(str(tmp_path))
    assert not moved(model, before)


# torch.compile


def test_a_compiled_model_learns_alike(task: Rows) -> None:
    """With a gate that reads the mask, a norm that runs twice, and experts drawn alike."""
    spec = {"pelt": 1, "attach": [
        {"method": "lora", "at": "attention.query", "r": 2, "gate": {"mask_padding": True}},
        {"method": "bottleneck", "at": "feed_forward.block", "size": 4, "reads": "normed", "experts": {"count": 3}},
    ]}  # fmt: skip
    model = fresh(spec)
    learn(model, whole(task), 2)

    def gradients(called: Any, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model.train().zero_grad()
        called(**whole(task)).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.pelt.parameters()])

    compiled = torch.compile(model, backend="aot_eager")
    found, expected, other = gradients(compiled, 3), gradients(model, 3), gradients(model, 4)
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
    assert (other - expected).abs().max() > 1e-2 * expected.abs().max(), "a witness: draws matter"


def test_a_model_compiled_before_its_modules_runs_them(task: Rows) -> None:
    """Code that knows nothing of them is not run any more."""
    model = models.build("bert").requires_grad_(False)
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled, task)
    peltc.attach(model, ROUTED)
    learn(model, whole(task), 1)
    assert np.array_equal(logits(compiled, task), logits(model, task))
    assert differ(logits(model, task), before) > 1e-3, "a witness: modules matter"


# recipes


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_hyperpelt_trains(family: str, task: Rows) -> None:
    model = fresh({"pelt": 1, "attach": [{"recipe": "hyperpelt", "size": 8, "hidden": 16, "length": 2}]}, family)
    inputs = whole(task)
    if family == "t5":
        model.config.decoder_start_token_id = model.config.pad_token_id = 0
        inputs["labels"] = inputs["input_ids"][:, :4].contiguous()
    before = state(model)
    first, last = learn(model, inputs, 12)
    assert last < 0.95 * first
    assert moved(model, before) == declared(model)


def test_one_network_shares_its_embeddings(task: Rows) -> None:
    """Adapters and prefixes of one name read one embedding, and each sends a gradient to it."""

    def embeddings(network: str) -> tuple[Any, dict[str, Any]]:
        generate = {"size": 8, "hidden": 16, "network": network}
        model = fresh({"pelt": 1, "attach": [
            {"method": "bottleneck", "name": "adapter", "at": "feed_forward.block", "size": 4, "generate": generate},
            {"method": "prefix", "at": "attention", "length": 2, "reparameterise": False, "generate": generate},
        ]})  # fmt: skip
        ends = ("task_embedding", "layer_embedding")
        return model, {n: p for n, p in model.pelt.named_parameters() if n.endswith(ends)}

    model, shared = embeddings("hyper")
    assert set(shared) == {"hyper/task_embedding", "hyper/layer_embedding"}
    parts = {"adapter": "adapter/up_generator", "prefix": "prefix/V_generator"}
    for kept in parts:
        with torch.no_grad():
            for name, parameter in model.pelt.named_parameters():
                if name.endswith("_generator"):
                    torch.nn.init.normal_(parameter) if name.startswith(f"{kept}/") else parameter.zero_()
        model.zero_grad()
        model(**whole(task)).loss.backward()
        assert all(bool(p.grad.any()) for p in shared.values()), f"no gradient from the {kept}"
    _, apart = embeddings("")
    assert set(apart) == {f"{part}/{kind}_embedding" for part in parts for kind in ("task", "layer")}


PARTS = {
    "whole": {},
    "AP": {"lora": False},
    "LoRA": {"prefix": False, "adapter": False},
    "prefix": {"lora": False, "adapter": False},
    "adapter": {"lora": False, "prefix": False},
    "no gates": {"gates": False},
    "constant gates": {"constant_gates": True},
    "masked": {"mask_padding": True},
}


@pytest.mark.parametrize("part", PARTS)
def test_unipelt_trains_in_all_parts(part: str, task: Rows) -> None:
    model = fresh({"pelt": 1, "attach": [{"recipe": "unipelt", "r": 2, "length": 2, "hidden": 8, **PARTS[part]}]})
    before = state(model)
    first, last = learn(model, whole(task), 8)
    assert last < first
    assert moved(model, before) == declared(model)
    gates = any("gate" in name for name in declared(model))
    assert gates is (part != "no gates")


# X-PEFT's profiles


@pytest.fixture(scope="module")
def profile(cache: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model whose masks were trained for a few steps, and its profile."""
    torch.manual_seed(0)
    model = fresh(XPEFT)
    ids = torch.randint(3, 100, (8, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    before = state(model)
    start = model.pelt.tensors()
    learn(model, inputs, 4)
    assert moved(model, before) == declared(model)
    assert all("mask_" in name for name in start)
    path = tmp_path_factory.mktemp("profile") / "user.safetensors"
    model.save_profile(path)
    return model.eval(), path


def test_a_profile_of_a_hundred_adapters_in_twelve_layers_is_312_bytes(cache: Any, tmp_path: Path) -> None:
    model = peltc.attach(models.build("bert", num_hidden_layers=12), XPEFT)
    model.save_profile(tmp_path / "user.safetensors")
    stored = load_file(tmp_path / "user.safetensors")
    assert sum(array.nbytes for array in stored.values()) == 2 * -(-100 // 8) * 12 == 312
    assert {array.dtype for array in stored.values()} == {np.dtype(np.uint8)}


def test_a_profile_compiles_to_what_its_adapter_does(
    profile: tuple[Any, Path], task: Rows, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Bits, logits and the live model: one function. Folded masks are the masks at run time."""
    model, path = profile
    model.save_adapter(tmp_path / "adapter.safetensors")
    answers = []
    for i, weights in enumerate((path, tmp_path / "adapter.safetensors")):
        peltc.compile(XPEFT, model_folder("bert"), tmp_path / str(i), weights=weights)
        answers.append(session(tmp_path / str(i), task))
    assert np.array_equal(*answers)
    assert differ(answers[0], logits(model, task)) <= CLOSE
    again = peltc.attach(models.build("bert"), XPEFT, weights=path)
    assert np.array_equal(logits(again, task), logits(model, task))
    untrained = peltc.attach(models.build("bert"), XPEFT)
    assert differ(logits(untrained, task), logits(model, task)) > 1e-4, "a witness: masks matter"


def tampered(path: Path, out: Path, change: Callable[[np.ndarray], None]) -> Path:
    """The profile with its masks changed, its metadata as they were."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    tensors = {name: array.copy() for name, array in load(raw).items()}
    change(tensors["bottleneck.masks"])
    out.write_bytes(save(tensors, json.loads(raw[8 : 8 + size])["__metadata__"]))
    return out


def one_more(masks: np.ndarray) -> None:
    """The first mask gets k + 1 ones."""
    bits = np.unpackbits(masks[0, 0], bitorder="little")
    bits[np.flatnonzero(bits[:100] == 0)[0]] = 1
    masks[0, 0] = np.packbits(bits, bitorder="little")


def spare(masks: np.ndarray) -> None:
    """A bit beyond the hundredth."""
    masks[0, 0, -1] |= 0x80


@pytest.mark.parametrize("change", [one_more, spare])
def test_tampered_masks_are_refused(change: Any, profile: tuple[Any, Path], tmp_path: Path) -> None:
    file = tampered(profile[1], tmp_path / "user.safetensors", change)
    with pytest.raises(PeltError, match=r"E407.*does not have 50 ones"):
        peltc.attach(models.build("bert"), XPEFT, weights=file)


def test_an_untampered_profile_is_taken(profile: tuple[Any, Path], tmp_path: Path) -> None:
    """Witness: it is the change that is refused, not the file being written again."""
    file = tampered(profile[1], tmp_path / "user.safetensors", lambda masks: None)
    peltc.attach(models.build("bert"), XPEFT, weights=file)


@pytest.mark.parametrize("kept", [4, 200, -1])
def test_a_truncated_profile_is_refused(kept: int, profile: tuple[Any, Path], tmp_path: Path) -> None:
    file = tmp_path / "user.safetensors"
    file.write_bytes(profile[1].read_bytes()[:kept])
    with pytest.raises(PeltError, match="E401"):
        peltc.attach(models.build("bert"), XPEFT, weights=file)


@pytest.mark.parametrize(
    "spec, what",
    [
        ({**XPEFT, "seed": 1}, "bank"),
        ({"pelt": 1, "attach": [{"recipe": "xpeft", "n": 100, "k": 40}]}, "k 50"),
        ({"pelt": 1, "attach": [{"recipe": "xpeft", "n": 96, "k": 50}]}, "n 100"),
        ({"pelt": 1, "attach": [{"recipe": "xpeft", "normalise": "sum"}]}, "normalise mean"),
        ({"pelt": 1, "attach": [{"recipe": "xpeft", "std": 0.03}]}, "bank"),
    ],
)
def test_masks_over_another_bank_are_refused(
    spec: Any, what: str, profile: tuple[Any, Path], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(PeltError, match=rf"E407.*of another bank: .*{what}"):
        peltc.compile(spec, model_folder("bert"), tmp_path / "out", weights=profile[1])
    assert not (tmp_path / "out").exists()


def test_a_profile_needs_hard_masks(tmp_path: Path) -> None:
    model = fresh({"pelt": 1, "attach": [{"recipe": "xpeft", "mask": "soft"}]})
    with pytest.raises(PeltError, match="E211"):
        model.save_profile(tmp_path / "user.safetensors")
