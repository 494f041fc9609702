"""Heads and rows that the checkpoint does not hold: modules bring them. References are `transformers`' own models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import peltc
from peltc.runtime.building.compile import compile, plan_for
from peltc.runtime.running.session import Session
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

pytestmark = pytest.mark.xdist_group("heads")

LORA = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 2}
HEAD = {"method": "replace", "at": "head"}
NAMES = ["billing", "shipping", "returns", "other"]


def headless(source: Path, folder: Path, architecture: str, head: str) -> Path:
    """A checkpoint of the base model alone, as it is published: no head, and the config of another task."""
    shutil.copytree(source, folder)
    state = {n: a for n, a in load_file(folder / "model.safetensors").items() if not n.startswith(head)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture], "pad_token_id": 0}))
    return folder


def qwen2(folder: Path) -> Path:
    """A tiny causal model as it is published: tied, in bfloat16."""
    config = transformers.Qwen2Config(**models.SMALL, **models.TEXT, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def randomise(model: Any) -> Any:
    """Random values for whatever is trained."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def inputs(vocabulary: int = 100) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(5).integers(10, vocabulary, (3, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = ids[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def in_torch(model: Any, fed: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**{n: torch.from_numpy(a) for n, a in fed.items()}).logits.numpy()


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize(
    ("family", "kept", "architecture", "head"),
    [
        ("bert", "BertModel", "BertForSequenceClassification", "classifier"),
        ("llama", "LlamaForCausalLM", "LlamaForSequenceClassification", "score"),
        ("qwen2", "Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "score"),
    ],
)
def test_a_head_comes_from_the_adapter(
    family: str, kept: str, architecture: str, head: str, mode: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The artifact shares the bytes of the checkpoint without a head, and no other base is written."""
    source = qwen2(tmp_path / "causal") if family == "qwen2" else model_folder(family)
    folder = headless(source, tmp_path / "base", kept, head)
    said = {"pelt": 1, "model": {"architecture": architecture, "labels": NAMES}, "attach": [LORA, HEAD]}
    model = getattr(transformers, architecture).from_pretrained(folder, num_labels=len(NAMES), dtype=torch.float32)
    peltc.attach(model, said)
    randomise(model).save_adapter(tmp_path / "adapter.safetensors")
    manifest = compile(said, folder, tmp_path / "out", tmp_path / "adapter.safetensors", mode=mode)
    same(Session(tmp_path / "out")(**inputs())["logits"], in_torch(model, inputs()))
    assert manifest["base"]["converted"] is None
    assert (tmp_path / "out/model.safetensors").samefile(folder / "model.safetensors")
    assert manifest["bytes_written"] < 2 * (folder / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["id2label"] == dict(zip("0123", NAMES, strict=True))
    assert peltc.verify(tmp_path / "out")["verification"]["worst"] <= TOLERANCE["float32"]
    assert peltc.verify(tmp_path / "out", folder)["verification"]["worst"] <= TOLERANCE["float32"]


def test_the_adapter_tells_its_labels(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = headless(model_folder("bert"), tmp_path / "base", "BertModel", "classifier")
    said = {"pelt": 1, "attach": [LORA, HEAD]}
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder, num_labels=4, id2label=dict(enumerate(NAMES))
    )
    peltc.attach(model, said)
    randomise(model).save_adapter(tmp_path / "adapter.safetensors")
    compile(said, folder, tmp_path / "out", tmp_path / "adapter.safetensors",
            architecture="BertForSequenceClassification")  # fmt: skip
    assert list(json.loads((tmp_path / "out/config.json").read_text())["id2label"].values()) == NAMES
    same(Session(tmp_path / "out")(**inputs())["logits"], in_torch(model, inputs()))


def test_classes_are_called_what_they_were_in_training(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Names in another order would give every answer another meaning."""
    folder = headless(model_folder("bert"), tmp_path / "base", "BertForSequenceClassification", "classifier")
    said: dict[str, Any] = {"pelt": 1, "attach": [HEAD]}
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder, num_labels=4, id2label=dict(enumerate(NAMES))
    )
    other = {**said, "model": {"labels": NAMES[::-1]}}
    with pytest.raises(PeltError, match=r"E221 class 0 is called 'other', and the model calls it 'billing' there"):
        peltc.attach(model, other)
    peltc.attach(model, said)
    model.save_adapter(tmp_path / "adapter.safetensors")
    with pytest.raises(PeltError, match=r"E221 class 0 is called 'other', and the adapter was trained with 'billing'"):
        compile(other, folder, tmp_path / "out", tmp_path / "adapter.safetensors")


def test_a_live_model_without_names_gets_the_specs(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=2)
    compile({"pelt": 1, "model": {"labels": ["no", "yes"]}, "attach": [HEAD]}, model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


def test_a_vocabulary_does_not_shrink(model_folder: Callable[..., Path]) -> None:
    with pytest.raises(PeltError, match=r"E221 the vocabulary is 50, and the model's table of words has 100 rows"):
        plan_for(load_spec({"pelt": 1, "model": {"vocabulary": 50}, "attach": [LORA]}), model_folder("bert"))


def test_the_parts_of_a_head_are_named(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = headless(model_folder("distilbert"), tmp_path / "base", "DistilBertForSequenceClassification", "pre_cl")
    with pytest.raises(PeltError, match=r"E504.*pre_classifier.bias(.|\n)*`method: replace` at 'head.dense'"):
        plan_for(load_spec({"pelt": 1, "attach": [HEAD]}), folder)


def test_a_head_of_another_size_is_replaced(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint that was trained for two classes, and an adapter with a head for four."""
    said = {"pelt": 1, "model": {"labels": 4}, "attach": [LORA, HEAD]}
    folder = model_folder("bert")
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder, num_labels=4, ignore_mismatched_sizes=True
    )
    peltc.attach(model, said)
    randomise(model).save_adapter(tmp_path / "adapter.safetensors")
    compile(said, folder, tmp_path / "out", tmp_path / "adapter.safetensors")
    same(Session(tmp_path / "out")(**inputs())["logits"], in_torch(model, inputs()))


def test_what_nobody_brings_is_an_error(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = headless(model_folder("bert"), tmp_path / "base", "BertForSequenceClassification", "classifier")
    for attach in ([LORA], [LORA, {**LORA, "at": "head", "name": "head"}]):
        with pytest.raises(PeltError, match=r"E504.*classifier\.bias, classifier\.weight") as caught:
            plan_for(load_spec({"pelt": 1, "attach": attach}), folder)
        assert "hint: attach `method: replace` at 'head' and train it, or name the class" in str(caught.value)


def test_a_head_that_nobody_holds_has_no_start_value(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = headless(model_folder("bert"), tmp_path / "base", "BertForSequenceClassification", "classifier")
    with pytest.raises(PeltError, match=r"E504.*classifier\.weight") as caught:
        compile({"pelt": 1, "attach": [HEAD]}, folder, tmp_path / "out")
    assert "hint: give the trained adapter by --weights" in str(caught.value)
    assert "--architecture" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"architecture": "BertForTokenClassification"}, "the model is a BertForSequenceClassification"),
        ({"labels": 7}, "the model has 2 labels"),
        ({"vocabulary": 101}, "the model's table of words has 100 rows"),
    ],
)
def test_a_live_model_is_what_the_spec_says(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(PeltError, match="E221") as caught:
        peltc.attach(models.build("bert"), {"pelt": 1, "model": choice, "attach": [LORA]})
    assert words in str(caught.value)


# vocabularies that have grown


def grown(folder: Path, rows: int, tied: bool, tensors: dict[str, np.ndarray]) -> Any:
    """The model as `transformers` resizes it, with the adapter's rows put in by hand."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        model.get_input_embeddings().weight[100:] = torch.from_numpy(tensors["trainable_tokens.embedding.word.values"])
        if not tied:
            model.get_output_embeddings().weight[100:] = torch.from_numpy(tensors["trainable_tokens.head.values"])
    return model.eval()


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [107, 112], ids=["seven", "padded to 16"])
def test_added_tokens(rows: int, tied: bool, mode: str, shared: Path, tmp_path: Path) -> None:
    folder = models.save("llama", shared / f"models/llama-{tied}", tie_word_embeddings=tied)
    entry: dict[str, Any] = {"method": "trainable_tokens", "at": "embedding.word", "rows": [f"100-{rows - 1}"]}
    entry |= {"tied": "together"} if tied else {"at": ["embedding.word", "head"]}
    spec = load_spec({"pelt": 1, "model": {"vocabulary": rows}, "attach": [entry],
                      "deploy": {"mode": mode, "generation": True}})  # fmt: skip
    plan, _ = plan_for(spec, folder)
    random = np.random.default_rng(0)
    tensors = {name: random.normal(0, 0.3, t.shape).astype(np.float32) for name, t in plan.tensors.items()}
    manifest = compile(spec, folder, tmp_path / "out", tensors)
    model = grown(folder, rows, tied, tensors)
    ids = random.integers(90, rows, (2, 9))
    mask = np.ones_like(ids)
    session = Session(tmp_path / "out")
    same(session(input_ids=ids, attention_mask=mask)["logits"], in_torch(model, {"input_ids": ids}))
    found = session.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected = model.generate(torch.from_numpy(ids), max_new_tokens=6, do_sample=False)
    assert found.tolist() == expected.tolist()
    assert manifest["verification"]["worst"] <= TOLERANCE["float32"]
    assert peltc.verify(tmp_path / "out")["verification"]["worst"] <= TOLERANCE["float32"]
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows


def test_rows_trained_in_torch_are_those_compiled(shared: Path, tmp_path: Path) -> None:
    """From `resize_token_embeddings` and training to an artifact over the checkpoint as it was."""
    folder = models.save("llama", shared / "models/llama-True", tie_word_embeddings=True)
    said = {"pelt": 1, "model": {"vocabulary": 107}, "attach": [
        LORA,
        {"method": "trainable_tokens", "at": "embedding.word", "rows": ["100-106"], "tied": "together"}]}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(107)
    peltc.attach(model, said)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(95, 107, (4, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_adapter(tmp_path / "adapter.safetensors")
    compile(said, folder, tmp_path / "out", tmp_path / "adapter.safetensors")
    fed = {"input_ids": ids.numpy(), "attention_mask": np.ones((4, 8), np.int64)}
    same(Session(tmp_path / "out")(**fed)["logits"], in_torch(model, fed))


def test_rows_that_nobody_brings_are_named(shared: Path) -> None:
    folder = models.save("llama", shared / "models/llama-True", tie_word_embeddings=True)
    entry = {"method": "trainable_tokens", "at": "embedding.word", "rows": ["100-102", "104-106"]}
    with pytest.raises(PeltError) as caught:
        plan_for(load_spec({"pelt": 1, "model": {"vocabulary": 107}, "attach": [entry]}), folder)
    first, second = sorted(caught.value.diagnostics, key=str)
    assert "100 of the 107 rows of 'lm_head.weight', and no module brings 100-106" in first.message
    assert "100 of the 107 rows of 'model.embed_tokens.weight', and no module brings 103" in second.message
    assert "`tied: together`" in first.hint


def test_a_whole_table_of_more_rows(shared: Path, tmp_path: Path) -> None:
    """The adapter's own table tells how long the vocabulary is."""
    folder = models.save("llama", shared / "models/llama-True", tie_word_embeddings=True)
    said = {"pelt": 1, "attach": [{"method": "replace", "at": "embedding.word", "tied": "together"}]}
    table = np.random.default_rng(0).normal(0, 0.3, (32, 103)).astype(np.float32)
    compile(said, folder, tmp_path / "out", {"replace.embedding.word.weight": table})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(103)
    model.get_input_embeddings().weight.data = torch.from_numpy(np.ascontiguousarray(table.T))
    model.tie_weights()
    ids = np.arange(94, 103)[None]
    same(Session(tmp_path / "out")(input_ids=ids, attention_mask=np.ones_like(ids))["logits"],
         in_torch(model.eval(), {"input_ids": ids}))  # fmt: skip


@pytest.mark.parametrize("selector", ["head", "classifier", "score"])
def test_a_class_without_a_head_is_named_as_such(
    selector: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Which class has one is what its user must say; the list of sites says so too, and nothing where there is one."""
    bare = headless(model_folder("bert"), tmp_path / "base", "BertModel", "classifier")
    with pytest.raises(PeltError) as caught:
        plan_for(load_spec({"pelt": 1, "attach": [{**HEAD, "at": selector}]}), bare)
    hint = "this class has no head; name one that has, `model: {architecture: BertForSequenceClassification}`"
    assert f"hint: {hint}" in str(caught.value)
    assert str(peltc.survey(bare)).splitlines()[-1].startswith(hint)
    assert hint not in str(peltc.survey(model_folder("bert")))
