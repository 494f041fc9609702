"""Artifacts with quantised bases: what they compute, what stays as it was, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

import peltc
from peltc.compiler.linking.linker import Linker
from peltc.compiler.lowering.written import blocks_in
from peltc.runtime.building.compile import plan_for
from peltc.runtime.commands.cli import run
from peltc.runtime.running.session import Session
from peltc.runtime.verification.verify import TOLERANCE, load_model
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Folder = Callable[..., Path]
IDS = np.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
REST = ["roberta", "distilbert", "llama", "t5", "phi3", "llama-tied", "qwen3_moe", "gpt_oss"]
FLOAT = {"to": "int4", "compute": "float"}
ALL = {**FLOAT, "except": []}


def spec(method: str = "lora", at: str = "attention.query", quantise: Any = "int4", **deploy: Any) -> dict[str, Any]:
    options = {"r": 2} if method in ("lora", "dora") else {}
    return {"pelt": 1, "name": "first", "attach": [{"method": method, "at": at, **options}],
            "deploy": {"quantise": quantise, **deploy}}  # fmt: skip


def some(said: dict[str, Any], folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    plan = plan_for(load_spec(said), folder)[0]
    return {name: random.normal(0, 0.1, t.shape).astype(np.float32) for name, t in plan.tensors.items()}


def compiled(said: dict[str, Any], folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return peltc.compile(said, folder, out, some(said, folder), **more)


def unpacked(out: Path, name: str) -> np.ndarray:
    """A weight [out, in] of four bits with zero points, off the artifact's bytes."""
    graph = onnx.load(out / "model.onnx").graph
    mine = [tensor for tensor in graph.initializer if tensor.name.startswith(name + ".")]
    part = {tensor.name.removeprefix(name): numpy_helper.to_array(tensor) for tensor in mine}

    def low_first(packed: np.ndarray) -> np.ndarray:
        return np.stack([packed % 16, packed // 16], -1).reshape(len(packed), -1).astype(np.float64)

    held = part.get(".quantised", part.get(".rows"))
    q, scales, zeros = low_first(held), part[".scales"].astype(np.float64), low_first(part[".zeros"])
    widths = {n.input[1]: a.i for n in graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "K"}
    n_in = widths.get(f"{name}.quantised", q.shape[1])
    blocks = scales.shape[1]
    q = q.reshape(len(scales), blocks, -1)
    return ((q - zeros[:, :blocks, None]) * scales[..., None]).reshape(len(scales), -1)[:, :n_in]


@pytest.mark.parametrize("family", ["bert", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_families(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """The artifact is torch with the weights that the test unpacks, heads' and tables' too; compilation has held it
    against torch as well."""
    folder = model_folder(family)
    said = spec(at="attention.value" if family != "t5" else "encoder.*.attention.value", quantise=ALL)
    manifest = compiled(said, folder, tmp_path / "out")
    record, held = manifest["quantised"], manifest["verification"]
    assert held["worst"] <= TOLERANCE["float32"] and held["quantised"]["steps"] <= 0.51
    assert held["quantised"]["worst"] > 100 * held["worst"]  # the model as it was is another
    assert all(0.03 < error < 0.15 for error in record["weights"].values())
    plan, base = plan_for(load_spec(said), folder)
    model, linear = load_model(base), [s for s in base.anatomy if s.kind == "linear"]
    transposed = {s.parameters["weight"] for s in linear if s.transposed}
    assert {s.parameters["weight"] for s in base.anatomy if s.role == "embedding.word"} & {*record["weights"]}
    for name in record["weights"]:
        weight = torch.from_numpy(unpacked(tmp_path / "out", name)).float()
        model.get_parameter(name).data = weight.T.contiguous() if name in transposed else weight
    assert all(claim.absorbed in record["weights"] for claim in plan.claims)
    feeds = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.ones_like(torch.from_numpy(IDS))}
    feeds |= {"decoder_input_ids": feeds["input_ids"]} if family == "t5" else {}
    with torch.no_grad():
        wanted = model(**feeds).logits.numpy()
    found = Session(tmp_path / "out")(**{name: value.numpy() for name, value in feeds.items()})["logits"]
    assert np.abs(found - wanted).max() <= TOLERANCE["float32"] * np.abs(wanted).max()


@pytest.mark.parametrize("family", ["llama-tied", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_table_and_its_head_share_their_bytes(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """In all graphs; and ids that have no row are refused as ever."""
    out = tmp_path / "out"
    said = spec(at="*attention.value", quantise=ALL, generation=True)
    manifest = compiled(said, model_folder(family), out)
    assert manifest["verification"]["worst"] <= TOLERANCE["float32"]
    found: dict[str, set[tuple[str, str]]] = {}
    for file in out.glob("*.onnx"):
        graph = onnx.load(file, load_external_data=False).graph
        stored = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in graph.initializer}
        tables = [node.input[0] for node in graph.node if node.op_type == "GatherBlockQuantized"]
        heads = [n.input[1] for n in graph.node if n.op_type == "MatMulNBits" and n.output[0] == "logits"]
        assert tables and (heads or file.stem == "encoder")
        assert all(int(entry.get("length", 0)) < 100 * 32 * 4 for entry in stored.values())  # none is in float
        found[file.stem] = {(stored[name]["offset"], stored[name]["length"]) for name in tables + heads}
    assert len(found) > 1 and len(set.union(*found.values())) == 1
    session = Session(out)
    feeds = {name: np.ones((1, 5), np.int64) for name in session.inputs}
    with pytest.raises(PeltError, match="E615"):
        session(**feeds | {"input_ids": np.full((1, 5), 100)})


@pytest.mark.parametrize(
    ("mode", "tied", "left", "quantised"),
    [
        ("static", {}, {"model.embed_tokens.weight": "'trainable_tokens' computes with it"}, set()),
        ("fold", {}, {}, {"model.embed_tokens.weight", "lm_head.weight"}),
        ("fold", {"tied": "together"}, {}, {"model.embed_tokens.weight"}),
    ],
)  # fmt: skip
def test_modules_at_a_quantised_table(
    mode: str, tied: dict[str, str], left: dict[str, str], quantised: set[str], model_folder: Folder, tmp_path: Path
) -> None:
    """What folds is inside, of a head that is one tensor with the table too; what does not keeps
    both float, since they are one."""
    entry = {"method": "trainable_tokens", "at": "embedding.word", "rows": [5, 9], **tied}
    said = {"pelt": 1, "name": "first", "attach": [entry], "deploy": {"quantise": ALL, "mode": mode}}
    manifest = compiled(said, model_folder("llama-tied"), tmp_path / "out")
    assert manifest["verification"]["worst"] <= TOLERANCE["float32"]
    record = manifest["quantised"]
    assert record["left"] == left and {n for n in record["weights"] if "layers" not in n} == quantised


def test_reasons_why_weights_stay(model_folder: Folder, tmp_path: Path) -> None:
    left = compiled(spec("dora", mode="static"), model_folder("llama"), tmp_path / "a")["quantised"]["left"]
    query = "model.layers.{}.self_attn.q_proj.weight"
    assert left == {query.format(i): "'dora' computes with it" for i in (0, 1)} | {
        "lm_head.weight": "spared by the spec",
        "model.embed_tokens.weight": "spared by the spec",
    }
    everything = spec(quantise={"to": "int8", "except": []})
    assert compiled(everything, model_folder("llama"), tmp_path / "b")["quantised"]["left"] == {}


@pytest.mark.slow
def test_reasons_why_tied_weights_and_experts_stay(model_folder: Folder, tmp_path: Path) -> None:
    tied = compiled(spec(quantise={"to": "int8", "except": "head"}), model_folder("llama-tied"), tmp_path / "a")
    why = {"lm_head.weight": "spared by the spec",
           "model.embed_tokens.weight": "one tensor with head, which is spared by the spec"}  # fmt: skip
    assert tied["quantised"]["left"] == why
    left = compiled(spec(), model_folder("qwen3_moe"), tmp_path / "b")["quantised"]["left"]
    assert {"stacked weights of experts", "spared by the spec"} == set(left.values())
    assert "model.layers.0.mlp.gate.weight" in left  # the router


def test_modules_stay_live_beside_quantised_maps(model_folder: Folder, tmp_path: Path) -> None:
    """Profiles are linked without the checkpoint, and each answers as its own static artifact."""
    folder, said = model_folder("llama"), spec(quantise=FLOAT, mode="bank", generation=True)
    compiled(said, folder, tmp_path / "bank")
    second = some(said, folder, seed=1)
    session = Session(tmp_path / "bank")
    session.add_profile("first", Linker(tmp_path / "bank").link(some(said, folder)))
    session.add_profile("second", Linker(tmp_path / "bank").link(second))
    mask = np.ones_like(IDS)
    found = session(input_ids=IDS, attention_mask=mask, profile=["first", "second"])["logits"]
    for row, tensors in enumerate((some(said, folder), second)):
        static = spec(quantise=FLOAT, mode="static", generation=True)
        peltc.compile(static, folder, tmp_path / "static", tensors)
        alone = Session(tmp_path / "static")
        wanted = alone(input_ids=IDS, attention_mask=mask)["logits"][row]
        assert np.abs(found[row] - wanted).max() <= TOLERANCE["float32"] * np.abs(wanted).max()
        texts = alone.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert np.asarray(texts).shape == (2, 9)


def test_dora_folds_before_anything_is_rounded(model_folder: Folder, tmp_path: Path) -> None:
    """Its norm is that of the weight as it was and the low-rank product, by hand here; that of the weight is seen."""
    folder, said = model_folder("llama"), spec("dora", quantise=FLOAT)
    tensors = {name: 10 * array for name, array in some(said, folder).items()}
    peltc.compile(said, folder, tmp_path / "out", tensors)
    name = "model.layers.1.self_attn.q_proj.weight"
    held = blocks_in(ir.load(tmp_path / "out/model.onnx").graph)[name]
    weight = load_file(folder / "model.safetensors")[name].astype(np.float64)
    a, b, m = (tensors[f"dora.decoder.layers.1.attention.query.{part}"].astype(np.float64) for part in "ABm")
    whole = weight + 8 * b @ a
    for normed, near in ((whole, True), (weight, False)):
        wanted = m.reshape(-1, 1) * whole / np.linalg.norm(normed, axis=1, keepdims=True)
        assert bool((np.abs(held.weight() - wanted) / held.steps()).max() <= 0.51) == near


def test_tokens_before_the_text_are_read_as_they_are(model_folder: Folder, tmp_path: Path) -> None:
    """Their keys are in the cache before any text: computed once, without rounding what products read."""
    said = {"pelt": 1, "name": "first", "attach": [{"method": "prompt", "at": "embedding.word", "length": 3}],
            "deploy": {"quantise": "int4", "generation": True}}  # fmt: skip
    held = compiled(said, model_folder("llama"), tmp_path / "out")["verification"]
    assert held["worst"] <= TOLERANCE["float32"]
    assert any(shape["output"] == "generated logits" for shape in held["shapes"])


@pytest.mark.parametrize(
    ("family", "stored", "precision", "to"),
    [
        ("llama", "float16", "checkpoint", "int4"),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (
            ("llama-tied", "float32", "bfloat16", "int4"),
            ("gpt2", "float32", "float16", "int8"), ("gemma3", "bfloat16", "float16", "int4"),
            ("t5", "bfloat16", "bfloat16", "int8"))),
    ],
)  # fmt: skip
def test_half_precision(
    family: str, stored: str, precision: str, to: str, model_folder: Folder, tmp_path: Path
) -> None:
    """The function in float32 on the scales as they are stored; the arithmetic where it can be computed."""
    generation = family != "llama"  # once more with a cache takes long
    said = spec(at="*attention.value", quantise={"to": to, "except": []}, precision=precision, generation=generation)
    manifest = compiled(said, model_folder(family, stored), tmp_path / "out")
    held, kind = manifest["verification"], manifest["base"]["precision"]
    assert held["worst"] <= held["tolerance"] and held["arithmetic"]["precision"] == kind != "float32"
    assert held["arithmetic"]["status"] == ("proven" if kind == "float16" else "open")
    assert held["quantised"]["computed"] == ("float16" if kind == "float16" else "float32")
    assert 0 < held["quantised"]["worst"] < (0.7 if to == "int4" else 0.1) and held["quantised"]["steps"] <= 1
    graph = onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    scales = {kinds[node.input[2]] for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")}
    assert scales == {onnx.TensorProto.FLOAT16 if kind == "float16" else onnx.TensorProto.BFLOAT16}  # no Cast
    if kind == "float16" and generation:
        texts = Session(tmp_path / "out").generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
        assert np.asarray(texts).shape[0] == 2


def test_rows_without_a_profile_are_the_quantised_base(model_folder: Folder, tmp_path: Path) -> None:
    """They are held against PyTorch on the weights that the artifact has: keys of a profile may stay away."""
    said = {"pelt": 1, "name": "first", "attach": [{"method": "prefix", "at": "attention", "length": 2}],
            "deploy": {"quantise": "int4", "mode": "bank"}}  # fmt: skip
    manifest = compiled(said, model_folder("llama"), tmp_path / "out")
    assert manifest["profiles"]["no_bare_base"] is None and not manifest["profiles"]["one_length"]


def test_the_folder_holds_no_float_weights_of_quantised_maps(model_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "model"))
    compiled(spec(quantise=FLOAT), folder, tmp_path / "out")
    before = Session(tmp_path / "out")(input_ids=IDS)["logits"]
    assert (
        not [*(tmp_path / "out").glob("*.safetensors.index.json")] and not (tmp_path / "out/model.safetensors").exists()
    )
    size = (tmp_path / "out/model.onnx.data").stat().st_size
    assert size < 0.45 * (folder / "model.safetensors").stat().st_size  # the tables are float, and large in a toy
    with pytest.raises(PeltError, match="E610 the artifact holds the base's weights quantised"):
        peltc.verify(tmp_path / "out")
    peltc.verify(tmp_path / "out", folder)
    shutil.rmtree(folder)
    assert (Session(tmp_path / "out")(input_ids=IDS)["logits"] == before).all()


@pytest.mark.parametrize(("part", "code"), [(".scales", "E705"), (".quantised", "E705")])
@pytest.mark.parametrize("at", ["attention.query", "attention.key"], ids=["inside", "beside"])
def test_a_wrong_number_is_caught(part: str, code: str, at: str, model_folder: Folder, tmp_path: Path) -> None:
    """Of a weight that nothing folds into, and of one that LoRA is in."""
    out, name = tmp_path / "out", "bert.encoder.layer.1.attention.self.query.weight"
    compiled(spec(at=at), model_folder("bert"), out)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    tensor = next(t for t in graph.initializer if t.name == name + part)
    offset = {e.key: e.value for e in tensor.external_data}["offset"] if tensor.external_data else None
    assert offset is not None
    with (out / "model.onnx.data").open("r+b") as file:
        file.seek(int(offset) + (3 if part == ".scales" else 0))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ (1 if part == ".scales" else 8)]))
    with pytest.raises(PeltError) as caught:
        peltc.verify(out, model_folder("bert"))
    assert caught.value.diagnostics[0].code == code and name in str(caught.value)


def test_a_wrong_bias_beside_is_caught(model_folder: Folder, tmp_path: Path) -> None:
    """What folds into a bias is in float, and held by itself: the torch model that the function is held on has it."""
    out, name = tmp_path / "out", "bert.encoder.layer.1.attention.self.query.bias"
    compiled(spec("bitfit"), model_folder("bert"), out)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    with (out / "model.onnx.data").open("r+b") as file:
        file.seek(int({entry.key: entry.value for entry in tensor.external_data}["offset"]) + 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(PeltError, match=f"E705 stored weights: '{name}'"):
        peltc.verify(out, model_folder("bert"))


def test_a_wrong_attribute_is_caught(model_folder: Folder, tmp_path: Path) -> None:
    """The blocks are right, and a product reads another weight's."""
    out = tmp_path / "out"
    compiled(spec(), model_folder("bert"), out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    first, second = [n for n in model.graph.node if n.op_type == "MatMulNBits" and ".value." in n.input[1]]
    first.input[1], second.input[1] = second.input[1], first.input[1]
    onnx.save(model, out / "model.onnx")
    with pytest.raises(PeltError, match="E701"):
        peltc.verify(out, model_folder("bert"))


@pytest.mark.parametrize(
    ("deploy", "words"),
    [
        ({"quantise": "int3"}, "deploy.quantise"),
        ({"quantise": {"block": 32}}, "deploy.quantise"),
        ({"quantise": {"to": "int4", "block": 48}}, "deploy.quantise"),
        ({"quantise": {"to": "int4", "spare": "head"}}, "deploy.quantise"),
        ({"quantise": {"to": "int4", "except": ["attention.qury"]}}, "E203 no map or table 'attention.qury'"),
    ],
)  # fmt: skip
def test_refusals(deploy: dict[str, Any], words: str, model_folder: Folder) -> None:
    said = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}], "deploy": deploy}
    with pytest.raises(PeltError) as caught:
        plan_for(load_spec(said), model_folder("bert"))
    assert words in str(caught.value)


def test_the_command(model_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = tmp_path / "spec.yaml"
    said.write_text("pelt: 1\nattach: [{method: bitfit, at: attention.query}]\n")
    arguments = ["compile", str(said), str(model_folder("bert")), "-o", str(tmp_path / "out"), "--quantise", "int8"]
    assert run([*arguments, "--weights", str(weights(said, model_folder("bert"), tmp_path))]) in (0, None)
    told = capsys.readouterr()
    assert "quantised: " in told.out and "weights of the base become int8" in told.err


def weights(said: Path, folder: Path, at: Path) -> Path:
    from safetensors.numpy import save_file

    plan = plan_for(load_spec(said), folder)[0]
    save_file({name: np.full(t.shape, 0.1, np.float32) for name, t in plan.tensors.items()}, at / "adapter.safetensors")
    return at / "adapter.safetensors"
