"""Inputs are held against what the graph takes before it runs; none is cut, wrapped or answered all the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import peltc
from peltc.runtime.running.inputs import converted
from peltc.spec.diagnostics import PeltError

SPEC: dict[str, Any] = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}
ONE = [[5, 6, 7]]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], cache: Path) -> Any:
    """A tiny BERT of 100 words, 64 positions and 2 token types, compiled."""
    out = tmp_path_factory.mktemp("inputs") / "out"
    peltc.compile(SPEC, model_folder("bert"), out, verify=False)
    return peltc.Session(out)


@pytest.fixture(scope="module")
def generating(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], cache: Path) -> Any:
    """A tiny GPT-2 of 100 words and 64 positions, compiled with its graph with a cache."""
    out = tmp_path_factory.mktemp("generating") / "out"
    peltc.compile(SPEC, model_folder("gpt2"), out, verify=False, generation=True)
    return peltc.Session(out)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mask of another length": (
        {"input_ids": ONE, "attention_mask": [[1] * 5]},
        r"E613 the inputs 'input_ids' \[1, 3\], 'attention_mask' \[1, 5\] differ in the axis 'sequence'.*3 and 5",
    ),
    "mask of another batch": (
        {"input_ids": ONE * 2, "attention_mask": [[1] * 3]},
        r"E613 .*differ in the axis 'batch', which they share: 2 and 1",
    ),
    "fraction": ({"input_ids": [[5.5, 6]]}, r"E614 the input 'input_ids' takes .* is given 5.5 at row 0, position 0"),
    "no number": ({"input_ids": [[5, float("nan")]]}, r"E614 .* is given nan at row 0, position 1"),
    "whole floats": ({"input_ids": [[5.0, 6.0]]}, r"E614 .* is given float64\nexpected int64\nhint: .*astype"),
    "torch floats": ({"input_ids": torch.ones(1, 3)}, r"E614 .* is given float32"),
    "torch bfloat16": ({"input_ids": torch.full((1, 3), 1.5, dtype=torch.bfloat16)}, r"E614 .* is given 1.5"),
    "truth values": ({"input_ids": [[True, False]]}, r"E614 .* is given truth values"),
    "words": ({"input_ids": [["a", "b"]]}, r"E614 the input 'input_ids' holds str_ values, first 'a'"),
    "too large for the type": ({"input_ids": np.uint64([[2**63 + 5]])}, r"E614 .* 9223372036854775813 .* cannot hold"),
    "too large for any": ({"input_ids": [[2**70]]}, r"E614 "),
    "ragged": ({"input_ids": [[5, 6], [7]]}, r"E614 .*\n.*\nhint: pad shorter texts"),
    "beyond the vocabulary": (
        {"input_ids": [[1, 2], [3, 100]]},
        r"E615 the input 'input_ids' holds 100 at row 1, position 1\nexpected values from 0 to 99",
    ),
    "below zero": ({"input_ids": [[1, -1], [-100, 0]]}, r"E615 .* holds -1 at row 0, position 1 \(and 1 more"),
    "token type": ({"input_ids": ONE, "token_type_ids": [[0, 1, 2]]}, r"E615 .*'token_type_ids' holds 2 .*position 2"),
    "too long": (
        {"input_ids": np.full((2, 65), 5)},
        r"E616 a text of 65 tokens in the input 'input_ids' is too long.*\nexpected at most 64",
    ),
    "empty text": ({"input_ids": [[]]}, r"E617 the input 'input_ids' is empty, texts without a token: .*\[1, 0\]"),
    "no text": ({"input_ids": np.zeros((0, 5), int)}, r"E617 the input 'input_ids' is empty, no text: .*\[0, 5\]"),
    "no batch": ({"input_ids": [5, 6]}, r"E606 .*\[2\]\nexpected \[batch, sequence\]"),
    "unknown": ({"input_id": ONE}, r"E606 the model takes no input 'input_id'"),
    "missing": ({"attention_mask": ONE}, r"E606 the input 'input_ids' is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(session: Any, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The finding names the input, the place and the bound, and ONNX Runtime says nothing of its own."""
    given, said = REFUSED[name]
    with pytest.raises(PeltError) as caught:
        session(**given)
    assert re.match(said, str(caught.value)), caught.value
    assert capfd.readouterr().err == ""


