"""Adapter files say how they were trained: what does not belong together is refused or told. In brackets, how far
outputs were off where such a pair was compiled without a word."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from conformance.cases import CASES, spec
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.adapter.mathematics import whole_digest
from peltc.compiler.adapter.provenance import DIGEST, KEY, read_provenance
from peltc.compiler.files.checkpoint import read_metadata
from peltc.runtime.building.compile import plan_for
from peltc.runtime.building.trained import adapter_tensors
from peltc.runtime.commands.cli import run
from peltc.spec.diagnostics import PeltError

LORA: dict[str, Any] = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}
GENERATED: dict[str, Any] = {"method": "ia3", "at": "attention.query", "generate": {"size": 4, "hidden": 6}}
BANK: dict[str, Any] = {"method": "bottleneck", "at": "feed_forward.block", "size": 4, "bank": {"size": 5, "k": 2}}
SCALE: dict[str, Any] = {"method": "ia3", "at": "attention.value"}
BEND: dict[str, Any] = {
    "title": "One matrix for all sites",
    "site": "linear",
    "options": {"s": {"type": "number", "default": 1.0}, "p": {"type": "number", "default": 0.1}},
    "parameters": {"A": {"shape": ["out", "in"], "init": "zeros", "scope": "model"}},
    "delta": "s * tanh(linear(dropout(x, p), A))",
}


def of(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"pelt": 1, "attach": [dict(entry) for entry in entries], **more}


def shaken(model: Any, std: float = 0.3) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def bert(cache: Any) -> Any:
    return models.build("bert")


@pytest.fixture
def saved(bert: Any, tmp_path: Path) -> Callable[..., Path]:
    """The file of an adapter with random weights, trained as a spec says."""

    def save(said: Any, name: str = "adapter.safetensors", base: Any = None) -> Path:
        shaken(peltc.attach(base or copy.deepcopy(bert), said)).save_adapter(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def compiled(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Compile, without verification; the warnings."""

    def compile(said: Any, weights: Any, model: Any = None) -> list[str]:
        told: list[str] = []
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # that an artifact is replaced is no matter of training
        peltc.compile(said, model or model_folder("bert"), tmp_path / "out", weights, verify=False, talk=told.append)
        return [line for line in told if line.startswith("warning")]

    return compile


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning that no test expects is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def own(**changes: Any) -> dict[str, Any]:
    return of({"method": "bend", "at": "attention.query"}, methods={"bend": {**BEND, **changes}})


