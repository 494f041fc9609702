"""Gates that are computed from the prompt and kept while the text grows, against bare models without any cache.

The reference knows nothing of keeping: gates, and whatever else is made of the whole prompt, are read off a forward
pass over the prompt as in training; then they are constants of another spec, with which each step reads its whole text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch

import peltc
from peltc import schemas
from peltc.compiler.base.opening import open_base
from peltc.compiler.plan.planner import make_plan
from peltc.runtime.building.compile import plan_for
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.verification.verify import TOLERANCE, load_model
from peltc.spec.diagnostics import PeltError
from peltc.spec.formula.syntax import Name

Folder = Callable[..., Path]
NEW = 6
KEEP = {"generation": True, "gates": {"at": "prefill"}}
POOLED = {
    "site": "linear",
    "parameters": {"w": {"shape": [1, "in"], "init": "normal(0.1)"}, "U": {"shape": ["out", "in"], "init": "zeros"}},
    "let": {"pool": "sum(softmax(linear(x, w), axis=1) * x, axis=1)"},
    "delta": "linear(tanh(pool), U) * y",
}
"""One vector for a text: its tokens' sum, weighed by a softmax over them."""
GIVEN = {
    "site": "linear",
    "parameters": {"pool": {"shape": [1, "in"], "init": "zeros"}, "U": POOLED["parameters"]["U"]},
    "delta": POOLED["delta"],
}
"""The same with the vector as a parameter."""
ATTACH: list[dict[str, Any]] = [
    {"recipe": "unipelt", "r": 2, "length": 3, "hidden": 4, "reduction": 8},
    {"method": "ia3", "at": "attention.key", "gate": {"mask_padding": True, "scales": "result"}},
    {"method": "pooled", "at": "attention.output"},
]
DECODER = [{**entry, "at": f"decoder.layers.*.{entry['at']}"} for entry in ATTACH[1:]]


def content(attach: list[dict[str, Any]], deploy: dict[str, Any], **methods: Any) -> dict[str, Any]:
    return {"pelt": 1, "name": "kept", "attach": attach, "methods": methods, "deploy": deploy}


def random_tensors(plan: Any) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {n: (0.3 * draw.standard_normal(t.shape)).astype(np.float32) for n, t in plan.tensors.items()}


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def compiled(request: Any, model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    model, out = model_folder(request.param), tmp_path_factory.mktemp(request.param) / "out"
    spec = peltc.load_spec(content(ATTACH, KEEP, pooled=POOLED))
    plan, base = plan_for(spec, model)
    tensors = random_tensors(plan)
    manifest = peltc.compile(spec, model, out, tensors)
    assert manifest["verification"]["worst"] <= TOLERANCE["float32"]
    return out, plan, base, tensors


def prompt(base: Any) -> dict[str, torch.Tensor]:
    """Three texts of several lengths, padded on the left for a decoder alone."""
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(3))
    mask, encodes = torch.ones_like(ids), base.config.get("is_encoder_decoder")
    mask[1, slice(4, 7) if encodes else slice(0, 3)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def options(base: Any) -> dict[str, Any]:
    found = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True,
             "return_dict_in_generate": True}  # fmt: skip
    return found | ({"decoder_start_token_id": 1} if base.config.get("is_encoder_decoder") else {})


