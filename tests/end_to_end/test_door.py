"""The first things that a user does in Python: what is given in the wrong place is named, and what PEFT's users expect
of a model with modules is there."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import peltc
from peltc import PeltError
from peltc.compiler.survey.grouping import grouped, spans
from peltc.runtime.verification.verify import TOLERANCE

LORA = {"pelt": 1, "name": "mine", "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}


@pytest.fixture
def model(model_folder: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(model_folder("bert")).eval()


@pytest.fixture
def attached(model: Any) -> Any:
    peltc.attach(model, LORA)
    with torch.no_grad():
        for parameter in model.pelt.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 11)[None]).logits


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: peltc.attach("bert", LORA), "E216 the model to attach to is given as str"),
        (lambda model: peltc.attach(model, None), "E216 a spec is given as NoneType"),
        (lambda model: peltc.plan(LORA, 7), "E216 the model is given as int"),
        (lambda model: peltc.survey(None), "E216 the model is given as NoneType"),
        (lambda model: peltc.compile(3, model, "out"), "E216 a spec is given as int"),
        (lambda model: peltc.consistency_loss({"logits": 1}, torch.zeros(2, 3)), "E216 a pass is given as dict"),
    ],
)
def test_what_is_given_in_the_wrong_place_is_named(call: Any, words: str, model: Any) -> None:
    with pytest.raises(PeltError, match=words):
        call(model)


def test_a_loss_takes_what_models_return(attached: Any) -> None:
    outputs = attached(input_ids=torch.arange(3, 11)[None])
    assert float(peltc.consistency_loss(outputs, outputs).detach()) == pytest.approx(0, abs=1e-7)


def test_modules_are_left_out_for_a_while(attached: Any, model_folder: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    bare = logits(AutoModelForSequenceClassification.from_pretrained(model_folder("bert")).eval())
    with_modules = logits(attached)
    assert (with_modules - bare).abs().max() > 1e-4
    with attached.disable_adapter():
        assert torch.equal(logits(attached), bare)
        assert any(p.requires_grad for n, p in attached.named_parameters() if not n.startswith("pelt."))
    assert torch.equal(logits(attached), with_modules)
    assert not any(p.requires_grad for n, p in attached.named_parameters() if not n.startswith("pelt."))


def test_modules_are_saved_where_no_folder_is_yet_and_loaded(attached: Any, tmp_path: Path) -> None:
    attached.save_adapter(tmp_path / "new" / "folder" / "adapter.safetensors")
    expected = logits(attached)
    with torch.no_grad():
        for parameter in attached.pelt.parameters():
            parameter.zero_()
    attached.load_adapter(tmp_path / "new" / "folder" / "adapter.safetensors")
    assert torch.equal(logits(attached), expected)
    with pytest.raises(PeltError, match="E40"):
        attached.load_adapter(tmp_path / "nowhere.safetensors")


def test_modules_are_taken_off_once_or_twice(attached: Any) -> None:
    detach = attached.detach_adapter
    detach()
    detach()
    for name in ("pelt", "detach_adapter", "disable_adapter", "print_trainable_parameters"):
        assert not hasattr(attached, name)
    pickle.loads(pickle.dumps(copy.deepcopy(attached)))
    peltc.attach(attached, LORA)


MERGED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "lora, ia3 and norms in BERT": (
        "bert", [{"method": "lora", "at": ["attention.query", "feed_forward.up"], "r": 2},
                 {"method": "norm_tuning", "at": "*.norm"}, {"method": "ia3", "at": "attention.key"}]),
    "a fused map": ("gpt2", [{"method": "dora", "at": ["attention.query", "attention.value"], "r": 2}]),
    "a table and the head that is the same tensor": (
        "gpt2", [{"method": "trainable_tokens", "at": "embedding.word", "rows": [3, 5], "tied": "together"}]),
    "a head, and biases": ("bert", [{"method": "replace", "at": "head"}, {"method": "bitfit", "at": "attention.*"}]),
    "an encoder and a decoder": (
        "t5", [{"method": "lora", "at": ["attention.query", "cross_attention.value"], "r": 2}]),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_modules_are_merged_into_the_weights(case: str, model_folder: Any, tmp_path: Path) -> None:
    family, entries = MERGED[case]
    folder = model_folder(family)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    given = {"input_ids": torch.arange(3, 11)[None]} | ({"decoder_input_ids": torch.arange(3, 7)[None]}
                                                        if family == "t5" else {})  # fmt: skip
    with torch.no_grad():
        bare = model(**given).logits
        peltc.attach(model, {"pelt": 1, "name": "merged", "attach": entries})
        for parameter in model.pelt.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        expected = model(**given).logits
        assert (expected - bare).abs().max() > 1e-3
        model.merge_adapter()
        assert not hasattr(model, "pelt") and all(parameter.requires_grad for parameter in model.parameters())
        assert (model(**given).logits - expected).abs().max() < TOLERANCE["float32"] * expected.abs().max()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(again(**given).logits, model(**given).logits)


def test_what_is_merged_is_the_closed_form(attached: Any) -> None:
    """W + (alpha / r) B A, in float64."""
    query = attached.bert.encoder.layer[1].attention.self.query
    A, B = (attached.pelt.parameter(f"lora.encoder.layers.1.attention.query.{n}").detach().double() for n in "AB")
    expected = query.weight.detach().double() + 16 / 2 * (B @ A)
    attached.merge_adapter()
    assert (query.weight.double() - expected).abs().max() < TOLERANCE["float32"] * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "entry", "words"),
    [
        ("bert", {"method": "bottleneck", "at": "feed_forward.block"}, "'relu' of the site's input is not affine"),
        ("bert", {"method": "lora", "at": "attention.query", "r": 2, "mode": "static"}, "static"),
        ("llama", {"method": "bitfit", "at": "attention.query"}, "needs a bias, and the map of"),
        ("gpt2", {"method": "lora", "at": "embedding.word", "r": 2}, "not head, which is the same tensor"),
    ],
)
def test_what_has_no_room_in_the_weights_is_not_merged(
    family: str, entry: dict[str, Any], words: str, model_folder: Any
) -> None:
    model = transformers.AutoModelForCausalLM if family != "bert" else transformers.AutoModelForSequenceClassification
    model = model.from_pretrained(model_folder(family)).eval()
    peltc.attach(model, {"pelt": 1, "name": "apart", "attach": [entry]})
    before = logits(model)
    with pytest.raises(PeltError, match=f"E209 the modules cannot be merged: .*{words}"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)


def test_a_merge_that_rounding_takes_is_warned_of(model: Any) -> None:
    peltc.attach(model.half(), LORA)
    with torch.no_grad():
        for parameter in model.pelt.parameters():
            parameter.fill_(2e-3)
    with pytest.warns(UserWarning, match="in torch.float16 takes .*% of the change"):
        model.merge_adapter()


REPLACE = {"method": "replace", "at": "head"}


@pytest.mark.parametrize(
    ("saved", "loaded", "entries", "words"),
    [
        ("BertModel", "BertForSequenceClassification", [], ["'classifier.weight', 'classifier.bias': the values are"]),
        ("BertModel", "BertForSequenceClassification", [REPLACE], []),
        ("BertForMaskedLM", "BertForSequenceClassification", [REPLACE], ["'bert.pooler.dense.weight', "]),
        ("BertForSequenceClassification", "BertForSequenceClassification", [], []),
        ("GPT2LMHeadModel", "GPT2LMHeadModel", [], []),
        ("GPT2Model", "GPT2LMHeadModel", [], []),
        ("T5ForConditionalGeneration", "T5ForConditionalGeneration", [], []),
    ],
)
def test_a_head_that_stays_random_is_told(
    saved: str, loaded: str, entries: list[Any], words: list[str], model_folder: Any, tmp_path: Path
) -> None:
    family = {"B": "bert", "G": "gpt2", "T": "t5"}[saved[0]]
    config = transformers.AutoConfig.from_pretrained(model_folder(family))
    getattr(transformers, saved)._from_config(config).save_pretrained(tmp_path)
    model = getattr(transformers, loaded).from_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peltc.attach(model, {**LORA, "attach": [*LORA["attach"], *entries]})
    found = [str(warning.message) for warning in told if "random" in str(warning.message)]
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found, strict=True)), found
    assert all(warning.filename == __file__ for warning in told if "random" in str(warning.message))


def test_modules_that_were_left_behind_are_told(attached: Any, tmp_path: Path) -> None:
    attached.save_pretrained(tmp_path / "checkpoint")
    attached.save_adapter(tmp_path / "adapter.safetensors")
    again = type(attached).from_pretrained(tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match="holds trained modules, and this model's are new: to go on"):
        peltc.attach(again, LORA)
    again.detach_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peltc.attach(again, LORA, tmp_path / "adapter.safetensors")


def test_a_model_with_modules_is_not_pickled(attached: Any) -> None:
    with pytest.raises(PeltError, match=r"E209 .*cannot be pickled(.|\n)*save_adapter"):
        pickle.dumps(attached)


def test_how_much_is_trained(attached: Any, capsys: Any) -> None:
    attached.print_trainable_parameters()
    total = sum(p.numel() for p in attached.parameters())
    assert f"trainable params: 256 || all params: {total:,} || trainable%: " in capsys.readouterr().out


def test_things_say_what_they_are(model_folder: Any, tmp_path: Path) -> None:
    folder = model_folder("bert")
    assert repr(peltc.load_spec(LORA)) == "<Spec 'mine': lora>"
    assert repr(peltc.survey(folder)).startswith("<Anatomy: ") and "layers.0-1.attention.query" in str(
        peltc.survey(folder)
    )
    plan = peltc.plan(LORA, folder)
    assert repr(plan) == "<Plan of 'mine': 2 modules, 2 fold, 256 values>"
    assert "layers.0-1.attention.query × 2" in str(plan) and str(plan).count("\n") == 1
    peltc.compile(LORA, folder, tmp_path / "out", verify=False)
    with peltc.Session(tmp_path / "out", ["CPUExecutionProvider"]) as session:
        assert repr(session) == "<Session of 'mine' on BertForSequenceClassification: CPUExecutionProvider>"
        first = session(input_ids=[[5, 6]])["logits"]
    assert "inference" not in vars(session)
    assert np.array_equal(session(input_ids=[[5, 6]])["logits"], first)


def test_rows_of_equal_layers_are_told_once() -> None:
    rows = [(layer, (f"layers.{layer}.query", f"h.{layer}.mlp.0.w, h.{layer}.b")) for layer in range(3)]
    rows += [(3, ("layers.3.query", "h.3.other")), (None, ("head", "lm_head.0"))]
    assert grouped(rows) == [("layers.0-2.query × 3", "h.0-2.mlp.0.w, h.0-2.b"), ("layers.3.query", "h.3.other"),
                             ("head", "lm_head.0")]  # fmt: skip
    assert spans([5, 1, 2, 3, 7, 7]) == "1-3,5,7"


def test_what_should_be_known_is_logged(model_folder: Any, tmp_path: Path, caplog: Any) -> None:
    """Every entry without a listener of its own logs; a program that configures no logging prints nothing."""
    with caplog.at_level("INFO", logger="peltc"):
        peltc.compile(LORA, model_folder("bert"), tmp_path / "out")
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "peltc"]
    assert ("WARNING", "no weights given; the modules have their start values") in said
    assert ("INFO", "verifying against PyTorch") in said
