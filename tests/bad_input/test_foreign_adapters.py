"""Adapters of other libraries, given where a spec, weights or a model belong: one finding, which names what it is and
says what can be done."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import models
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import peltc
from peltc.spec.diagnostics import PeltError
from peltc.spec.foreign import IMPORTED, recognised

CONFIGS: dict[str, tuple[peft.PeftConfig, str]] = {
    "LORA": (peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]), "`lora`"),
    "DORA": (peft.LoraConfig(r=4, target_modules=["query"], use_dora=True), "`dora`"),
    "IA3": (peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "`ia3`"),
    "OFT": (peft.OFTConfig(target_modules=["query"], oft_block_size=4), "`oft`"),
    "PREFIX_TUNING": (peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4), "`prefix`"),
    "PROMPT_TUNING": (peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4), "`prompt`"),
}
SPEC: dict[str, Any] = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}
LORA = "pelt: 1\nattach:\n  - method: lora\n    at: attention.query\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What PEFT saves of each kind."""
    home = tmp_path_factory.mktemp("peft")
    for name, (config, _) in CONFIGS.items():
        live: Any = peft.get_peft_model(models.build("bert"), config)
        live.save_pretrained(home / name)
        file = home / name / "adapter_config.json"  # a model that is made, not loaded, has no name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "our/base"}))
    return {name: home / name for name in CONFIGS}


@pytest.fixture(scope="module")
def live() -> Any:
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    return peft.get_peft_model(models.build("bert"), config)


def only(err: str, kind: str, role: str) -> str:
    """The one finding of a command line."""
    assert err.endswith("1 error\n"), err
    assert re.search(rf"E410 an adapter of Hugging Face PEFT, {kind},.* is given as {role}\n", err), err
    return err


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("what", ["", "adapter_model.safetensors", "adapter_config.json"])
def test_given_as_weights(desk: Any, folders: dict[str, Path], kind: str, what: str) -> None:
    err = only(desk.refuse("--weights", str(folders[kind] / what)).err, kind, "weights")
    if kind in IMPORTED:
        assert "`pelt import FOLDER MODEL -o spec/` makes a spec of it" in err
    else:
        assert f"of {CONFIGS[kind][1]} and train that" in err
        assert "merge_and_unload" in err
    assert "for 'our/base'" in err
    assert "export" not in err  # before anything takes time


@pytest.mark.parametrize("what", ["adapter", "adapter/adapter_model.safetensors"])
def test_named_by_a_spec(desk: Any, folders: dict[str, Path], what: str) -> None:
    shutil.copytree(folders["LORA"], desk.folder / "adapter")
    desk.write(LORA + f"weights: {what}\n")
    only(desk.refuse().err, "LORA", "weights")


def test_a_file_by_its_names(desk: Any, folders: dict[str, Path]) -> None:
    """Alone, under another name, what its tensors are called tells."""
    shutil.copy(folders["LORA"] / "adapter_model.safetensors", desk.folder / "mine.safetensors")
    only(desk.refuse("--weights", "mine.safetensors").err, "LORA", "weights")
    outcome = desk.pelt("bank", "mine.safetensors", "mine.safetensors", "-o", "bank.safetensors")
    only(outcome.err, "LORA", "weights")


def test_a_bank_of_a_spec(desk: Any, folders: dict[str, Path]) -> None:
    shutil.copy(folders["LORA"] / "adapter_model.safetensors", desk.folder / "mine.safetensors")
    desk.write("pelt: 1\nattach:\n  - method: bottleneck\n    at: feed_forward.block\n"
               "    bank: {size: 8, k: 4, file: mine.safetensors}\n")  # fmt: skip
    only(desk.refuse().err, "LORA", "weights")


@pytest.mark.parametrize("what", ["", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("verb", ["compile", "check", "plan", "describe"])
def test_given_as_spec(desk: Any, folders: dict[str, Path], what: str, verb: str) -> None:
    strange = desk.folder / "strange"  # of a method that is not imported
    shutil.copytree(folders["PREFIX_TUNING"], strange)
    config = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "CARTRIDGE"}))
    assert "CARTRIDGE" not in IMPORTED
    spec = str(strange / what)
    arguments = {"compile": (str(desk.model), "-o", "out"), "plan": (str(desk.model),)}.get(verb, ())
    outcome = desk.pelt(verb, spec, *arguments)
    assert outcome.code == 1
    only(outcome.err, "CARTRIDGE", "a spec")


@pytest.mark.parametrize("what", ["", "adapter_model.safetensors"])
def test_given_as_model(desk: Any, folders: dict[str, Path], what: str) -> None:
    err = only(desk.refuse(model=str(folders["LORA"] / what)).err, "LORA", "the model")
    assert "and `pelt-compile FOLDER MODEL` an artifact" in err
    for verb in (("sites",), ("plan", "spec.yaml"), ("describe", "spec.yaml")):
        only(desk.pelt(*verb, str(folders["LORA"] / what)).err, "LORA", "the model")


def test_a_model_folder_with_an_adapter_in_it_is_one(desk: Any, folders: dict[str, Path]) -> None:
    model = desk.copy_model()
    shutil.copy(folders["LORA"] / "adapter_config.json", model)
    assert recognised(model) is None


