"""Bad weights, models and output paths, through the real command line: exit code 1, the file at fault named, and
nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

LORA = "pelt: 1\nattach:\n  - method: lora\n    at: attention.query\n"

# Weights.

NAMES = [f"lora.encoder.layers.{i}.attention.query" for i in (0, 1)]
TENSORS = {f"{n}.{p}": np.ones(s, np.float32) for n in NAMES for p, s in (("A", (8, 32)), ("B", (32, 8)))}


def stored(tensors: dict[str, Any], file: Path) -> bytes:
    save_file(tensors, file)
    return file.read_bytes()


def with_header(header: object, data: bytes = b"\0" * 4) -> bytes:
    """A safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}


def good(desk: Any) -> bytes:
    return stored(TENSORS, desk.folder / "made.safetensors")


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


class Bad(NamedTuple):
    """What is wrong with a file or folder, and what is said of it."""

    make: Callable[..., Any]
    words: tuple[str, ...]


def cases(table: dict[str, Bad]) -> list[Any]:
    """Parameters of a test."""
    return [pytest.param(bad, id=name) for name, bad in table.items()]


FILES = {
    "empty": Bad(lambda d: b"", ("cut off, or no safetensors file",)),
    "header_cut": Bad(lambda d: good(d)[:50], ("cut off, or no safetensors file",)),
    "length_cut": Bad(lambda d: good(d)[:3], ("cut off, or no safetensors file",)),
    "data_cut": Bad(lambda d: good(d)[:-100], (f"cut off before the end of '{NAMES[1]}.",)),
    "text": Bad(lambda d: b"hello, " * 50, ("no safetensors file",)),
    "pickle": Bad(lambda d: pickle.dumps(Evil()), ("no safetensors file",)),
    "header_length": Bad(lambda d: struct.pack("<Q", 1 << 62) + b"{}", ("no safetensors file",)),
    "header_list": Bad(lambda d: with_header([1]), ("not a mapping",)),
    "header_deep": Bad(lambda d: with_header(b"[" * 5000), ("not JSON",)),
    "header_digits": Bad(lambda d: with_header(b'{"a": ' + b"9" * 5000 + b"}"), ("E401",)),
    "entry_number": Bad(lambda d: with_header({"a": 3}), ("'a' is malformed",)),
    "entry_type": Bad(lambda d: with_header(entry(dtype="F8")), ("'a' has an unknown type",)),
    "entry_shape": Bad(lambda d: with_header(entry(shape="x")), ("'a' is malformed",)),
    "entry_infinite": Bad(lambda d: with_header(entry(shape=[float("inf")])), ("'a' is malformed",)),
    "entry_negative": Bad(lambda d: with_header(entry(shape=[-1])), ("'a' has a wrong extent",)),
    "entry_huge": Bad(lambda d: with_header(entry(shape=[1 << 60])), ("'a' has a wrong extent",)),
    "entry_offsets": Bad(lambda d: with_header(entry(data_offsets=[0, 4, 5])), ("'a' is malformed",)),
}


@pytest.mark.parametrize("bad", cases(FILES))
@pytest.mark.parametrize("by_option", [False, True], ids=["spec", "option"])
def test_weights_that_are_none(desk: Any, bad: Bad, by_option: bool) -> None:
    desk.write(bad.make(desk), "adapter.safetensors")
    desk.write(LORA if by_option else LORA + "weights: adapter.safetensors\n")
    err = desk.refuse(*(["--weights", "adapter.safetensors"] if by_option else [])).err
    assert re.match(r"(.*/)?adapter.safetensors\n  E401 ", err), err
    assert all(words in err for words in (*bad.words, "expected a safetensors file")), err
    assert not (desk.folder / "pwned").exists()


@pytest.mark.parametrize("path", ["adapter.safetensors", "folder", "a" * 300])
def test_weights_that_are_not_there(desk: Any, path: str) -> None:
    (desk.folder / "folder").mkdir()
    desk.write(LORA + f"weights: {path}\n")
    err = desk.refuse().err
    what = "a folder is given where a file of tensors is wanted" if path == "folder" else "cannot read the file: "
    assert f"{path}\n  E401 {what}" in err


