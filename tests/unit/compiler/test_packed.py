"""Packed checkpoints: what is read against what the packer says, number by number, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import packed
import pytest
from safetensors.numpy import load_file, save_file

from peltc.compiler.files.checkpoint import open_checkpoint
from peltc.compiler.files.levels import LevelledTensor
from peltc.compiler.files.packed import PackedTensor, Packing, packing_of, unpack
from peltc.spec.diagnostics import PeltError

FORMS: list[tuple[Any, ...]] = [  # method, layout, bits, group, sizes, mixed, symmetric, the size of blocks
    ("gptq", "gptq", 4, 32, (16, 96), False, False, 32),
    ("gptq", "gptq", 4, 128, (8, 256), False, True, 128),
    ("gptq", "gptq", 8, 16, (12, 48), False, False, 16),
    ("gptq", "gptq_v2", 4, 48, (8, 96), False, False, 16),
    ("gptq", "gptq", 4, 32, (8, 96), True, False, 32),
    ("gptq", "gptq_v2", 8, -1, (8, 80), False, False, 64),
    ("gptq", "gptq", 4, 512, (8, 1024), True, False, 256),
    ("gptq", "gptq", 4, 64, (8, 96), False, False, 64),  # the last group is not full
    ("awq", "gemm", 4, 16, (24, 48), False, False, 16),
    ("awq", "gemm", 4, -1, (8, 40), False, False, 32),
]


def written(folder: Path, parts: dict[str, Any], dtype: Any = None) -> Path:
    held = {f"a.b.{end}": part.astype(dtype) if dtype and end == "scales" else part for end, part in parts.items()}
    save_file(held, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_what_was_packed(form: tuple[Any, ...], tmp_path: Path) -> None:
    """Elementwise, without a tolerance; and the blocks are made of the same numbers."""
    method, layout, bits, group, sizes, mixed, symmetric, block = form
    parts, wanted = packed.drawn(method, layout, bits, group, sizes, 7, mixed, symmetric)
    held = unpack(open_checkpoint(written(tmp_path, parts)), Packing(method, layout, bits, group))
    tensor = held.tensors["a.b.weight"]
    assert isinstance(tensor, PackedTensor) and list(held.tensors) == ["a.b.weight"]
    assert tensor.shape == sizes and tensor.dtype == np.float16 and tensor.array().dtype == np.float32
    assert (tensor.array() == wanted).all()
    blocks = tensor.blocks()
    assert blocks.block == block and (blocks.zeros is None) == symmetric and (blocks.order is not None) == mixed
    assert blocks.scales.dtype == np.float16 and {*blocks.scales.ravel()} == {*parts["scales"].ravel()}


def test_a_wrong_zero_point_is_seen(tmp_path: Path) -> None:
    """The two layouts of GPTQ differ in nothing but what is added to zero points."""
    parts, wanted = packed.drawn("gptq", "gptq", 4, 32, (8, 64), 3)
    held = unpack(open_checkpoint(written(tmp_path, parts)), Packing("gptq", "gptq_v2", 4, 32))
    off = (held.tensors["a.b.weight"].array() - wanted) / np.repeat(parts["scales"].T, 32, 1)
    assert np.abs(off - 1).max() < 1e-6


def test_zero_points_that_are_none_were_stored_as_less(tmp_path: Path) -> None:
    """Fifteen and one is none in four bits, as GPTQ's own kernels have it."""
    parts, _ = packed.drawn("gptq", "gptq", 4, 32, (8, 32), 3)
    parts["qzeros"][:] = -1
    blocks = unpack(open_checkpoint(written(tmp_path, parts)), Packing("gptq", "gptq", 4, 32)).tensors["a.b.weight"]
    assert isinstance(blocks, PackedTensor) and blocks.blocks().zeros is not None
    assert not blocks.blocks().zeros.any()  # type: ignore[union-attr]


