"""Adapters written back as Hugging Face PEFT's folders: PEFT loads them and computes the same; what was imported comes
back byte by byte; and what PEFT cannot express is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import numpy as np
import peft
import pytest
import torch
import transformers
from import_matrix import written
from safetensors.numpy import load_file, save_file
from test_import import CASES

import peltc
from peltc.compiler.exporters.naming import endings, every_module, patterns, targets
from peltc.runtime.building.adapters import read_adapter
from peltc.runtime.commands.cli import run
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError

Folder = Callable[..., Path]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
KINDS = (peft.LoraConfig, peft.IA3Config)
UNSAID = ("all biases", "biases of its modules", "a table", "a table that is a head as well", "rows of a table",
          "rows of a table that is a head as well", *(name for name in CASES if "experts" in name))  # fmt: skip
"""What is imported and cannot be told back."""
BACK = {name: case for name, case in CASES.items() if case[1].get("kind", KINDS[0]) in KINDS and name not in UNSAID}
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def answers(base: Path, folder: Path, given: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What PEFT's model answers with an adapter's folder loaded."""
    named = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, named).from_pretrained(base)
    live: Any = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        found: np.ndarray[Any, Any] = live(**{n: torch.as_tensor(v) for n, v in given.items()}).logits.numpy()
    return found


def random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("case", BACK)
def test_what_was_imported_comes_back(case: str, model_folder: Folder, tmp_path: Path) -> None:
    """The same tensors by the same names, byte by byte, for the same modules; and PEFT answers the same."""
    family, settings, _ = BACK[case]
    base = model_folder(family)
    expected, given = written(family, settings, base, tmp_path / "adapter")
    assert run(["import", str(tmp_path / "adapter"), str(base), "-o", str(tmp_path / "spec"), "-q"]) == 0
    out = tmp_path / "back"
    assert run(["export-peft", str(tmp_path / "spec/spec.yaml"), str(base), "-o", str(out), "-q"]) == 0
    theirs, ours = load_file(tmp_path / "adapter" / FILE), load_file(out / FILE)
    assert {n: (a.shape, a.tobytes()) for n, a in theirs.items()} == {
        n: (a.shape, a.tobytes()) for n, a in ours.items()
    }
    assert np.array_equal(answers(base, out, given), expected)
    config = json.loads((out / CONFIG).read_text())
    assert list(config) == sorted(config)
    entries = config["target_modules"]
    assert len(entries) <= max(4, len(json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]))


ATTACHED: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    # name: the model, what is attached, and what the config says
    "parts of a fused map, each with factors of its own": (
        "gpt2", [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 3, "alpha": 7}],
        {"r": 6, "lora_alpha": 14, "fan_in_fan_out": True, "target_modules": ["c_attn"]}),
    "parts of a fused map with scales of their own": (
        "gpt2", [{"method": "lora", "at": "attention.query", "r": 3, "alpha": 7, "bias": True},
                 {"method": "lora", "name": "other", "at": "attention.key", "r": 2, "bias": True},
                 {"method": "lora", "name": "off", "at": "attention.value", "r": 1, "alpha": 0, "bias": True}],
        {"r": 6}),
    "biases of B on parts of a fused map": (
        "gpt2", [{"method": "lora", "at": "attention.query", "bias": True, "r": 2, "alpha": 3}], {"lora_bias": True}),
    "a rank-stabilised scale": (
        "bert", [{"method": "lora", "at": "attention.query", "r": 3, "rank_stabilised": True}],
        {"use_rslora": True, "lora_alpha": 16, "r": 3}),
    "both scales": (
        "bert", [{"method": "lora", "at": "attention.query", "r": 3, "rank_stabilised": True},
                 {"method": "lora", "name": "other", "at": "attention.key", "r": 3}], {"use_rslora": False}),
    "vectors on parts of a fused map": (
        "gpt2", [{"method": "ia3", "at": ["attention.key", "attention.value"]},
                 {"method": "ia3", "name": "inside", "at": "feed_forward.down", "position": "input"}],
        {"feedforward_modules": ["mlp.c_proj"], "target_modules": ["c_attn", "mlp.c_proj"]}),
    "some layers, and a head": (
        "bert", [{"method": "dora", "at": "attention.query", "layers": [1]}, {"method": "replace", "at": "head"}],
        {"use_dora": True, "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "a head of two maps": (
        "roberta", [{"method": "lora", "at": "attention.query"}, {"method": "replace", "at": ["head", "pooler"]}],
        {"modules_to_save": ["classifier"]}),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case in UNSAID if case.startswith(("all", "rows of a table that", "a table"))]
)
def test_what_is_imported_and_cannot_be_told_back_is_refused(case: str, model_folder: Folder, tmp_path: Path) -> None:
    family, settings, _ = CASES[case]
    written(family, settings, model_folder(family), tmp_path / "adapter")
    with pytest.raises(PeltError, match="E434 "):
        peltc.export_peft(tmp_path / "adapter", model_folder(family), tmp_path / "back")


