"""Heads of every task as sites: found at the right parameter, trained as a whole beside LoRA, and compiled."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers

import peltc
from peltc.spec.diagnostics import PeltError

TOLERANCE = 1e-5
RANK, ALPHA = 3, 6.0
SPEC: dict[str, Any] = {
    "pelt": 1,
    "attach": [
        {"method": "lora", "at": ["attention.query", "attention.value"], "r": RANK, "alpha": ALPHA},
        {"method": "replace", "at": "head"},
    ],
}
TEXT = {**models.SMALL, **models.TEXT, "pad_token_id": 0}
DISTIL = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, **models.TEXT}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **models.TEXT,
}  # fmt: skip
BERT_MAPS = ("encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.value")
LLAMA_MAPS = ("layers.{}.self_attn.q_proj", "layers.{}.self_attn.v_proj")


@dataclass(frozen=True)
class Task:
    """A model class with a head, and what its code says.

    Attributes:
        config, settings: the config's class, and what is set in it.
        maps: the modules of queries and values in layer {} of a stack.
        stacks: what the names of modules begin with, by stack.
        head: the module of the head.
        tied: the table of embeddings whose weight the head has.
        outputs: what the head's numbers are called.
    """

    architecture: str
    config: str
    settings: dict[str, Any]
    stacks: dict[str, str]
    maps: tuple[str, str]
    head: str
    tied: str = ""
    outputs: tuple[str, ...] = ("logits",)


TASKS = {
    "sequence classification, bert": Task(
        "BertForSequenceClassification", "BertConfig", {**TEXT, "num_labels": 3}, {"encoder": "bert."}, BERT_MAPS,
        "classifier",
    ),
    "sequence classification, roberta": Task(
        "RobertaForSequenceClassification", "RobertaConfig", {**TEXT, "num_labels": 3}, {"encoder": "roberta."},
        BERT_MAPS, "classifier.out_proj",
    ),
    "token classification, roberta": Task(
        "RobertaForTokenClassification", "RobertaConfig", {**TEXT, "num_labels": 5}, {"encoder": "roberta."}, BERT_MAPS,
        "classifier",
    ),
    "token classification, t5": Task(
        "T5ForTokenClassification", "T5Config", {**T5, "num_labels": 3}, {"encoder": "transformer.encoder."},
        ("block.{}.layer.0.SelfAttention.q", "block.{}.layer.0.SelfAttention.v"), "classifier",
    ),
    "question answering, distilbert": Task(
        "DistilBertForQuestionAnswering", "DistilBertConfig", DISTIL, {"encoder": "distilbert."},
        ("transformer.layer.{}.attention.q_lin", "transformer.layer.{}.attention.v_lin"), "qa_outputs",
        outputs=("start_logits", "end_logits"),
    ),
    "question answering, bart": Task(
        "BartForQuestionAnswering", "BartConfig", BART, {"encoder": "model.encoder.", "decoder": "model.decoder."},
        LLAMA_MAPS, "qa_outputs", outputs=("start_logits", "end_logits"),
    ),
    "masked language, bert, tied": Task(
        "BertForMaskedLM", "BertConfig", TEXT, {"encoder": "bert."}, BERT_MAPS, "cls.predictions.decoder",
        tied="bert.embeddings.word_embeddings",
    ),
    "causal language, llama, tied": Task(
        "LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"decoder": "model."}, LLAMA_MAPS, "lm_head", tied="model.embed_tokens",
    ),
    "sequence classification, llama": Task(
        "LlamaForSequenceClassification", "LlamaConfig", {**TEXT, "num_key_value_heads": 2, "num_labels": 3},
        {"decoder": "model."}, LLAMA_MAPS, "score",
    ),
}  # fmt: skip

Tensors = dict[str, np.ndarray[Any, Any]]


def instance(architecture: str, config: str, settings: dict[str, Any]) -> Any:
    """A tiny model, none of its parameters neutral."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, architecture)(getattr(transformers, config)(**settings)).eval()
    for name, parameter in model.named_parameters():
        gain = parameter.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=0.1)
    return model


@cache
def built(name: str) -> Any:
    task = TASKS[name]
    return instance(task.architecture, task.config, task.settings)


def saved(model: Any, folder: Path) -> Path:
    logging.disable(logging.WARNING)
    model.save_pretrained(folder)
    logging.disable(logging.NOTSET)
    return folder


def random_tensors(plan: Any) -> Tensors:
    random = np.random.default_rng(1)
    return {name: random.normal(0, 0.3, t.shape).astype(np.float32) for name, t in plan.tensors.items()}


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Three texts, the last of them padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 100, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, -2:], mask[-1, -2:] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.startswith("Bert"):
        found["token_type_ids"] = (torch.arange(7) >= 4).long().expand(3, -1)
    return found


def answer(model: Any, task: Task) -> list[np.ndarray[Any, Any]]:
    with torch.no_grad():
        output = model(**inputs(model))
    return [output[name].numpy() for name in task.outputs]


def apart(one: list[Any], other: list[Any]) -> float:
    """The largest difference as a share of the largest value."""
    assert [a.shape for a in one] == [b.shape for b in other]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(one, other, strict=True))


def tensor(tensors: Tensors, *ends: str) -> torch.Tensor:
    """The one tensor whose name ends so."""
    (name,) = (name for name in tensors if name.endswith(".".join(ends)))
    return torch.from_numpy(tensors[name])


