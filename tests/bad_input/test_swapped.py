"""What is given in another's place, or by another's name, is said to be: a folder for a file, a spec for a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import peltc
from peltc.runtime.commands.cli import run
from peltc.spec.diagnostics import PeltError

SPEC: dict[str, Any] = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text("pelt: 1\nattach:\n  - {method: lora, at: attention.query}\n")
    return file


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(PeltError) as caught:
        call()
    return str(caught.value)


def test_a_checkpoint_with_modules_is_no_file_of_weights(
    model_folder: Callable[..., Path], spec: Path, tmp_path: Path
) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"))
    peltc.attach(model, SPEC)
    checkpoint = tmp_path / "checkpoint-500"
    model.save_pretrained(checkpoint)
    calls = (
        lambda: peltc.compile(spec, model_folder("bert"), tmp_path / "out", checkpoint),
        lambda: model.load_adapter(checkpoint),
    )
    for said in map(refused, calls):
        assert "E401 a folder is given where a file of tensors is wanted" in said
        assert "hint: it is a checkpoint with modules in it: give it as MODEL" in said


def test_a_folder_with_an_adapter_is_no_file_of_weights(
    model_folder: Callable[..., Path], spec: Path, tmp_path: Path
) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"))
    peltc.attach(model, SPEC)
    (tmp_path / "empty").mkdir()
    assert "hint: `model.save_adapter(path)` writes" in refused(lambda: model.load_adapter(tmp_path / "empty"))
    model.save_adapter(tmp_path / "mine" / "tuned.safetensors")
    assert "hint: the folder has tuned.safetensors" in refused(lambda: model.load_adapter(tmp_path / "mine"))


@pytest.mark.parametrize("verb", ["compile", "plan", "describe"])
def test_spec_and_model_are_swapped(
    verb: str, model_folder: Callable[..., Path], spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out")] if verb == "compile" else []
    for model in (str(model_folder("bert")), "organisation/model"):
        assert run([verb, model, str(spec), *out]) == 1
        assert "E100 the spec and the model seem to be swapped: " in capsys.readouterr().err


def test_spec_and_model_are_swapped_in_python(model_folder: Callable[..., Path], spec: Path, tmp_path: Path) -> None:
    model = model_folder("bert")
    for call in (lambda: peltc.compile(model, spec, tmp_path / "out"), lambda: peltc.plan(model, spec)):
        assert "seem to be swapped" in refused(call)


def test_a_folder_is_no_spec_and_a_spec_no_model(spec: Path) -> None:
    assert "hint: the folder has spec.yaml" in refused(lambda: peltc.load_spec(spec.parent))
    assert "E501 a file is given where a model's folder is wanted" in refused(lambda: peltc.survey(spec))
    assert "E100 cannot read the file" in refused(lambda: peltc.load_spec("a" * 5000))


def test_shapes_of_a_shipped_method_are_found_at_the_attachment(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The file is called as the method's own is."""
    file = tmp_path / "oft.yaml"
    file.write_text("pelt: 1\nattach:\n  - {method: oft, at: attention.query, block: 12}\n")
    said = refused(lambda: peltc.plan(file, model_folder("bert")))
    assert said.startswith(f"{file}:3:5  attach[0]\n  E310 'weight' of 'oft' at encoder.layers.0.attention.query")


@pytest.mark.parametrize(
    ("word", "here"),
    [
        ("c_attn", "`at: [attention.query, attention.key, attention.value]`"),
        ("c_proj", "`at: [attention.output, feed_forward.down]`"),
        ("c_fc", "'feed_forward.up'"),
    ],
)
def test_the_models_own_name_stands_for_all_that_it_is(word: str, here: str, model_folder: Callable[..., Path]) -> None:
    """A fused map is several sites, and several maps of one name are several too."""
    said = refused(lambda: peltc.plan({"pelt": 1, "attach": [{"method": "lora", "at": word}]}, model_folder("gpt2")))
    assert f"hint: '{word}' is the model's own name of what is {here} here" in said


def test_every_linear_map_is_a_star(model_folder: Callable[..., Path]) -> None:
    said = refused(lambda: peltc.plan({"pelt": 1, "attach": [{"method": "lora", "at": "all-linear"}]},
                                      model_folder("gpt2")))  # fmt: skip
    assert "hint: `at: '*'` is every linear map that has a role, a head too" in said
    found = peltc.plan({"pelt": 1, "attach": [{"method": "lora", "at": "*"}]}, model_folder("gpt2"))
    assert {claim.site.role for claim in found.claims} == {
        "attention.query", "attention.key", "attention.value", "attention.output", "feed_forward.up",
        "feed_forward.down", "head"}  # fmt: skip


def test_keys_that_are_written_stay_in_the_list() -> None:
    entry = {"method": "lora", "at": "attention.query", "r": 4, "rank": 8}
    said = refused(lambda: peltc.load_spec({"pelt": 1, "attach": [entry]}))
    listed = said.split("expected one of: ")[1].split("\n")[0].split(", ")
    assert {"method", "at", "r"} <= set(listed) and "did you mean 'r'" not in said