@pytest.mark.parametrize("case", ATTACHED)
def test_what_was_trained_here_is_what_peft_computes(case: str, model_folder: Folder, tmp_path: Path) -> None:
    family, attach, says = ATTACHED[case]
    base = model_folder(family)
    spec = {"pelt": 1, "attach": attach}
    tensors = random({name: t.shape for name, t in peltc.plan(spec, base).tensors.items()})
    config = peltc.export_peft(spec, base, tmp_path / "adapter", tensors)
    assert {key: config[key] for key in says} == says
    peltc.compile(spec, base, tmp_path / "artifact", tensors, mode="static")
    given = {"input_ids": np.arange(3, 12)[None]}
    expected = peltc.Session(tmp_path / "artifact", ["CPUExecutionProvider"])(**given)["logits"]
    found = answers(base, tmp_path / "adapter", given)
    assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()
    assert run(["export-peft", str(tmp_path / "artifact"), "-o", str(tmp_path / "again"), "-q"]) == 0
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "adapter" / FILE).read_bytes()


def test_a_method_of_ones_own_is_told_by_its_formula(model_folder: Folder, tmp_path: Path) -> None:
    """Names decide nothing: a method that computes what PEFT knows is written, whatever it is called."""
    own = {"site": "linear", "options": {"half": {"type": "integer", "default": 2}},
           "parameters": {"down": {"shape": ["half", "in"], "init": "zeros"},
                          "up": {"shape": ["out", "half"], "init": "zeros"}},
           "let": {"narrow": "linear(x, down)"}, "delta": "(3 / half) * linear(narrow, up)"}  # fmt: skip
    spec = {"pelt": 1, "methods": {"mine": own}, "attach": [{"method": "mine", "at": "attention.query"}]}
    base = model_folder("bert")
    tensors = random({name: t.shape for name, t in peltc.plan(spec, base).tensors.items()})
    config = peltc.export_peft(spec, base, tmp_path / "adapter", tensors)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3)


