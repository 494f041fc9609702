"""Profiles of one artifact: each computes what an artifact of its own would, and a wrong one is refused by whoever runs
the graph."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import transformers
from profiled import ATTACHED, CPU, LORA, Array, Folder, drawn, given, spec_of
from safetensors.numpy import save_file

import peltc
from peltc.compiler.linking.linker import Linker
from peltc.runtime.commands.cli import run
from peltc.runtime.running import bank, profiles
from peltc.runtime.running.device import HOST, value_on
from peltc.runtime.running.form import number_of, write_profile
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("kind", ATTACHED)
def test_a_profile_is_an_artifact_of_its_own(kind: str, family: str, model_folder: Folder, tmp_path: Path) -> None:
    """Compiled with one set of values, linked with another; one at a time and by rows, each text has what an artifact
    of its profile alone answers, and the base's own answer without a profile."""
    base, spec = model_folder(family), spec_of(ATTACHED[kind])
    own = {name: drawn(spec, base, seed) for seed, name in enumerate(("one", "other"))}
    alone = {}
    for name, tensors in own.items():
        peltc.compile(spec, base, tmp_path / name, tensors, mode="static", verify=False)
        alone[name] = peltc.Session(tmp_path / name, CPU)(**given(family))["logits"]
    scale = np.abs(alone["one"]).max()
    assert np.abs(alone["one"] - alone["other"]).max() > 1e-3 * scale
    with torch.no_grad():
        architecture = json.loads((base / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, architecture).from_pretrained(base).eval()
        bare = model(**{name: torch.tensor(value) for name, value in given(family).items()}).logits.numpy()
    shown = np.array(given(family)["attention_mask"], bool) if bare.ndim == 3 and family != "t5" else ...
    for mode in ("swappable", "bank"):
        peltc.compile(spec, base, tmp_path / mode, own["one"], mode=mode)  # verified with its first profile
        session = peltc.Session(tmp_path / mode, CPU)
        session.add_profile("one", tmp_path / mode / "profiles/first.onnx_adapter")
        session.add_profile("other", peltc.link(tmp_path / mode, own["other"]))
        for name, expected in alone.items():
            assert np.abs(session(profile=name, **given(family))["logits"] - expected).max() < 1e-6 * scale
        if mode == "bank":
            mixed = session(profile=["one", "other"], **given(family))["logits"]
            expected = np.stack([alone["one"][0], alone["other"][1]])
            assert np.abs(mixed - expected).max() < 1e-6 * scale
        if session.manifest["profiles"]["no_bare_base"]:
            assert kind in ("keys", "gates") or (kind, mode) == ("all chosen", "swappable")  # no mask is another
            with pytest.raises(PeltError, match="E627 no profile is named, and this artifact has no bare base"):
                session(**given(family))
            continue
        found = session(**given(family))["logits"]
        assert np.abs(found - bare)[shown].max() < TOLERANCE["float32"] * np.abs(bare).max()
        if mode == "bank":
            half = session(profile=[None, "other"], **given(family))["logits"]
            assert np.abs(half - np.stack([found[0], alone["other"][1]])).max() < 1e-6 * scale


@pytest.fixture(scope="module")
def compiled(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profiles") / "out"
    spec = spec_of(LORA)
    peltc.compile(spec, model_folder("bert"), out, drawn(spec, model_folder("bert"), 0), mode="swappable", verify=False)
    return out


def test_onnx_runtime_takes_the_file_for_its_own_adapter(compiled: Path) -> None:
    file = compiled / "profiles/first.onnx_adapter"
    session = peltc.Session(compiled, CPU)
    session.add_profile("first", file)
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    feeds = {name: np.array(value) for name, value in given("bert").items()}
    feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
    found = ort.InferenceSession(compiled / "model.onnx", providers=CPU).run(None, feeds, options)[0]
    assert np.array_equal(found, session(profile="first", **given("bert"))["logits"])


def test_a_profile_of_another_base_is_refused_by_all(compiled: Path, tmp_path: Path, model_folder: Folder) -> None:
    """The other base has the same shapes; names with the base's stamp tell the two apart, in ONNX Runtime too."""
    model = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"))
    with torch.no_grad():
        model.bert.pooler.dense.bias.add_(1)
    model.save_pretrained(tmp_path / "base")
    spec = spec_of(LORA)
    peltc.compile(spec, tmp_path / "base", tmp_path / "out", drawn(spec, tmp_path / "base", 0), mode="swappable",
                  verify=False)  # fmt: skip
    file = tmp_path / "out/profiles/first.onnx_adapter"
    session = peltc.Session(compiled, CPU)
    with pytest.raises(PeltError, match=r"E625 the profile 'first.onnx_adapter' was made for another artifact"):
        session.add_profile("other", file)
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    feeds = {name: np.array(value) for name, value in given("bert").items()}
    feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
    with pytest.raises(Exception, match="Invalid input name"):
        ort.InferenceSession(compiled / "model.onnx", providers=CPU).run(None, feeds, options)


def test_linking_reads_no_weight_and_needs_no_torch(compiled: Path, model_folder: Folder, tmp_path: Path) -> None:
    save_file(drawn(spec_of(LORA), model_folder("bert"), 3), tmp_path / "adapter.safetensors")
    program = (
        "import sys; from peltc.runtime.commands.cli import run;"
        f"code = run(['link', {str(compiled)!r}, '--weights', {str(tmp_path / 'adapter.safetensors')!r},"
        f" '-o', {str(tmp_path / 'ada.onnx_adapter')!r}]);"
        "print(code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 []\n"), done.stdout + done.stderr
    session = peltc.Session(compiled, CPU)
    session.add_profile("ada", tmp_path / "ada.onnx_adapter")
    assert session.profiles == ["ada"]
    session.remove_profile("ada")
    with pytest.raises(PeltError, match="E626 there is no profile 'ada'"):
        session(profile="ada", **given("bert"))


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_peft_is_a_profile(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("llama")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    live = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=16,
                                                      task_type="CAUSAL_LM", init_lora_weights=False))  # fmt: skip
    live.save_pretrained(tmp_path / "adapter")
    peltc.compile(spec_of(LORA), base, tmp_path / "out", mode="swappable", verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    session.add_profile("theirs", peltc.link(tmp_path / "out", tmp_path / "adapter"))
    with torch.no_grad():
        expected = live.eval()(torch.tensor(given("llama")["input_ids"])).logits.numpy()
    found = session(profile="theirs", input_ids=given("llama")["input_ids"])["logits"]
    assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()
    peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base),
                        peft.LoraConfig(target_modules=["k_proj"], r=2)).save_pretrained(tmp_path / "more")  # fmt: skip
    with pytest.raises(PeltError, match="E408 the adapter was trained with"):
        peltc.link(tmp_path / "out", tmp_path / "more")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_by_rows(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """Each text of a batch, and all of its beams, with a profile of its own."""
    base, spec = model_folder(family), spec_of(LORA + ATTACHED["blocks"])
    own = {name: drawn(spec, base, seed) for seed, name in enumerate(("one", "other"))}
    peltc.compile(spec, base, tmp_path / "out", own["one"], mode="bank", generation=True)
    session = peltc.Session(tmp_path / "out", CPU)
    ids = torch.tensor([[5, 6, 7], [8, 4, 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "decoder_start_token_id": 0}
    alone = {}
    for name, tensors in own.items():
        session.add_profile(name, peltc.link(tmp_path / "out", tensors))
        peltc.compile(spec, base, tmp_path / name, tensors, generation=True, verify=False)
        alone[name] = peltc.Session(tmp_path / name, CPU)
    for beams in (1, 3):
        found = session.generate(ids, profile=["one", "other"], num_beams=beams, **options)
        for row, name in enumerate(own):
            assert torch.equal(found[row], alone[name].generate(ids, num_beams=beams, **options)[row])
            assert torch.equal(session.generate(ids, profile=name, num_beams=beams, **options)[row], found[row])


def test_profiles_come_and_go_while_others_run(model_folder: Folder, tmp_path: Path) -> None:
    """Two threads ask, a third adds and removes: no answer is ever of another profile."""
    base, spec = model_folder("bert"), spec_of(LORA)
    peltc.compile(spec, base, tmp_path / "out", mode="bank", verify=False)
    session, linker = peltc.Session(tmp_path / "out", CPU), Linker(tmp_path / "out")
    linked = [linker.link(drawn(spec, base, seed)) for seed in range(4)]
    for i in (0, 1):
        session.add_profile(str(i), linked[i])
    expected = session(profile=["0", "1"], **given("bert"))["logits"]
    wrong: list[float] = []

    def ask() -> None:
        for _ in range(60):
            found = session(profile=["0", "1"], **given("bert"))["logits"]
            wrong.append(float(np.abs(found - expected).max()))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(40):  # grows twice
        session.add_profile(f"more {i}", linked[2 + i % 2])
        if i % 3 == 0:
            session.remove_profile(f"more {i}")
    for thread in threads:
        thread.join()
    assert len(wrong) == 120 and max(wrong) == 0
    with pytest.raises(PeltError, match="E216 the profiles of a batch"):
        session(profile=["0"] * 3, **given("bert"))
    with pytest.raises(PeltError, match="E626 there is no profile 'more 0'"):
        session(profile=["0", "more 0"], **given("bert"))


@pytest.mark.parametrize("mode", ["swappable", "bank"])
def test_on_a_device_profiles_lie_there(
    mode: str, model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are copied once, and again when others were added; here a copy in this machine's memory stands for it."""
    copied: list[str] = []

    def copy(device: str, array: Array) -> Any:
        if device == HOST:
            return value_on(HOST, array)
        copied.append(device)
        return value_on(HOST, np.array(array))

    for module in (bank, profiles):
        monkeypatch.setattr(module, "value_on", copy)
    base, spec = model_folder("bert"), spec_of(LORA)
    peltc.compile(spec, base, tmp_path / "out", mode=mode, verify=False)
    here, there = peltc.Session(tmp_path / "out", CPU), peltc.Session(tmp_path / "out", CPU)
    there.kept.device = "cuda"
    count = len(there.manifest["profiles"]["inputs"])

    def same(name: str) -> None:
        ours, theirs = (session(profile=name, **given("bert"))["logits"] for session in (there, here))
        assert np.array_equal(ours, theirs)

    for seed, name in enumerate(("one", "other")):
        for session in (here, there):
            session.add_profile(name, peltc.link(tmp_path / "out", drawn(spec, base, seed)))
        same(name)
        same(name)
        assert copied == ["cuda"] * count * (seed + 1)
    for session in (here, there):  # in place of the one of that name
        session.add_profile("one", peltc.link(tmp_path / "out", drawn(spec, base, 2)))
    same("one")
    same("other")
    before = len(copied)
    there.remove_profile("one")
    same("other")
    assert len(copied) == before
    if mode == "swappable":
        assert set(there.kept.moved) == {"other"}


def test_generation_with_profiles(model_folder: Folder, tmp_path: Path) -> None:
    base, spec = model_folder("llama"), spec_of(LORA + ATTACHED["blocks"])
    one, other = (drawn(spec, base, seed) for seed in (0, 1))
    peltc.compile(spec, base, tmp_path / "out", one, mode="swappable", generation=True)
    session = peltc.Session(tmp_path / "out", CPU)
    ids, options = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    texts = []
    for name, tensors in (("one", one), ("other", other)):
        peltc.compile(spec, base, tmp_path / name, tensors, generation=True, verify=False)
        session.add_profile(name, peltc.link(tmp_path / "out", tensors))
        texts.append(peltc.Session(tmp_path / name, CPU).generate(ids, **options))
        assert torch.equal(session.generate(ids, profile=name, **options), texts[-1])
    assert not torch.equal(*texts)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision(precision: str, model_folder: Folder, tmp_path: Path) -> None:
    base, spec = model_folder("llama", precision), spec_of(LORA)
    content = {"pelt": 1, "name": "first", "attach": LORA, "deploy": {"mode": "swappable", "precision": precision}}
    manifest = peltc.compile(content, base, tmp_path / "out", drawn(spec, base, 0))
    assert manifest["verification"]["worst"] < TOLERANCE["float32"]
    assert manifest["profiles"]["inputs"]


def test_what_is_no_profile_is_refused(compiled: Path, model_folder: Folder, tmp_path: Path) -> None:
    session, linker = peltc.Session(compiled, CPU), Linker(compiled)
    arrays = linker.link(drawn(spec_of(LORA), model_folder("bert"), 0))
    name = next(iter(arrays))
    for broken, words in (
        ({n: a for n, a in arrays.items() if n != name}, "has other tensors than"),
        ({**arrays, name: arrays[name].T}, "which is"),
        ({**arrays, name: arrays[name].astype(np.float64)}, "as float64"),
        ({**arrays, name: np.full_like(arrays[name], np.nan)}, "no numbers"),
    ):
        with pytest.raises(PeltError, match=f"E625 the profile 'x' .*{words}"):
            session.add_profile("x", broken)
    file = tmp_path / "x.onnx_adapter"
    file.write_bytes(b"\0" * 500)
    with pytest.raises(PeltError, match="E625 the file is no profile"):
        session.add_profile("x", file)
    file.write_bytes(b"\0" * (1 << 22))
    with pytest.raises(PeltError, match=r"E625 .* has 4,194,304 bytes"):
        session.add_profile("x", file)
    write_profile(file, arrays, "f" * 64)
    assert number_of("f" * 64) != number_of(linker.record["fingerprint"])
    with pytest.raises(PeltError, match="was made for another artifact"):
        session.add_profile("x", file)
    with pytest.raises(PeltError, match="E625 cannot read the profile"):
        session.add_profile("x", tmp_path / "absent")
    assert session.profiles == []


def test_an_artifact_whose_modules_are_fixed_takes_none(model_folder: Folder, tmp_path: Path) -> None:
    peltc.compile(spec_of(LORA), model_folder("bert"), tmp_path / "out", verify=False)
    with pytest.raises(PeltError, match="E624 the modules of this artifact are fixed in it"):
        peltc.Session(tmp_path / "out", CPU).add_profile("x", {})
    assert run(["link", str(tmp_path / "out"), "--weights", "x", "-o", str(tmp_path / "y")]) == 1
    assert not (tmp_path / "y").exists()


def masked(size: int, k: int, masks: str = "packed") -> Any:
    """X-PEFT's spec, for a bank."""
    attach = [{"recipe": "xpeft", "n": size, "k": k, "std": 0.5, "reduction": 4}]
    return load_spec({"pelt": 1, "name": "first", "attach": attach, "deploy": {"mode": "bank", "masks": masks}})


@pytest.mark.parametrize(("size", "k"), [(2, 1), (20, 9)])
def test_a_profile_of_masks_is_their_bits(size: int, k: int, model_folder: Folder, tmp_path: Path) -> None:
    """Two masks of ⌈N/8⌉ bytes for each layer, by which the graph mixes the bank: what it answers is what the modules
    that are mixed when a profile is linked answer. Of a bank of two, half of all masks are alike."""
    base, answers = model_folder("bert"), {}
    own = [drawn(masked(size, k), base, seed) for seed in range(4)]
    for masks in ("packed", "mixed"):
        peltc.compile(masked(size, k, masks), base, tmp_path / masks, own[0], verify=masks == "packed")
        session = peltc.Session(tmp_path / masks, CPU)
        linked = [peltc.link(tmp_path / masks, tensors) for tensors in own]
        for i, profile in enumerate(linked):
            session.add_profile(str(i), profile)
        inputs = {"input_ids": [[5, 6, 7, 8]] * 5}
        answers[masks] = session(profile=[None, "0", "1", "2", "3"], **inputs)["logits"]
        if masks == "packed":
            assert {array.dtype for array in linked[0].values()} == {np.dtype(np.uint8)}
            assert sum(array.nbytes for array in linked[0].values()) == 2 * 2 * -(-size // 8)
    scale = np.abs(answers["mixed"]).max()
    assert np.abs(answers["packed"] - answers["mixed"]).max() < 1e-6 * scale
    assert np.abs(answers["packed"][0] - answers["packed"][1:]).max(axis=1).min() > 1e-3 * scale


def test_masks_that_choose_another_number_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    base, spec = model_folder("bert"), masked(20, 9)
    peltc.compile(spec, base, tmp_path / "out", drawn(spec, base, 0), verify=False)
    session, profile = peltc.Session(tmp_path / "out", CPU), peltc.link(tmp_path / "out", drawn(spec, base, 1))
    name = next(iter(profile))
    for wrong in (profile[name] | 255, profile[name] & 0, np.array([0xFF, 1, 0x80], np.uint8)):
        with pytest.raises(PeltError, match=r"E625 .* does not choose 9 of 20 modules in"):
            session.add_profile("wrong", {**profile, name: wrong})
    with pytest.raises(PeltError, match=r"E625 .* which is uint8 \[3\] in this artifact"):
        session.add_profile("wrong", {**profile, name: profile[name].astype(np.float32)})
    session.add_profile("right", profile)


def test_many_profiles_are_added_at_once(model_folder: Folder, tmp_path: Path) -> None:
    """As one by one; and all, or none."""
    base, spec = model_folder("bert"), masked(20, 9)
    peltc.compile(spec, base, tmp_path / "out", drawn(spec, base, 0), verify=False)
    one, many = (peltc.Session(tmp_path / "out", CPU) for _ in range(2))
    linked = [peltc.link(tmp_path / "out", drawn(spec, base, seed)) for seed in range(12)]
    names = [f"user {i}" for i in range(12)]
    for name, profile in zip(names, linked, strict=True):
        one.add_profile(name, profile)
    stacked = {key: np.stack([profile[key] for profile in linked]) for key in linked[0]}
    many.add_profiles(names[:5], {key: array[:5][::-1] for key, array in stacked.items()})
    many.add_profiles(names, stacked)  # which replace the first five
    many.add_profiles([], stacked)
    inputs = {"input_ids": np.arange(5, 53).reshape(12, 4)}
    assert np.array_equal(one(profile=names, **inputs)["logits"], many(profile=names, **inputs)["logits"])
    wrong = {key: array.copy() for key, array in stacked.items()}
    wrong[next(iter(wrong))][7] = 255
    fewer = {key: array[1:] for key, array in stacked.items()}
    for broken, message in (
        (wrong, "E625 .*'new 0 and 11 more' does not choose 9 of 20"),
        (fewer, r"E625 .* which is uint8 \[12, 3\]"),
    ):
        with pytest.raises(PeltError, match=message):
            many.add_profiles([f"new {i}" for i in range(12)], broken)
    with pytest.raises(PeltError, match="E216 the names of profiles"):
        many.add_profiles(names[:11] + names[:1], stacked)
    assert many.profiles == names


def test_a_store_keeps_masks(model_folder: Folder, tmp_path: Path) -> None:
    base, spec = model_folder("bert"), masked(20, 9)
    peltc.compile(spec, base, tmp_path / "out", drawn(spec, base, 0), verify=False)
    linked = peltc.link(tmp_path / "out", drawn(spec, base, 1))
    with peltc.ProfileStore(tmp_path / "store", tmp_path / "out") as store:
        store.put("a/linked", linked)
        save_file(drawn(spec, base, 1), tmp_path / "adapter.safetensors")
        store.put("a/adapter", tmp_path / "adapter.safetensors")
        with pytest.raises(PeltError, match=r"E625 .* does not choose 9 of 20"):
            store.put("a/wrong", {name: array | 255 for name, array in linked.items()})
    session = peltc.Session(tmp_path / "out", CPU, store=tmp_path / "store")
    plain = peltc.Session(tmp_path / "out", CPU)
    plain.add_profile("linked", linked)
    inputs = {"input_ids": [[5, 6, 7, 8]] * 2}
    found = session(profile=["a/linked", "a/adapter"], **inputs)["logits"]
    assert np.array_equal(found, plain(profile="linked", **inputs)["logits"])
