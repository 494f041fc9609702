"""Artifacts that compute in bfloat16: proven in float32, refused where the type is not computed, and what a session
takes and gives in a type that numpy does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers

import peltc
from peltc.compiler.base.live import module_base
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.precision import computed
from peltc.runtime.building.adapters import read_adapter
from peltc.runtime.building.compile import plan_for
from peltc.runtime.commands.cli import run
from peltc.runtime.running.inputs import converted
from peltc.runtime.running.values import BFLOAT16, NARROW, array_of, value_of
from peltc.runtime.serving.inference import Inference, datatype
from peltc.runtime.serving.protocol import write
from peltc.runtime.verification.rewritten import Widened
from peltc.spec.diagnostics import PeltError

CPU = ["CPUExecutionProvider"]
LORA = [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 2}]
ADAPTER = [{"method": "bottleneck", "at": "feed_forward.block", "size": 4}]
Folder = Callable[..., Path]


def compiled(model: Path, out: Path, attach: Any = LORA, mode: str = "static", **options: Any) -> dict[str, Any]:
    """An artifact in bfloat16, its modules drawn."""
    deploy = {"mode": mode, "precision": "bfloat16", **options.pop("deploy", {})}
    spec = peltc.load_spec({"pelt": 1, "name": "first", "attach": attach, "deploy": deploy})
    random, plan = np.random.default_rng(0), peltc.plan(spec, model)
    tensors = {n: random.normal(0, 0.1, t.shape).astype(np.float32) for n, t in plan.tensors.items()}
    return peltc.compile(spec, model, out, tensors, **options)


class Narrow(Widened):
    """In place of a provider that computes the type: the same bytes in float32, what comes out rounded to the type."""

    def rewrite(self, model: Any) -> None:
        super().rewrite(model)
        graph = model.graph
        for i, value in enumerate(list(graph.outputs)):
            name, value.name = value.name, f"{value.name}.wide"
            cast = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16.value}, name=f"{name}.narrow")
            graph.outputs[i], cast.outputs[0].name = cast.outputs[0], name
            cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.BFLOAT16)
            graph.append(cast)


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("mode", ["static", "swappable", "bank"])
def test_what_is_computed_is_proven_in_float32(
    mode: str, generation: bool, model_folder: Folder, tmp_path: Path
) -> None:
    """With banks, profiles and generation too; that the arithmetic is not, the manifest says."""
    found = compiled(model_folder("llama", "bfloat16"), tmp_path / "out", ADAPTER, mode, generation=generation)
    proof, arithmetic = found["verification"], found["verification"]["arithmetic"]
    assert proof["worst"] <= proof["tolerance"]
    assert ("generated logits" in [figure["output"] for figure in proof["shapes"]]) == generation
    assert arithmetic["status"] == "open" and "CPUExecutionProvider has no kernels" in arithmetic["reason"]
    assert arithmetic["reason"] == json.loads((tmp_path / "out" / "pelt.json").read_text())["verification"][
        "arithmetic"]["reason"]  # fmt: skip


@pytest.fixture(scope="module")
def artifact(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bfloat16") / "out"
    compiled(model_folder("llama", "bfloat16"), out, generation=True, verify=False)
    return out


def test_it_is_refused_where_the_type_is_not_computed(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is run, whatever opens it."""
    with pytest.raises(PeltError, match="E618 the artifact computes in bfloat16") as error:
        peltc.Session(artifact, CPU)
    said = str(error.value)
    assert "pelt verify OUT --provider CUDAExecutionProvider" in said and "float16" in said
    if ort.get_available_providers() == CPU or (peltc.Session.__name__ and not any(Path("/dev").glob("nvidia[0-9]*"))):
        for command in (["run", str(artifact), "--text", "a"], ["serve", str(artifact)],
                        ["export-triton", str(artifact), "-o", str(artifact.parent / "repository")]):  # fmt: skip
            assert run(command) == 1
            assert "E618" in capsys.readouterr().err, command
        with pytest.raises(PeltError, match="E618"):
            peltc.Session(artifact)


def test_what_a_session_gives(artifact: Path) -> None:
    """Each number is that of float32, rounded once, in a type of its own."""
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    found = Narrow(artifact, CPU)(input_ids=ids)["logits"]
    wide = Widened(artifact, CPU)(input_ids=ids)["logits"]
    assert found.dtype == BFLOAT16 and wide.dtype == np.float32 and np.abs(wide).max() > 0.1
    expected = torch.from_numpy(wide).to(torch.bfloat16).float().numpy()
    assert np.array_equal(found.astype(np.float32), expected)
    assert not np.array_equal(expected, wide)


