"""Generation where profiles bring tokens and keys before the text: each text of a batch, and all of its beams, with
those of its own profile, or with none; against PyTorch's `generate` with each profile's modules attached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers

import peltc
from peltc.runtime.building.compile import plan_for
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.verification.verify import TOLERANCE, load_model
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

pytestmark = pytest.mark.xdist_group("prompt profiles")

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
CPU = ["CPUExecutionProvider"]
LORA = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}
ROOM, FEW, NEW = 4, 2, 6
BEAMS = (1, 3)


def attached(kind: str, family: str, length: int) -> list[dict[str, Any]]:
    at = "encoder.embedding.word" if family == "t5" else "embedding.word"
    prompt = {"method": "prompt", "at": at, "length": length}
    prefix = {"method": "prefix", "at": "*attention", "length": length, "hidden": 8}
    shifted = {"method": "prefix", "at": "decoder.layers.*.attention", "length": length, "positions": "shifted",
               "reparameterise": False}  # fmt: skip
    kinds: dict[str, list[dict[str, Any]]] = {
        "all": [prompt, prefix, LORA, {"method": "bottleneck", "at": "feed_forward.block", "reduction": 4}],
        "prefix": [prefix],
        "shifted": [shifted, LORA],
        "gates": [{"recipe": "unipelt", "length": length, "hidden": 8, "r": 2, "reduction": 4}],
        "fixed prompt": [{**prompt, "mode": "static"}, LORA],
        "fixed prefix": [{**prefix, "mode": "static"}, prompt],
    }
    return kinds[kind]


def spec_of(attach: list[dict[str, Any]]) -> Any:
    gates = {"gates": {"at": "prefill"}} if "recipe" in attach[0] else {}
    return load_spec({"pelt": 1, "name": "first", "attach": attach, "deploy": {"generation": True, **gates}})


def drawn(spec: Any, base: Path, seed: int) -> dict[str, Array]:
    """Random values; those of what is fixed are the same whatever the seed."""
    plan, _ = plan_for(spec, base)
    fixed = {tensor.name for claim in plan.claims if claim.mode == "static" for tensor in claim.tensors.values()}
    draws = {True: np.random.default_rng(9), False: np.random.default_rng(seed)}
    return {name: draws[name in fixed].normal(0, 0.2, tensor.shape).astype(np.float32)
            for name, tensor in plan.tensors.items()}  # fmt: skip


def texts(family: str) -> dict[str, Any]:
    """Four, with padding, on the left for a decoder alone."""
    ids = torch.tensor([[5, 6, 7, 8], [4, 9, 7, 3], [9, 8, 3, 5], [1, 2, 7, 4]])
    mask = torch.ones_like(ids)
    if family == "t5":
        mask[1, 3:] = 0
    else:
        mask[1, :1], mask[3, :2] = 0, 0
    given = {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": NEW, "min_new_tokens": NEW}
    given |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return given | ({"decoder_start_token_id": 1} if family == "t5" else {})


def same(found: Any, expected: Any, row: int, whole: bool) -> None:
    """Whether a text is another's; the logits of beams are those of whichever was chosen then."""
    assert torch.equal(found.sequences[row], expected.sequences[row])
    for ours, theirs in zip(found.logits, expected.logits, strict=True) if whole else ():
        assert (ours[row] - theirs[row]).abs().max() <= TOLERANCE["float32"] * theirs.abs().max()


CASES = [("gpt2", "all"), ("llama", "all"), ("t5", "all"), ("t5", "prefix"), ("llama", "shifted"), ("llama", "gates"),
         ("gpt2", "fixed prompt"), ("llama", "fixed prefix")]  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_tokens_and_logits_equal_pytorch(family: str, kind: str, model_folder: Folder, tmp_path: Path) -> None:
    base, given = model_folder(family), texts(family)
    fixed = kind.startswith("fixed")
    own: dict[str, dict[str, Array]] = {}
    expected: dict[tuple[str | None, int], Any] = {}
    for seed, (name, length) in enumerate({"one": ROOM, "other": ROOM, "few": ROOM if fixed else FEW}.items()):
        spec = spec_of(attached(kind, family, length))
        plan, read = plan_for(spec, base)
        own[name] = drawn(spec, base, seed)
        model = attach_plan(load_model(read), plan, own[name]).eval()
        expected |= {(name, beams): model.generate(num_beams=beams, **given) for beams in BEAMS}
    bare = load_model(read)
    expected |= {(None, beams): bare.generate(num_beams=beams, **given) for beams in BEAMS}
    spec = spec_of(attached(kind, family, ROOM))
    for mode in ("swappable", "bank") if (family, kind) == ("llama", "all") else ("bank",):
        manifest = peltc.compile(spec, base, tmp_path / mode, own["one"], mode=mode)  # verified, by generating too
        assert not (tmp_path / mode / "cache.safetensors").exists()
        session = peltc.Session(tmp_path / mode, CPU)
        for name, tensors in own.items():
            session.add_profile(name, peltc.link(tmp_path / mode, tensors))
        names: list[str | None] = [*own] if fixed else [*own, None]
        assert manifest["profiles"]["no_bare_base"] is None
        for beams in BEAMS:
            for rows in ([names[i % len(names)] for i in range(4)], [names[-1 - i % len(names)] for i in range(4)]):
                if mode == "bank":
                    found = session.generate(num_beams=beams, profile=rows, **given)
                    for row, name in enumerate(rows):
                        same(found, expected[name, beams], row, beams == 1)
            for name in names if mode == "swappable" else ():
                found = session.generate(num_beams=beams, profile=name, **given)
                for row in range(4):
                    same(found, expected[name, beams], row, beams == 1)


