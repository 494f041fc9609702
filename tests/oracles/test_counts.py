"""How many values a method trains, on the shape of RoBERTa-base, against the figures that its paper's library gives.

The figures are those of `adapters` 1.3.0 and Hugging Face PEFT on the same shape, and of the UniPELT paper's table 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from peltc.compiler.adapter.profile import pack
from peltc.compiler.base.live import survey_model
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.planner import make_plan
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Entry = dict[str, Any]
Count = Callable[..., int]

D, F, L = 768, 3072, 12
BLOCKS = ["attention.block", "feed_forward.block"]
LINEAR = ["attention.query", "attention.key", "attention.value", "attention.output", "feed_forward.up",
          "feed_forward.down"]  # fmt: skip


@pytest.fixture(scope="session")
def plan(fresh_cache: None) -> Callable[..., Plan]:
    """Plans on RoBERTa-base's real shape, all 12 layers; the model has no memory for its parameters."""
    from accelerate import init_empty_weights
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (D, F, L)
    with init_empty_weights(include_buffers=False):
        model = RobertaModel(config).eval()
    anatomy, key = survey_model(model)

    def build(*entries: Entry, mode: str | None = None) -> Plan:
        return make_plan(load_spec({"pelt": 1, "attach": [dict(e) for e in entries]}), anatomy, key, mode)

    return build


def same(found: int, expected: int) -> None:
    """The comparison of this file."""
    assert found == expected, f"{found:,} trained values, expected {expected:,} ({found - expected:+,})"


def entry(method: str, at: str | list[str], **options: Any) -> Entry:
    return {"method": method, "at": at, **options}


IA3 = entry("ia3", ["attention.key", "attention.value"])
COUNTS: dict[str, tuple[int, list[Entry]]] = {
    "lora r=8 on q, v": (294_912, [entry("lora", ["attention.query", "attention.value"], r=8)]),
    # `adapters` scales the intermediate activations before the non-linearity, PEFT after it: 3072 values either way.
    "ia3, ff before the non-linearity": (55_296, [IA3, entry("ia3", "feed_forward.up", name="ff")]),
    "ia3, ff after the non-linearity": (55_296, [IA3, entry("ia3", "feed_forward.down", name="ff", position="input")]),
    "prefix 10, flat": (184_320, [entry("prefix", "attention", length=10, reparameterise=False)]),
    "prefix 10 through a network": (9_857_024, [entry("prefix", "attention", length=10, hidden=512)]),
    "pfeiffer bottleneck": (894_528, [entry("bottleneck", "feed_forward.block", reduction=16, reads="normed")]),
    "houlsby bottlenecks": (1_789_056, [entry("bottleneck", BLOCKS, reduction=16)]),
    "parallel adapter": (7_091_712, [entry("parallel_adapter", "feed_forward.block", reduction=2)]),
    "compacter": (57_088, [entry("compacter", BLOCKS, reduction=32, n=4)]),
    "compacter++": (28_576, [entry("compacter", "feed_forward.block", reduction=32, n=4)]),
    # Biases of all linear maps and of all norms, the embedding's norm and the pooler included.
    "bitfit": (102_912, [entry("bitfit", [*LINEAR, "pooler"]), entry("norm_tuning", "*norm", weight=False)]),
    "prompt 10": (7_680, [entry("prompt", "embedding", length=10)]),
    "unipelt": (11_083_376, [{"recipe": "unipelt"}]),
    "unipelt, AP": (11_083_376 - 294_912 - 2 * 12 * 769, [{"recipe": "unipelt", "lora": False}]),
    "unipelt without gates": (11_083_376 - 4 * 12 * 769, [{"recipe": "unipelt", "gates": False}]),
    "unipelt with a central gate": (11_083_376 - 3 * 12 * 769 + 12 * 2 * 769, [{"recipe": "unipelt_central"}]),
    "unipelt with a prompt": (11_091_056, [{"recipe": "unipelt_prompt"}]),
    "gated ia3, prefix, adapter": (10_852_988, [{"recipe": "unipelt_ia3"}]),
    "mam": (22_493_984, [{"recipe": "mam"}]),
    "pfeiffer": (894_528, [{"recipe": "pfeiffer"}]),
    "houlsby": (1_789_056, [{"recipe": "houlsby"}]),
    "adamix, four down and one up": (2_223_360, [{"recipe": "adamix"}]),
    # Two masks of 100 logits in each layer; with a norm inside, its gain and bias: 2 (N + b) L.
    "xpeft": (2_400, [{"recipe": "xpeft"}]),
    "xpeft with norms": (3_552, [{"recipe": "xpeft", "inner_norm": "affine"}]),
}


@pytest.mark.parametrize("name", list(COUNTS))
def test_trained_values(name: str, plan: Callable[..., Plan]) -> None:
    expected, entries = COUNTS[name]
    same(plan(*entries).trained(), expected)


DEPLOYED: dict[str, tuple[int, list[Entry]]] = {
    "unipelt": (1_410_672, [{"recipe": "unipelt"}]),
    "unipelt with a prompt": (1_418_352, [{"recipe": "unipelt_prompt"}]),
    "mam": (552_960 + 7_091_712, [{"recipe": "mam"}]),
    "adamix": (894_528, [{"recipe": "adamix"}]),
    "adamix, 8 experts, nothing shared": (894_528, [{"recipe": "adamix", "experts": 8, "share": ""}]),
    "xpeft": (894_528, [{"recipe": "xpeft"}]),
}