def test_wrong_tensors_are_all_counted(desk: Any) -> None:
    """Missing, left-over, misshapen, and of another type: one look shows the kinds, one finding each."""
    tensors = dict(TENSORS)
    tensors[f"{NAMES[0]}.a"] = tensors.pop(f"{NAMES[0]}.A")
    tensors[f"{NAMES[0]}.B"] = np.ones((32, 4), np.float32)
    tensors[f"{NAMES[1]}.B"] = np.ones((32, 8), np.int32)
    tensors["lora.decoder.layers.0.attention.query.A"] = np.ones(2, np.float32)
    desk.write(stored(tensors, desk.folder / "adapter.safetensors"), "adapter.safetensors")
    desk.write(LORA + "weights: adapter.safetensors\n")
    err = desk.refuse().err
    assert f"E402 the tensor '{NAMES[0]}.A' is missing\n  expected [8, 32]\n  hint: did you mean '{NAMES[0]}.a'" in err
    left = f"'lora.decoder.layers.0.attention.query.A', '{NAMES[0]}.a'"
    assert f"E403 no module of the spec takes 2 of the 5 tensors: {left}\n" in err
    wrong = f"'{NAMES[0]}.B' is [32, 4], '{NAMES[1]}.B' holds int32"
    assert f"E404 2 tensors are not as the spec has them: {wrong}\n  expected [32, 8]; a float type" in err
    assert err.endswith("3 errors\n")


def test_weights_that_are_not_finite(desk: Any) -> None:
    tensors = TENSORS | {f"{NAMES[0]}.A": np.full((8, 32), np.nan, np.float32)}
    desk.write(stored(tensors, desk.folder / "adapter.safetensors"), "adapter.safetensors")
    desk.write(LORA + "weights: adapter.safetensors\n")
    assert f"'{NAMES[0]}.A'" in desk.refuse().err


@pytest.mark.parametrize("how", ["parent", "absolute", "link", "linked_folder"])
def test_weights_outside_the_folder(desk: Any, how: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A spec from a stranger names no file outside its folder, whatever is there."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    stored(TENSORS, elsewhere / "adapter.safetensors")
    if how == "link":
        (desk.folder / "adapter.safetensors").symlink_to(elsewhere / "adapter.safetensors")
    if how == "linked_folder":
        (desk.folder / "folder").symlink_to(elsewhere)
    path = {
        "parent": f"../{elsewhere.name}/adapter.safetensors",
        "absolute": str(elsewhere / "adapter.safetensors"),
        "link": "adapter.safetensors",
        "linked_folder": "folder/adapter.safetensors",
    }[how]
    desk.write(LORA + f"weights: {path}\n")
    err = desk.refuse().err
    assert f"E406 the file {str(path)!r} lies outside the spec's folder" in err
    assert re.match(r"spec.yaml.*  weights\n", err)
    assert "hint: give the file by --weights" in err


# The model.


INDEX = "model.safetensors.index.json"


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def instead(name: str, content: bytes) -> Callable[[Path], None]:
    """Another file in place of the checkpoint."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


def sharded(index: dict[str, str] | None = None, cut: int | None = None, lost: bool = False) -> Callable[[Path], None]:
    """The checkpoint in two shards; the index may name more, and the second may be cut or lost."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        mapping = {name: f"{'one' if i % 2 else 'two'}.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in ("one.safetensors", "two.safetensors"):
            save_file({name: tensors[name] for name in mapping if mapping[name] == file}, folder / file)
        if cut is not None:
            os.truncate(folder / "two.safetensors", cut)
        if lost:
            (folder / "two.safetensors").unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": mapping | (index or {})}))

    return change


def pickled(value: object) -> Callable[[Path], None]:
    """A checkpoint as torch once wrote them."""

    def change(folder: Path) -> None:
        import torch

        (folder / "model.safetensors").unlink()
        torch.save(value, folder / "pytorch_model.bin")

    return change


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50_000)


