"""Generation behind soft prompts: tokens and logits of `Session.generate` against PyTorch's `generate` with the modules
attached, and against a bare model that is given the embedded prompt by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.base.opening import open_base
from peltc.runtime.building.compile import plan_for
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.verification.verify import TOLERANCE, load_model
from peltc.spec.diagnostics import PeltError

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from instances import FAMILIES, save

pytestmark = pytest.mark.xdist_group("prompted generation")

SWEPT = [pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "phi")]
MODELS = ("gpt2", "llama", "qwen3", "t5", "bart", *SWEPT)
NEW, LENGTH = 12, 4
PROMPT = {"method": "prompt", "length": LENGTH}
MIXED = [
    {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4},
    {"method": "ia3", "at": "attention.key"},
    {"method": "bottleneck", "at": "feed_forward.block", "reduction": 4},
    {"method": "prefix", "at": "attention", "length": 3},
]


def where(family: str) -> str:
    return "encoder.embedding.word" if family in ("t5", "bart") else "embedding.word"


def built(model: Path, attach: list[dict[str, Any]], out: Path) -> tuple[peltc.Session, Any, dict[str, Any]]:
    spec = peltc.load_spec({"pelt": 1, "name": "prompted", "attach": attach, "deploy": {"generation": True}})
    plan, base = plan_for(spec, model)
    random = np.random.default_rng(0)
    tensors = {n: (0.1 * random.standard_normal(t.shape)).astype(np.float32) for n, t in plan.tensors.items()}
    manifest = peltc.compile(spec, model, out, tensors)
    assert manifest["verification"]["worst"] < TOLERANCE["float32"]
    assert any(figure["output"] == "generated logits" for figure in manifest["verification"]["shapes"])
    return peltc.Session(out, ["CPUExecutionProvider"]), attach_plan(load_model(base), plan, tensors).eval(), tensors


@pytest.fixture(scope="module", params=MODELS)
def compiled(request: Any, tmp_path_factory: Any) -> Any:
    """A tiny model's artifact with a prompt and every other kind of module, and the torch model with the same."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save(request.param, dict(FAMILIES)[request.param], folder / "model")
    return (*built(model, [*MIXED, {**PROMPT, "at": where(request.param)}], folder / "out"), folder)


def texts(model: Any) -> dict[str, Any]:
    """A batch of three with padding, on the left for a decoder alone."""
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        mask[1, 4:] = 0
    else:
        mask[1, :3], mask[2, :1] = 0, 0
    given = {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": NEW, "min_new_tokens": NEW}
    given |= {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    return given | ({"decoder_start_token_id": 1} if model.config.is_encoder_decoder else {})


def same(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE["float32"] * theirs.abs().max()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"attention_mask": None}, {"prefill_chunk_size": 2}],
    ids=["greedy", "beams", "without-a-mask", "in-chunks"],
)
def test_tokens_and_logits_equal_pytorch(compiled: Any, options: dict[str, Any]) -> None:
    session, model, *_ = compiled
    if model.config.is_encoder_decoder and "prefill_chunk_size" in options:
        pytest.skip("transformers cuts the encoder's mask")
    given = texts(model) | options
    same(session.generate(**given), model.generate(**given))


def test_steps_go_on_from_an_own_cache(compiled: Any) -> None:
    """A second call with the first one's cache and text reads what is new alone."""
    session, model, *_ = compiled
    if model.config.is_encoder_decoder:
        pytest.skip("generate begins a new text for each encoder's states")
    given = texts(model)
    first = session.generate(**given)
    longer = torch.cat([first.sequences, torch.tensor([[5, 6]]).expand(3, 2)], 1)
    mask = torch.cat([given["attention_mask"], torch.ones(3, NEW + 2, dtype=torch.long)], 1)
    whole = given | {"input_ids": longer, "attention_mask": mask}
    same(session.generate(**whole, past_key_values=first.past_key_values), model.generate(**whole))