def test_a_decoder_that_takes_no_mask_has_no_text_without(model_folder: Folder, tmp_path: Path) -> None:
    """Behind an encoder, nothing could hide the places of keys that take positions; profiles that fill them do."""
    base, given = model_folder("t5"), texts("t5")
    spec = spec_of(attached("shifted", "t5", ROOM))
    tensors = [drawn(spec, base, seed) for seed in range(2)]
    manifest = peltc.compile(spec, base, tmp_path / "out", tensors[0], mode="bank")
    assert manifest["profiles"]["one_length"] == "the model takes no mask of its text"
    assert manifest["profiles"]["places"] == []
    session, (plan, read) = peltc.Session(tmp_path / "out", CPU), plan_for(spec, base)
    with pytest.raises(PeltError, match="E627"):
        session.generate(**given)
    with pytest.raises(PeltError, match="E411"):
        peltc.link(tmp_path / "out", drawn(spec_of(attached("shifted", "t5", FEW)), base, 0))
    for i in range(2):
        session.add_profile(str(i), peltc.link(tmp_path / "out", tensors[i]))
    found = session.generate(profile=["0", "1", "1", "0"], **given)
    for i in range(2):
        expected = attach_plan(load_model(read), plan, tensors[i]).eval().generate(**given)
        for row in (0, 3) if i == 0 else (1, 2):
            same(found, expected, row, True)


def test_steps_go_on_from_an_own_cache(model_folder: Folder, tmp_path: Path) -> None:
    """The tokens are in the cache then, and are not read again; what is read in chunks reads them with the first."""
    base, spec = model_folder("llama"), spec_of(attached("all", "llama", ROOM))
    tensors, given = drawn(spec, base, 0), texts("llama")
    peltc.compile(spec, base, tmp_path / "out", tensors, mode="bank", verify=False)
    plan, read = plan_for(spec, base)
    model, session = attach_plan(load_model(read), plan, tensors).eval(), peltc.Session(tmp_path / "out", CPU)
    session.add_profile("one", tmp_path / "out/profiles/first.onnx_adapter")
    session.profile = "one"
    first, chunks = session.generate(**given), session.generate(**given, prefill_chunk_size=2)
    longer = torch.cat([first.sequences, torch.tensor([[5, 6]]).expand(4, 2)], 1)
    mask = torch.cat([given["attention_mask"], torch.ones(4, NEW + 2, dtype=torch.long)], 1)
    whole = given | {"input_ids": longer, "attention_mask": mask}
    found, expected = session.generate(**whole, past_key_values=first.past_key_values), model.generate(**whole)
    for row in range(4):
        same(chunks, first, row, True)
        same(found, expected, row, True)


@pytest.mark.parametrize("kind", ["tokens", "keys"])
def test_where_the_cache_begins_counts(kind: str, model_folder: Folder, tmp_path: Path) -> None:
    """The witness: a graph that puts nothing into the cache has a mask that is too long for it."""
    base, spec = model_folder("llama"), spec_of(attached("prefix" if kind == "keys" else "all", "llama", ROOM))
    peltc.compile(spec, base, tmp_path / "out", drawn(spec, base, 0), mode="swappable", verify=False)
    for node_of_begin in ("Equal", "Less"):
        graph = onnx.load(tmp_path / "out/decode.onnx", load_external_data=False)
        begin = [node for node in graph.graph.node if node.op_type == "Equal" and node.name.startswith("pelt.")
                 and node.name.startswith("pelt.prompt") == (kind == "tokens")]  # fmt: skip
        assert len(begin) == 1
        begin[0].op_type = node_of_begin
        onnx.save(graph, tmp_path / "out/decode.onnx")
        session = peltc.Session(tmp_path / "out", CPU)
        session.add_profile("one", tmp_path / "out/profiles/first.onnx_adapter")
        given = texts("llama") | {"max_new_tokens": 1, "min_new_tokens": 1}
        if node_of_begin == "Equal":
            assert session.generate(profile="one", **given).logits[0].isfinite().all()
        else:
            with pytest.raises(PeltError, match="E612"):
                session.generate(profile="one", **given)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.filterwarnings("ignore")
def test_folders_of_peft_generate(kind: str, model_folder: Folder, tmp_path: Path) -> None:
    """Two folders, a profile each, in one batch: as PEFT's own `generate` with each of them."""
    base, given = model_folder("llama"), texts("llama")
    del given["output_logits"], given["return_dict_in_generate"]
    config = peft.PromptTuningConfig if kind == "PROMPT_TUNING" else peft.PrefixTuningConfig
    expected = []
    for seed in range(2):
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        live = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=ROOM)).eval()
        torch.manual_seed(seed)
        for parameter in live.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.2)
        live.save_pretrained(tmp_path / str(seed))
        expected.append(live.generate(**given))
    peltc.compile(tmp_path / "0", base, tmp_path / "out", mode="bank", generation=True, verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    for seed in range(2):
        session.add_profile(str(seed), peltc.link(tmp_path / "out", tmp_path / str(seed)))
    names = ["0", "1", "1", "0"]
    found = session.generate(profile=names, **given)
    assert not torch.equal(*expected)
    for row, name in enumerate(names):
        assert torch.equal(found[row], expected[int(name)][row])
