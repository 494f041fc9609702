"""Generation: tokens and logits of `Session.generate` against PyTorch's `generate` with the modules attached."""

import json
import shutil
import sys
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList, TextStreamer

import peltc
from peltc.compiler.base.opening import open_base
from peltc.runtime.building.compile import plan_for
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.verification.verify import load_model
from peltc.spec.diagnostics import PeltError

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from instances import FAMILIES, save

pytestmark = pytest.mark.xdist_group("generation")

SWEPT = ("qwen3", "gemma", "mistral", "phi")
MODELS = ("gpt2", "llama", "t5", "bart", *(pytest.param(name, marks=pytest.mark.slow) for name in SWEPT))
"""All forms of positions, caches and fused maps; those like Llama are run in sweeps."""
NEW = 20
TOLERANCE = 1e-5
SPEC = {
    "pelt": 1,
    "name": "generating",
    "attach": [
        {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4},
        {"method": "dora", "at": "attention.output", "r": 2},
        {"method": "ia3", "at": "attention.key"},
        {"method": "bottleneck", "at": "feed_forward.block", "reduction": 4},
        {"method": "prefix", "at": "attention", "length": 5},
    ],
}


@pytest.fixture(scope="module", params=MODELS)
def compiled(request, tmp_path_factory):
    """A tiny model's artifact with every kind of module, and the torch model with the same attached."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save(request.param, dict(FAMILIES)[request.param], folder / "model")
    return (*build(model, SPEC, folder / "out"), folder / "out")


def build(model, content, out, mode="fold"):
    spec = peltc.load_spec(content)
    plan, base = plan_for(spec, model)
    random = np.random.default_rng(0)
    tensors = {n: (0.1 * random.standard_normal(t.shape)).astype(np.float32) for n, t in plan.tensors.items()}
    manifest = peltc.compile(spec, model, out, tensors, mode=mode, generation=True)
    assert manifest["verification"]["worst"] < TOLERANCE
    return peltc.Session(out, ["CPUExecutionProvider"]), attach_plan(load_model(base), plan, tensors).eval()


def prompt(model):
    """A batch of three with padding, on the left for a decoder alone."""
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        mask[1, 4:] = 0
    else:
        mask[1, :3], mask[2, :1] = 0, 0
    given = {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": NEW, "min_new_tokens": NEW}
    return given | ({"decoder_start_token_id": 1} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "top_k": 20},
     {"do_sample": False, "attention_mask": None}, {"do_sample": False, "prefill_chunk_size": 2}],
    ids=["greedy", "beams", "sampling", "without-a-mask", "in-chunks"],
)  # fmt: skip
def test_tokens_and_logits_equal_pytorch(compiled, options):
    session, model, _ = compiled
    if model.config.is_encoder_decoder and "prefill_chunk_size" in options:
        pytest.skip("transformers cuts the encoder's mask: refused, below")
    given = prompt(model) | options | {"output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    expected = model.generate(**given)
    torch.manual_seed(0)
    found = session.generate(**given)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_modules_count(compiled):
    """The witness: without its modules the model answers otherwise."""
    _, model, out = compiled
    given = prompt(model) | {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_modules = model.generate(**given).logits[0]
    bare = load_model(open_base(out))
    assert (bare.generate(**given).logits[0] - with_modules).abs().max() > 100 * TOLERANCE * with_modules.abs().max()


def test_graphs_share_their_weights(compiled):
    """No tensor of any size is in a graph itself, and none is written twice."""
    _, model, out = compiled
    manifest = json.loads((out / "pelt.json").read_text())
    encodes = model.config.is_encoder_decoder
    assert manifest["graphs"] == ["model", "decode", *(["encoder"] if encodes else [])]
    seen = {}
    for name in manifest["graphs"]:
        graph = onnx.load(out / f"{name}.onnx", load_external_data=False).graph
        for tensor in graph.initializer:
            assert len(tensor.raw_data) < 256
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place and place["location"] == "model.onnx.data":
                seen.setdefault(tensor.name, set()).add((place["offset"], place["length"]))
    assert seen
    folded = {entry["parameter"] for entry in manifest["folded"]}
    assert all(len(places) == 1 for name, places in seen.items() if name in folded)


def test_prefix_begins_the_cache(compiled):
    """Nothing in the step's graph joins the prefix to the keys: it is in the cache before the first token."""
    _, _, out = compiled

    def joins(name):
        graph = onnx.load(out / f"{name}.onnx", load_external_data=False).graph
        marked = [n for n in graph.node if {("pelt.method", "prefix")} & {(p.key, p.value) for p in n.metadata_props}]
        return [n for n in marked if n.op_type == "Concat" and n.attribute[0].i == -2]

    assert joins("model") and not joins("decode")
    assert (out / "cache.safetensors").is_file()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, save("llama", "LlamaForCausalLM", folder / "model")


