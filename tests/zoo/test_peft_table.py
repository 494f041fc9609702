"""Queries and values as discovery finds them are those that Hugging Face PEFT's table of LoRA targets names.

The table is written by hand, model type by model type, and discovery reads no name: each is an oracle for the other.
It names modules, though, and where one module computes queries, keys and values, only numbers tell which of its outputs
are which. They are told apart here by autograd in PyTorch, with nothing from the compiler: in the attention's
probabilities, the row of a position moves with its own query alone, with the keys of others, and with no value.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from peltc.compiler.base.live import survey_model
from peltc.compiler.survey.anatomy import Anatomy, Site

sys.path.insert(0, str(Path(__file__).parent))
from instances import FAMILIES, build, config_of

ARCHITECTURES = dict(FAMILIES)
SAMPLE = ("bloom", "deberta", "falcon", "gpt2", "phi", "t5")
"""Interleaved heads, the same without a bias, one key for all queries, thirds of a transposed weight, names that are
not queries or values, and cross-attention. They run everywhere; the others are slow."""

ELSEWHERE = {
    "phi": ({"fc1", "fc2"}, "the table trains the feed-forward network as well: feed_forward.up and feed_forward.down"),
}
"""Names in the table that mean neither queries nor values, and what they mean."""

ABSENT = {
    "RefinedWeb": "Falcon's name when its code came with the checkpoint; transformers 5 has only falcon",
    "RefinedWebModel": "Falcon's name when its code came with the checkpoint; transformers 5 has only falcon",
    "blip-2": "not in architectures.txt: reads pictures",
    "btlm": "not in transformers 5",
    "chatglm": "not in transformers 5",
    "gemma4": "not in architectures.txt: reads pictures and sounds",
    "layoutlm": "not in architectures.txt: reads where words stand on a page",
    "llama4": "not in architectures.txt: reads pictures",
    "nemotron_h": "not in architectures.txt: its graph does not export with symbolic axes",
    "rwkv": "not in architectures.txt: its graph does not export with symbolic axes, and it has no attention",
    "rwkv7": "not in transformers 5",
}
"""Model types of the table that are not compared, and why."""

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "codegen, two heads in each of four parts": ("codegen", {"n_head": 8, "rotary_dim": 8}),
    "falcon, groups of queries with their key and value": ("falcon", {"new_decoder_architecture": True,
                                                                      "num_kv_heads": 2, "alibi": False}),
    "falcon, a key and value for each query": ("falcon", {"multi_query": False, "new_decoder_architecture": False}),
    "gpt_bigcode, a key and value for each query": ("gpt_bigcode", {"multi_query": False}),
}  # fmt: skip
"""Other layouts of fused weights in the same model types, by their configs."""

ROLES = tuple(f"{attention}.{part}" for attention in ("attention", "cross_attention") for part in ("query", "value"))
Found = tuple[Any, Anatomy]


@cache
def found(model_type: str) -> Found:
    """A tiny model, and what discovery finds in it."""
    torch.set_num_threads(1)
    model = build(model_type, ARCHITECTURES[model_type])
    return model, survey_model(model)[0]


def laid_out(model_type: str, changes: dict[str, Any]) -> Found:
    """The same with a config that differs."""
    torch.set_num_threads(1)
    config = type(config_of(model_type))(**(config_of(model_type).to_dict() | changes))
    torch.manual_seed(0)
    model = getattr(transformers, ARCHITECTURES[model_type])(config).eval()
    return model, survey_model(model)[0]


def targets(model: Any, names: Iterable[str] | str) -> set[str]:
    """The weights of the linear maps that names of the table mean, as PEFT itself matches them."""
    config = LoraConfig(target_modules=names if isinstance(names, str) else list(names))
    maps = (name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
    return {f"{name}.weight" for name in maps if check_target_module_exists(config, name)}


def apart(model: Any, anatomy: Anatomy, names: Iterable[str] | str, other: Iterable[str] = ()) -> dict[str, set[str]]:
    """The weights that only the table has, and those that only the sites have.

    Args:
        names: what the table names.
        other: those of them that are neither queries nor values.
    """
    table = targets(model, names) - targets(model, other)
    sites = {site.parameters["weight"] for site in anatomy if site.role in ROLES}
    return {"only in the table": table - sites, "only in sites": sites - table}


def owned(site: Site) -> set[int]:
    """The output features that a site says are its own."""
    return {i for start, stop in site.rows or ((0, site.sizes["out"]),) for i in range(start, stop)}


class Attending:
    """One pass of a model: what its linear maps put out, and its attentions' probabilities."""

    def __init__(self, model: Any, weights: set[str]):
        model.set_attn_implementation("eager")
        model.config._attn_implementation = "eager"  # Falcon ignores the line above, and adds a mask of booleans
        generator = torch.Generator().manual_seed(0)
        inputs = {"input_ids": torch.randint(3, 100, (1, 6), generator=generator)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(3, 100, (1, 5), generator=generator)
        self.outputs: dict[str, torch.Tensor] = {}
        hooks = [
            model.get_submodule(weight.removesuffix(".weight")).register_forward_hook(
                lambda module, inputs, output, weight=weight: self.outputs.update({weight: output})
            )
            for weight in weights
        ]
        self.answer = model(**inputs, output_attentions=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        self.generator = generator

    def probabilities(self, site: Site) -> torch.Tensor:
        """[H, S, T] in a site's layer."""
        key = "attentions"
        if "encoder_attentions" in self.answer:
            key = "cross_attentions" if site.role.startswith("cross") else f"{site.stack}_attentions"
        return self.answer[key][site.layer][0]

    def slope(self, value: torch.Tensor, weight: str) -> torch.Tensor:
        """[S, F]: how a random combination of a tensor's elements moves with each output feature, where it does."""
        mix = (value * torch.randn(value.shape, generator=self.generator)).sum()
        output = self.outputs[weight]
        (slope,) = torch.autograd.grad(mix, output, retain_graph=True, allow_unused=True)
        return torch.zeros_like(output[0]) if slope is None else slope[0].abs()

    def features(self, site: Site) -> dict[str, set[int]]:
        """Which output features of a site's weight are queries, keys or values in the layer's attention."""
        weight, probabilities = site.parameters["weight"], self.probabilities(site)
        own: Any = False
        others: Any = False
        for position in range(1, probabilities.shape[1]):  # a first position that sees only itself says nothing
            slope = self.slope(probabilities[:, position], weight)
            mine = torch.arange(len(slope)) == position
            own = own | (slope[mine] > 1e-9).any(0)
            others = others | (slope[~mine] > 1e-9).any(0)
        used = (self.slope(self.answer.logits, weight) > 1e-9).any(0)
        kinds = {"query": own & ~others, "key": others, "value": used & ~own & ~others}
        return {kind: set(torch.nonzero(which).flatten().tolist()) for kind, which in kinds.items()}


def misplaced(model: Any, anatomy: Anatomy) -> list[str]:
    """The query and value sites whose output features are not those that PyTorch has in that part."""
    sites = [site for site in anatomy if site.role in ROLES]
    seen = Attending(model, {site.parameters["weight"] for site in sites})
    return [site.path for site in sites if owned(site) != seen.features(site)[site.role.rpartition(".")[2]]]


def types() -> list[Any]:
    """The table's model types, with those marked that are slow or absent; the tests of one in one process."""
    marks = {name: [pytest.mark.skip(reason=why)] for name, why in ABSENT.items()}
    slow = {name: [pytest.mark.slow] for name in TABLE if name not in SAMPLE}
    return [
        pytest.param(name, marks=[*(marks.get(name) or slow.get(name, [])), pytest.mark.xdist_group(f"peft-{name}")])
        for name in TABLE
    ]


@pytest.mark.parametrize("model_type", types())
def test_queries_and_values_are_those_of_the_table(model_type: str) -> None:
    """The same weights, and of a fused weight the outputs that are queries, or values, in PyTorch."""
    model, anatomy = found(model_type)
    other, _ = ELSEWHERE.get(model_type, (set(), ""))
    assert not any(apart(model, anatomy, TABLE[model_type], other).values())
    sites = [site for site in anatomy if site.role in ROLES]
    layers = {(site.stack, site.layer) for site in anatomy if site.layer is not None}
    expected = {(*layer, role) for layer in layers for role in ROLES if layer[0] == "decoder" or "cross" not in role}
    if not model.config.is_encoder_decoder:
        expected = {entry for entry in expected if "cross" not in entry[2]}
    assert {(site.stack, site.layer, site.role) for site in sites} == expected
    assert misplaced(model, anatomy) == []


@pytest.mark.parametrize("model_type", types())
def test_decoders_are_those_that_see_nothing_ahead(model_type: str) -> None:
    """A stack is a decoder where its self-attention has no probabilities above the diagonal in PyTorch."""
    model, anatomy = found(model_type)
    sites = [site for site in anatomy if site.role == "attention.query"]
    seen = Attending(model, {site.parameters["weight"] for site in sites})
    blind = {site.path: float(seen.probabilities(site).detach().triu(1).abs().max()) == 0 for site in sites}
    assert {site.path: site.stack == "decoder" for site in sites} == blind
    assert len(set(blind.values())) == (2 if model.config.is_encoder_decoder else 1)  # the witness: both kinds


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_of_a_fused_weight(layout: str) -> None:
    """Where a config decides how heads are interleaved, the slices follow it."""
    model, anatomy = laid_out(*LAYOUTS[layout])
    assert not any(apart(model, anatomy, TABLE[LAYOUTS[layout][0]]).values())
    assert misplaced(model, anatomy) == []


def test_every_type_is_compared_or_has_a_reason() -> None:
    assert set(TABLE) - set(ARCHITECTURES) == set(ABSENT)
    assert {name for name in ABSENT if "not in architectures.txt" in ABSENT[name]} == set(ABSENT) & set(CONFIG_MAPPING)
    assert set(SAMPLE) | set(ELSEWHERE) <= set(TABLE)


def test_names_that_mean_something_else_are_needed() -> None:
    """Without its exception, phi's feed-forward network is missed among the queries and values."""
    for model_type, (_, _) in ELSEWHERE.items():
        model, anatomy = found(model_type)
        missed = apart(model, anatomy, TABLE[model_type])["only in the table"]
        assert missed == {s.parameters["weight"] for s in anatomy if s.role in ("feed_forward.up", "feed_forward.down")}


def test_other_names_disagree() -> None:
    """The witness of the first half: keys in place of queries, or values left out."""
    model, anatomy = found("t5")
    differ = apart(model, anatomy, ["k", "v"])
    assert all(name.endswith(".k.weight") for name in differ["only in the table"])
    assert all(name.endswith(".q.weight") for name in differ["only in sites"])
    assert len(differ["only in the table"]) == len(differ["only in sites"]) == 6
    assert apart(model, anatomy, ["q"])["only in sites"]


@pytest.mark.parametrize("model_type", ["gpt2", "bloom"])
def test_other_rows_disagree(model_type: str) -> None:
    """The witness of the second half: the queries' rows off by one, those of the keys, and all of the weight."""
    model, anatomy = found(model_type)
    keys = {site.layer: site.rows for site in anatomy if site.role == "attention.key"}
    site = anatomy["decoder.layers.1.attention.query"]
    (start, stop), *rest = site.rows or ()
    for rows in (((start + 1, stop + 1), *rest), keys[1], None):
        sites = tuple(replace(s, rows=rows) if s is site else s for s in anatomy)
        if rows is None:
            sites = tuple(replace(s, sizes={**s.sizes, "out": 192}) if s.path == site.path else s for s in sites)
        assert misplaced(model, replace(anatomy, sites=sites)) == [site.path]