@pytest.mark.parametrize("name", list(DEPLOYED))
def test_deployed_values(name: str, plan: Callable[..., Plan]) -> None:
    """What is stored beside the base once all that can be computed is."""
    expected, entries = DEPLOYED[name]
    same(plan(*entries, mode="static").cost.stored, expected)


def test_profile_bytes(plan: Callable[..., Plan]) -> None:
    """What a profile of X-PEFT holds for N = 100 on BERT-base's shape, and what the adapter that it stands for holds.

    A ten-thousandth it is with hard masks, packed, alone. With a norm's gain and bias in each layer it is a
    seven-hundredth; a head of two classes weighs more than both.
    """
    adapter = 4 * L * 2 * D * (D // 16)
    sizes = {name: payload(plan(*entries)) for name, entries in PROFILES.items()}
    assert sizes == {"masks": 312, "masks and norms": 312 + 4 * 2 * (D // 16) * L,
                     "masks and head": 312 + 4 * (D * D + D), "soft masks": None}  # fmt: skip
    assert round(adapter / 312) == 11_343
    assert round(adapter / (312 + 4_608)) == 719


# The model has no classifier; its pooler, a map of the same kind, stands for one.
PROFILES: dict[str, list[Entry]] = {
    "masks": [{"recipe": "xpeft"}],
    "masks and norms": [{"recipe": "xpeft", "inner_norm": "affine"}],
    "masks and head": [{"recipe": "xpeft"}, entry("replace", "pooler")],
    "soft masks": [{"recipe": "xpeft", "mask": "soft"}],
}


def payload(plan: Plan) -> int | None:
    """The bytes of a profile without its header; None where nothing can be packed."""
    from safetensors.numpy import load

    tensors = {name: np.broadcast_to(np.float32(0), t.shape) for name, t in plan.tensors.items()}
    try:
        return sum(array.nbytes for array in load(pack(plan, tensors)).values())
    except PeltError as error:
        assert error.diagnostics[0].code == "E211"
        return None


def test_adamix_on_the_large_shape(fresh_cache: None) -> None:
    """RoBERTa-large with b = 16, the paper's 0.23 %: four projections down and one up are trained, one each is left."""
    from accelerate import init_empty_weights
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(vocab_size=50265, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                           num_attention_heads=16, max_position_embeddings=514, type_vocab_size=1)  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model = RobertaModel(config).eval()
    anatomy, key = survey_model(model)
    large = make_plan(load_spec({"pelt": 1, "attach": [{"recipe": "adamix", "size": 16}]}), anatomy, key)
    same(large.trained(), 1_992_192)
    same(large.cost.stored, 811_392)


def test_formulas() -> None:
    """The figures are what the papers' formulas give; a figure that was copied wrongly would show here."""
    b, m, n, reduced = D // 16, 512, 4, D // 32
    same(294_912, L * 2 * 2 * 8 * D)
    same(55_296, L * (2 * D + F))
    same(184_320, L * 2 * 10 * D)
    same(9_857_024, 10 * D + (D + 1) * m + (m + 1) * 2 * L * D)
    same(894_528, L * (2 * D * b + b + D))
    same(7_091_712, L * (2 * D * (D // 2) + D // 2 + D))
    compacter = n * (D // n + reduced // n) * 2 + reduced + D
    same(57_088, 2 * L * compacter + n**3)
    same(28_576, L * compacter + n**3)
    same(102_912, L * (4 * D + F + D + 2 * D) + D + D)
    same(11_083_376, 9_857_024 + 894_528 + 294_912 + 4 * L * (D + 1))
    same(10_852_988, 9_857_024 + 894_528 + 55_296 + 5 * L * (D + 1))
    same(1_410_672, 184_320 + 894_528 + 294_912 + 4 * L * (D + 1))
    same(2_223_360, L * (4 * (D * b + b) + b * D + D))
    same(22_493_984, 30 * D + (D + 1) * 800 + (800 + 1) * 2 * L * D + 7_091_712)


def test_frozen_values_do_not_count(plan: Callable[..., Plan]) -> None:
    """VeRA's projections are part of the file and are not trained."""
    found = plan(entry("vera", ["attention.query", "attention.value"], r=256))
    same(found.trained(), L * 2 * (256 + D))
    sizes = [t.shape for t in found.tensors.values() if t.frozen]
    assert sorted(sizes) == [(256, D), (D, 256)]


@pytest.mark.parametrize(
    "name, mistake",
    [
        ("lora r=8 on q, v", {"layers": "first 11"}),
        ("pfeiffer bottleneck", {"reduction": 15}),
        ("compacter", {"at": "attention.block"}),
        ("prefix 10, flat", {"length": 11}),
    ],
)
def test_a_wrong_count_shows(name: str, mistake: Entry, plan: Callable[..., Plan]) -> None:
    """Witness: a site or a size too few is found out."""
    expected, entries = COUNTS[name]
    with pytest.raises(AssertionError, match="trained values, expected"):
        same(plan(*({**e, **mistake} for e in entries)).trained(), expected)