def by_hand(name: str, tensors: Tensors, head: bool = True, table: bool = False) -> Any:
    """The model with the tensors in its weights, as the model's code has them: W + (alpha / r) B A in queries and
    values, and the head's own weights instead of those it had.

    Args:
        head: whether the head is changed.
        table: whether the table that the head is tied to changes with it.
    """
    task, model = TASKS[name], copy.deepcopy(built(name))
    for stack, stem in task.stacks.items():
        for layer in range(2):
            for role, path in zip(("query", "value"), task.maps, strict=True):
                a, b = (tensor(tensors, f"{stack}.layers.{layer}.attention.{role}", letter) for letter in "AB")
                model.get_submodule(stem + path.format(layer)).weight.data += ALPHA / RANK * b @ a
    if head:
        last = model.get_submodule(task.head)
        last.weight = torch.nn.Parameter(tensor(tensors, "head.weight"))
        if last.bias is not None:
            last.bias = torch.nn.Parameter(tensor(tensors, "head.bias"))
        if table:
            model.get_submodule(task.tied).weight = last.weight
    return model


ON = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TASKS]
"""The tests of a task in one process, so that its graph is exported once."""


@pytest.mark.parametrize("name", ON)
def test_the_head_is_a_site(name: str, tmp_path: Path) -> None:
    """One site, of the module that the code calls last, whatever it is called; its bias too where it has one."""
    task, anatomy = TASKS[name], peltc.survey(saved(built(name), tmp_path))
    (site,) = (site for site in anatomy if site.role == "head")
    last = built(name).get_submodule(task.head)
    kinds = [kind for kind in ("weight", "bias") if getattr(last, kind) is not None]
    assert site.path == "head" and site.kind == "linear" and site.rows is None
    parameters = dict(built(name).named_parameters(remove_duplicate=False))
    assert set(site.parameters) == set(kinds)
    assert all(parameters[site.parameters[kind]] is getattr(last, kind) for kind in kinds)
    assert (site.sizes["out"], site.sizes["in"]) == tuple(last.weight.shape)
    assert not anatomy.unnamed


@pytest.mark.parametrize("name", ON)
def test_a_trained_head_is_compiled(name: str, tmp_path: Path) -> None:
    """LoRA and a head of its own: ONNX Runtime, folded and static, answers as the model whose weights were set by
    hand."""
    task, folder = TASKS[name], saved(built(name), tmp_path / "model")
    tensors = random_tensors(peltc.plan(SPEC, folder))
    expected = answer(by_hand(name, tensors), task)
    for mode in ("fold", "static"):
        manifest = peltc.compile(SPEC, folder, tmp_path / mode, tensors, mode=mode)
        assert manifest["verification"]["worst"] < TOLERANCE
        session = peltc.Session(tmp_path / mode)
        given = inputs(built(name))
        first = torch.zeros_like(given["input_ids"])  # what a class makes of tokens without a type
        answers = session(**{key: given.get(key, first).numpy() for key in session.inputs})
        assert apart([answers[key] for key in task.outputs], expected) < TOLERANCE
    # The witnesses: the head as it was, and the modules' own part.
    assert apart(answer(by_hand(name, tensors, head=False), task), expected) > 1e-2
    assert apart(answer(built(name), task), expected) > 1e-2
    if task.tied:  # the table of embeddings keeps its values, though the head had them too
        assert built(name).get_submodule(task.tied).weight is built(name).get_submodule(task.head).weight
        assert apart(answer(by_hand(name, tensors, table=True), task), expected) > 1e-2


@pytest.mark.parametrize("name", ["masked language, bert, tied", "sequence classification, llama"])
def test_a_head_is_attached(name: str) -> None:
    """In PyTorch the modules answer as the weights set by hand; a tied table stays what it is, and stays tied."""
    task, model = TASKS[name], copy.deepcopy(built(name))
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    tensors = random_tensors(peltc.plan(SPEC, model))
    expected = answer(by_hand(name, tensors), task)
    assert apart(answer(model, task), expected) > 1e-2
    peltc.attach(model, SPEC, tensors)
    assert apart(answer(model, task), expected) < TOLERANCE
    model.detach_adapter()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert apart(answer(model, task), answer(built(name), task)) == 0
    assert not task.tied or model.get_submodule(task.tied).weight is model.get_submodule(task.head).weight


@pytest.mark.parametrize(
    ("architecture", "config", "settings"),
    [("BertModel", "BertConfig", TEXT), ("LlamaModel", "LlamaConfig", {**TEXT, "num_key_value_heads": 2})],
)
def test_feature_extraction_has_no_head(
    architecture: str, config: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A pooler is not a head, nor is a final norm; a spec that wants one is told what there is instead."""
    folder = saved(instance(architecture, config, settings), tmp_path / "model")
    roles = peltc.survey(folder).roles()
    assert not [role for role in roles if role.split(".")[0] == "head"]
    assert ("pooler" in roles) == (architecture == "BertModel")
    with pytest.raises(PeltError) as caught:
        peltc.compile(SPEC, folder, tmp_path / "out")
    (finding,) = caught.value.diagnostics
    assert finding.code == "E203"
    assert "no site 'head' in this model" in str(caught.value)
    assert "attention.query" in str(caught.value)
    assert not (tmp_path / "out").exists()
    manifest = peltc.compile({**SPEC, "attach": SPEC["attach"][:1]}, folder, tmp_path / "out")
    assert manifest["verification"]["worst"] < TOLERANCE


def test_classes_that_make_the_decoders_input_themselves() -> None:
    """T5ForSequenceClassification (and BART's) pools the decoder's output where `input_ids` end, so both are of one
    length: without `decoder_input_ids` it makes them from `input_ids`."""
    model = instance("T5ForSequenceClassification", "T5Config", {**T5, "num_labels": 3, "decoder_start_token_id": 0})
    assert "head" in peltc.survey(model).roles()
