"""Artifacts of checkpoints that are quantised already: the same numbers, and modules beside them that stay live."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import packed
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.linking.linker import Linker
from peltc.compiler.lowering.written import blocks_in
from peltc.runtime.building.compile import plan_for
from peltc.runtime.running.session import Session
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
IDS = np.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
QUERY = "model.layers.{}.self_attn.q_proj.weight"
FORMS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "act-order": {"mixed": True},
    "v2, 8 bits": {"layout": "gptq_v2", "bits": 8, "group": 32},
    "awq": {"method": "awq", "layout": "gemm"},
    "one group": {"group": -1, "symmetric": True},
    "nf4": {"method": "bitsandbytes", "group": 64, "mixed": True},
    "nf4, plain scales": {"method": "bitsandbytes", "group": 128},
}
SLOW = ("gptq", "v2, 8 bits", "one group", "nf4, plain scales")


def spec(method: str = "lora", **deploy: Any) -> dict[str, Any]:
    entry = {"method": method, "at": "attention.query", "r": 2, "alpha": 4}
    return {"pelt": 1, "name": "first", "attach": [entry], "deploy": {"precision": "float32", **deploy}}


def some(said: dict[str, Any], folder: Path, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    plan = plan_for(load_spec(said), folder)[0]
    return {name: random.normal(0, 0.3, t.shape).astype(np.float32) for name, t in plan.tensors.items()}


def torch_model(folder: Path, weights: dict[str, Array]) -> Any:
    """The model in PyTorch with the weights that the packer says, in float32."""
    config = transformers.AutoConfig.for_model(**json.loads((folder / "config.json").read_text()))
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).eval()
    held = {name: part.astype(np.float32) for name, part in load_file(folder / "model.safetensors").items()
            if part.dtype.kind == "f" and not name.endswith(".scales") and ".weight." not in name}  # fmt: skip
    state = {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in {**held, **weights}.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    return model


def logits(model: Any) -> Array:
    with torch.no_grad():
        found: Array = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    return found


def close(found: Array, wanted: Array) -> bool:
    return bool(np.abs(found - wanted).max() <= 2 * TOLERANCE["float32"] * np.abs(wanted).max())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FORMS])
def test_the_same_numbers(name: str, model_folder: Folder, tmp_path: Path) -> None:
    """Each dequantised number is the packer's; and with LoRA, by hand, the artifact is PyTorch."""
    how = FORMS[name]
    wanted = packed.checkpoint(model_folder("llama"), tmp_path / "model", **how)
    kind = "nf4" if "nf4" in name else f"int{how.get('bits', 4)}"
    said = spec(**({} if kind == "nf4" else {"quantise": {"to": kind, "compute": "float"}}))
    tensors = some(said, tmp_path / "model")
    manifest = peltc.compile(said, tmp_path / "model", tmp_path / "out", tensors)
    record, held = manifest["quantised"], manifest["verification"]
    assert (record["stored"], record["to"], record["left"]) == (how.get("method", "gptq"), kind, {})
    assert record["weights"] == dict.fromkeys(wanted, 0.0) and held["quantised"]["steps"] == 0
    assert held["worst"] <= held["tolerance"] and held["quantised"]["worst"] <= held["tolerance"]
    assert {entry["reason"] for entry in manifest["modules"]} == {
        "the weight is stored in small whole numbers, which a fold would round anew"
    }
    blocks = blocks_in(ir.load(tmp_path / "out/model.onnx").graph)
    assert blocks.keys() == wanted.keys() and all((blocks[n].weight() == w).all() for n, w in wanted.items())
    for layer in (0, 1):
        a, b = (tensors[f"lora.decoder.layers.{layer}.attention.query.{part}"].astype(np.float64) for part in "AB")
        wanted[QUERY.format(layer)] = wanted[QUERY.format(layer)] + 2 * b @ a
    assert close(Session(tmp_path / "out")(input_ids=IDS)["logits"], logits(torch_model(tmp_path / "model", wanted)))


def test_the_folder_is_a_model_of_its_own(model_folder: Folder, tmp_path: Path) -> None:
    """In float16, as the checkpoint is: its config tells of nothing that is quantised, and a changed number is seen."""
    packed.checkpoint(model_folder("llama"), tmp_path / "model", symmetric=True)
    said, out = spec(precision="checkpoint"), tmp_path / "out"
    manifest = peltc.compile(said, tmp_path / "model", out, some(said, tmp_path / "model"))
    assert manifest["base"]["precision"] == "float16" and manifest["base"]["files"] == []
    assert manifest["verification"]["arithmetic"]["status"] == "proven"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("model*.safetensors"))
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert not [tensor for tensor in graph.initializer if tensor.name.endswith(".zeros")]  # all are the middle
    with pytest.raises(PeltError, match="E610"):
        peltc.verify(out)
    peltc.verify(out, tmp_path / "model")
    tensor = next(tensor for tensor in graph.initializer if tensor.name == QUERY.format(1) + ".quantised")
    with (out / "model.onnx.data").open("r+b") as file:
        file.seek(int({entry.key: entry.value for entry in tensor.external_data}["offset"]))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 2]))
    with pytest.raises(PeltError, match="E705"):
        peltc.verify(out, tmp_path / "model")