CONFIGS: dict[str, tuple[dict[str, Any], Packing]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Packing("gptq", "gptq", 4, 128)),
    "its second layout": ({"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
                          Packing("gptq", "gptq_v2", 8, -1)),
    "its later name": ({"quant_method": "gptq", "bits": 4, "group_size": 64, "format": "GPTQ_V2"},
                       Packing("gptq", "gptq_v2", 4, 64)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM", "zero_point": True},
            Packing("awq", "gemm", 4, 128)),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
                     Packing("bitsandbytes", "nf4", 4, -1)),
    "awq's own": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, Packing("awq", "gemm", 4, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, tmp_path: Path) -> None:
    settings, wanted = CONFIGS[name]
    assert packing_of({"quantization_config": settings}, tmp_path) == wanted


NOT: list[Any] = [None, 4, {"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_8bit": True},
                  {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}]  # fmt: skip


@pytest.mark.parametrize("settings", NOT)
def test_configs_that_are_not_of_this(settings: Any, tmp_path: Path) -> None:
    assert packing_of({"quantization_config": settings}, tmp_path) is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no scales": ({"scales": None}, "lacks 'a.b.scales'"),
    "no zero points": ({"qzeros": None}, "lacks 'a.b.qzeros'"),
    "scales of whole numbers": ({"scales": np.zeros((2, 8), np.int32)}, "'a.b.scales' is int32"),
    "numbers of 64 bits": ({"qweight": np.zeros((8, 8), np.int64)}, "'a.b.qweight' is int64"),
    "one axis": ({"qweight": np.zeros(8, np.int32)}, "'a.b.qweight' is int32 [8]"),
    "too few scales": ({"scales": np.ones((1, 8), np.float16)}, "'a.b.scales' has the shape [1, 8]"),
    "too many zero points": ({"qzeros": np.zeros((2, 2), np.int32)}, "'a.b.qzeros' has the shape [2, 2]"),
    "a short index": ({"g_idx": np.zeros(8, np.int32)}, "'a.b.g_idx' has the shape [8]"),
    "nothing": ({"qweight": np.zeros((0, 8), np.int32)}, "'a.b.qzeros' has the shape [2, 1]"),
    "the weight too": ({"weight": np.zeros((8, 64), np.float16)}, "'a.b.weight' beside 'a.b.qweight'"),
}


@pytest.mark.parametrize("name", BAD)
def test_parts_that_do_not_fit(name: str, tmp_path: Path) -> None:
    """Before a number is read."""
    changes, words = BAD[name]
    parts, _ = packed.drawn("gptq", "gptq", 4, 32, (8, 64), 3)
    parts = {end: part for end, part in (parts | changes).items() if part is not None}
    checkpoint = open_checkpoint(written(tmp_path, parts))
    with pytest.raises(PeltError, match="E508") as caught:
        unpack(checkpoint, Packing("gptq", "gptq", 4, 32))
    assert words in str(caught.value)


@pytest.mark.parametrize("index", [[0] * 64, [0] * 33 + [1] * 31, [1] * 32 + [2] * 32, [-1] * 32 + [0] * 32])
def test_groups_of_other_sizes(index: list[int], tmp_path: Path) -> None:
    parts, _ = packed.drawn("gptq", "gptq", 4, 32, (8, 64), 3)
    parts["g_idx"] = np.array(index, np.int32)
    held = unpack(open_checkpoint(written(tmp_path, parts)), Packing("gptq", "gptq", 4, 32))
    with pytest.raises(PeltError, match=r"E508 'a\.b\.g_idx' gives groups of other sizes than 32"):
        held.tensors["a.b.weight"].array()


