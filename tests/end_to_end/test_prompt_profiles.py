"""Profiles with tokens and keys before the text: rows of one batch with as many as each profile has, and with none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import peltc
from peltc.runtime.building.compile import plan_for
from peltc.runtime.commands.cli import run
from peltc.runtime.verification.verify import TOLERANCE, load_model
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

pytestmark = pytest.mark.xdist_group("prompt profiles")

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
CPU = ["CPUExecutionProvider"]
LORA = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}
ROOM, FEW = 4, 2
"""How many tokens the artifact has room for, and how many a profile has that fills it in part."""


def attached(kind: str, family: str, length: int) -> list[dict[str, Any]]:
    at = "encoder.embedding.word" if family == "t5" else "embedding.word"
    prompt = {"method": "prompt", "at": at, "length": length}
    prefix = {"method": "prefix", "at": "attention", "length": length, "hidden": 8}
    kinds: dict[str, list[dict[str, Any]]] = {
        "prompt": [prompt],
        "prefix": [prefix],
        "all": [prompt, prefix, LORA, {"method": "bottleneck", "at": "feed_forward.block", "reduction": 4}],
        "behind": [{**prompt, "at": "embedding"}, LORA],
        "cut": [{**prompt, "class_token": "text"}, LORA],
        "gates": [{"recipe": "unipelt", "length": length, "hidden": 8, "r": 2, "reduction": 4}],
        "shifted": [
            {
                **prefix,
                "at": f"{'encoder' if family == 'bert' else 'decoder'}.layers.*.attention",
                "positions": "shifted",
            },
            LORA,
        ],
        "two": [prompt, {**prompt, "name": "second", "length": 1, "after": "prompt"}],
    }
    return kinds[kind]


def spec_of(attach: list[dict[str, Any]], **deploy: Any) -> Any:
    return load_spec({"pelt": 1, "name": "first", "attach": attach, **({"deploy": deploy} if deploy else {})})


def drawn(spec: Any, base: Path, seed: int) -> dict[str, Array]:
    plan, _ = plan_for(spec, base)
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, 0.2, tensor.shape).astype(np.float32) for name, tensor in plan.tensors.items()}


def texts(family: str) -> dict[str, Any]:
    """Four, with padding where such a model has it."""
    last = [0, 1, 1, 1] if family in ("gpt2", "llama") else [1, 1, 0, 0]
    found = {"input_ids": [[5, 6, 7, 8], [4, 9, 7, 3], [9, 8, 3, 5], [1, 2, 7, 6]],
             "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], last]}  # fmt: skip
    return {**found, "decoder_input_ids": [[5, 6], [1, 2], [3, 4], [7, 7]]} if family == "t5" else found


def bare(base: Path, family: str) -> Array:
    """What the model alone answers, in PyTorch."""
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(base).eval()
    with torch.no_grad():
        found: Array = model(**{name: torch.tensor(value) for name, value in texts(family).items()}).logits.numpy()
    return found


CASES = [("bert", "prompt"), ("bert", "all"), ("bert", "behind"), ("bert", "cut"), ("bert", "gates"), ("gpt2", "all"),
         ("llama", "all"), ("llama", "gates"), ("llama", "two"), ("t5", "all"), ("t5", "prefix"), ("bert", "shifted"),
         ("llama", "shifted"), ("t5", "shifted")]  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_each_row_has_its_own(family: str, kind: str, model_folder: Folder, tmp_path: Path) -> None:
    """A profile that fills all places, one that fills some, and none, in one batch and alone: each answers what an
    artifact of its own does, whose modules are fixed; and what PyTorch does without modules."""
    base = model_folder(family)
    own, alone = {}, {None: bare(base, family)}
    for seed, (name, length) in enumerate({"one": ROOM, "few": FEW, "other": ROOM}.items()):
        spec = spec_of(attached(kind, family, length))
        own[name] = drawn(spec, base, seed)
        peltc.compile(spec, base, tmp_path / name, own[name], mode="static", verify=name == "few")
        alone[name] = peltc.Session(tmp_path / name, CPU)(**texts(family))["logits"]
    seen = np.array(texts(family)["attention_mask"], bool) if alone[None].ndim == 3 and family != "t5" else ...
    assert all(np.abs(alone[name] - alone[None])[seen].max() > 1e-3 for name in own)

    def same(found: Array, name: str | None, row: Any = slice(None)) -> None:
        distance = np.abs(found - alone[name])
        shown = distance[row] if seen is ... else distance[row][seen[row]]
        assert shown.max() < 1e-6 * np.abs(alone[name]).max()

    for mode in ("swappable", "bank"):
        peltc.compile(spec_of(attached(kind, family, ROOM)), base, tmp_path / mode, own["one"], mode=mode)  # verified
        session = peltc.Session(tmp_path / mode, CPU)
        session.add_profile("one", tmp_path / mode / "profiles/first.onnx_adapter")
        for name in ("few", "other"):
            session.add_profile(name, peltc.link(tmp_path / mode, own[name]))
        for name in (*own, None):
            same(session(profile=name, **texts(family))["logits"], name)
        if mode == "bank":
            for names in (["one", "few", None, "other"], [None, "other", "few", "one"]):
                found = session(profile=names, **texts(family))["logits"]
                for row, name in enumerate(names):
                    same(found, name, row)


def test_the_turn_is_what_makes_it_so(model_folder: Folder, tmp_path: Path) -> None:
    """The witness: turned the other way, a row without tokens answers otherwise."""
    base, spec = model_folder("bert"), spec_of(attached("prompt", "bert", 3))
    peltc.compile(spec, base, tmp_path / "out", drawn(spec, base, 0), mode="swappable", verify=False)
    expected, graph = bare(base, "bert"), onnx.load(tmp_path / "out/model.onnx", load_external_data=False)
    made = {name: node for node in graph.graph.node for name in node.output}
    (turn,) = (made[node.input[0]] for node in graph.graph.node if node.op_type == "Mod")
    for kind in ("Add", "Sub"):
        turn.op_type = kind
        onnx.save(graph, tmp_path / "out/model.onnx")
        found = peltc.Session(tmp_path / "out", CPU)(**texts("bert"))["logits"]
        assert (np.abs(found - expected).max() > 1e-3 * np.abs(expected).max()) == (kind == "Sub")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
@pytest.mark.filterwarnings("ignore")
def test_folders_of_peft_are_profiles(kind: str, model_folder: Folder, tmp_path: Path) -> None:
    """Of as many tokens as the artifact's, and of fewer."""
    base = model_folder("llama")
    config = {"PROMPT_TUNING": peft.PromptTuningConfig, "P_TUNING": peft.PromptEncoderConfig,
              "PREFIX_TUNING": peft.PrefixTuningConfig}[kind]  # fmt: skip
    expected = {}
    for name, count in (("full", ROOM), ("few", FEW)):
        torch.manual_seed(count)
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        options = {"encoder_hidden_size": 8} if kind == "P_TUNING" else {}
        live = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=count, **options)).eval()
        for parameter in live.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.2)
        live.save_pretrained(tmp_path / name)
        given = {n: torch.tensor(v) for n, v in texts("llama").items()}
        with torch.no_grad():
            logits = live(**given).logits.numpy()
        expected[name] = logits[:, -4:]
    peltc.compile(tmp_path / "full", base, tmp_path / "out", mode="bank")
    session, seen = peltc.Session(tmp_path / "out", CPU), np.array(texts("llama")["attention_mask"], bool)
    names = ["full", "full", "full", "full"]
    for name in expected:
        file = tmp_path / f"{name}.onnx_adapter"
        assert run(["link", str(tmp_path / "out"), "--weights", str(tmp_path / name), "-o", str(file)]) == 0
        session.add_profile(name, file)
        names[2:] = [name] * 2
    found = session(profile=names, **texts("llama"))["logits"]
    for row, name in enumerate(names):
        distance = np.abs(found[row] - expected[name][row])[seen[row]].max()
        assert distance < TOLERANCE["float32"] * np.abs(expected[name]).max()


