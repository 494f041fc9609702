"""Compositions of the `adapters` library that give rows of a batch to different adapters, as profiles of a bank; and
its average, as a combination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters_cases as cases
import numpy as np
import pytest
from adapters_cases import bottleneck, config, lora, prefix
from safetensors.numpy import load_file

import peltc
from peltc.runtime.verification.verify import TOLERANCE

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.xdist_group("adapters")
EFFECT = 1e-2
"""How far apart the adapters are at least, as a share of the largest value, for the comparison to mean anything."""
WEIGHTS = [3.0, 1.0]
UNION = config("ConfigUnion", bottleneck(), lora(use_gating=True), prefix(flat=True))


def setup(kind: str, one: Any, **options: Any) -> dict[str, Any]:
    return {"setup": {"kind": kind, "configs": [one, one], "options": options}}


FOLDERS: dict[str, tuple[str, Any, Any]] = {
    "BatchSplit": ("bert", {}, setup("BatchSplit", UNION, batch_sizes=[1, 1]) | {"safe": False}),
    "Parallel": ("bert", {}, setup("Parallel", bottleneck("DoubleSeqBnConfig"))),
    "Average": ("bert", {}, setup("Average", lora(intermediate_lora=True), weights=WEIGHTS)),
}


@pytest.fixture(scope="module")
def library(toys: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the library saved and answered, by the name of the case."""
    if not cases.PYTHON.is_file():
        pytest.skip(f"no interpreter with the adapters library at {cases.PYTHON}: make .venv/adapters/.ready")
    root = tmp_path_factory.mktemp("compositions")
    cases.write(FOLDERS, lambda family: toys.base("bert").folder, root)
    return {name: root / str(number) for number, name in enumerate(FOLDERS)}


@pytest.mark.parametrize("name", ["BatchSplit", "Parallel"])
def test_rows_have_adapters_of_their_own(name: str, library: dict[str, Path], toys: Any, tmp_path: Path) -> None:
    """The bank answers each row as the library does; with the profiles the other way round it does not."""
    folder = library[name] / "adapter"
    given = load_file(library[name] / "answer.safetensors")
    expected, _ = given.pop("answer"), given.pop("bare")
    peltc.compile(folder / "one0", toys.base("bert").folder, tmp_path, mode="bank", verify=False)
    session = peltc.Session(tmp_path, ["CPUExecutionProvider"])
    session.add_profile("one0", tmp_path / "profiles/one0.onnx_adapter")
    session.add_profile("one1", peltc.link(tmp_path, folder / "one1"))
    times = len(expected) // len(given["input_ids"])
    tiled = {key: np.tile(array, (times, 1)) for key, array in given.items()}
    rows = ["one0"] * (len(expected) // 2) + ["one1"] * (len(expected) // 2)
    real = tiled["attention_mask"] > 0

    def error(profiles: list[str]) -> float:
        found = session(**tiled, profile=profiles)["last_hidden_state"]
        return float(np.abs(found - expected)[real].max() / np.abs(expected[real]).max())

    assert error(rows) < TOLERANCE["float32"]
    assert error(rows[::-1]) > EFFECT


def test_an_average_is_a_combination(library: dict[str, Path], toys: Any, tmp_path: Path) -> None:
    """With the library's weights, which it divides by the number of adapters as well; and not without that."""
    folder, base = library["Average"] / "adapter", toys.base("bert").folder
    expected, given = cases.answers(library["Average"])
    real = given["attention_mask"] > 0

    def error(parts: list[float]) -> float:
        peltc.combine([folder / "one0", folder / "one1"], base, tmp_path / "both", weights=parts)
        peltc.compile(tmp_path / "both/spec.yaml", base, tmp_path / "out", verify=False)
        found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"])(**given)["last_hidden_state"]
        return float(np.abs(found - expected)[real].max() / np.abs(expected[real]).max())

    shares = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    assert error([share / 2 for share in shares]) < TOLERANCE["float32"]
    assert error(shares) > EFFECT