@pytest.mark.parametrize("mode", ["static", pytest.param("fold", marks=pytest.mark.slow)])
def test_dora_on_dequantised_weights(mode: str, model_folder: Folder, tmp_path: Path) -> None:
    """QDoRA: its norm is that of the dequantised weight and the low-rank product, whatever the mode; by hand here."""
    wanted = packed.checkpoint(model_folder("llama"), tmp_path / "model", mixed=True)
    said = spec("dora", mode=mode, quantise={"to": "int4", "compute": "float"})
    tensors = some(said, tmp_path / "model")
    manifest = peltc.compile(said, tmp_path / "model", tmp_path / "out", tensors)
    assert manifest["quantised"]["left"] == {QUERY.format(layer): "'dora' computes with it" for layer in (0, 1)}
    for layer in (0, 1):
        name = QUERY.format(layer)
        a, b, m = (tensors[f"dora.decoder.layers.{layer}.attention.query.{part}"].astype(np.float64) for part in "ABm")
        whole = wanted[name] + 2 * b @ a
        wanted[name] = m.reshape(-1, 1) * whole / np.linalg.norm(whole, axis=1, keepdims=True)
    assert close(Session(tmp_path / "out")(input_ids=IDS)["logits"], logits(torch_model(tmp_path / "model", wanted)))


def test_profiles_beside_stored_numbers(model_folder: Folder, tmp_path: Path) -> None:
    """They are linked without the checkpoint, and each is its own low-rank product."""
    wanted = packed.checkpoint(model_folder("llama"), tmp_path / "model", method="awq", layout="gemm")
    said = spec(mode="bank", quantise={"to": "int4", "compute": "float"})
    first, second = (some(said, tmp_path / "model", seed) for seed in (0, 1))
    peltc.compile(said, tmp_path / "model", tmp_path / "out", first)
    session = Session(tmp_path / "out")
    shutil.copytree(tmp_path / "model", tmp_path / "kept")
    shutil.rmtree(tmp_path / "model")
    for name, tensors in (("first", first), ("second", second)):
        session.add_profile(name, Linker(tmp_path / "out").link(tensors))
    found = session(input_ids=IDS, attention_mask=np.ones_like(IDS), profile=["first", "second"])["logits"]
    for row, tensors in enumerate((first, second)):
        own = dict(wanted)
        for layer in (0, 1):
            a, b = (tensors[f"lora.decoder.layers.{layer}.attention.query.{part}"] for part in "AB")
            own[QUERY.format(layer)] = wanted[QUERY.format(layer)] + 2 * b.astype(np.float64) @ a
        assert close(found[row], logits(torch_model(tmp_path / "kept", own))[row])


@pytest.mark.parametrize(
    "quantise", ["int8", {"to": "int4", "block": 64}, {"to": "int4", "zeros": False}, {"to": "int4", "except": []}]
)
def test_options_that_are_the_checkpoints_own(quantise: Any, model_folder: Folder, tmp_path: Path) -> None:
    packed.checkpoint(model_folder("llama"), tmp_path / "model")
    with pytest.raises(PeltError, match=r"E208 the checkpoint is quantised already \(gptq, int4\)"):
        plan_for(load_spec(spec(quantise=quantise)), tmp_path / "model")
    plan = plan_for(load_spec(spec(quantise="int4")), tmp_path / "model")[0]
    assert plan.notes[0].startswith("14 weights of the base are int4, as gptq has them in the checkpoint")


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        ("attn.c_proj", "is no weight of a linear map"),
        pytest.param("mlp.c_fc", "is no parameter", marks=pytest.mark.slow),
    ],
)
def test_maps_that_are_stored_by_their_inputs(leaf: str, words: str, model_folder: Folder, tmp_path: Path) -> None:
    """GPT-2's are [in, out], and packed ones never: a square one would be taken for its transposition."""
    folder = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "model"))
    tensors, stem = load_file(folder / "model.safetensors"), f"transformer.h.0.{leaf}"
    n_in, n_out = tensors.pop(f"{stem}.weight").shape
    parts, _ = packed.drawn("gptq", "gptq", 4, 16, (n_out, n_in), 0)
    save_file(tensors | {f"{stem}.{end}": part for end, part in parts.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PeltError, match="E508") as caught:
        plan_for(load_spec(spec()), folder)
    assert words in str(caught.value) and stem in str(caught.value)


def test_levels_have_no_options(model_folder: Folder, tmp_path: Path) -> None:
    """The CPU's kernel is in float32, which is what the model computes in unless the spec says otherwise."""
    packed.checkpoint(model_folder("llama"), tmp_path / "model", "bitsandbytes", group=64)
    plan, base = plan_for(load_spec(spec(precision="checkpoint")), tmp_path / "model")
    assert base.precision == "float32" and "14 weights of the base are nf4" in plan.notes[0]
    with pytest.raises(PeltError, match=r"E208 the checkpoint is quantised already \(bitsandbytes, nf4\)"):
        plan_for(load_spec(spec(quantise="int4")), tmp_path / "model")


@pytest.mark.slow
def test_levels_in_float16_are_for_a_device(model_folder: Folder, tmp_path: Path) -> None:
    packed.checkpoint(model_folder("llama"), tmp_path / "model", "bitsandbytes", group=64)
    with pytest.raises(PeltError, match="E208 products by nf4 are computed in float32 on the CPU"):
        plan_for(load_spec(spec(precision="float16")), tmp_path / "model")
    said = spec(precision="float16", provider="cuda")
    manifest = peltc.compile(said, tmp_path / "model", tmp_path / "out", some(said, tmp_path / "model"), verify=False)
    assert manifest["kernels"]["model"]["lacking"] == []