CONFIG, WEIGHTS = "model/config.json\n  E502", "model/model.safetensors\n  E503"
SHARD, BIN = "model/two.safetensors\n  E503", "model/pytorch_model.bin\n  E503"
MODELS = {
    "no_config": Bad(without("config.json"), (f"{CONFIG} cannot read", "expected a model folder")),
    "no_weights": Bad(without("model.safetensors"), ("model\n  E503 the model folder holds no weights", INDEX)),
    "config_text": Bad(replaced("config.json", b"{hello"), (f"{CONFIG} the model's config is not JSON", "line 1")),
    "config_list": Bad(replaced("config.json", b"[1]"), (CONFIG, "a key 'model_type'")),
    "config_bytes": Bad(replaced("config.json", b"\xff\xfe"), (CONFIG, "not JSON")),
    "config_deep": Bad(replaced("config.json", b"[" * 100_000), (CONFIG,)),
    "weights_empty": Bad(replaced("model.safetensors", b""), (WEIGHTS, "cut off")),
    "weights_text": Bad(replaced("model.safetensors", b"x" * 99), (WEIGHTS, "no safetensors file")),
    "weights_cut": Bad(cut, (WEIGHTS, "cut off before the end of")),
    "shard_cut": Bad(sharded(cut=9000), (SHARD, "cut off before the end of")),
    "shard_lost": Bad(sharded(lost=True), (SHARD, "cannot read the file")),
    "index_parent": Bad(sharded({"x": "../x.safetensors"}), (f"{INDEX}\n  E503", "'../x.safetensors' lies outside")),
    "index_absolute": Bad(sharded({"x": "/etc/passwd"}), (f"{INDEX}\n  E503", "'/etc/passwd' lies outside")),
    "index_lacks": Bad(sharded({"x": "one.safetensors"}), (f"{INDEX}\n  E503", "first 'x'")),
    "index_nul": Bad(sharded({"x": "a\0b"}), ("E503",)),
    "index_text": Bad(instead(INDEX, b"{"), (f"{INDEX}\n  E503 the index", "a 'weight_map'")),
    "index_list": Bad(instead(INDEX, b"[]"), (f"{INDEX}\n  E503",)),
    "index_deep": Bad(instead(INDEX, b"[" * 100_000), (f"{INDEX}\n  E503",)),
    "pickle_empty": Bad(instead("pytorch_model.bin", b""), (BIN,)),
    "pickle_evil": Bad(instead("pytorch_model.bin", pickle.dumps(Evil(), 2)), (BIN, "plain tensors")),
    "pickle_torch_evil": Bad(pickled({"a": Evil()}), (BIN, "plain tensors")),
    "pickle_number": Bad(pickled({"a": 3}), ("E503",)),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("bad", cases(MODELS))
def test_model_folder_is_refused(desk: Any, bad: Bad) -> None:
    bad.make(desk.copy_model())
    err = desk.refuse(model="model").err
    assert all(words in err for words in bad.words), err
    assert not (desk.folder / "pwned").exists()


CLASS = "does not describe a BertForSequenceClassification"
CONFIGS: dict[str, tuple[dict[str, object], str, str]] = {
    "architecture": ({"architectures": ["BretModel"]}, "no architecture 'BretModel'", "did you mean 'BertModel'?"),
    "architecture_no_model": ({"architectures": ["Trainer"]}, "Trainer is no model class", "BertForMaskedLM"),
    "architecture_missing": ({"architectures": None}, "names no architecture", "by --architecture"),
    "model_type": ({"model_type": "brett"}, "no model type 'brett'", "did you mean 'bert'?"),
    "model_type_missing": ({"model_type": None}, "names no model type", "a key 'model_type'"),
    "size_wrong": ({"hidden_size": 33}, CLASS, "33"),
    "size_text": ({"hidden_size": "x"}, CLASS, "hidden_size"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_refused(desk: Any, name: str) -> None:
    change, message, words = CONFIGS[name]
    desk.copy_model(**change)
    err = desk.refuse(model="model").err
    assert re.search(rf"model/config.json.*\n  E5(02|12) .*{re.escape(message)}", err), err
    assert words in err


def test_architecture_that_is_a_number(desk: Any) -> None:
    desk.copy_model(architectures=[3])
    assert "E502" in desk.refuse(model="model").err


@pytest.mark.parametrize("model", ["./nope", "/nope/model", "spec.yaml"])
def test_no_such_model(desk: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    err = desk.refuse(model=model).err
    assert "E501" in err and "a folder with a config.json" in err


# The output path.


@pytest.mark.parametrize("make", ["file", "folder", "model", "here"])
def test_output_is_taken(desk: Any, make: str) -> None:
    """Only a new folder, an empty one or an artifact is written to."""
    if make == "file":
        desk.write("mine", "out")
    if make == "folder":
        (desk.folder / "out").mkdir()
        desk.write("mine", "out/keep.txt")
    if make == "model":
        desk.copy_model("out")
    err = desk.refuse(out="." if make == "here" else "out").err
    assert "E601 the output path is taken by something that is no artifact" in err
    assert "expected a new folder, an empty one, or an artifact to replace" in err


PATHS = {
    "below_a_file": "spec.yaml/out",
    "too_long": "a" * 300,
    "nearly_too_long": "a" * 250,
    "not_writable": "/proc/out",
}


@pytest.mark.parametrize("name", PATHS)
def test_output_cannot_be_made(desk: Any, name: str) -> None:
    assert "E602" in desk.refuse(out=PATHS[name]).err


@pytest.mark.parametrize("target", ["empty", "artifact"])
def test_output_is_a_link(desk: Any, target: str) -> None:
    """The artifact goes where the link leads, and the link stays."""
    if target == "artifact":
        assert desk.compile(out="there").code == 0
    else:
        (desk.folder / "there").mkdir()
    (desk.folder / "out").symlink_to("there")
    before = sorted(p.name for p in desk.folder.iterdir())
    outcome = desk.compile()
    assert outcome.code == 0, outcome.err
    assert sorted(p.name for p in desk.folder.iterdir()) == before
    assert (desk.folder / "out").is_symlink()
    assert (desk.folder / "there" / "pelt.json").is_file()


def test_output_is_a_link_to_nowhere(desk: Any) -> None:
    (desk.folder / "out").symlink_to("nowhere")
    assert desk.compile().code in (0, 1)
