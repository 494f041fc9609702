"""The same weights in the `adapters` library and here: equal outputs, equal gates, as many trained values.

The library needs another version of transformers, so it answers from an environment of its own: see `PYTHON`. What it
does otherwise by design is said where a case works around it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import peltc
from peltc.compiler.base.live import survey_model
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.plan.planner import make_plan
from peltc.runtime.running.session import Session
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.formula.syntax import Name
from peltc.spec.specification import load_spec

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Entry = dict[str, Any]
Said = dict[str, Any]

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PELTC_ADAPTERS_PYTHON") or ROOT / ".venv/adapters/bin/python")
"""An interpreter that has the library; `make .venv/adapters/.ready` sets one up."""
PATIENCE = 300
"""Seconds that the library may take."""
EFFECT = 1e-2
"""How much, at least, a method must move the output for the comparison to mean anything."""

pytestmark = pytest.mark.xdist_group("adapters")

SMALL = {
    "vocab_size": 72,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODELS: dict[str, Said] = {
    "bert": {"model": "BertModel", "config": "BertConfig", "sizes": {**SMALL, "pad_token_id": 0}},
    "roberta": {"model": "RobertaModel", "config": "RobertaConfig", "sizes": {**SMALL, "pad_token_id": 1}},
    "gpt2": {
        "model": "GPT2LMHeadModel",
        "config": "GPT2Config",
        "sizes": {"vocab_size": 72, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 48,
                  "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                  "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    },
}  # fmt: skip
"""Two encoders that normalise after the residual sum, and a decoder that does before, with a fused projection."""


def config(name: str, *parts: Said, **options: Any) -> Said:
    """A configuration of the library, by the name of its class."""
    return {"class": name, "parts": list(parts), "options": options}


def entry(method: str, at: str | list[str], **options: Any) -> Entry:
    return {"method": method, "at": at, **options}


def recipe(name: str, **options: Any) -> Entry:
    return {"recipe": name, **options}


@dataclass(frozen=True)
class Case:
    """A method said twice: as entries of a spec, and as a configuration of the library."""

    config: Said
    entries: list[Entry]
    models: tuple[str, ...] = ("bert", "roberta")


QV = ["attention.query", "attention.value"]
BLOCKS = ["attention.block", "feed_forward.block"]
GATED = {"use_gating": True}
SIZES = {"length": 3, "hidden": 8}
BOTTLENECK = {"reduction": 4}
BEFORE = ("gpt2",)
EVERY = tuple(MODELS)


def prefix(**options: Any) -> Said:
    return config("PrefixTuningConfig", prefix_length=3, bottleneck_size=8, **options)


def bottleneck(name: str = "SeqBnConfig", **options: Any) -> Said:
    return config(name, reduction_factor=4, **options)


def lora(name: str = "LoRAConfig", **options: Any) -> Said:
    return config(name, r=2, alpha=3, **options)


CASES: dict[str, Case] = {
    "unipelt": Case(
        config("UniPELTConfig", prefix_tuning=prefix(), adapter=bottleneck(), lora=lora()),
        [recipe("unipelt", r=2, **SIZES, **BOTTLENECK)],
    ),
    "prompt": Case(config("PromptTuningConfig", prompt_length=2), [entry("prompt", "embedding", length=2)]),
    "unipelt-prompt": Case(
        config(
            "ConfigUnion",
            config("PromptTuningConfig", prompt_length=2),
            prefix(**GATED),
            bottleneck(**GATED),
            lora(**GATED),
        ),
        [recipe("unipelt_prompt", prompt=2, r=2, **SIZES, **BOTTLENECK)],
    ),
    "unipelt-before": Case(
        config("UniPELTConfig", prefix_tuning=prefix(), adapter=bottleneck(), lora=lora()),
        [recipe("unipelt", r=2, reads="sum", **SIZES, **BOTTLENECK)],
        BEFORE,
    ),
    "unipelt-ap": Case(
        config("ConfigUnion", prefix(**GATED), bottleneck(**GATED)),
        [recipe("unipelt", lora=False, **SIZES, **BOTTLENECK)],
    ),
    "unipelt-without-gates": Case(
        config("ConfigUnion", prefix(), bottleneck(), lora()),
        [recipe("unipelt", r=2, alpha=3, gates=False, **SIZES, **BOTTLENECK)],
    ),
    "unipelt-ia3": Case(
        config("ConfigUnion", config("IA3Config", **GATED), prefix(**GATED), bottleneck(**GATED)),
        [recipe("unipelt_ia3", **SIZES, **BOTTLENECK)],
    ),
    "prefix": Case(prefix(), [entry("prefix", "attention", **SIZES)], EVERY),
    "prefix-flat": Case(prefix(flat=True), [entry("prefix", "attention", length=3, reparameterise=False)], EVERY),
    "pfeiffer": Case(bottleneck(), [recipe("pfeiffer", **BOTTLENECK)]),
    "pfeiffer-before": Case(bottleneck(), [recipe("pfeiffer", reads="sum", **BOTTLENECK)], BEFORE),
    "houlsby": Case(bottleneck("DoubleSeqBnConfig"), [recipe("houlsby", **BOTTLENECK)], EVERY),
    "parallel": Case(
        bottleneck("ParBnConfig"), [entry("parallel_adapter", "feed_forward.block", scale=4, **BOTTLENECK)]
    ),
    # The library's gate stands beside a bottleneck's scale, and in place of LoRA's.
    "parallel-gated": Case(
        bottleneck("ParBnConfig", **GATED),
        [entry("parallel_adapter", "feed_forward.block", gate={"replaces_scale": False}, **BOTTLENECK)],
    ),
    "mam": Case(
        config("MAMConfig", prefix_tuning=prefix(), adapter=bottleneck("ParBnConfig")),
        [recipe("mam", **SIZES, **BOTTLENECK)],
    ),
    "mam-before": Case(
        config("MAMConfig", prefix_tuning=prefix(), adapter=bottleneck("ParBnConfig")),
        [recipe("mam", reads="residual", **SIZES, **BOTTLENECK)],
        BEFORE,
    ),
    "compacter": Case(bottleneck("CompacterConfig"), [entry("compacter", BLOCKS, **BOTTLENECK)], EVERY),
    "compacter++": Case(
        bottleneck("CompacterPlusPlusConfig", phm_rank=2),
        [entry("compacter", "feed_forward.block", reads="normed", rank=2, **BOTTLENECK)],
    ),
    "lora": Case(lora(), [entry("lora", QV, r=2, alpha=3)], EVERY),
    "lora-everywhere": Case(
        lora(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
        [entry("lora", [*QV, "attention.key", "feed_forward.up", "feed_forward.down"], r=2, alpha=3)],
        EVERY,
    ),
    "lora-gated": Case(lora(**GATED), [entry("lora", QV, r=2, gate={})], EVERY),
    "ia3": Case(config("IA3Config"), [entry("ia3", ["attention.key", "attention.value", "feed_forward.up"])], EVERY),
}
PAIRS = [(model, case) for case, said in CASES.items() for model in said.models]
every_case = pytest.mark.parametrize("model, case", PAIRS, ids=[f"{m}-{c}" for m, c in PAIRS])

COUNTS: dict[str, tuple[Said, Entry]] = {
    "unipelt": (config("UniPELTConfig"), recipe("unipelt")),
    "unipelt-ia3": (
        config("ConfigUnion", config("IA3Config", **GATED), config("PrefixTuningConfig", prefix_length=10, **GATED),
               config("SeqBnConfig", **GATED)),
        recipe("unipelt_ia3"),
    ),
    "unipelt-prompt": (
        config("ConfigUnion", config("PromptTuningConfig", prompt_length=10), config("LoRAConfig", **GATED),
               config("PrefixTuningConfig", prefix_length=10, **GATED), config("SeqBnConfig", **GATED)),
        recipe("unipelt_prompt"),
    ),
    "prefix": (config("PrefixTuningConfig"), entry("prefix", "attention", length=30)),
    "pfeiffer": (config("SeqBnConfig"), recipe("pfeiffer")),
    "houlsby": (config("DoubleSeqBnConfig"), recipe("houlsby")),
    "parallel": (config("ParBnConfig"), entry("parallel_adapter", "feed_forward.block")),
    "mam": (config("MAMConfig"), recipe("mam")),
    "compacter": (config("CompacterConfig"), entry("compacter", BLOCKS)),
    "lora": (config("LoRAConfig"), entry("lora", QV)),
    "ia3": (config("IA3Config"), entry("ia3", ["attention.key", "attention.value", "feed_forward.up"])),
}  # fmt: skip


def part(arrays: Mapping[str, Array], name: str) -> Arrays:
    """The arrays whose names begin with a word, without it."""
    return {key.removeprefix(f"{name}/"): value for key, value in arrays.items() if key.startswith(f"{name}/")}


class Library:
    """What the library answered, and the same models here."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts: dict[str, int] = json.loads((folder / "counts.json").read_text())
        self.bases = {name: load_file(folder / "models" / f"{name}.safetensors") for name in MODELS}

    def case(self, model: str, case: str) -> Arrays:
        return load_file(self.folder / "cases" / model / f"{case}.safetensors")

    def inputs(self, model: str) -> Arrays:
        return part(self.bases[model], "input")

    def model(self, name: str) -> Any:
        """A fresh model with the library's weights."""
        said = MODELS[name]
        model = getattr(transformers, said["model"])(getattr(transformers, said["config"])(**said["sizes"])).eval()
        model.load_state_dict({key: torch.from_numpy(a) for key, a in part(self.bases[name], "state").items()})
        return model

    def answer(self, name: str, model: Any) -> Any:
        """The last hidden state of an encoder, the logits of a decoder."""
        with torch.no_grad():
            return model(**{key: torch.from_numpy(a) for key, a in self.inputs(name).items()})[0]