def test_shards_are_all_known(tmp_path: Path) -> None:
    """The parts of a weight may lie in several files, each of which is watched."""
    parts, wanted = packed.drawn("gptq", "gptq", 4, 32, (8, 64), 3)
    names = {"qweight": "model-1.safetensors"}
    weight_map = {f"a.b.{end}": names.get(end, "model-2.safetensors") for end in parts}
    for file in {*weight_map.values()}:
        save_file({name: parts[name[4:]] for name, at in weight_map.items() if at == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    held = unpack(open_checkpoint(tmp_path), Packing("gptq", "gptq", 4, 32))
    assert (held.tensors["a.b.weight"].array() == wanted).all()
    assert [file.name for file in held.files] == ["model-1.safetensors", "model-2.safetensors"]
    assert load_file(tmp_path / "model-1.safetensors").keys() == {"a.b.qweight"}
    other = unpack(open_checkpoint(tmp_path), Packing("gptq", "gptq_v2", 4, 32))
    assert held.header_digest == other.header_digest and held.fingerprint != other.fingerprint


LEVELS = Packing("bitsandbytes", "nf4", 4, -1)


def in_levels(folder: Path, parts: dict[str, Any]) -> Path:
    save_file(
        {f"a.b.weight{end}": np.ascontiguousarray(part) for end, part in parts.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("sizes", "block"), [((6, 64), 64), ((5, 24), 32), ((8, 256), 256)])
def test_levels_are_what_was_packed(sizes: tuple[int, int], block: int, nested: bool, tmp_path: Path) -> None:
    """Elementwise, also where blocks run over the ends of rows; and ONNX Runtime's kernel has the same numbers."""
    parts, wanted = packed.levelled(sizes, block, 3, nested)
    tensor = unpack(open_checkpoint(in_levels(tmp_path, parts)), LEVELS).tensors["a.b.weight"]
    assert isinstance(tensor, LevelledTensor) and tensor.shape == sizes and (tensor.array() == wanted).all()
    blocks = tensor.blocks()
    attributes = f"K={sizes[1]}, N={sizes[0]}, block_size={block}, quant_type=1"
    sides = f"float[n, {sizes[1]}] x, uint8[{len(blocks.numbers)}] q, float[{len(blocks.scales)}] s"
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>'
        f"g ({sides}) => (float[n, {sizes[0]}] y) {{ y = com.microsoft.MatMulBnb4 <{attributes}> (x, q, s) }}"
    )
    feeds = {"x": np.eye(sizes[1], dtype=np.float32), "q": blocks.numbers, "s": blocks.scales}
    (found,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
    assert (wanted == found.T).all()


STATE = ".quant_state.bitsandbytes__nf4"


def said(**changes: Any) -> Any:
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], **changes}
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no scales": ({".absmax": None}, "'a.b.weight.absmax' is missing"),
    "too few scales": ({".absmax": np.ones(3, np.float32)}, "'a.b.weight.absmax' is float32 [3]"),
    "scales in levels, and no levels": ({".absmax": np.ones(4, np.uint8)}, "'a.b.weight.absmax' is uint8 [4]"),
    "other levels": ({".quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}, "other levels than NF4"),
    "no numbers": ({"": None}, "'a.b.weight' does not hold the 4 x 64 numbers"),
    "too few numbers": ({"": np.zeros((100, 1), np.uint8)}, "'a.b.weight' does not hold the 4 x 64 numbers"),
    "an odd number": ({STATE: said(shape=[1, 1])}, "'a.b.weight' does not hold the 1 x 1 numbers"),
    "levels of another kind": ({STATE: said(quant_type="fp4")}, "blocks of 64 in 'fp4'"),
    "blocks that have no kernel": ({STATE: said(blocksize=512)}, "blocks of 512 in 'nf4'"),
    "no JSON": ({STATE: np.zeros(8, np.uint8)}, "does not say of what sizes"),
    "a list": ({STATE: np.frombuffer(b"[1]", np.uint8)}, "does not say of what sizes"),
    "no shape": ({STATE: said(shape=None)}, "does not say of what sizes"),
    "a shape of words": ({STATE: said(shape=["4", 64])}, "does not say of what sizes"),
    "sizes below nothing": ({STATE: said(shape=[-4, -64])}, "does not say of what sizes"),
    "a nested block of nothing": ({STATE: said(nested_blocksize=0, nested_offset=0.1)}, "does not say of what sizes"),
    "no nested block": ({STATE: said(nested_offset=0.1)}, "does not say of what sizes"),
    "nested, and no levels": ({STATE: said(nested_blocksize=8, nested_offset=0.1)}, "absmax' is float32 [4]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_levels_that_do_not_fit(name: str, tmp_path: Path) -> None:
    changes, words = WRONG[name]
    parts, _ = packed.levelled((4, 64), 64, 3, nested=False)
    whole = {end: part for end, part in (parts | changes).items() if part is not None}
    checkpoint = open_checkpoint(in_levels(tmp_path, whole))
    with pytest.raises(PeltError, match="E508") as caught:
        unpack(checkpoint, LEVELS)
    assert words in str(caught.value)
