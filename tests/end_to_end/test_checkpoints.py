"""Checkpoints as they come: shards, pickles, renamed and merged tensors, ties, other types than the computation's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.base.opening import open_base
from peltc.runtime.building.compile import compile, plan_for
from peltc.runtime.running.session import Session
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

LORA = {"pelt": 1, "attach": [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 2}]}


def random_lora(folder: Path, spec: dict[str, Any] = LORA) -> dict[str, np.ndarray]:
    plan, _ = plan_for(load_spec(spec), folder)
    random = np.random.default_rng(0)
    return {name: random.normal(0, 0.1, t.shape).astype(np.float32) for name, t in plan.tensors.items()}


def references(folder: Path) -> dict[str, Any]:
    """The initializers that lie in other files, by name."""
    model = ir.load(folder / "model.onnx")
    return {
        n: v.const_value for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)
    }


def test_static_mode_writes_no_base_bytes(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llama")
    spec = {**LORA, "deploy": {"mode": "static"}}
    manifest = compile(spec, folder, tmp_path / "out", random_lora(folder))
    adapter = sum(a.nbytes for a in random_lora(folder).values())
    assert manifest["bytes_written"] <= 1.1 * adapter, "stacked products stand in place of their parts"
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert [name for name, value in graph.initializers.items() if not value.uses()] == []
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino


def test_fold_writes_only_touched_tensors(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llama")
    compile(LORA, folder, tmp_path / "out", random_lora(folder))
    own = {n for n, t in references(tmp_path / "out").items() if str(t.location) == "model.onnx.data"}
    assert own == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qv"}


def test_self_contained_copies(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("bert")
    manifest = compile(LORA, folder, tmp_path / "out", random_lora(folder), self_contained=True)
    assert manifest["base"]["files"][0]["how"] == "copy"
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino != (folder / "model.safetensors").stat().st_ino


def test_shards(shared: Path, tmp_path: Path) -> None:
    folder = models.save("llama", shared / "models" / "llama-shards", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    manifest = compile(LORA, folder, tmp_path / "out", random_lora(folder))
    assert len(manifest["base"]["files"]) == len(list(folder.glob("*.safetensors")))
    assert manifest["verification"]["worst"] < 1e-5


def test_pickled_checkpoint_is_converted_once(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(model_folder("bert"), folder)
    state = {n: torch.from_numpy(a) for n, a in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    said: list[str] = []
    manifest = compile(LORA, folder, tmp_path / "out", random_lora(folder), talk=said.append)
    assert "converted once" in manifest["base"]["converted"]
    assert manifest["verification"]["worst"] < 1e-5
    assert any("cannot be referenced" in line for line in said)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_with_code_is_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    import pickle

    folder = tmp_path / "hostile"
    shutil.copytree(model_folder("bert"), folder)
    (folder / "model.safetensors").unlink()

    class Bad:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(PeltError, match="E503"):
        compile(LORA, folder, tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_base_checkpoint_under_a_task_class(shared: Path, tmp_path: Path) -> None:
    """Names without the base model's prefix, and the old names of norms' parameters."""
    source = models.save("bert", shared / "models" / "bert-float32")
    folder = tmp_path / "old"
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
           for n, a in state.items()}  # fmt: skip
    save_file(old, folder / "model.safetensors")
    manifest = compile(LORA, folder, tmp_path / "out", random_lora(folder))
    assert manifest["base"]["converted"] is None
    assert manifest["verification"]["worst"] < 1e-5


def test_missing_head_is_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "headless"
    shutil.copytree(model_folder("bert"), folder)
    state = {n: a for n, a in load_file(folder / "model.safetensors").items() if not n.startswith("classifier")}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(PeltError, match=r"E504.*classifier") as caught:
        compile(LORA, folder, tmp_path / "out")
    assert "--architecture" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_are_untied_by_a_fold(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("gpt2")
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "head", "r": 2}]}
    manifest = compile(spec, folder, tmp_path / "out", random_lora(folder, spec))
    assert manifest["modules"][0]["absorbed"] == "lm_head.weight"
    assert manifest["verification"]["worst"] < 1e-5
    kept = references(tmp_path / "out")["transformer.wte.weight"]
    assert str(kept.location) == "model.safetensors"


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_stored_computed_in_float32(stored: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llama", stored)
    spec = {**LORA, "deploy": {"precision": "float32", "mode": "static"}}
    manifest = compile(spec, folder, tmp_path / "out", random_lora(folder))
    assert manifest["base"]["precision"] == "float32"
    assert manifest["verification"]["worst"] < 1e-5
    assert manifest["bytes_converted"] <= manifest["bytes_written"] <= manifest["bytes_converted"] + 20_000


def test_rounding_loss_is_told(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = model_folder("llama", "float16")
    small = {n: a * 0.01 for n, a in random_lora(folder).items()}
    said: list[str] = []
    manifest = compile(LORA, folder, tmp_path / "out", small, talk=said.append)
    losses = [entry["rounding_loss"] for entry in manifest["folded"]]
    assert min(losses) > 0.1
    assert any("static" in line and "of the change" in line for line in said)


def test_fingerprints_tell_equal_headers_apart(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(model_folder("bert"), folder)
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"] = state["classifier.bias"] + 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    one, other = open_base(model_folder("bert")), open_base(folder)
    assert one.graph_file == other.graph_file
    assert one.fingerprint != other.fingerprint


class TestOpensElsewhere:
    """Plain ONNX Runtime and transformers open the folder."""

    @pytest.fixture(scope="class")
    @staticmethod
    def artifact(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("artifact") / "out"
        folder = model_folder("bert")
        compile(LORA, folder, out, random_lora(folder))
        return out

    def inputs(self) -> dict[str, np.ndarray]:
        ids = np.random.default_rng(1).integers(3, 99, (2, 9))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    def test_onnxruntime(self, artifact: Path) -> None:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], self.inputs())
        np.testing.assert_array_equal(logits, Session(artifact)(**self.inputs())["logits"])

    def test_transformers(self, artifact: Path) -> None:
        import torch
        from transformers.exporters.base import ExportedModel

        model = ExportedModel.from_pretrained(artifact, device="cpu")
        output = model(**{n: torch.from_numpy(a) for n, a in self.inputs().items()})
        np.testing.assert_allclose(output.logits.numpy(), Session(artifact)(**self.inputs())["logits"], rtol=1e-6)

    def test_onnx_checker(self, model_folder: Callable[..., Path], tmp_path: Path) -> None:
        """`onnx` takes a hard link for an attack, so it looks at a copy."""
        import onnx

        folder = model_folder("bert")
        compile(LORA, folder, tmp_path / "out", random_lora(folder), self_contained=True, verify=False)
        onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)

    def test_defaults_of_inputs(self, artifact: Path) -> None:
        full = self.inputs()
        few = Session(artifact)(input_ids=full["input_ids"])["logits"]
        np.testing.assert_array_equal(few, Session(artifact)(**full)["logits"])

    def test_wrong_inputs_are_refused(self, artifact: Path) -> None:
        session = Session(artifact)
        with pytest.raises(PeltError, match="E606"):
            session(input_ids=np.ones((1, 3), np.int64), pixels=np.ones(3))
        with pytest.raises(PeltError, match="E606"):
            session(attention_mask=np.ones((1, 3), np.int64))
        with pytest.raises(PeltError, match="E606"):
            session(input_ids=np.ones(3, np.int64))

    def test_manifest(self, artifact: Path) -> None:
        import jsonschema

        from peltc import schemas

        manifest = json.loads((artifact / "pelt.json").read_text())
        jsonschema.Draft202012Validator(schemas.load("manifest")).validate(manifest)


def test_a_model_saved_with_its_modules(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """`save_pretrained` of an attached model keeps the modules' tensors; a compilation uses them, and says so."""
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder("bert"))
    peltc.attach(model, spec)
    with torch.no_grad():
        for name in model.pelt.plan.tensors:
            model.pelt.parameter(name).normal_(0, 0.1)
    model.save_adapter(tmp_path / "adapter.safetensors")
    model.save_pretrained(tmp_path / "model")
    said: list[str] = []
    compile(spec, tmp_path / "model", tmp_path / "out", talk=said.append)
    assert any("are those in the checkpoint" in line for line in said)
    saved = load_file(tmp_path / "adapter.safetensors")
    kept = load_file(tmp_path / "out" / "adapter.safetensors")
    assert {n: a.tolist() for n, a in kept.items()} == {n: a.tolist() for n, a in saved.items()}