def test_a_server_tells_of_what_it_answers(artifact: Path) -> None:
    """Its protocol has no bfloat16: the numbers are answered in float32, and so say the metadata."""
    answered = Narrow(artifact, CPU)(input_ids=np.array([[5, 6, 7]]))["logits"]
    body, _ = write(Inference("", {}, None, None, False), "first", {"logits": answered})
    (said,) = json.loads(body)["outputs"]
    value = next(v for v in ir.load(artifact / "model.onnx").graph.outputs if v.name == "logits")
    assert value.dtype == ir.DataType.BFLOAT16 and answered.dtype == BFLOAT16
    assert said["datatype"] == datatype(NARROW) == "FP32"


def test_what_a_session_takes() -> None:
    """Arrays of the type, torch tensors and wider floats, each rounded to nearest and none to infinity."""
    exact = torch.tensor([1.5, -3.0, 2.0**-120, 1.0 + 2.0**-7], dtype=torch.bfloat16)
    for given in (exact, exact.float().numpy(), exact.float().numpy().astype(ml_dtypes.bfloat16)):
        found = converted("x", given, "tensor(bfloat16)")
        assert found.dtype == BFLOAT16 and np.array_equal(found.astype(np.float32), exact.float().numpy())
    with pytest.raises(PeltError, match="E614"):
        converted("x", np.array([1e39]), "tensor(bfloat16)")


