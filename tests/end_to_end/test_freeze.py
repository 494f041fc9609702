"""Gates frozen to what they are on calibration texts: what folds then, and what it changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import peltc
from peltc import schemas
from peltc.runtime.building.compile import plan_for
from peltc.runtime.building.freeze import freeze

TEXTS = ["Return the number of edges.", "Draw error bars at each point of the line, please.", "Simplify."]
GATED = {"recipe": "unipelt", "r": 4, "hidden": 16}


def spec_file(folder: Path, entry: dict[str, Any] = GATED, texts: str = "texts.txt") -> Path:
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    content = {"pelt": 1, "attach": [entry], "deploy": {"freeze_gates": texts}}
    file = folder / "spec.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def random_tensors(spec: peltc.Spec, model: Path, scale: float = 0.02) -> dict[str, np.ndarray]:
    plan, _ = plan_for(spec, model)
    random = np.random.default_rng(0)
    return {name: random.normal(0, scale, t.shape).astype(np.float32) for name, t in plan.tensors.items()}


@pytest.mark.xdist_group("minilm")
@pytest.mark.parametrize("recipe", ["unipelt", "unipelt_central"])
def test_frozen_gates_fold(recipe: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, spec = model_folder("minilm"), peltc.load_spec(spec_file(tmp_path, {**GATED, "recipe": recipe}))
    said: list[str] = []
    manifest = peltc.compile(spec, model, tmp_path / "out", random_tensors(spec, model), talk=said.append)
    absorbed = {m["attachment"] for m in manifest["modules"] if m["absorbed"]}
    assert absorbed == {"lora"}, "LoRA folds once its gates are numbers"
    assert 0 < manifest["frozen_gates"]["difference"] < 0.1
    assert manifest["frozen_gates"]["texts"] == len(TEXTS)
    assert any("gates are frozen" in line for line in said), "it is said aloud"
    assert manifest["verification"]["worst"] <= 1e-5
    jsonschema.validate(json.loads((tmp_path / "out" / "pelt.json").read_text()), schemas.load("manifest"))
    assert peltc.verify(tmp_path / "out")["frozen_gates"] == manifest["frozen_gates"]


@pytest.mark.xdist_group("minilm")
def test_a_number_is_the_mean_over_texts(model_folder: Callable[..., Path]) -> None:
    """Of gates whose map is zero the bias alone is left, whatever the text; others are means of what texts give."""
    model = model_folder("minilm")
    spec = peltc.load_spec({"pelt": 1, "attach": [GATED]})
    plan, base = plan_for(spec, model)
    tensors = random_tensors(spec, model)
    for name in tensors:
        if name.endswith("query.gate_weight"):
            tensors[name] *= 0
        if name.endswith("query.gate_bias"):
            tensors[name][:] = 1.5
    report = freeze(plan, base, tensors, TEXTS).report["gates"]
    for name, gate in report.items():
        if name.endswith("query"):
            assert gate["mean"] == pytest.approx(1 / (1 + np.exp(-1.5)), abs=1e-6)
            assert gate["deviation"] == pytest.approx(0, abs=1e-6)
        else:
            assert gate["deviation"] > 0
    assert len(report) == 4 * 6


@pytest.mark.xdist_group("minilm")
def test_the_order_of_texts_does_not_matter(model_folder: Callable[..., Path]) -> None:
    """Texts are measured one at a time: none is padded for another's sake."""
    plan, base = plan_for(peltc.load_spec({"pelt": 1, "attach": [GATED]}), model_folder("minilm"))
    tensors = random_tensors(plan.spec, model_folder("minilm"))
    first, second = (freeze(plan, base, tensors, texts) for texts in (TEXTS, TEXTS[::-1]))
    assert all(np.allclose(first.tensors[name], second.tensors[name], atol=1e-7) for name in first.tensors)


@pytest.mark.xdist_group("minilm")
def test_the_mode_is_kept(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, spec = model_folder("minilm"), peltc.load_spec(spec_file(tmp_path))
    manifest = peltc.compile(spec, model, tmp_path / "out", random_tensors(spec, model), mode="static")
    assert {m["mode"] for m in manifest["modules"]} == {"static"}


@pytest.mark.parametrize(
    ("entry", "texts", "reason"),
    [
        ({"method": "lora", "at": "attention.query"}, "texts.txt", "no gate reads the input"),
        (GATED, "../elsewhere.txt", "outside"),
        (GATED, "missing.txt", "cannot read"),
    ],
)
@pytest.mark.xdist_group("minilm")
def test_refused(entry: dict[str, Any], texts: str, reason: str, model_folder: Callable[..., Path],
                 tmp_path: Path) -> None:  # fmt: skip
    spec = peltc.load_spec(spec_file(tmp_path, entry, texts))
    with pytest.raises(peltc.PeltError, match=reason):
        peltc.compile(spec, model_folder("minilm"), tmp_path / "out", random_tensors(spec, model_folder("minilm")))
    assert not (tmp_path / "out").exists()