def test_in_python(desk: Any, folders: dict[str, Path], live: Any) -> None:
    """Files, folders, state dicts, configs and live models, at every door."""
    model = models.build("bert")
    state = load_file(folders["LORA"] / "adapter_model.safetensors")
    out = desk.folder / "out"
    config = json.loads((folders["LORA"] / "adapter_config.json").read_text())
    doors = [
        lambda: peltc.attach(model, SPEC, folders["LORA"]),
        lambda: peltc.attach(model, SPEC, state),
        lambda: peltc.attach(model, SPEC, live),
        lambda: peltc.attach(model, SPEC, live.state_dict()),
        lambda: peltc.attach(model, folders["LORA"]),
        lambda: peltc.attach(model, config),
        lambda: peltc.attach(model, live.peft_config["default"]),
        lambda: peltc.attach(live, SPEC),
        lambda: peltc.attach(live.base_model.model, SPEC),  # a class of transformers, PEFT's modules within
        lambda: peltc.compile(SPEC, live, out),
        lambda: peltc.compile(SPEC, live.base_model.model, out),
        lambda: peltc.compile(SPEC, model, out, weights=live),
        lambda: peltc.compile(SPEC, folders["LORA"], out),
        lambda: peltc.compile(config, model, out),
        lambda: peltc.survey(live),
        lambda: peltc.survey(folders["LORA"]),
        lambda: peltc.plan(SPEC, live),
    ]
    for door in doors:
        with pytest.raises(PeltError) as caught:
            door()
        (finding,) = caught.value.diagnostics
        assert finding.code == "E410" and "Hugging Face PEFT" in finding.message, finding
    assert not hasattr(model, "pelt") and not out.exists()


def test_the_hint_works(desk: Any) -> None:
    """What merging in PEFT saves is a model here."""
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    merged = peft.get_peft_model(models.build("bert"), config).merge_and_unload()
    merged.save_pretrained(desk.folder / "merged")
    assert recognised(merged) is None
    assert desk.compile(model="merged").code == 0


def adapters_folder(folder: Path) -> Path:
    """What the `adapters` library saves."""
    folder.mkdir()
    said = {"config": {"architecture": None, "reduction_factor": 16}, "hidden_size": 32, "model_class": "BertModel",
            "model_name": "our/base", "model_type": "bert", "name": "one", "version": "adapters.1.2.0"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))
    torch.save(
        {"bert.encoder.layer.0.output.adapters.one.adapter_up.weight": torch.ones(2)}, folder / "pytorch_adapter.bin"
    )
    return folder


@pytest.mark.parametrize("what", ["", "pytorch_adapter.bin", "adapter_config.json"])
def test_the_adapters_library(desk: Any, what: str) -> None:
    err = desk.refuse("--weights", str(adapters_folder(desk.folder / "one") / what)).err
    assert "E410 an adapter of the adapters library for 'our/base' is given as weights" in err
    assert err.endswith("1 error\n")
    assert "E410" in desk.refuse(model="one").err


def test_a_live_model_of_the_adapters_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by where its classes are defined; the library needs another transformers, so its package is stood in for."""
    package = types.ModuleType("adapters")
    package.AdapterConfig = object  # type: ignore[attr-defined]
    layer = type("Adapter", (torch.nn.Linear,), {"__module__": "adapters.modeling"})
    model = torch.nn.Sequential(layer(2, 2))
    assert recognised(model) is None  # somebody's own file of that name
    monkeypatch.setitem(sys.modules, "adapters", package)
    found = recognised(model)
    assert found is not None and found.library == "the adapters library"


HOSTILE = {
    "list": b"[1]",
    "deep": b"[" * 100_000,
    "bytes": b"\xff\xfe",
    "long": b'{"peft_type": "LORA", "x": "' + b"x" * 2**21 + b'"}',
    "type": b'{"peft_type": ["LORA"], "base_model_name_or_path": {"a": 1}}',
    "control": b'{"peft_type": "\\u001b[31m", "base_model_name_or_path": "\\u0000"}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configs(desk: Any, name: str) -> None:
    """A config from a stranger is read within bounds, and shown without what moves a terminal."""
    (desk.folder / "adapter").mkdir()
    (desk.folder / "adapter" / "adapter_config.json").write_bytes(HOSTILE[name])
    err = desk.refuse("--weights", "adapter").err
    assert err.endswith("1 error\n") and "\x1b" not in err and len(err) < 2000


def test_our_own_are_not_taken_for_theirs(desk: Any) -> None:
    """An attachment may be called as PEFT calls a matrix, and so may a method's parameters."""
    names = [f"lora_A.encoder.layers.{i}.attention.query.{p}" for i in (0, 1) for p in "AB"]
    save_file({name: np.ones((8, 32) if name[-1] == "A" else (32, 8), np.float32) for name in names},
              desk.folder / "adapter.safetensors")  # fmt: skip
    desk.write(LORA.replace("    at:", "    name: lora_A\n    at:"))
    assert desk.compile("--weights", "adapter.safetensors").code == 0
    assert recognised({"own.encoder.layers.0.attention.query.lora_A": np.ones(2)}) is None
    for path in ("spec.yaml", "adapter.safetensors", "out", str(desk.model), "nowhere", "org/model", os.devnull):
        assert recognised(path) is None
