"""What linking and sessions make of what does not fit: other values in what profiles do not bring, files of bytes that
nobody wrote, lists of another length than the batch, and several threads."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import peltc
from peltc.runtime.building.compile import plan_for
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
CPU = ["CPUExecutionProvider"]
IDS = [[5, 6, 7, 8], [4, 9, 7, 3]]
LORA: dict[str, Any] = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}
BLOCK: dict[str, Any] = {"method": "bottleneck", "at": "feed_forward.block", "size": 4}
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def spec_of(*attach: dict[str, Any]) -> Any:
    return load_spec({"pelt": 1, "name": "first", "attach": list(attach)})


def drawn(spec: Any, base: Path, seed: int) -> dict[str, Array]:
    """Random values of all tensors that are an adapter's own."""
    plan, _ = plan_for(spec, base)
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, 0.2, tensor.shape).astype(np.float32) for name, tensor in plan.tensors.items()
            if not tensor.source}  # fmt: skip


@pytest.mark.parametrize("mode", ["fold", "static"])
def test_tensors_in_other_modes_are_the_artifacts(mode: str, model_folder: Folder, tmp_path: Path) -> None:
    """The modes of attachments are those of the artifact, whoever said them; what is fixed in it must be the same."""
    base = model_folder("bert")
    spec = spec_of(LORA, {**LORA, "name": "fixed", "at": "feed_forward.down", "mode": mode})
    one, other = (drawn(spec, base, seed) for seed in (0, 1))
    peltc.compile(spec, base, tmp_path / "out", one, mode="swappable", verify=False)
    same = {name: (one if name.startswith("fixed") else other)[name] for name in one}
    peltc.compile(spec, base, tmp_path / "same", same, mode="static", verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    session.add_profile("same", peltc.link(tmp_path / "out", same))
    expected = peltc.Session(tmp_path / "same", CPU)(input_ids=IDS)["logits"]
    assert np.abs(session(profile="same", input_ids=IDS)["logits"] - expected).max() < 1e-6 * np.abs(expected).max()
    with pytest.raises(PeltError, match=r"E411 the adapter has other values than the artifact in 'fixed\.encoder"):
        peltc.link(tmp_path / "out", other)


@pytest.mark.parametrize(
    ("entry", "frozen"),
    [
        ({"method": "delora", "at": "attention.query", "r": 4}, "norms"),
        ({"method": "lorahub", "at": "attention.query", "modules": 2, "r": 2, "rule": "delta_linear"}, ".A"),
    ],
    ids=["norms", "modules"],
)
def test_frozen_tensors_of_another_adapter(
    entry: dict[str, Any], frozen: str, model_folder: Folder, tmp_path: Path
) -> None:
    """What the graph has of frozen tensors alone is fixed in the artifact: others are refused, and rounding is not."""
    base, spec = model_folder("bert"), spec_of(entry)
    plan, _ = plan_for(spec, base)
    draw = np.random.default_rng(0)
    values = {name: draw.normal(0, 0.2, tensor.shape).astype(np.float32) for name, tensor in plan.tensors.items()}
    peltc.compile(spec, base, tmp_path / "out", values, mode="swappable", verify=False)
    assert peltc.link(tmp_path / "out", values)
    peltc.link(tmp_path / "out", {n: v * np.float32(1 + 1e-7) if n.endswith(frozen) else v for n, v in values.items()})
    with pytest.raises(PeltError, match="E411 the adapter has other values than the artifact in"):
        peltc.link(tmp_path / "out", {n: v + 0.1 if n.endswith(frozen) else v for n, v in values.items()})


@pytest.mark.parametrize(
    "entry", [{"method": "vera", "at": "attention.query", "r": 4}, {**BLOCK, "bank": {"size": 5, "k": 2}}],
    ids=["matrices", "bank"],
)  # fmt: skip
def test_frozen_tensors_may_differ_where_a_profile_holds_their_part(
    entry: dict[str, Any], model_folder: Folder, tmp_path: Path
) -> None:
    base, spec = model_folder("bert"), spec_of(entry)
    plan, _ = plan_for(spec, base)
    one, other = (
        {name: draw.normal(0, 0.2, tensor.shape).astype(np.float32) for name, tensor in plan.tensors.items()}
        for draw in (np.random.default_rng(seed) for seed in (0, 1))
    )
    peltc.compile(spec, base, tmp_path / "out", one, mode="swappable", verify=False)
    peltc.compile(spec, base, tmp_path / "other", other, mode="static", verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    session.add_profile("other", peltc.link(tmp_path / "out", other))
    expected = peltc.Session(tmp_path / "other", CPU)(input_ids=IDS)["logits"]
    assert np.abs(session(profile="other", input_ids=IDS)["logits"] - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("mode", ["swappable", "bank"])
def test_a_bias_where_the_base_has_none(mode: str, model_folder: Folder, tmp_path: Path) -> None:
    base, spec = model_folder("llama"), spec_of({"method": "bitfit", "at": ["attention.*", "feed_forward.*"]})
    one, other = (drawn(spec, base, seed) for seed in (0, 1))
    manifest = peltc.compile(spec, base, tmp_path / "out", one, mode=mode)
    assert manifest["profiles"]["no_bare_base"] is None
    peltc.compile(spec, base, tmp_path / "other", other, mode="static", verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    session.add_profile("other", peltc.link(tmp_path / "out", other))
    expected = peltc.Session(tmp_path / "other", CPU)(input_ids=IDS)["logits"]
    assert np.abs(session(profile="other", input_ids=IDS)["logits"] - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.fixture(scope="module")
def bank(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linking") / "out"
    spec = spec_of(LORA)
    peltc.compile(spec, model_folder("llama"), out, drawn(spec, model_folder("llama"), 0), mode="bank", verify=False,
                  generation=True)  # fmt: skip
    return out


def test_bytes_that_nobody_wrote_are_no_profile(bank: Path, tmp_path: Path) -> None:
    """Cut off and changed anywhere, a file is a profile of the right names and shapes, or refused in our words."""
    session, content = peltc.Session(bank, CPU), (bank / "profiles/first.onnx_adapter").read_bytes()
    draw, file, refused = np.random.default_rng(0), tmp_path / "x.onnx_adapter", 0
    for i in range(400):
        changed = bytearray(content[: draw.integers(len(content))] if i % 4 == 0 else content)
        for _ in range(i % 4):
            at = int(draw.integers(len(content) - 8)) if i % 2 else int(draw.integers(1500))
            changed[at : at + 8] = draw.bytes(8) if i % 3 else (-1).to_bytes(8, "little", signed=True)
        file.write_bytes(changed)
        try:
            session.add_profile("x", file)
        except PeltError as error:
            assert "E625" in str(error)
            refused += 1
    assert refused > 100
    name = b"pelt.lora.decoder"
    file.write_bytes(content.replace(name, b"\xff" + name[1:]))
    with pytest.raises(PeltError, match="E625 the file is no profile"):
        session.add_profile("x", file)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(PeltError, match="E625 the file is no profile"):
            session.add_profile("x", path)
    with pytest.raises(PeltError, match="E625 cannot read the profile"):
        session.add_profile("x", "a\0b")


def test_what_is_given_in_place_of_names_and_arrays(bank: Path, model_folder: Folder) -> None:
    session = peltc.Session(bank, CPU)
    file = bank / "profiles/first.onnx_adapter"
    session.add_profile("a", file)
    for source in (None, 5, [file], b"x"):
        with pytest.raises(PeltError, match="E216 a profile is given as"):
            session.add_profile("x", source)
        with pytest.raises(PeltError, match="E216 an adapter is given as"):
            peltc.link(bank, source)  # type: ignore[arg-type]
    arrays = peltc.link(bank, drawn(spec_of(LORA), model_folder("llama"), 1))
    name = next(iter(arrays))
    with pytest.raises(PeltError, match=r"E625 .* has .* as list, which is float32 \["):
        session.add_profile("x", {**arrays, name: arrays[name].tolist()})
    with pytest.raises(PeltError, match="E626 there is no profile"):
        session.remove_profile(["a"])  # type: ignore[arg-type]
    for chosen in (5, True, [], ["a"], ["a", "a", "a"], ["a", 5], {"a": 1, "b": 2}, iter(["a", "a"])):
        with pytest.raises(PeltError, match=r"E216 the profiles? of a (batch|text) is given as"):
            session(profile=chosen, input_ids=IDS)
    assert np.array_equal(session(profile=np.array(["a", "a"]), input_ids=IDS)["logits"],
                          session(profile="a", input_ids=IDS)["logits"])  # fmt: skip


def test_a_list_of_profiles_has_one_for_each_text(bank: Path) -> None:
    """Neither halves of a batch nor beams are taken for texts."""
    session = peltc.Session(bank, CPU)
    session.add_profile("a", bank / "profiles/first.onnx_adapter")
    for texts, names, beams in ((4, 2, 1), (2, 4, 2), (2, 1, 1)):
        with pytest.raises(PeltError, match=f"E216 the profiles of a batch .*\nexpected a name, or a list of {texts}"):
            session.generate(torch.tensor(IDS * (texts // 2)), profile=["a"] * names, num_beams=beams, **OPTIONS)


def test_generation_with_profiles_of_a_store(bank: Path, model_folder: Folder, tmp_path: Path) -> None:
    """Each text of a batch with its own, though there is room for two alone; the others are brought in meanwhile."""
    store = peltc.ProfileStore(tmp_path / "store", bank)
    added, held = peltc.Session(bank, CPU), peltc.Session(bank, CPU, store=store, resident=2)
    for seed in range(3):
        arrays = peltc.link(bank, drawn(spec_of(LORA), model_folder("llama"), seed))
        store.put(f"t/{seed}", arrays)
        added.add_profile(f"t/{seed}", arrays)
    for names in (["t/0", "t/1"], ["t/2", None], ["t/1", "t/0"]):
        found = held.generate(torch.tensor(IDS), profile=names, **OPTIONS)
        assert torch.equal(found, added.generate(torch.tensor(IDS), profile=names, **OPTIONS))
    assert held.residents is not None and held.residents.stats()["evictions"] == 2


def test_generations_in_several_threads(bank: Path, model_folder: Folder) -> None:
    """Each with its own profiles to its last token, though they are removed and others added; and whoever asks
    meanwhile without a profile has none."""
    base = model_folder("llama")
    session = peltc.Session(bank, CPU)
    linked = [peltc.link(bank, drawn(spec_of(LORA), base, seed)) for seed in range(3)]
    for name in ("0", "1"):
        session.add_profile(name, linked[int(name)])
    ids, options = torch.tensor(IDS), {**OPTIONS, "max_new_tokens": 40}
    expected = {(name, beams): session.generate(ids, profile=[name, None], num_beams=beams, **options)
                for name in ("0", "1") for beams in (1, 2)}  # fmt: skip
    assert not torch.equal(expected["0", 1], expected["1", 1])
    bare = session(input_ids=IDS)["logits"]
    wrong: list[Any] = []
    begun = threading.Barrier(5)

    class Begun:
        """A streamer that tells when the first token is there."""

        waited = False

        def put(self, value: Any) -> None:
            if not self.waited:
                self.waited = True
                begun.wait(60)

        def end(self) -> None:
            pass

    def generate(name: str, beams: int) -> None:
        streamer = {"streamer": Begun()} if beams == 1 else {}
        if beams > 1:
            begun.wait(60)
            name = "2"
        found = session.generate(ids, profile=[name, None], num_beams=beams, **options, **streamer)
        wrong.extend([name, beams] for _ in range(1) if beams == 1 and not torch.equal(found, expected[name, beams]))

    session.add_profile("2", linked[2])
    threads = [threading.Thread(target=generate, args=(name, beams)) for name in ("0", "1") for beams in (1, 2)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    for name in ("0", "1"):
        session.remove_profile(name)
    for i in range(10):
        session.add_profile(f"more {i}", linked[2])  # would take the rows that are free
        assert np.array_equal(session(input_ids=IDS)["logits"], bare)
    for thread in threads:
        thread.join()
    assert not wrong
    assert not session.kept.running and not session.kept.left  # type: ignore[attr-defined]


def test_a_bank_that_the_weights_brought_is_the_artifacts(model_folder: Folder, tmp_path: Path) -> None:
    """The spec's file of the bank is not in the artifact then, and nobody asks for it: who brings the bank too links,
    and masks alone are refused for what they lack."""
    base = model_folder("bert")
    entry = {**BLOCK, "bank": {"size": 5, "k": 2, "file": "bank.safetensors"}}
    (tmp_path / "spec.yaml").write_text(json.dumps({"pelt": 1, "name": "first", "attach": [entry]}))
    spec = load_spec(tmp_path / "spec.yaml")
    plan, _ = plan_for(spec, base)
    draw = np.random.default_rng(0)
    whole = {name: draw.normal(0, 0.2, t.shape).astype(np.float32) for name, t in plan.tensors.items()}
    bank = {name: array[::-1].copy() for name, array in whole.items() if plan.tensors[name].source}
    save_file(bank, tmp_path / "bank.safetensors")
    peltc.compile(spec, base, tmp_path / "out", whole, mode="swappable", verify=False)
    assert not (tmp_path / "out/bank.safetensors").exists()
    masks = {name for name, tensor in plan.tensors.items() if not tensor.source}
    other = {**whole, **{name: draw.normal(0, 0.2, whole[name].shape).astype(np.float32) for name in masks}}
    session = peltc.Session(tmp_path / "out", CPU)
    session.add_profile("other", peltc.link(tmp_path / "out", other))
    peltc.compile(spec, base, tmp_path / "own", other, mode="static", verify=False)
    expected = peltc.Session(tmp_path / "own", CPU)(input_ids=[[5, 6, 7]])["logits"]
    found = session(profile="other", input_ids=[[5, 6, 7]])["logits"]
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    with pytest.raises(PeltError, match=r"E4\d\d .*"):
        peltc.link(tmp_path / "out", {name: other[name] for name in masks})
