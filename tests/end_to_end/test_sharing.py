"""A base's weights in memory once for several sessions: they answer what others answer, and a further one adds none."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import peltc
from peltc.runtime.running.sharing import in_memory
from peltc.spec.diagnostics import PeltError

Folder = Callable[..., Path]
CPU = ["CPUExecutionProvider"]
IDS = [[5, 6, 7, 8], [4, 9, 7, 3]]


def spec(method: str, mode: str = "static") -> dict[str, Any]:
    site = "feed_forward.block" if method == "bottleneck" else ["attention.query", "attention.value"]
    return {"pelt": 1, "name": method, "attach": [{"method": method, "at": site}], "deploy": {"mode": mode}}


def held(folder: Path) -> int:
    """Bytes of a model's weights that this process shares; those of modules lie in files of their own."""
    return sum(size for file, size in in_memory() if file == os.stat(folder / "model.safetensors").st_ino)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_artifacts_on_one_base_share_it(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """Each weight is there once; a tied one is looked up in and multiplied with where it is."""
    base = model_folder(family)
    for method in ("lora", "bottleneck"):
        peltc.compile(spec(method), base, tmp_path / method, verify=False)
    gc.collect()
    assert not list(in_memory()), "another test left a session open"
    kept, sizes = [], []
    for method in ("lora", "bottleneck", "bottleneck"):
        plain = peltc.Session(tmp_path / method, CPU)(input_ids=IDS)
        kept.append(peltc.Session(tmp_path / method, CPU, share_weights=True))
        found = kept[-1](input_ids=IDS)
        for name, expected in plain.items():
            assert np.abs(found[name] - expected).max() <= 1e-5 * np.abs(expected).max()
        sizes.append(held(base))
    weights = sum(array.nbytes for array in load_file(base / "model.safetensors").values())
    assert 0.9 * weights < sizes[0] <= weights
    assert sizes[1:] == sizes[:1] * 2, "no session adds to what the first one has"
    kept[0].close()
    assert held(base) == sizes[0]
    del kept, found
    gc.collect()
    assert not list(in_memory()), "what nobody reads is gone"


def test_the_graphs_of_one_artifact_share_it(model_folder: Folder, tmp_path: Path) -> None:
    """A profile's tensors are no part of it, and stay what they are."""
    base = model_folder("llama")
    peltc.compile(spec("lora", "bank"), base, tmp_path / "out", generation=True, verify=False)
    plain, sharing = peltc.Session(tmp_path / "out", CPU), peltc.Session(tmp_path / "out", CPU, share_weights=True)
    for session in (plain, sharing):
        session.add_profile("first", tmp_path / "out/profiles/lora.onnx_adapter")
    given: dict[str, Any] = {"profile": ["first", None], "max_new_tokens": 5, "do_sample": False}
    assert np.array_equal(plain.generate(IDS, **given), sharing.generate(IDS, **given))
    before = len(list(in_memory()))
    sharing(input_ids=IDS)  # the graph without a cache
    assert len(list(in_memory())) == before


def test_half_precision_is_not_shared(model_folder: Folder, tmp_path: Path) -> None:
    """The CPU computes it in float32, from a copy of each weight that it makes when a session opens."""
    peltc.compile(spec("lora"), model_folder("llama", "float16"), tmp_path / "out", verify=False)
    with pytest.raises(PeltError, match="E604 weights cannot be shared in float16"):
        peltc.Session(tmp_path / "out", CPU, share_weights=True)


def test_the_file_of_a_weight_lies_beside_the_graph(model_folder: Folder, tmp_path: Path) -> None:
    import onnx

    peltc.compile(spec("lora"), model_folder("bert"), tmp_path / "out", verify=False)
    (tmp_path / "elsewhere").write_bytes(bytes(1 << 20))
    model = onnx.load(tmp_path / "out/model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"
    (tmp_path / "out/model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(PeltError, match="E605"):
        peltc.Session(tmp_path / "out", CPU, share_weights=True)