@pytest.mark.parametrize("compiled", ["gpt2", "llama", "qwen3", SWEPT[0]], indirect=True)
def test_equal_to_a_bare_model_on_the_embedded_prompt(compiled: Any, tmp_path: Path) -> None:
    """Nothing of ours takes part in the reference: the prompt's rows stand before the text's embeddings."""
    *_, folder = compiled
    session, _, tensors = built(folder / "model", [{**PROMPT, "at": "embedding.word"}], tmp_path / "out")
    bare = load_model(open_base(folder / "model"))
    given = texts(bare)
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    (prompt,) = (torch.from_numpy(value).expand(3, -1, -1) for value in tensors.values())
    embedded = torch.cat([prompt, bare.get_input_embeddings()(ids)], 1)
    longer = torch.cat([mask.new_ones(3, LENGTH), mask], 1)
    expected = bare.generate(inputs_embeds=embedded, attention_mask=longer, **given)
    found = session.generate(input_ids=ids, attention_mask=mask, **given)
    assert torch.equal(found.sequences[:, ids.shape[1] :], expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE["float32"] * theirs.abs().max()


@pytest.mark.parametrize("compiled", ["llama"], indirect=True)
def test_the_cache_begins_with_the_prompt(compiled: Any, tmp_path: Path) -> None:
    """The witness: with another start of the cache, verification finds out by generating; and no step reads the
    prompt's tokens again."""
    *_, folder = compiled
    shutil.copytree(folder / "out", tmp_path / "out")
    starts = load_file(tmp_path / "out/cache.safetensors")
    assert all(start.shape[2] == LENGTH + 3 for start in starts.values())
    assert json.loads((tmp_path / "out/pelt.json").read_text())["tokens_before"] == LENGTH
    graph = onnx.load(tmp_path / "out/decode.onnx", load_external_data=False).graph
    assert not any(tensor.name.startswith("pelt.prompt.tokens") for tensor in graph.initializer)
    changed = {name: np.where(np.arange(LENGTH + 3)[None, None, :, None] > 2, 0, a) for name, a in starts.items()}
    save_file({n: np.ascontiguousarray(a, np.float32) for n, a in changed.items()}, tmp_path / "out/cache.safetensors")
    with pytest.raises(PeltError, match=r"E701(.|\n)*generated logits"):
        peltc.verify(tmp_path / "out")


@pytest.fixture(scope="module", params=["gpt2", "llama", "t5", "bart"])
def shifted(request: Any, tmp_path_factory: Any) -> Any:
    """The same with a prefix that takes positions, in the decoder."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save(request.param, dict(FAMILIES)[request.param], folder / "model")
    prefix = {"method": "prefix", "at": "decoder.layers.*.attention", "length": LENGTH, "positions": "shifted"}
    return (*built(model, [*MIXED[:-1], prefix], folder / "out"), folder)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"attention_mask": None}], ids=["greedy", "beams", "no-mask"]
)
def test_a_prefix_that_takes_positions_equals_pytorch(shifted: Any, options: dict[str, Any]) -> None:
    session, model, *_ = shifted
    given = texts(model) | options
    same(session.generate(**given), model.generate(**given))


@pytest.mark.parametrize("shifted", ["gpt2", "llama", "t5"], indirect=True)
def test_where_the_text_begins_counts(shifted: Any, tmp_path: Path) -> None:
    """The witness: the same prefix without positions is another function; and no graph joins it to the keys of a
    step."""
    session, _, tensors, folder = shifted
    prefix = {"method": "prefix", "at": "decoder.layers.*.attention", "length": LENGTH}
    spec = {"pelt": 1, "name": "kept", "attach": [*MIXED[:-1], prefix]}
    peltc.compile(spec, folder / "model", tmp_path / "kept", tensors, verify=False)
    given = {"input_ids": np.arange(5, 12)[None]}
    if any(i.name == "decoder_input_ids" for i in session.inference.get_inputs()):
        given["decoder_input_ids"] = np.arange(5, 9)[None]
    found, other = session(**given)["logits"], peltc.Session(tmp_path / "kept")(**given)["logits"]
    assert found.shape == other.shape
    assert np.abs(found - other).max() > 10 * TOLERANCE["float32"] * np.abs(found).max()
    starts = load_file(folder / "out/cache.safetensors")
    assert all(start.shape[2] == LENGTH for start in starts.values())


SHIFTED = {"method": "prefix", "at": "attention", "positions": "shifted", "reparameterise": False}


@pytest.mark.parametrize(
    ("family", "attach", "words"),
    [
        ("llama", [{**SHIFTED, "layers": [0]}], "every layer's `attention`"),
        ("llama", [{**SHIFTED, "length": [2, 3]}], "one length for all"),
        ("llama", [SHIFTED, {**PROMPT, "at": "embedding.word"}], "it or 'prompt', which puts something before"),
        ("llama", [SHIFTED, {"method": "prefix", "name": "other", "at": "attention"}], "it or 'other'"),
        ("t5", [{**SHIFTED, "at": "encoder.layers.*.attention"}], "the decoder of a model that has an encoder too"),
    ],
)  # fmt: skip
def test_what_cannot_take_positions_is_refused(
    family: str, attach: list[dict[str, Any]], words: str, tmp_path_factory: Any
) -> None:
    model = save(family, dict(FAMILIES)[family], tmp_path_factory.mktemp("refused") / "model")
    with pytest.raises(PeltError, match=f"E208 the keys and values of 'prefix' take positions(.|\n)*{words}"):
        plan_for(peltc.load_spec({"pelt": 1, "attach": attach}), model)


def test_keys_that_no_cache_can_begin_with_are_refused(tmp_path: Path) -> None:
    """They take positions, and change the text's own keys besides."""
    model = save("llama", dict(FAMILIES)["llama"], tmp_path / "model")
    grown = {"site": "attention", "options": {"length": {"type": "integer", "default": 2}},
             "parameters": {"K": {"shape": ["kv_heads", "length", "head_dim"], "init": "normal(0.1)"}},
             "keys": "concat(K, 1.5 * k, axis=-2)", "values": "concat(K, v, axis=-2)", "takes": "length"}  # fmt: skip
    spec = {"pelt": 1, "attach": [{"method": "grown", "at": "attention"}], "methods": {"grown": grown}}
    with pytest.raises(PeltError, match=r"E208 'grown' at .* takes positions(.|\n)*compile without `generation`"):
        peltc.compile(spec, model, tmp_path / "out", generation=True, verify=False)
    manifest = peltc.compile(spec, model, tmp_path / "out")
    assert manifest["verification"]["worst"] < TOLERANCE["float32"]