@pytest.fixture(scope="session")
def library(fresh_cache: None, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The library's answers to every case, from one run of it."""
    if not PYTHON.is_file():
        pytest.skip(f"no interpreter with the adapters library at {PYTHON}: make .venv/adapters/.ready")
    folder = tmp_path_factory.mktemp("adapters")
    request = {
        "models": {m: said | {"cases": [c for n, c in PAIRS if n == m]} for m, said in MODELS.items()},
        "cases": {name: case.config for name, case in CASES.items()},
        "counts": {name: said for name, (said, _) in COUNTS.items()},
    }
    program = [str(PYTHON), "-I", str(Path(__file__).with_name("adapters_reference.py")), str(folder)]
    done = subprocess.run(program, input=json.dumps(request), text=True, capture_output=True, timeout=PATIENCE,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Library(folder)


# the library's parameters by our names

LORA = {"A": "lora_A", "B": "lora_B"}
LINEARS = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias", "up": "adapter_up.weight",
           "up_bias": "adapter_up.bias"}  # fmt: skip
PRODUCTS = {"down_l": "adapter_down.0.W_left", "down_r": "adapter_down.0.W_right", "down_bias": "adapter_down.0.b",
            "up_l": "adapter_up.W_left", "up_r": "adapter_up.W_right", "up_bias": "adapter_up.b"}  # fmt: skip
NETWORK = {"embedding": "wte.weight", "down": "control_trans.0.weight", "down_bias": "control_trans.0.bias",
           "up": "control_trans.2.weight", "up_bias": "control_trans.2.bias"}  # fmt: skip
GATE = {"gate_weight": "gate.weight", "gate_bias": "gate.bias"}
WORDS = {
    "lora": LORA,
    "ia3": {"l": "lora_B"},
    "bottleneck": LINEARS,
    "parallel_adapter": LINEARS,
    "compacter": PRODUCTS,
}
ADAPTERS = {"mlp": "output_adapters", "attn": "attention_adapters"}
"""Where GPT-2's layer has the adapters of its parts; in the encoders they are in the parts themselves."""


def owner(path: str) -> str:
    return path.rpartition(".")[0]


def end_of(claim: Claim, name: str) -> str:
    """How the library's name of a tensor ends, beginning with the module that has it."""
    site, method = claim.site, claim.method.name
    word = (WORDS.get(method, NETWORK) | GATE).get(name, "")
    if method == "prefix":
        if name in GATE:
            return f"{owner(owner(site.anchors['core']))}.prefix_tuning.prefix_gates.one.{word.removeprefix('gate.')}"
        return f"prefix_tunings.one.self_prefix.{word or 'control_trans'}"
    if site.kind == "embedding":
        return "prompt_tunings.one.prompt_embedding.weight"
    if name == "rule":
        return "shared_parameters.one.phm_rule"
    if site.kind == "linear":
        return f"{owner(site.parameters['weight'])}.loras.one.{word}"
    module = owner(owner(site.values["linear"]))
    layer, _, last = module.rpartition(".")
    place = f"{layer}.{ADAPTERS[last]}" if last in ADAPTERS else module
    return f"{place}.adapters.one.{word}"


def own_part(claim: Claim, name: str, theirs: Array, plan: Plan) -> Array:
    """A tensor out of the library's parameter: a fused projection has its sites' one after the other."""
    shape = claim.tensors[name].shape
    if claim.method.name == "prefix" and name in ("K", "V"):
        kv_heads, length, head_dim = shape
        both = theirs.reshape(length, claim.count, 2, kv_heads, head_dim)
        return both[:, claim.index, "KV".index(name)].transpose(1, 0, 2)
    if claim.site.rows is not None:
        module = claim.site.parameters["weight"]
        beside = [c.site.path for c in plan.claims if c.site.parameters.get("weight") == module]
        theirs = np.split(theirs, len(beside))[beside.index(claim.site.path)]
    return theirs.reshape(shape) if name == "l" else theirs


def bring(plan: Plan, theirs: Mapping[str, Array]) -> Arrays:
    """The library's parameters by our names; each of them must have one."""
    found: Arrays = {}
    used = set()
    for claim in plan.claims:
        for name, tensor in claim.tensors.items():
            end = end_of(claim, name)
            (key,) = (k for k in theirs if k.endswith(end))
            used.add(key)
            found[tensor.name] = np.ascontiguousarray(own_part(claim, name, theirs[key], plan))
    assert used == set(theirs)
    return found


def spec_of(*entries: Entry) -> dict[str, Any]:
    return {"pelt": 1, "attach": [dict(e) for e in entries]}


def attached(library: Library, model: str, case: str, *entries: Entry) -> Any:
    """Our model with the library's parameters inside; with other entries where some are given."""
    ours = library.model(model)
    spec = spec_of(*(entries or CASES[case].entries))
    tensors = bring(make_plan(load_spec(spec), *survey_model(ours)), part(library.case(model, case), "adapter"))
    return peltc.attach(ours, spec, weights=tensors)


@every_case
def test_outputs(model: str, case: str, library: Library, close: Any) -> None:
    expected = library.case(model, case)["output"]
    close(library.answer(model, attached(library, model, case)), expected, TOLERANCE["float32"])
    with pytest.raises(AssertionError):
        close(library.answer(model, library.model(model)), expected, EFFECT)


@pytest.mark.parametrize("model", EVERY)
def test_models_without_modules(model: str, library: Library, close: Any) -> None:
    """What differs between the two versions of transformers alone, which no case can be closer than."""
    close(library.answer(model, library.model(model)), library.bases[model]["output"], TOLERANCE["float32"])


# gates

LOCATIONS = {"attention": "self_prefix", "attention.block": "mh_adapter", "feed_forward.block": "output_adapter",
             "feed_forward.up": "intermediate_lora", "attention.query": "selfattn_lora",
             "attention.key": "selfattn_lora", "attention.value": "selfattn_lora"}  # fmt: skip


def gates(library: Library, name: str, model: Any) -> Arrays:
    """The values of every `gate`, [B] or [B, sites], by the layer and the place that the library calls them."""
    modules = model.pelt
    scope = modules.scope
    values: dict[Claim, Array] = {}

    def watching(claim: Claim, interpreter: Any, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = scope(claim, interpreter, **more)
        if "gate" in found:
            values[claim] = interpreter.evaluate(Name("gate"), found).detach().numpy()
        return found

    modules.scope = watching
    library.answer(name, model)
    places: dict[str, list[Array]] = {}
    for claim in modules.plan.claims:
        if claim in values:
            place = f"{claim.site.layer}/{LOCATIONS[claim.site.role]}"
            places.setdefault(place, []).append(values[claim].reshape(-1))
    return {place: np.column_stack(found) if len(found) > 1 else found[0] for place, found in places.items()}


GATED_CASES = (
    "unipelt",
    "unipelt-prompt",
    "unipelt-before",
    "unipelt-ap",
    "unipelt-ia3",
    "lora-gated",
    "parallel-gated",
)
GATES = [(model, case) for model, case in PAIRS if case in GATED_CASES]


@pytest.mark.parametrize("model, case", GATES, ids=[f"{m}-{c}" for m, c in GATES])
def test_gates(model: str, case: str, library: Library, close: Any) -> None:
    expected = part(library.case(model, case), "gate")
    found = gates(library, model, attached(library, model, case))
    assert set(found) == set(expected)
    for place, value in found.items():
        close(value, expected[place], TOLERANCE["float32"])


def test_compiled(library: Library, close: Any, tmp_path: Path) -> None:
    """The whole way: the artifact on ONNX Runtime answers as the library does."""
    library.model("bert").save_pretrained(tmp_path / "base")
    tensors = attached(library, "bert", "unipelt").pelt.tensors()
    spec = spec_of(*CASES["unipelt"].entries)
    peltc.compile(spec, tmp_path / "base", tmp_path / "out", weights=tensors, verify=False)
    found = Session(tmp_path / "out", ["CPUExecutionProvider"])(**library.inputs("bert"))
    close(found["last_hidden_state"], library.case("bert", "unipelt")["output"], TOLERANCE["float32"])


# how many values are trained


@pytest.fixture(scope="session")
def plan(fresh_cache: None) -> Callable[[Entry], Plan]:
    """Plans on the shape of RoBERTa-base; the model has no memory for its parameters."""
    from accelerate import init_empty_weights

    base = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
                                      layer_norm_eps=1e-5)  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model = transformers.RobertaModel(base).eval()
    survey = survey_model(model)
    return lambda said: make_plan(load_spec(spec_of(said)), *survey)


@pytest.mark.parametrize("name", list(COUNTS))
def test_trained_values(name: str, library: Library, plan: Callable[[Entry], Plan]) -> None:
    """With each side's own defaults."""
    assert plan(COUNTS[name][1]).trained() == library.counts[name]


# witnesses: each of these mistakes must show

PADDING_LEFT_OUT = recipe("unipelt", r=2, mask_padding=True, **SIZES, **BOTTLENECK)
MISTAKES: dict[str, tuple[str, Entry]] = {
    "gates that leave padding out": ("unipelt", PADDING_LEFT_OUT),
    "no second norm": ("pfeiffer", recipe("pfeiffer", reads="sum", **BOTTLENECK)),
    "another scale": ("parallel", entry("parallel_adapter", "feed_forward.block", scale=2, **BOTTLENECK)),
    "another alpha": ("lora", entry("lora", QV, r=2, alpha=3.01)),
    "another gelu": ("compacter", entry("compacter", BLOCKS, activation="gelu_tanh", **BOTTLENECK)),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_outputs_can_differ(mistake: str, library: Library, close: Any) -> None:
    case, wrong = MISTAKES[mistake]
    found = library.answer("bert", attached(library, "bert", case, wrong))
    with pytest.raises(AssertionError, match="differs by"):
        close(found, library.case("bert", case)["output"], TOLERANCE["float32"])


def test_gates_can_differ(library: Library, close: Any) -> None:
    """Nothing comes before LoRA's gates in the first layer: they differ for the padded sequence, and only for it."""
    expected = part(library.case("bert", "unipelt"), "gate")["0/selfattn_lora"]
    found = gates(library, "bert", attached(library, "bert", "unipelt", PADDING_LEFT_OUT))["0/selfattn_lora"]
    close(found[:-1], expected[:-1], TOLERANCE["float32"])
    with pytest.raises(AssertionError, match="differs by"):
        close(found[-1], expected[-1], TOLERANCE["float32"])