def test_values_keep_their_bits() -> None:
    """In and out of ONNX Runtime, by a graph that copies them; every number that the type has, and no value at all."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    numbers = bits[np.isfinite(bits.astype(np.float32))].reshape(2, -1)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape(["batch", "size"]))
    wide = ir.node("Cast", [x], {"to": ir.DataType.FLOAT.value})
    back = ir.node("Cast", wide.outputs, {"to": ir.DataType.BFLOAT16.value})
    y = back.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.BFLOAT16), ir.Shape(["batch", "size"])
    graph = ir.Graph([x], [y], nodes=[wide, back], opset_imports={"": 23}, name="graph")
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), providers=CPU)
    for array in (numbers, numbers[:, ::3], numbers[:, :0]):
        found = array_of(session.run_with_ort_values(None, {"x": value_of(array)})[0])
        assert found.dtype == BFLOAT16 and found.shape == array.shape
        assert np.array_equal(found.view(np.uint16), np.ascontiguousarray(array).view(np.uint16))


@pytest.mark.parametrize(("stored", "asked", "provider", "expected"), [
    ("bfloat16", "checkpoint", "any", "float32"), ("bfloat16", "checkpoint", "cpu", "float32"),
    ("bfloat16", "checkpoint", "cuda", "bfloat16"), ("float16", "checkpoint", "any", "float16"),
    ("float64", "checkpoint", "cuda", "float32"), ("", "checkpoint", "cuda", "float32"),
    ("bfloat16", "float16", "cuda", "float16"), ("float32", "bfloat16", "cpu", "bfloat16"),
])  # fmt: skip
def test_what_is_computed_in(stored: str, asked: str, provider: str, expected: str) -> None:
    assert computed(stored, asked, provider) == expected


@pytest.mark.parametrize(("provider", "expected"), [("cuda", "bfloat16"), ("any", "float32"), ("cpu", "float32")])
@pytest.mark.parametrize("how", ["spec", "argument", "torch"])
def test_the_provider_decides_for_a_checkpoint_in_bfloat16(
    how: str, provider: str, expected: str, model_folder: Folder, tmp_path: Path
) -> None:
    """Whoever names it, and whatever the model comes as; `pelt verify` opens the base in the same type."""
    model, out = model_folder("llama", "bfloat16"), tmp_path / "out"
    deploy = {"mode": "static"} | ({} if how == "argument" else {"provider": provider})
    given: Any = transformers.LlamaForCausalLM.from_pretrained(model, dtype="auto") if how == "torch" else model
    asked = {"provider": provider} if how == "argument" else {}
    spec = {"pelt": 1, "attach": LORA, "deploy": deploy}
    found = peltc.compile(spec, given, out, verify=False, **asked)
    assert (found["base"]["stored"], found["base"]["precision"]) == ("bfloat16", expected)
    kind = ir.DataType.BFLOAT16 if expected == "bfloat16" else ir.DataType.FLOAT
    assert {value.dtype for value in ir.load(out / "model.onnx").graph.outputs} == {kind}
    if how != "torch":
        assert plan_for(peltc.load_spec(spec).on(provider), model)[1].precision == expected
        again = peltc.verify(out, step="function")
        assert again["verification"]["worst"] <= again["verification"]["tolerance"]
        assert read_adapter(out).base.precision == expected


def test_a_module_s_own_graph_is_for_its_provider(tmp_path: Path) -> None:
    """Of a torch module that `transformers` does not have."""
    module, inputs = torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16(), {"input": torch.ones(3, 5, 8).bfloat16()}
    for provider, expected in (("cuda", "bfloat16"), ("any", "float32")):
        (tmp_path / provider).mkdir()
        found = module_base(module, inputs, tmp_path / provider, provider=provider)
        assert found.precision == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_stay_where_they_lie(dtype: str, model_folder: Folder, tmp_path: Path) -> None:
    """Of a checkpoint of the type that is computed nothing is copied: the file is linked, each weight read from it in
    its own type, and no node casts one but for what the model itself computes in float32."""
    model, out = model_folder("llama", dtype), tmp_path / "out"
    assert open_base(model, provider="cuda").precision == dtype
    spec = peltc.load_spec({"pelt": 1, "attach": LORA, "deploy": {"mode": "static", "precision": dtype}})
    tensors = {name: np.ones(t.shape, np.float32) for name, t in peltc.plan(spec, model).tensors.items()}
    found = peltc.compile(spec, model, out, tensors, verify=False, generation=True)
    assert found["bytes_converted"] == 0 and (out / "model.safetensors").samefile(model / "model.safetensors")
    for file in ("model.onnx", "decode.onnx"):
        graph = ir.load(out / file).graph
        weights = [v for v in graph.initializers.values()
                   if getattr(v.const_value, "location", None) == "model.safetensors"]  # fmt: skip
        assert len(weights) == 21 and {str(v.dtype).lower() for v in weights} == {dtype}
        casts = [use.node for value in weights for use in value.uses() if use.node.op_type == "Cast"]
        assert not casts, f"{file}: {[node.name for node in casts]}"


@pytest.mark.parametrize(("dtype", "computed"), [
    ("bfloat16", "float32"), ("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16"),
])  # fmt: skip
def test_weights_of_another_type_are_converted_once(
    dtype: str, computed: str, model_folder: Folder, tmp_path: Path
) -> None:
    """On the disk, for all graphs together, to what PyTorch makes of them; no session casts a weight."""
    model, out = model_folder("llama-tied", dtype), tmp_path / "out"
    spec = {"pelt": 1, "attach": LORA, "deploy": {"mode": "static", "precision": computed, "generation": True}}
    found = peltc.compile(spec, model, out, verify=False)
    torch_model = transformers.LlamaForCausalLM.from_pretrained(model, dtype=getattr(torch, computed))
    expected = dict(torch_model.named_parameters())
    places = []
    for file in ("model.onnx", "decode.onnx"):
        graph = ir.load(out / file).graph
        weights = {name: value for name, value in graph.initializers.items() if name in expected}
        assert len(weights) == len(expected) == 20, "a head that is tied to the table has no weight of its own"
        assert not [use for value in weights.values() for use in value.uses() if use.node.op_type == "Cast"]
        for name, value in weights.items():
            tensor = value.const_value
            assert isinstance(tensor, ir.ExternalTensor) and tensor.location == "model.onnx.data"
            bits = np.fromfile(out / tensor.location, np.uint8, tensor.length or 0, offset=tensor.offset or 0)
            assert str(value.dtype).lower() == {"float32": "float"}.get(computed, computed)
            assert np.array_equal(bits, expected[name].detach().contiguous().view(torch.uint8).numpy().reshape(-1))
        places.append({name: (value.const_value.offset, value.const_value.length) for name, value in weights.items()})
    assert places[0] == places[1]
    width = expected["model.norm.weight"].element_size()
    assert found["bytes_converted"] == width * sum(p.numel() for p in expected.values()) <= found["bytes_written"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("gemma3", 13)])
def test_norms_compute_in_float32(family: str, norms: int, dtype: str, model_folder: Folder, tmp_path: Path) -> None:
    """Each norm of the model computes in float32, as `torch` does it: two a layer and the last, or Gemma's six."""
    model, out = model_folder(family, dtype), tmp_path / "out"
    spec = peltc.load_spec({"pelt": 1, "attach": LORA, "deploy": {"precision": dtype, "mode": "static"}})
    tensors = {name: np.ones(t.shape, np.float32) for name, t in peltc.plan(spec, model).tensors.items()}
    peltc.compile(spec, model, out, tensors, verify=False)
    kinds = ("RMSNormalization", "SkipSimplifiedLayerNormalization")  # the other accumulates in float32 in any type
    found = [node for node in ir.load(out / "model.onnx").graph if node.op_type in kinds]
    assert len(found) == norms
    for node in found:
        assert node.attributes.get_int("stash_type", 1) == ir.DataType.FLOAT.value