OTHER = {
    "alpha (7 %)": (of(LORA), of({**LORA, "alpha": 64}), "alpha 16 in 'lora'; the spec says alpha 64"),
    "layer (1.1)": (of({**GENERATED, "layers": [0]}), of({**GENERATED, "layers": [1]}), r"layers\.0\.a.*layers\.1\.a"),
    "sites (1.8)": (
        of({**GENERATED, "at": ["attention.query", "attention.value"]}),
        of({**GENERATED, "at": ["attention.key", "attention.output"]}),
        "attention.query, attention.value.*attention.key, attention.output",
    ),
    "own scope, sites": (
        own(),
        {**own(), "attach": [{"method": "bend", "at": "attention.key"}]},
        "at encoder.layers.0-1.attention.query; the spec says at encoder.layers.0-1.attention.key",
    ),
    "own formula": (own(), own(delta="s * sigmoid(linear(x, A))"), r"delta = \(1 \* tanh.*delta = \(1 \* sigmoid"),
    "own option": (own(), {**own(), "attach": [{"method": "bend", "at": "attention.query", "s": 2}]}, "s 1.0 .* s 2"),
    "seed of a bank": (of(BANK), of(BANK, seed=1), "seed 0; the spec says seed 1"),
    "k of a bank": (of(BANK), of({**BANK, "bank": {"size": 5, "k": 3}}), "bank.k 2 .* bank.k 3"),
    "std of a bank": (of(BANK), of({**BANK, "bank": {"size": 5, "k": 2, "std": 0.1}}), "bank.std 0.02 .* bank.std 0.1"),
    "size": (of(LORA), of({**LORA, "r": 2}), "r 4 in 'lora'; the spec says r 2"),
    "an attachment more": (of(LORA, BANK), of(LORA), "the attachments 'lora', 'bottleneck'; the spec says 'lora'"),
    "order": (
        of({**LORA, "name": "a"}, {**SCALE, "after": "a"}, {**SCALE, "name": "b", "after": "ia3"}),
        of({**LORA, "name": "a"}, {**SCALE, "name": "b", "after": "a"}, {**SCALE, "after": "b"}),
        "in the order a → ia3 → b; the spec says a → b → ia3",
    ),
    "task": (
        of({**GENERATED, "generate": {"size": 4, "hidden": 6, "tasks": 2}}),
        of({**GENERATED, "generate": {"size": 4, "hidden": 6, "tasks": 2, "task": 1}}),
        "generate.task 0 .* generate.task 1",
    ),
    "per layer": (of({**LORA, "alpha": [1, 2]}), of({**LORA, "alpha": [2, 1]}), r"alpha \[1, 2\] .* alpha \[2, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_other_mathematics_are_refused(case: str, saved: Any, bert: Any, compiled: Any, tmp_path: Path) -> None:
    """By `compile` and by `attach`, before anything is written."""
    trained, said, message = OTHER[case]
    file = saved(trained)
    assert compiled(trained, file) == []
    (tmp_path / "out").rename(tmp_path / "before")
    with pytest.raises(PeltError, match=f"E408 'adapter.safetensors' was trained with .*{message}"):
        compiled(said, file)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PeltError, match="E408"):
        peltc.attach(copy.deepcopy(bert), said, file)


@pytest.mark.parametrize("case", ["alpha (7 %)", "layer (1.1)", "sites (1.8)", "seed of a bank"])
def test_so_are_those_of_a_live_model(case: str, bert: Any, compiled: Any) -> None:
    """(alpha 16 as 64: 0.34)"""
    trained, said, message = OTHER[case]
    model = shaken(peltc.attach(copy.deepcopy(bert), trained))
    with pytest.raises(PeltError, match=f"E408 the model with modules attached was trained with .*{message}"):
        compiled(said, None, model)
    assert compiled(trained, None, model) == []


@pytest.mark.parametrize("case", ["alpha (7 %)", "layer (1.1)", "sites (1.8)", "own formula"])
def test_so_are_those_in_a_checkpoint(case: str, bert: Any, compiled: Any, tmp_path: Path) -> None:
    trained, said, _ = OTHER[case]
    shaken(peltc.attach(copy.deepcopy(bert), trained)).save_pretrained(tmp_path / "checkpoint")
    assert compiled(trained, None, tmp_path / "checkpoint") == []
    with pytest.raises(PeltError, match="E408 what 'checkpoint' holds was trained with other formulas"):
        compiled(said, None, tmp_path / "checkpoint")


def test_a_checkpoint_without_the_digest_is_told(bert: Any, compiled: Any, tmp_path: Path) -> None:
    model = peltc.attach(copy.deepcopy(bert), of(LORA))
    model.save_pretrained(tmp_path / "old")
    tensors = load_file(tmp_path / "old/model.safetensors")
    del tensors[f"pelt.{DIGEST}"]
    save_file(tensors, tmp_path / "old/model.safetensors", {"format": "pt"})
    (warning,) = compiled(of(LORA), None, tmp_path / "old")
    assert "'old' says nothing of how it was trained" in warning
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()}, strict=True)
    assert f"pelt.{DIGEST}" in model.state_dict(), "an old state is taken, and the digest stays"


def test_the_state_of_other_modules_is_refused(bert: Any) -> None:
    one, other = (peltc.attach(copy.deepcopy(bert), of({**LORA, "alpha": alpha})) for alpha in (16, 64))
    with pytest.raises(PeltError, match="E415"):
        other.load_state_dict(one.state_dict())
    one.load_state_dict(peltc.attach(copy.deepcopy(bert), of({**LORA, "dropout": 0.5})).state_dict())


