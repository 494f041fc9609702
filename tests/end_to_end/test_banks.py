"""Banks of trained adapters: stacked by the command line, mixed by masks, kept in the artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peltc
from peltc.runtime.building.compile import plan_for
from peltc.runtime.commands.cli import run

ADAPTER = {"recipe": "pfeiffer", "reduction": 4}
N, K = 5, 2


@pytest.fixture
def bank(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Adapters of random values, stacked by `pelt bank`."""
    plan, _ = plan_for(peltc.load_spec({"pelt": 1, "attach": [ADAPTER]}), model_folder("bert"))
    random = np.random.default_rng(0)
    files = []
    for i in range(N):
        files.append(tmp_path / f"{i}.safetensors")
        save_file({n: random.normal(0, 0.3, t.shape).astype(np.float32) for n, t in plan.tensors.items()}, files[-1])
    assert run(["bank", *map(str, files), "-o", str(tmp_path / "bank.safetensors")]) == 0
    return tmp_path / "bank.safetensors"


def spec(folder: Path, **options: Any) -> peltc.Spec:
    said = ", ".join(f"{key}: {value}" for key, value in {"n": N, "k": K, "reduction": 4, **options}.items())
    (folder / "spec.yaml").write_text(f"pelt: 1\nattach: [{{recipe: xpeft, {said}}}]\n")
    return peltc.load_spec(folder / "spec.yaml")


def masks(spec: peltc.Spec, model: Path) -> dict[str, np.ndarray]:
    plan, _ = plan_for(spec, model)
    random = np.random.default_rng(1)
    return {n: random.normal(size=t.shape).astype(np.float32) for n, t in plan.tensors.items() if not t.source}


def outputs(folder: Path) -> np.ndarray:
    ids = np.arange(12).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return peltc.Session(folder)(**inputs)["logits"]


def test_equal_to_the_adapter_that_the_masks_make(
    bank: Path, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Averaged by hand, the chosen adapters are one plain adapter."""
    model, mixed = model_folder("bert"), spec(tmp_path, file=bank.name)
    given = masks(mixed, model)
    peltc.compile(mixed, model, tmp_path / "mixed", given)
    stacked, adapter = load_file(bank), {}
    for name, array in stacked.items():
        side = "down" if "down" in name.rsplit(".", 1)[1] else "up"
        logits = given[f"{name.rsplit('.', 1)[0]}.mask_{side}"]
        adapter[name.removesuffix("_bank")] = array[np.argsort(-logits)[:K]].mean(0)
    peltc.compile({"pelt": 1, "attach": [ADAPTER]}, model, tmp_path / "plain", adapter)
    np.testing.assert_allclose(outputs(tmp_path / "mixed"), outputs(tmp_path / "plain"), atol=1e-6)
    assert peltc.verify(tmp_path / "mixed")["verification"]["worst"] <= 1e-5, "the bank is kept with the artifact"


def test_a_given_bank_is_kept(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Weights may bring a bank along, in place of the random one; the artifact can be verified with it."""
    random_bank = spec(tmp_path)
    plan, _ = plan_for(random_bank, model_folder("bert"))
    random = np.random.default_rng(2)
    every = {n: random.normal(0, 0.3, t.shape).astype(np.float32) for n, t in plan.tensors.items()}
    save_file(every, tmp_path / "all.safetensors")
    peltc.compile(random_bank, model_folder("bert"), tmp_path / "out", tmp_path / "all.safetensors")
    assert set(load_file(tmp_path / "out" / "adapter.safetensors")) == set(every)
    assert peltc.verify(tmp_path / "out")["verification"]["worst"] <= 1e-5


def test_more_than_a_machine_holds(model_folder: Callable[..., Path]) -> None:
    entry = {"method": "lora", "at": "*attention.*", "r": 1024, "bank": {"size": 65536, "k": 2}}
    with pytest.raises(peltc.PeltError, match="E205 the modules have"):
        plan_for(peltc.load_spec({"pelt": 1, "attach": [entry]}), model_folder("bert"))


def test_one_value_per_layer_needs_layers(model_folder: Callable[..., Path]) -> None:
    entry = {"method": "lora", "at": ["attention.query", "pooler"], "r": [2] * 6}
    with pytest.raises(peltc.PeltError, match="lies in none"):
        plan_for(peltc.load_spec({"pelt": 1, "attach": [entry]}), model_folder("minilm"))


def test_refused(bank: Path, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = model_folder("bert")
    shutil.copy(bank, tmp_path / "model.safetensors")
    for options, reason in (
        ({"file": bank.name, "n": N + 1}, r"is \[5, 8, 32\]"),
        ({"file": "missing.safetensors"}, "cannot read"),
        ({"file": "../bank.safetensors"}, "outside"),
        ({"file": "model.safetensors"}, "cannot be kept in the artifact under this name"),
        ({"file": str(bank)}, "cannot be kept in the artifact under this name"),
    ):
        mixed = spec(tmp_path, **options)
        with pytest.raises(peltc.PeltError, match=reason):
            peltc.compile(mixed, model, tmp_path / "out", masks(mixed, model), verify=False)
        assert not (tmp_path / "out").exists()


def test_adapters_of_another_spec_do_not_stack(bank: Path, tmp_path: Path, capsys: Any) -> None:
    save_file({"other": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    files = [str(tmp_path / "0.safetensors"), str(tmp_path / "other.safetensors")]
    assert run(["bank", *files, "-o", str(tmp_path / "new.safetensors")]) == 1
    assert "E404" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()