@pytest.fixture(scope="module")
def plain(llama):
    folder, model = llama
    spec = {**SPEC, "attach": SPEC["attach"][:1]}
    return (*build(model, spec, folder / "plain", "static"), folder / "plain")


def test_streams_stops_and_goes_on(plain):
    session, model, _ = plain
    given = prompt(model) | {"do_sample": False}
    one = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in given.items()}

    class Words(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            pass

    words = Words()
    streamed = session.generate(**one, streamer=words)
    assert words.seen == streamed[0].tolist()
    stop = StoppingCriteriaList([MaxLengthCriteria(max_length=11)])
    given.pop("min_new_tokens")
    assert session.generate(**given, stopping_criteria=stop).shape[1] == 11
    arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in one.items()}
    assert torch.equal(session.generate(**arrays), streamed)


def test_without_a_cache_equals_with_one(plain):
    session, model, _ = plain
    given = prompt(model) | {"do_sample": False}
    assert torch.equal(session.generate(**given, use_cache=False), session.generate(**given))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output_hidden_states": True}, "E606 .*'output_hidden_states'"),
        ({"output_attentions": True}, "E606 .*'output_attentions'(.|\n)*peltc.attach"),
        ({"cache_implementation": "static"}, "E606 .*StaticCache(.|\n)*leave cache_implementation out"),
        ({"attention_mask": torch.ones(3, 9, dtype=torch.long)}, "E613"),
        ({"input_ids": torch.zeros(0, 7, dtype=torch.long)}, "E617"),
        ({"input_ids": torch.full((3, 7), -1)}, "E615"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_graph_does_not_have_is_refused(compiled, options, words):
    session, model, _ = compiled
    with pytest.raises(PeltError, match=words):
        session.generate(**prompt(model) | options, do_sample=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decoder_start_token_id": -1}, "E615 .*'decoder_input_ids' holds -1"),
        ({"prefill_chunk_size": 2}, "E606 .*'attention_mask'(.|\n)*for a decoder alone"),
        ({"decoder_attention_mask": torch.ones(3, 1)}, "E606 .*'decoder_attention_mask'"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(3, 7, 64)}, "E606 .*'input_ids' is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("compiled", ["t5", "bart"], indirect=True)
def test_what_an_encoder_with_a_decoder_does_not_take(compiled, options, words):
    session, model, _ = compiled
    with pytest.raises(PeltError, match=words):
        session.generate(**prompt(model) | options, do_sample=False)


def test_how_a_model_keeps_its_cache_is_no_matter_of_the_graphs(plain, tmp_path):
    """A model's own generation config may ask for a static cache, as those of some checkpoints do."""
    session, model, out = plain
    shutil.copytree(out, tmp_path / "out")
    file = tmp_path / "out" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cache_implementation": "static"}))
    found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"]).generate(**prompt(model), do_sample=False)
    assert torch.equal(found, session.generate(**prompt(model), do_sample=False))


def test_artifact_without_generation_says_so(llama):
    folder, model = llama
    peltc.compile({**SPEC, "attach": SPEC["attach"][:1]}, model, folder / "scores", verify=False)
    with pytest.raises(PeltError, match="E611") as error:
        peltc.Session(folder / "scores").generate(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert "--generation" in str(error.value)


@pytest.mark.parametrize(
    ("attach", "reason"),
    [
        ({"recipe": "unipelt"}, "whole sequence"),
        ({"method": "prompt", "at": "embedding", "length": 4}, "behind the embedding"),
    ],
)
def test_what_needs_the_whole_sequence_is_refused(llama, attach, reason, tmp_path):
    _, model = llama
    spec = {"pelt": 1, "name": "whole", "deploy": {"generation": True}, "attach": [attach]}
    with pytest.raises(PeltError, match="E208") as error:
        peltc.compile(spec, model, tmp_path / "out")
    assert reason in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_encoder_does_not_generate(tmp_path):
    model = save("bert", "BertForMaskedLM", tmp_path / "model")
    with pytest.raises(PeltError, match="E505"):
        peltc.compile({**SPEC, "attach": SPEC["attach"][:1]}, model, tmp_path / "out", generation=True)


def test_verification_reads_the_graphs_with_a_cache(plain, tmp_path):
    """The witness: a graph whose weights are not right any more is found out by generating."""
    *_, out = plain
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    graph = onnx.load(copy / "decode.onnx", load_external_data=False)
    added = next(n for n in graph.graph.node if n.op_type == "Add" and "lora" in n.name)
    added.op_type = "Sub"
    onnx.save(graph, copy / "decode.onnx")
    with pytest.raises(PeltError, match="E701") as error:
        peltc.verify(copy)
    assert "generated logits" in str(error.value)


def test_half_precision_with_a_cache(tmp_path):
    """A step of ONNX Runtime's optimiser ends the process on this graph, unless it is kept from it."""
    base = models.save("gpt2", tmp_path / "base", "float16")
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}
    random = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in peltc.plan(spec, base).tensors.items()}
    tensors = {name: random.standard_normal(shape).astype(np.float32) / 10 for name, shape in shapes.items()}
    found = peltc.compile(spec, base, tmp_path / "out", tensors, generation=True)["verification"]
    assert found["worst"] <= TOLERANCE and found["arithmetic"]["status"] == "proven"
    assert "generated logits" in {shape["output"] for shape in found["shapes"]}


def test_texts_are_padded_where_a_decoder_goes_on(tmp_path):
    """A text beside a longer one generates what it does alone: its end stands beside the other's."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    model = save("llama", dict(FAMILIES)["llama"], tmp_path / "model")
    tokenizer = Tokenizer(WordLevel({"[PAD]": 0, **{f"w{i}": i for i in range(1, 90)}}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}
    peltc.compile(spec, model, tmp_path / "out", generation=True, verify=False)
    session = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    inputs = session.tokenize(["w5 w6", "w7 w8 w9 w10 w11"])
    assert inputs["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    alone = session.generate(**session.tokenize("w5 w6"), **options)
    assert session.generate(**inputs, **options)[0, -5:].tolist() == alone[0, -5:].tolist()


def test_a_formula_reads_the_mask_of_new_tokens(llama, tmp_path):
    """In a step as in a prompt: the mask is of the tokens that a module sees, and no longer than they are."""
    _, model = llama
    method = {
        "site": "linear",
        "parameters": {"A": {"shape": ["out", "in"], "init": "normal(0.1)"}},
        "delta": "unsqueeze(mask, -1) * linear(x, A)",
    }
    spec = {**SPEC, "attach": [{"method": "shown", "at": "attention.value"}], "methods": {"shown": method}}
    session, attached = build(model, spec, tmp_path / "out")
    given = prompt(attached) | {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = session.generate(**given), attached.generate(**given)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    whole = {"input_ids": found.sequences, "use_cache": False}
    more = torch.ones(3, NEW, dtype=torch.long)
    whole |= {"attention_mask": torch.cat([given["attention_mask"], more], 1)}
    with torch.no_grad():
        logits = attached(**whole).logits[0, 6:-1]
    steps = torch.stack(found.logits, 1)[0]
    assert (steps - logits).abs().max() <= TOLERANCE * logits.abs().max()