def test_more_tokens_than_there_is_room_for_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("bert")
    more, fewer = (spec_of(attached("prompt", "bert", n)) for n in (ROOM + 1, FEW))
    peltc.compile(spec_of(attached("prompt", "bert", ROOM)), base, tmp_path / "out", mode="bank", verify=False)
    with pytest.raises(PeltError, match=r"E411 the adapter has 5 tokens in 'prompt'.*: there is room for 4"):
        peltc.link(tmp_path / "out", drawn(more, base, 0))
    save_file(drawn(fewer, base, 0), tmp_path / "few.safetensors")
    arrays = peltc.link(tmp_path / "out", tmp_path / "few.safetensors")
    shown = next(array for name, array in arrays.items() if ".shown@" in name)
    assert shown.tolist() == [0, 0, 1, 1]
    with peltc.ProfileStore(tmp_path / "store", tmp_path / "out") as store:  # which links it as it is asked for
        store.put("t/few", tmp_path / "few.safetensors")
    session = peltc.Session(tmp_path / "out", CPU, store=tmp_path / "store")
    plain = peltc.Session(tmp_path / "out", CPU)
    plain.add_profile("few", arrays)
    found = session(profile=["t/few", None, None, "t/few"], **texts("bert"))["logits"]
    assert np.array_equal(found, plain(profile=["few", None, None, "few"], **texts("bert"))["logits"])


