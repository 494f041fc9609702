"""What a hostile file may say of how it was trained: a finding in plain words, or nothing; never another exception."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.adapter.identity import BaseRecord
from peltc.compiler.adapter.mathematics import Mathematics
from peltc.compiler.adapter.provenance import KEY, MAX_CHARACTERS, check_file, read_provenance
from peltc.compiler.files.checkpoint import read_metadata
from peltc.compiler.plan.claims import Plan
from peltc.runtime.building.compile import plan_for
from peltc.spec.diagnostics import PeltError

SPEC: dict[str, Any] = {
    "pelt": 1,
    "attach": [
        {"method": "lora", "at": "attention.query", "r": 2, "alpha": [1, 2]},
        {"method": "bottleneck", "at": "feed_forward.block", "size": 4, "bank": {"size": 5, "k": 2}},
        {"method": "ia3", "at": "attention.query", "after": "lora"},
    ],
}
ODD: list[Any] = [None, True, -1, 2**70, 1e300, "", "x\n\x1b[31m", "ü" * 5000, [], [[]], [1, "a"], {}, {"a": {"b": 1}}]


@pytest.fixture(scope="module")
def plan(model_folder: Callable[..., Path], cache: Any) -> Plan:
    return plan_for(peltc.load_spec(SPEC), model_folder("bert"))[0]


@pytest.fixture(scope="module")
def good(cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("good") / "adapter.safetensors"
    peltc.attach(models.build("bert"), SPEC).save_adapter(file)
    return file


def said(good: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(read_metadata(good)[KEY])
    return data


def written(good: Path, text: Any) -> Path:
    """The adapter with other metadata, which need not be text."""
    file = good.with_name("bad.safetensors")
    save_file(load_file(good), file, {KEY: "?"})
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"][KEY] = text
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + size :])
    return file


def held(plan: Plan, file: Path) -> list[str]:
    return check_file(plan, file, BaseRecord("BertForSequenceClassification"), lambda name: None)


def test_the_file_as_it_was_saved_is_taken(plan: Plan, good: Path) -> None:
    assert held(plan, written(good, json.dumps(said(good))))[0].startswith(
        "'bad.safetensors': the modules were trained"
    )


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "null", "[]", "3", '"x"', "{}", "[" * 100_000, '{"version":' + "[" * 50_000, '{"version": 1}',
     '{"version": ' + "9" * 5000 + "}", "{" + '"a":1,' * 200_000 + '"version":1}', 7, None, ["a"], {"version": 1}],
)  # fmt: skip
def test_nonsense_is_refused_by_name(text: Any, plan: Plan, good: Path) -> None:
    if text is None:
        assert "says nothing" in held(plan, written(good, text))[0]
        return
    with pytest.raises(PeltError, match="E409") as caught:
        held(plan, written(good, text))
    assert "bad.safetensors" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("version", [0, 2, "1", True, None, [1], "x" * 10_000])
def test_another_version_is_refused(version: Any, plan: Plan, good: Path) -> None:
    with pytest.raises(PeltError, match="E409") as caught:
        held(plan, written(good, json.dumps({**said(good), "version": version})))
    assert len(str(caught.value)) < 600


def test_a_bound_on_the_size(plan: Plan, good: Path) -> None:
    data = {**said(good), "more": "x" * MAX_CHARACTERS}
    with pytest.raises(PeltError, match=r"E409 .*malformed"):
        held(plan, written(good, json.dumps(data)))


def test_mathematics_that_the_digest_does_not_know_are_refused(plan: Plan, good: Path) -> None:
    data = said(good)
    data["mathematics"]["attachments"]["lora"]["variants"][0]["formulas"]["delta"] = "x"
    with pytest.raises(PeltError, match="E409"):
        held(plan, written(good, json.dumps(data)))


def test_a_digest_alone_is_compared(plan: Plan, good: Path) -> None:
    """As a file has it whose mathematics are too long to write down."""
    data = said(good)
    del data["mathematics"]
    held(plan, written(good, json.dumps(data)))
    data["digest"] = "0" * 64
    with pytest.raises(PeltError, match=r"E408 .* other formulas, options or sites"):
        held(plan, written(good, json.dumps(data)))


def parts(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in a tree."""
    yield path
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield from parts(tree[key], (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The tree with something else at a path."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


@pytest.mark.parametrize("odd", ODD, ids=[repr(odd)[:12] for odd in ODD])
def test_odd_values_anywhere(odd: Any, plan: Plan, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the digest made to fit, wherever what is there can be read at all."""
    data, refused = said(good), 0
    data["base"]["samples"] = dict(list(data["base"]["samples"].items())[:2])
    for path in parts(data):
        tree = changed(data, path, odd)
        if path and path[0] == "mathematics" and isinstance(tree, dict):
            with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):
                tree["digest"] = Mathematics.from_json(tree["mathematics"]).digest
        text = json.dumps(tree)
        monkeypatch.setattr("peltc.compiler.adapter.provenance.read_metadata", lambda file, text=text: {KEY: text})
        try:
            sentences = held(plan, good)
        except PeltError as error:
            refused += 1
            sentences = str(error).splitlines()
            assert {d.code for d in error.diagnostics} <= {"E408", "E409"}
        assert all(line.isprintable() and len(line) < 1000 for line in sentences), path
    assert refused > 20


def test_a_malformed_file_is_refused_by_whoever_reads_it(good: Path, model_folder: Any, tmp_path: Path) -> None:
    file = written(good, "nonsense")
    with pytest.raises(PeltError, match="E409"):
        peltc.compile(SPEC, model_folder("bert"), tmp_path / "out", file)
    with pytest.raises(PeltError, match="E409"):
        peltc.attach(models.build("bert"), SPEC, file)
    assert not (tmp_path / "out").exists()


def test_long_provenance_is_written_short(good: Path) -> None:
    found = read_provenance(good)
    assert found is not None
    many = BaseRecord("A", labels=("x" * 300,) * 4096)
    text = type(found)(found.mathematics, found.digest, many).metadata()[KEY]
    assert len(text) <= MAX_CHARACTERS and json.loads(text)["digest"] == found.digest
