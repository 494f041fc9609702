"""Artifacts that are there already: one of another spec is not replaced without a word, and none is a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import peltc
from peltc.spec.diagnostics import PeltError

LORA = "pelt: 1\nname: first\nattach:\n  - method: lora\n    at: attention.query\n"
IA3 = "pelt: 1\nname: second\nattach:\n  - method: ia3\n    at: attention.key\n"


@pytest.fixture
def artifact(desk: Any) -> Path:
    """An artifact of `first` at `out`."""
    desk.write(LORA)
    outcome = desk.compile()
    assert outcome.code == 0, outcome.err
    assert "holds an artifact" not in outcome.err
    return Path(desk.folder / "out")


def warned(err: str) -> list[str]:
    return re.findall(r"warning: ('out' holds an artifact .*)\n", err)


def test_another_spec_is_replaced_with_a_word(desk: Any, artifact: Path) -> None:
    """Even where only warnings are asked for; afterwards the artifact is the new one."""
    desk.write(IA3)
    outcome = desk.compile("--quiet")
    assert outcome.code == 0, outcome.err
    (line,) = warned(outcome.err)
    assert line == "'out' holds an artifact of another spec, 'first' on BertForSequenceClassification; it is replaced"
    assert json.loads((artifact / "pelt.json").read_text())["name"] == "second"
    assert warned(desk.compile().err) == []


def test_the_same_spec_is_replaced_without(desk: Any, artifact: Path) -> None:
    """Weights and modes change from day to day, and so do comments and layout."""
    desk.write("# a comment\n" + LORA.replace("attention.query", "'attention.query'"))
    assert warned(desk.compile("--mode", "static", "--weights", "out/adapter.safetensors").err) == []


def test_the_same_spec_on_another_base(desk: Any, artifact: Path) -> None:
    model = desk.copy_model("other")
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, model / "model.safetensors")
    (line,) = warned(desk.compile(model="other").err)
    assert line.startswith("'out' holds an artifact of another base of this spec, 'first' on Bert")


@pytest.mark.parametrize("content", [b"{", b'{"pelt": 1}', b'{"pelt": 1, "name": "x", "spec": 3, "base": []}'])
def test_what_cannot_be_read_is_told_too(desk: Any, artifact: Path, content: bytes) -> None:
    (artifact / "pelt.json").write_bytes(content)
    assert warned(desk.compile().err) == ["'out' holds an artifact whose manifest cannot be read; it is replaced"]


def test_words_of_a_stranger_move_no_terminal(desk: Any, artifact: Path) -> None:
    manifest = json.loads((artifact / "pelt.json").read_text())
    (artifact / "pelt.json").write_text(json.dumps(manifest | {"name": "\x1b[2J" + "x" * 1000, "spec": "other: 1"}))
    err = desk.compile().err
    assert "\\x1b[2Jxxx" in warned(err)[0] and len(err) < 2000


def test_an_artifact_is_no_model(desk: Any, artifact: Path) -> None:
    """Its modules would be lost: refused at every door, and what to give instead is named."""
    err = desk.refuse(model="out", out="new").err
    assert "E507 the folder is an artifact, 'first' on BertForSequenceClassification, and no model" in err
    assert "expected the BertForSequenceClassification that it was compiled from" in err
    assert "modules do not stack" in err and err.endswith("1 error\n")
    for verb in (("sites", "out"), ("plan", "spec.yaml", "out"), ("describe", "spec.yaml", "out")):
        outcome = desk.pelt(*verb)
        assert outcome.code == 1 and "E507" in outcome.err, verb
    for door in (peltc.survey, lambda model: peltc.plan(desk.folder / "spec.yaml", model)):
        with pytest.raises(PeltError, match="E507"):
            door(artifact)


def test_an_artifact_is_compiled_anew_in_place(desk: Any, artifact: Path) -> None:
    """From the base that it holds, when its own folder is the output; by whatever path."""
    before = json.loads((artifact / "pelt.json").read_text())["base"]["fingerprint"]
    desk.write(IA3)
    (desk.folder / "link").symlink_to("out")
    outcome = desk.compile(model="link")
    assert outcome.code == 0, outcome.err
    assert len(warned(outcome.err)) == 1
    manifest = json.loads((artifact / "pelt.json").read_text())
    assert (manifest["name"], manifest["base"]["fingerprint"]) == ("second", before)
    assert desk.pelt("verify", "out").code == 0