SAME = {
    "deploy": of(LORA, deploy={"mode": "static", "precision": "float16"}),
    "dropout": of({**LORA, "dropout": 0.5}),
    "expect": of({**LORA, "expect": 4}),
    "name": of(LORA, name="another"),
    "seed that nothing depends on": of(LORA, seed=7),
    "selectors": of({**LORA, "at": ["attention.[vq]*"], "layers": ["0-1"]}),
    "numbers": of({**LORA, "alpha": 16.0}),
    "one value per layer": of({**LORA, "alpha": [16, 16]}),
    "the same factor": of({**LORA, "alpha": 8, "rank_stabilised": True}),
}


@pytest.mark.parametrize("case", SAME)
def test_what_changes_no_function_is_taken(case: str, saved: Any, compiled: Any) -> None:
    assert compiled(SAME[case], saved(of(LORA))) == []


def test_an_option_of_training_alone_is_told_by_its_formula(saved: Any, compiled: Any) -> None:
    """`p` is read by `dropout` alone, whatever it is called; and width and reduction can say one size."""
    other = {**own(), "attach": [{"method": "bend", "at": "attention.query", "p": 0.5}]}
    assert compiled(other, saved(own())) == []
    sized: dict[str, Any] = {"method": "bottleneck", "at": "feed_forward.block"}
    assert compiled(of({**sized, "size": 4}), saved(of({**sized, "reduction": 8}))) == []


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_every_method_is_taken_as_it_was_saved(
    case: str, family: str, model_folder: Callable[..., Path], cache: Any, tmp_path: Path
) -> None:
    said, file = peltc.load_spec(spec(case, family)), tmp_path / "adapter.safetensors"
    model = shaken(peltc.attach(models.build(family), said))
    model.save_adapter(file)
    plan, base = plan_for(said, model_folder(family))
    told: list[str] = []
    tensors, _, _ = adapter_tensors(plan, base, file, told.append)
    assert told == []
    assert whole_digest(plan) == whole_digest(model.pelt.plan)
    again = peltc.attach(models.build(family), said, file)
    for name, array in tensors.items():
        assert np.array_equal(array, again.pelt.parameter(name).detach().numpy())
    assert len(read_metadata(file)[KEY]) < 16_384


# the base


def test_another_base_of_the_same_shapes_is_told(saved: Any, compiled: Any, model_folder: Any, bert: Any) -> None:
    other = models.build("bert")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    file = saved(of(LORA), base=other)
    (warning,) = compiled(of(LORA), file)
    name = model_folder("bert").name
    assert (
        f"trained on another base: on BertForSequenceClassification, and this is BertForSequenceClassification '{name}'"
        in warning
    )
    with pytest.warns(UserWarning, match="another base"):
        peltc.attach(copy.deepcopy(bert), of(LORA), file)


def test_a_single_other_parameter_is_told(saved: Any, compiled: Any) -> None:
    other = models.build("bert")
    with torch.no_grad():
        other.classifier.weight.mul_(2)
    (warning,) = compiled(of(LORA), saved(of(LORA), base=other))
    assert "1 of 41 parameters compared, first 'classifier.weight', differ" in warning


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_trained_in_half_precision_is_the_same(dtype: str, saved: Any, compiled: Any, model_folder: Any) -> None:
    narrow = models.build("bert").to(getattr(torch, dtype))
    file = saved(of(LORA), base=narrow)
    assert compiled(of(LORA), file) == []
    other = "float16" if dtype == "bfloat16" else "bfloat16"
    assert compiled(of(LORA), file, model_folder("bert", other)) == [], "two roundings of one base"


def test_modules_in_half_precision_are_of_the_same_bank(bert: Any, compiled: Any, tmp_path: Path) -> None:
    """The seed says what a random bank is, not the rounded values of a model that was cast since."""
    model = shaken(peltc.attach(copy.deepcopy(bert), of(LORA, BANK))).half()
    model.save_adapter(tmp_path / "adapter.safetensors")
    assert compiled(of(LORA, BANK), tmp_path / "adapter.safetensors") == []
    assert compiled(of(LORA, BANK), None, model) == []
    assert model.pelt.state_dict()[DIGEST].dtype == torch.uint8


