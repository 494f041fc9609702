"""Packed checkpoints: what is read against what the packer says, number by number, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import packed
import pytest
from safetensors.numpy import load_file, save_file

from peltc.compiler.files.checkpoint import open_checkpoint
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
    "awq's own": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, Packing("awq", "gemm", 4, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, tmp_path: Path) -> None:
    settings, wanted = CONFIGS[name]
    assert packing_of({"quantization_config": settings}, tmp_path) == wanted


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "fp8"}}, {"quantization_config": 4}])
def test_configs_that_are_not_of_this(config: dict[str, Any], tmp_path: Path) -> None:
    assert packing_of(config, tmp_path) is None


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
    assert held.header_digest != unpack(open_checkpoint(tmp_path), Packing("gptq", "gptq_v2", 4, 32)).header_digest