@pytest.mark.parametrize(
    ("attach", "words"),
    [
        ([{"method": "bottleneck", "at": "feed_forward.block"}], "E434 'bottleneck' at encoder.*block"),
        ([{"method": "lora", "at": "attention.query", "gate": {}}], "E434 'lora' at encoder.*query cannot"),
        ([{"method": "lora", "at": "attention.query"}, {"method": "ia3", "at": "attention.key"}],
         "E434 PEFT has no words for LORA and IA3 in one spec"),
        ([{"method": "lora", "at": "attention.query"}, {"method": "dora", "at": "attention.key"}],
         "E434 PEFT has no words for LORA and LORA with magnitudes in one spec"),
        ([{"method": "lora", "at": "attention.query"}, {"method": "lora", "name": "b", "at": "attention.query"}],
         r"E434 the module '.*query' cannot be said in PEFT's words: lora and b act on the same rows"),
        ([{"method": "replace", "at": "head"}], "E434 PEFT has no words for whole maps alone"),
        ([{"method": "lora", "at": "embedding.word"}], "E434 'lora' at .* it changes a table, which"),
    ],
)  # fmt: skip
def test_what_peft_cannot_express_is_refused(
    attach: list[dict[str, Any]], words: str, model_folder: Folder, tmp_path: Path
) -> None:
    base = model_folder("bert")
    spec = {"pelt": 1, "attach": attach}
    tensors = random({name: t.shape for name, t in peltc.plan(spec, base).tensors.items()})
    with pytest.raises(PeltError, match=words):
        peltc.export_peft(spec, base, tmp_path / "adapter", tensors)
    assert not (tmp_path / "adapter").exists()


def test_magnitudes_of_a_part_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    base, spec = model_folder("gpt2"), {"pelt": 1, "attach": [{"method": "dora", "at": "attention.query"}]}
    tensors = random({name: t.shape for name, t in peltc.plan(spec, base).tensors.items()})
    with pytest.raises(PeltError, match=r"E434 the module '.*c_attn' .* magnitudes of a part"):
        peltc.export_peft(spec, base, tmp_path / "adapter", tensors)


def test_folders_with_something_else_in_them_are_kept(model_folder: Folder, tmp_path: Path) -> None:
    base, spec = model_folder("bert"), {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    with pytest.raises(PeltError, match="E601 the output path is taken"):
        peltc.export_peft(spec, base, tmp_path / "taken")
    with pytest.raises(PeltError, match="E216 the base of a spec"):
        peltc.export_peft(spec, None, tmp_path / "out")
    peltc.export_peft(spec, base, tmp_path / "out")
    with pytest.raises(PeltError, match="E601 the output path is taken"):
        peltc.export_peft(spec, base, tmp_path / "out")


def test_weights_beside_a_folder_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("bert")
    written("bert", {"target_modules": "all-linear"}, base, tmp_path / "adapter")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(PeltError, match="E410 a folder that holds its own tensors is given, and weights beside"):
        read_adapter(tmp_path / "adapter", base, tmp_path / "x.safetensors")


def test_an_artifact_is_exported_for_its_own_model_alone(model_folder: Folder, tmp_path: Path) -> None:
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}
    peltc.compile(spec, model_folder("bert"), tmp_path / "out", verify=False)
    peltc.export_peft(tmp_path / "out", model_folder("bert"), tmp_path / "peft")
    other = models.save("bert", tmp_path / "other", vocab_size=101)
    with pytest.raises(PeltError, match=r"E608 .* is not the model that this artifact was compiled from"):
        peltc.export_peft(tmp_path / "out", other, tmp_path / "again")


def test_modules_are_named_by_the_shortest_endings() -> None:
    names = {f"model.layers.{i}.{m}.weight" for i in range(4) for m in ("attn.q", "attn.out", "mlp.up", "mlp.out")}
    every = every_module(names)
    assert "model.layers.0.attn" in every and "model" in every
    wanted = [f"model.layers.{i}.attn.out" for i in range(4)]
    assert endings(wanted, every) == ["attn.out"]
    assert targets(wanted, every, [], None) == {"target_modules": ["attn.out"]}
    some = [name for name in sorted(every) if ".2." in name or ".3." in name]
    assert targets([n for n in some if n.count(".") == 4], every, [], None) == {
        "target_modules": ["out", "q", "up"], "layers_to_transform": [2, 3]}  # fmt: skip
    assert targets([wanted[0]], every, [], None) == {"target_modules": ["0.attn.out"]}
    assert patterns({wanted[0]: 2, wanted[1]: 2}, wanted) == {"0.attn.out": 2, "1.attn.out": 2}