def test_a_little_more_than_rounding_is_told(saved: Any, compiled: Any) -> None:
    """Witness: one unit in the last place of the coarser type."""
    narrow = models.build("bert").to(torch.bfloat16)
    with torch.no_grad():
        narrow.classifier.weight.view(torch.int16).add_(1)
    (warning,) = compiled(of(LORA), saved(of(LORA), base=narrow))
    assert "'classifier.weight'" in warning


def test_no_path_of_the_trainer_is_in_the_file(saved: Any, model_folder: Callable[..., Path]) -> None:
    import transformers

    folder = model_folder("bert")
    file = saved(of(LORA), base=transformers.BertForSequenceClassification.from_pretrained(folder))
    text = read_metadata(file)[KEY]
    assert f'"{folder.name}"' in text and str(folder.parent) not in text


def test_what_modules_replace_is_no_part_of_the_base(saved: Any, compiled: Any) -> None:
    other = models.build("bert")
    with torch.no_grad():
        other.classifier.weight.mul_(2)
    said = of(LORA, {"method": "replace", "at": "head"})
    assert compiled(said, saved(said, base=other)) == []


# files that say nothing, or nonsense


def test_a_file_without_provenance_is_told_once(saved: Any, compiled: Any, bert: Any) -> None:
    file = saved(of(LORA))
    arrays = load_file(file)
    assert compiled(of({**LORA, "alpha": 64}), arrays) == [], "arrays say nothing and are taken as they are"
    save_file(arrays, file)
    (warning,) = compiled(of(LORA), file)
    assert "'adapter.safetensors' says nothing of how it was trained" in warning
    with pytest.warns(UserWarning, match="says nothing of how it was trained"):
        peltc.attach(copy.deepcopy(bert), of(LORA), file)


def test_the_adapter_in_an_artifact_says_what_its_source_said(saved: Any, compiled: Any, tmp_path: Path) -> None:
    file = saved(of(LORA))
    compiled(of(LORA), file)
    assert read_provenance(tmp_path / "out/adapter.safetensors") == read_provenance(file)
    (tmp_path / "out").rename(tmp_path / "first")
    with pytest.raises(PeltError, match="E408"):
        compiled(of({**LORA, "alpha": 64}), tmp_path / "first/adapter.safetensors")
    compiled(of(LORA), load_file(file))
    assert read_provenance(tmp_path / "out/adapter.safetensors") is None


# banks and profiles


def test_adapters_of_other_mathematics_do_not_stack(saved: Any, tmp_path: Path, capsys: Any) -> None:
    files = [str(saved(of({**LORA, "alpha": alpha}), f"{alpha}.safetensors")) for alpha in (16, 17)]
    assert run(["bank", *files, "-o", str(tmp_path / "bank.safetensors")]) == 1
    assert (
        "E408 the adapter was trained with alpha 17 in 'lora', and '16.safetensors' with alpha 16"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "bank.safetensors").exists()
    assert run(["bank", files[0], files[0], "-o", str(tmp_path / "bank.safetensors")]) == 0
    assert "warning" not in capsys.readouterr().err