TAKEN: dict[str, dict[str, Any]] = {
    "lists": {"input_ids": ONE},
    "int32": {"input_ids": np.int32(ONE)},
    "uint8": {"input_ids": np.uint8(ONE)},
    "torch": {"input_ids": torch.tensor(ONE)},
    "torch int": {"input_ids": torch.tensor(ONE, dtype=torch.int16)},
    "bool mask": {"input_ids": ONE, "attention_mask": [[True, True, True]]},
    "torch bool mask": {"input_ids": ONE, "attention_mask": torch.ones(1, 3, dtype=torch.bool)},
    "left out by None": {"input_ids": ONE, "attention_mask": None},
    "column-major": {"input_ids": np.asfortranarray(ONE)},
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(session: Any, name: str) -> None:
    """What says the same in another type is the same input."""
    expected = session(input_ids=np.int64(ONE), attention_mask=np.ones((1, 3), np.int64))["logits"]
    assert np.array_equal(session(**TAKEN[name])["logits"], expected)


def test_the_longest_text_runs(session: Any) -> None:
    assert session(input_ids=np.full((2, 64), 99))["logits"].shape == (2, 2)


CONVERSIONS: list[tuple[Any, str, Any]] = [
    (np.int64([2**31]), "tensor(int32)", "2147483648 at row 0, which int32 cannot hold"),
    (np.int64([-(2**31), 2**31 - 1]), "tensor(int32)", np.int32),
    (np.float64([1.0, 1e5]), "tensor(float16)", "100000.0 at row 1, which float16 cannot hold"),
    (np.float64([0.1, -np.inf]), "tensor(float16)", np.float16),
    (np.float64([1e300]), "tensor(float)", "cannot hold"),
    (np.int64([2**24 + 1]), "tensor(float)", "16777217 at row 0, which float32 cannot hold"),
    (np.int64([2**24, 2**30]), "tensor(float)", np.float32),
    (np.int64([70000]), "tensor(float16)", "cannot hold"),
    (np.int64([0, 1]), "tensor(bool)", np.bool_),
    (np.int64([0, 2]), "tensor(bool)", "2 at row 1, which bool cannot hold"),
    (np.float32([1.0]), "tensor(bool)", "is given float32"),
    (np.complex64([1]), "tensor(float)", "complex64"),
    (np.bool_([True]), "tensor(float)", np.float32),
]


@pytest.mark.parametrize(("value", "kind", "result"), CONVERSIONS)
def test_conversions(value: Any, kind: str, result: Any) -> None:
    """A value that the other type has no place for is refused; rounding to a narrower float is not."""
    if isinstance(result, str):
        with pytest.raises(PeltError, match=f"E614.*{re.escape(result)}"):
            converted("x", value, kind)
    else:
        found = converted("x", value, kind)
        assert found.dtype == result
        assert np.allclose(found.astype(np.float64), value, 1e-3)


def test_artifacts_without_limits_open(session: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of those nothing is known before it runs; what ONNX Runtime then says is told in a line, with the shapes."""
    out = tmp_path / "out"
    out.mkdir()
    for file in session.folder.iterdir():
        (out / file.name).hardlink_to(file)
    manifest = json.loads((out / "pelt.json").read_text())
    del manifest["limits"]
    (out / "pelt.json").unlink()
    (out / "pelt.json").write_text(json.dumps(manifest))
    old = peltc.Session(out)
    assert old(input_ids=ONE)
    with pytest.raises(PeltError, match=r"E612 ONNX Runtime could not run the model: in Gather: indices") as caught:
        old(input_ids=[[5, 500]])
    assert "'input_ids' [1, 2], 'attention_mask' [1, 2]" in str(caught.value)
    assert "[ONNXRuntimeError]" not in str(caught.value)
    with pytest.raises(PeltError, match=r"E612 .*in Add: Attempting to broadcast .* 64 by 65"):
        old(input_ids=np.full((1, 65), 5))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("texts", [["a b", ""], "", []])
def test_texts_without_tokens(session: Any, texts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 3, "b": 4}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(session, "folder", tmp_path)
    assert session.tokenize(["a b", "a"])["input_ids"].shape == (2, 2)
    with pytest.raises(PeltError, match=r"E617 (text . '', has no tokens|there is no text|text .*has no tokens)"):
        session.tokenize(texts)


PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "fraction": ({"input_ids": [[5.5]]}, "E614"),
    "beyond the vocabulary": ({"input_ids": torch.tensor([[5, 500]])}, "E615 .* holds 500 at row 0, position 1"),
    "by the other name": ({"inputs": np.array([[5, 500]])}, "E615 .* holds 500"),
    "mask of another length": ({"input_ids": ONE, "attention_mask": np.ones((1, 5), int)}, "E613"),
    "empty": ({"input_ids": np.zeros((1, 0), int)}, "E617"),
    "too long": ({"input_ids": np.full((1, 65), 5)}, "E616 a text of 65 tokens"),
    "grows too long": ({"input_ids": np.full((1, 60), 5)}, "E616 a text of 65 tokens"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_refused(generating: Any, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    given, said = PROMPTS[name]
    with pytest.raises(PeltError, match=said):
        generating.generate(**given, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert "onnxruntime" not in capfd.readouterr().err


def test_prompts_are_taken(generating: Any) -> None:
    """Arrays, lists and other whole types are the same prompt; and the last position is used."""
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = generating.generate(input_ids=torch.tensor(ONE), **options)
    for value in (ONE, np.int32(ONE), torch.tensor(ONE, dtype=torch.int16)):
        assert torch.equal(generating.generate(input_ids=value, **options), expected)
    assert generating.generate(input_ids=np.full((1, 61), 5), **options).shape == (1, 65)


def test_what_generation_meets_without_limits(generating: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating.generator, "_limits", {"values": {}, "lengths": {}})
    with pytest.raises(PeltError, match=r"E612 .*indices element out of data bounds"):
        generating.generate(input_ids=np.full((1, 60), 5), max_new_tokens=9, min_new_tokens=9, do_sample=False)