def whole(base: Any, given: dict[str, torch.Tensor], texts: torch.Tensor) -> dict[str, Any]:
    """What a model is called with to read whole texts, as `generate` counts their positions."""
    if base.config.get("is_encoder_decoder"):
        return {**given, "decoder_input_ids": texts, "use_cache": False}
    more = texts.shape[1] - given["attention_mask"].shape[1]
    mask = torch.cat([given["attention_mask"], given["attention_mask"].new_ones(len(texts), more)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": texts, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def constants(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The attachments, all that is made of a text a constant."""
    found = []
    for entry in entries:
        gate = {"gate": {**entry["gate"], "constant": True}} if "gate" in entry else {}
        found.append({**entry, **gate, **({"method": "given"} if entry["method"] == "pooled" else {})})
    return found


def measured(plan: Any, base: Any, tensors: Any, given: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the modules make of each text, by the names that the constants have: a forward pass as in training."""
    model = attach_plan(load_model(base), plan, tensors).eval()
    scope, found = model.pelt.scope, {}

    def watched(claim: Any, interpreter: Any, **values: Any) -> Any:
        names = scope(claim, interpreter, **values)
        for name in {"gate", "pool"} & {*dict(claim.method.let)}:
            value = interpreter.evaluate(Name(name), names)
            found[f"{claim.attachment}.{claim.site.name}.{name}"] = value.flatten(1).numpy()
        return names

    model.pelt.scope = watched
    with torch.no_grad():
        model(**given)
    return found


def step_by_step(compiled: tuple[Any, ...], texts: torch.Tensor, turned: int = 0) -> torch.Tensor:
    """The logits of every generated token [B, T, V]: each text by itself, without a cache, constants in its modules.

    Args:
        texts: with the tokens that were generated [B, S].
        turned: how many texts before its own the constants of each are of.
    """
    _, plan, base, tensors = compiled
    given, first = prompt(base), texts.shape[1] - NEW
    own = measured(plan, base, tensors, whole(base, given, texts[:, :first]))
    summaries = {name: np.roll(value, turned, 0) for name, value in own.items()}
    training = peltc.load_spec(content(ATTACH, {}, pooled=POOLED))
    entries = constants([entry.entry() for entry in training.attach])
    spec = peltc.load_spec(content(entries, {}, given=GIVEN))
    fixed = make_plan(spec, base.anatomy, base.fingerprint)
    rows = []
    for row in range(len(texts)):
        own = {n: tensors.get(n, summaries[n][row].reshape(t.shape) if n in summaries else None)
               for n, t in fixed.tensors.items()}  # fmt: skip
        model = attach_plan(load_model(base), fixed, own).eval()
        one = {name: value[row : row + 1] for name, value in given.items()}
        with torch.no_grad():
            steps = [model(**whole(base, one, texts[row : row + 1, : first + step])) for step in range(NEW)]
        rows.append(torch.cat([step.logits[:, -1] for step in steps]))
    return torch.stack(rows)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE["float32"] * expected.abs().max())


def torch_model(compiled: tuple[Any, ...]) -> Any:
    _, plan, base, tensors = compiled
    return attach_plan(load_model(base), plan, tensors).eval()


def test_each_step_has_the_gates_of_its_prompt(compiled: tuple[Any, ...]) -> None:
    out, _, base, _ = compiled
    given = prompt(base)
    found = peltc.Session(out).generate(**given, **options(base))
    expected = step_by_step(compiled, found.sequences)
    assert same(torch.stack(found.logits, 1), expected)
    theirs = torch_model(compiled).generate(**given, **options(base))
    assert torch.equal(theirs.sequences, found.sequences)
    assert same(torch.stack(theirs.logits, 1), expected)
    assert not same(step_by_step(compiled, found.sequences, turned=1), expected), "the witness: another text's gates"


def test_beams_and_going_on(compiled: tuple[Any, ...]) -> None:
    out, _, base, _ = compiled
    session, model, given = peltc.Session(out), torch_model(compiled), prompt(base)
    beams = {**options(base), "num_beams": 3, "output_scores": True}
    found, expected = session.generate(**given, **beams), model.generate(**given, **beams)
    assert torch.equal(found.sequences, expected.sequences)
    assert same(found.sequences_scores, expected.sequences_scores)
    if base.config.get("is_encoder_decoder"):
        return
    first = session.generate(**given, **options(base))
    longer = torch.cat([first.sequences, torch.tensor([[5, 6]]).expand(3, 2)], 1)
    more = {"input_ids": longer, "attention_mask": whole(base, given, longer)["attention_mask"]}
    found = session.generate(**more, **options(base), past_key_values=first.past_key_values)
    theirs = model.generate(**given, **options(base)).past_key_values
    expected = model.generate(**more, **options(base), past_key_values=theirs)
    assert same(torch.stack(found.logits, 1), torch.stack(expected.logits, 1))


def test_the_manifest_says_what_is_kept(compiled: tuple[Any, ...]) -> None:
    out, plan, base, _ = compiled
    manifest = json.loads((out / "pelt.json").read_text())
    jsonschema.validate(manifest, schemas.load("manifest"))
    kept = manifest["kept"]
    width = base.config.get("hidden_size") or base.config.get("n_embd") or base.config.get("d_model")
    pooled = {n: size for n, size in kept["modules"].items() if n.startswith("pooled.")}
    assert pooled == {f"pooled.decoder.layers.{i}.attention.output": width for i in range(2)}
    assert all("decoder." in name for name in kept["modules"])
    graph = onnx.load(out / "decode.onnx", load_external_data=False).graph
    (value,) = [v for v in graph.input if v.name == kept["input"]]
    assert [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch", "kept", kept["values"]]
    assert kept["output"] in [v.name for v in graph.output]
    assert any("computed from the prompt" in line for line in plan.told())


@pytest.mark.parametrize("compiled", ["llama"], indirect=True)
def test_verification_finds_gates_of_single_tokens(compiled: tuple[Any, ...], tmp_path: Path) -> None:
    """The witness: a graph that takes each step's own gates is found out by generating."""
    out, *_ = compiled
    shutil.copytree(out, tmp_path / "out")
    graph = onnx.load(tmp_path / "out/decode.onnx", load_external_data=False)
    firsts = [n for n in graph.graph.node if n.op_type == "Slice" and "input.kept" in n.input]
    for node in graph.graph.node:
        if node.op_type == "Concat" and node.input[0] in {n.output[0] for n in firsts}:
            node.input[0], node.input[1] = node.input[1], node.input[0]
    onnx.save(graph, tmp_path / "out/decode.onnx")
    with pytest.raises(PeltError, match=r"E701(.|\n)*generated logits"):
        peltc.verify(tmp_path / "out")


@pytest.mark.parametrize("compiled", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prefill_chunk_size": 2}, "by 'prefill_chunk_size' the model reads a part"),
        ({"prompt_lookup_num_tokens": 2}, "in assisted generation the model reads guesses"),
        ({"use_cache": False}, "with 'use_cache' false the model reads the prompt and what follows"),
        ({"generation_config": "chunks"}, "by 'prefill_chunk_size' the model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_prompt_is_read_as_a_whole(compiled: tuple[Any, ...], more: dict[str, Any], words: str) -> None:
    from transformers import GenerationConfig

    out, _, base, _ = compiled
    if "generation_config" in more:
        more = {"generation_config": GenerationConfig(prefill_chunk_size=2)}
    given = prompt(base) | options(base) | more
    with pytest.raises(PeltError, match=f"E606 {words}"):
        peltc.Session(out).generate(**given)
    model = torch_model(compiled)
    with pytest.raises(PeltError, match=f"E209 {words}"):
        model.generate(**given)
    if "use_cache" not in more:
        with model.disable_adapter():
            model.generate(**{name: value[:1] if hasattr(value, "shape") else value for name, value in given.items()})


@pytest.mark.parametrize("compiled", ["llama"], indirect=True)
def test_a_cache_of_others_is_refused(compiled: tuple[Any, ...]) -> None:
    out, _, base, _ = compiled
    given, model = prompt(base), torch_model(compiled)
    with model.disable_adapter():
        cache = model(**given, use_cache=True).past_key_values
    ids = torch.ones(3, 8, dtype=torch.long)
    with pytest.raises(PeltError, match="E209 the cache carries nothing of its prompt"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(PeltError, match="E606 the cache carries nothing of its prompt"):
        peltc.Session(out).generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache)


@pytest.fixture(scope="module")
def llama(model_folder: Folder) -> Iterator[Any]:
    yield load_model(open_base(model_folder("llama")))


@pytest.mark.parametrize(
    ("formula", "hint"),
    [
        ("mean_seq(linear(x, A))", "keeps what the prompt gives"),
        ("linear(x, A) * unsqueeze(take(sigmoid(linear(x, A)), 0, axis=1), 1)", "keeps what the prompt gives"),
        ("running_sum(linear(x, A), axis=1)", ""),
    ],
)
@pytest.mark.parametrize("deploy", [{}, {"gates": {"at": "prefill"}}], ids=["not-said", "kept"])
def test_torch_computes_nothing_from_new_tokens_alone(
    formula: str, hint: str, deploy: dict[str, Any], llama: Any, model_folder: Folder, tmp_path: Path
) -> None:
    """What cannot be kept is refused by the same words in torch, where there is a cache, and when compiling."""
    method = {"site": "linear", "parameters": {"A": {"shape": ["out", "in"], "init": "normal(0.1)"}}, "delta": formula}
    spec = content([{"method": "own", "at": "attention.query"}], deploy, own=method)
    if deploy and not hint:
        with pytest.raises(PeltError, match="E212 no module makes one value of a whole text"):
            peltc.attach(llama, spec)
        return
    model, ids = peltc.attach(llama, spec), torch.arange(5, 12)[None]
    try:
        first = model(input_ids=ids, use_cache=True)
        if deploy:
            model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
            return
        with pytest.raises(PeltError, match=r"E208 'own' at .* reads the whole sequence by") as error:
            model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
        assert hint in str(error.value) and "use_cache=False" in str(error.value)
        with pytest.raises(PeltError, match="E208"):
            model.model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
        with pytest.raises(PeltError, match="E208"):
            model.generate(ids, max_new_tokens=3, min_new_tokens=3)
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, use_cache=False).shape == (1, 10)
    finally:
        model.detach_adapter()
    with pytest.raises(PeltError, match=r"E208 'own' at .* reads the whole sequence by") as error:
        peltc.compile(spec, model_folder("llama"), tmp_path / "out", generation=True, verify=False)
    assert hint in str(error.value)


GATED = {"method": "lora", "at": "attention.query", "r": 2, "gate": {}}


@pytest.mark.parametrize(
    ("attach", "deploy", "words"),
    [
        ([{"method": "lora", "at": "attention.query"}], KEEP, "E212 no module makes one value of a whole text"),
        ([{**GATED, "at": "head"}], KEEP, "E208 'lora' at head reads the whole sequence"),
        ([GATED], {**KEEP, "freeze_gates": "texts.txt"}, "E212 gates are to be kept(.|\n)*`gates` or `freeze_gates`"),
        ([GATED, {"method": "prompt", "at": "embedding.word", "length": 2}], KEEP, "E208 .* tokens of 'prompt' too"),
        ([GATED, {"method": "prefix", "at": "attention", "length": 2, "positions": "shifted"}], KEEP,
         "E208 .* tokens of 'prefix' too"),
    ],
    ids=["no-gate", "head", "frozen", "prompt", "shifted-prefix"],
)  # fmt: skip
def test_refused(attach: Any, deploy: Any, words: str, model_folder: Folder) -> None:
    with pytest.raises(PeltError, match=words):
        plan_for(peltc.load_spec(content(attach, deploy)), model_folder("llama"))


def test_gates_of_an_encoder_need_nothing_kept(model_folder: Folder, tmp_path: Path) -> None:
    """A text that is read before there is a first token does not grow; its padding counts or does not."""
    gate = {"mask_padding": True}
    sites = ["encoder.layers.*.attention.query", "decoder.layers.*.cross_attention.key"]
    spec = content([{**GATED, "at": sites, "gate": gate}], {"generation": True})
    plan, base = plan_for(peltc.load_spec(spec), model_folder("t5"))
    tensors = random_tensors(plan)
    manifest = peltc.compile(spec, model_folder("t5"), tmp_path / "out", tensors)
    assert manifest["kept"] is None and manifest["verification"]["worst"] <= TOLERANCE["float32"]
    model = attach_plan(load_model(base), plan, tensors).eval()
    given = prompt(base)
    both = [each.generate(**given, **options(base)) for each in (model, peltc.Session(tmp_path / "out"))]
    assert same(torch.stack(both[1].logits, 1), torch.stack(both[0].logits, 1))
    short = {name: value[1:2, :4] for name, value in given.items()}
    alone = model.generate(**short, **options(base))
    assert same(torch.stack(alone.logits, 1), torch.stack(both[0].logits, 1)[1:2])


def test_profiles_bring_gates(model_folder: Folder, tmp_path: Path) -> None:
    spec = content([GATED], {**KEEP, "mode": "bank"})
    plan, base = plan_for(peltc.load_spec(spec), model_folder("llama"))
    tensors = random_tensors(plan)
    manifest = peltc.compile(spec, model_folder("llama"), tmp_path / "out", tensors)
    assert manifest["verification"]["worst"] <= TOLERANCE["float32"]
    session, given = peltc.Session(tmp_path / "out"), prompt(base)
    session.add_profile("one", peltc.link(tmp_path / "out", tensors))
    found = session.generate(**given, **options(base), profile=["one", None, "one"])
    expected = attach_plan(load_model(base), plan, tensors).eval().generate(**given, **options(base))
    bare = load_model(base).generate(**given, **options(base))
    for step, (ours, theirs, without) in enumerate(zip(found.logits, expected.logits, bare.logits, strict=True)):
        assert same(ours[[0, 2]], theirs[[0, 2]]) and same(ours[1], without[1]), step