def test_a_text_that_is_read_whole_keeps_its_length(model_folder: Folder, tmp_path: Path) -> None:
    """A mean over all positions counts empty ones too, so that profiles have no fewer; with a mask it does not."""
    base = model_folder("bert")
    for masked, words in ((False, r"E411 .*reads the whole text by 'mean_seq', without its mask"), (True, "")):
        gated = {**LORA, "gate": {"mask_padding": masked}}
        full, few = (spec_of([*attached("prompt", "bert", n), gated]) for n in (ROOM, FEW))
        out = tmp_path / f"masked-{masked}"
        peltc.compile(full, base, out, mode="bank", verify=False)
        session, own = peltc.Session(out, CPU), drawn(few, base, 1)
        assert np.abs(session(**texts("bert"))["logits"] - bare(base, "bert")).max() < 1e-6
        if words:
            with pytest.raises(PeltError, match=words):
                peltc.link(out, own)
            continue
        session.add_profile("few", peltc.link(out, own))
        peltc.compile(few, base, tmp_path / "few", own, mode="static", verify=False)
        expected = peltc.Session(tmp_path / "few", CPU)(**texts("bert"))["logits"]
        found = session(profile=["few"] * 3 + [None], **texts("bert"))["logits"]
        assert np.abs(found - expected)[:3].max() < 1e-6 * np.abs(expected).max()


def test_a_fixed_module_that_reads_a_text_whole_has_no_row_without(model_folder: Folder, tmp_path: Path) -> None:
    """It would count empty places in rows that have no profile."""
    gated = {**LORA, "gate": True, "mode": "static"}
    manifest = peltc.compile(spec_of([*attached("prompt", "bert", ROOM), gated]), model_folder("bert"),
                             tmp_path / "out", mode="bank", verify=False)  # fmt: skip
    assert "'lora' at" in manifest["profiles"]["no_bare_base"]
    with pytest.raises(PeltError, match=r"E627 .*reads the whole text by 'mean_seq'"):
        peltc.Session(tmp_path / "out", CPU)(**texts("bert"))


def test_what_is_measured_counts(model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base that PyTorch has is another one, rows without a profile are refused, and the compiler says why."""
    from peltc.runtime.verification import bare as measured

    def other(base: Any) -> Any:
        model = load_model(base)
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        return model

    monkeypatch.setattr(measured, "load_model", other)
    told: list[str] = []
    manifest = peltc.compile(spec_of(attached("prompt", "bert", ROOM)), model_folder("bert"), tmp_path / "out",
                             mode="bank", talk=told.append)  # fmt: skip
    assert any("every text needs a profile of full length" in line for line in told)
    assert "measured, rows without a profile differ" in manifest["profiles"]["no_bare_base"]
    with pytest.raises(PeltError, match=r"E627 .*measured"):
        peltc.Session(tmp_path / "out", CPU)(**texts("bert"))


def test_a_head_that_reads_the_last_place_has_no_row_without(model_folder: Folder, tmp_path: Path) -> None:
    """Behind the text, where rows with fewer tokens have their empty places."""
    config = transformers.LlamaConfig.from_pretrained(model_folder("llama"), num_labels=2, pad_token_id=0,
                                                      num_hidden_layers=1)  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    spec = spec_of(attached("prompt", "llama", ROOM))
    manifest = peltc.compile(spec, tmp_path / "model", tmp_path / "out", mode="swappable", verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    with pytest.raises(PeltError, match=r"E627 .*'logits' is read elsewhere than at the first token"):
        session(**texts("llama"))
    with pytest.raises(PeltError, match=r"E411 .*'logits' is read elsewhere"):
        peltc.link(tmp_path / "out", drawn(spec_of(attached("prompt", "llama", FEW)), tmp_path / "model", 0))
    assert manifest["profiles"]["one_length"] == manifest["profiles"]["no_bare_base"]
    session.add_profile("full", peltc.link(tmp_path / "out", drawn(spec, tmp_path / "model", 0)))
    assert session(profile="full", **texts("llama"))["logits"].shape == (4, 2)


def test_tokens_are_all_brought_or_all_fixed(model_folder: Folder, tmp_path: Path) -> None:
    first, second = attached("two", "bert", ROOM)
    with pytest.raises(PeltError, match="E207 profiles bring some of the tokens of 'prompt' and 'second'"):
        peltc.compile(spec_of([first, {**second, "mode": "static"}]), model_folder("bert"), tmp_path / "out",
                      mode="bank")  # fmt: skip