def test_masks_over_another_file_of_the_same_shapes_are_refused(saved: Any, bert: Any, tmp_path: Path) -> None:
    """The file's name says nothing: its values do."""
    adapter: dict[str, Any] = {"method": "bottleneck", "at": "feed_forward.block", "size": 4}
    banked = {**adapter, "bank": {"size": 2, "k": 1, "file": "bank.safetensors"}}
    (tmp_path / "spec.yaml").write_text(json.dumps(of(banked)))
    one = saved(of(adapter), "one.safetensors")
    assert run(["bank", str(one), str(one), "-o", str(tmp_path / "bank.safetensors")]) == 0
    masks = saved(tmp_path / "spec.yaml", "masks.safetensors")
    (tmp_path / "moved.safetensors").write_bytes((tmp_path / "bank.safetensors").read_bytes())
    (tmp_path / "moved.yaml").write_text((tmp_path / "spec.yaml").read_text().replace("bank.saf", "moved.saf"))
    peltc.attach(copy.deepcopy(bert), tmp_path / "moved.yaml", masks)
    tensors = {name: array + 1 for name, array in load_file(tmp_path / "bank.safetensors").items()}
    save_file(tensors, tmp_path / "bank.safetensors")
    with pytest.raises(PeltError, match=r"E408 .* values of another file for 'bottleneck'"):
        peltc.attach(copy.deepcopy(bert), tmp_path / "spec.yaml", masks)


def test_a_profile_of_other_mathematics_is_refused(bert: Any, compiled: Any, tmp_path: Path) -> None:
    """Of a gelu where the spec says relu: the bank is the same."""
    file = tmp_path / "user.safetensors"
    shaken(peltc.attach(copy.deepcopy(bert), of({**BANK, "activation": "gelu"}))).save_profile(file)
    assert compiled(of({**BANK, "activation": "gelu"}), file) == []
    with pytest.raises(PeltError, match="E407 the profile was made with other formulas"):
        compiled(of(BANK), file)


def test_an_old_profile_is_told(bert: Any, compiled: Any, tmp_path: Path) -> None:
    file = tmp_path / "user.safetensors"
    peltc.attach(copy.deepcopy(bert), of(BANK)).save_profile(file)
    (key, text), tensors = next(iter(read_metadata(file).items())), load_file(file)
    said = json.loads(text)
    assert len(said.pop("mathematics")) == 16
    save_file(tensors, file, {key: json.dumps(said)})
    (warning,) = compiled(of(BANK), file)
    assert "says nothing of how it was trained" in warning


# what is trained and in no file


def thawed(bert: Any, *entries: dict[str, Any]) -> Any:
    model = peltc.attach(copy.deepcopy(bert), of(*entries))
    model.classifier.requires_grad_(True)
    return shaken(model)


def test_a_trained_head_is_told_by_who_saves_and_by_who_compiles(bert: Any, compiled: Any, tmp_path: Path) -> None:
    """(1.24)"""
    model, file = thawed(bert, LORA), tmp_path / "adapter.safetensors"
    with pytest.warns(UserWarning, match=r"2 parameters of the base .*'classifier.weight', 'classifier.bias'") as told:
        model.save_adapter(file)
    assert "`method: replace, at: head`" in str(told[0].message) and told[0].filename == __file__
    (warning,) = compiled(of(LORA), file)
    assert "'classifier.bias' and 1 more of the base were trained along" in warning
    model.detach_adapter()
    model.save_pretrained(tmp_path / "trained")
    assert compiled(of(LORA), file, tmp_path / "trained") == [], "the base that was trained brings them"


def test_what_is_written_instead_holds_the_head(bert: Any, compiled: Any, tmp_path: Path) -> None:
    entries = LORA, {"method": "replace", "at": "head"}
    model = thawed(bert, *entries)  # its own head is thawed to no purpose, and has no say
    model.save_adapter(tmp_path / "adapter.safetensors")
    assert compiled(of(*entries), tmp_path / "adapter.safetensors") == []
    found = read_provenance(tmp_path / "adapter.safetensors")
    assert found is not None and found.base.labels == ("LABEL_0", "LABEL_1")


def test_a_thawed_base_of_a_fold_is_told(bert: Any, tmp_path: Path) -> None:
    model = peltc.attach(copy.deepcopy(bert), of(LORA))
    model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(True)
    model.bert.encoder.layer[0].output.LayerNorm.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"query.weight.*replace, at: encoder.layers.0.attention.query.*norm_tuning"):
        model.save_adapter(tmp_path / "adapter.safetensors")


def test_a_profile_tells_of_it_too(bert: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'classifier.weight'"):
        thawed(bert, BANK).save_profile(tmp_path / "user.safetensors")
