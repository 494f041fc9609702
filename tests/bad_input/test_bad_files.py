"""Bad weights, models and output paths, through the real command line: exit code 1, the file at fault named, and
nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


HEADER = "checkpoint.read_header lets this error through"
FILES: dict[str, tuple[Callable[[Any], bytes], str, str]] = {
    "empty": (lambda d: b"", "cut off, or no safetensors file", ""),
    "header_cut": (lambda d: good(d)[:50], "cut off, or no safetensors file", ""),
    "length_cut": (lambda d: good(d)[:3], "cut off, or no safetensors file", ""),
    "data_cut": (lambda d: good(d)[:-100], f"cut off before the end of '{NAMES[1]}.", ""),
    "text": (lambda d: b"hello, " * 50, "no safetensors file", ""),
    "pickle": (lambda d: pickle.dumps(Evil()), "no safetensors file", ""),
    "header_length": (lambda d: struct.pack("<Q", 1 << 62) + b"{}", "no safetensors file", ""),
    "header_list": (lambda d: with_header([1]), "not a mapping", ""),
    "header_deep": (lambda d: with_header(b"[" * 5000), "not JSON", ""),
    "header_digits": (lambda d: with_header(b'{"a": ' + b"9" * 5000 + b"}"), "a", HEADER),
    "entry_number": (lambda d: with_header({"a": 3}), "'a' is malformed", ""),
    "entry_type": (lambda d: with_header(entry(dtype="F8")), "'a' has an unknown type", ""),
    "entry_shape": (lambda d: with_header(entry(shape="x")), "'a' is malformed", ""),
    "entry_infinite": (lambda d: with_header(entry(shape=[float("inf")])), "'a' is malformed", HEADER),
    "entry_negative": (lambda d: with_header(entry(shape=[-1])), "'a' has a wrong extent", ""),
    "entry_huge": (lambda d: with_header(entry(shape=[1 << 60])), "'a' has a wrong extent", ""),
    "entry_offsets": (lambda d: with_header(entry(data_offsets=[0, 4, 5])), "'a' is malformed", ""),
}


def marked(name: str, bug: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.xfail(reason=bug, strict=True)] if bug else [])


@pytest.mark.parametrize("name", [marked(name, bug) for name, (_, _, bug) in FILES.items()])
@pytest.mark.parametrize("by_option", [False, True])
def test_weights_that_are_none(desk: Any, name: str, by_option: bool) -> None:
    content, words, _ = FILES[name]
    desk.write(content(desk), "adapter.safetensors")
    desk.write(LORA if by_option else LORA + "weights: adapter.safetensors\n")
    err = desk.refuse(*(["--weights", "adapter.safetensors"] if by_option else [])).err
    assert re.match(r"(.*/)?adapter.safetensors\n  E401 ", err), err
    assert words in err
    assert "expected a safetensors file" in err
    assert not (desk.folder / "pwned").exists()


@pytest.mark.parametrize("path", ["adapter.safetensors", "folder", "a" * 300])
def test_weights_that_are_not_there(desk: Any, path: str) -> None:
    (desk.folder / "folder").mkdir()
    desk.write(LORA + f"weights: {path}\n")
    err = desk.refuse().err
    assert f"{path}\n  E401 cannot read the file: " in err


def test_wrong_tensors_are_all_listed(desk: Any) -> None:
    """Missing, left-over, misshapen, and of another type: one look shows them all."""
    tensors = dict(TENSORS)
    tensors[f"{NAMES[0]}.a"] = tensors.pop(f"{NAMES[0]}.A")
    tensors[f"{NAMES[0]}.B"] = np.ones((32, 4), np.float32)
    tensors[f"{NAMES[1]}.B"] = np.ones((32, 8), np.int32)
    tensors["lora.decoder.layers.0.attention.query.A"] = np.ones(2, np.float32)
    desk.write(stored(tensors, desk.folder / "adapter.safetensors"), "adapter.safetensors")
    desk.write(LORA + "weights: adapter.safetensors\n")
    err = desk.refuse().err
    assert f"E402 the tensor '{NAMES[0]}.A' is missing\n  expected [8, 32]" in err
    assert f"E403 no module of the spec takes the tensor '{NAMES[0]}.a'\n  hint: did you mean '{NAMES[0]}." in err
    assert "E403 no module of the spec takes the tensor 'lora.decoder.layers.0.attention.query.A'" in err
    assert f"E404 the tensor '{NAMES[0]}.B' is [32, 4]\n  expected [32, 8]" in err
    assert f"E404 the tensor '{NAMES[1]}.B' holds int32\n  expected a float type" in err
    assert err.endswith("5 errors\n")


@pytest.mark.xfail(reason="weights.load_tensors does not look whether values are finite", strict=True)
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
    assert f"E406 the weights '{path}' lie outside the spec's folder" in err
    assert re.match(r"spec.yaml.*  weights\n", err)
    assert "hint: give the file by --weights" in err


# The model.


def sharded(folder: Path, index: object = None, cut: int | None = None, lost: bool = False) -> None:
    """Split a model's checkpoint into two shards, with an index of one's own."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    two = folder / "two.safetensors"
    if cut is not None:
        two.write_bytes(two.read_bytes()[:cut])
    if lost:
        two.unlink()
    mapping = {name: file for file, part in parts.items() for name in part}
    text = (
        json.dumps({"weight_map": mapping | index} if index is None or isinstance(index, dict) else index)
        if index
        else ""
    )
    (folder / "model.safetensors.index.json").write_text(text or json.dumps({"weight_map": mapping}))


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def shards(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: sharded(folder, **changes)


def only(name: str, content: bytes) -> Callable[[Path], object]:
    """A model folder with another file in place of its checkpoint."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


def tensor_free_pickle(value: object) -> bytes:
    import io

    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


INDEX = "model.safetensors.index.json"
MODELS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "no_config": (
        lambda f: (f / "config.json").unlink(),
        "model/config.json\n  E502 cannot read the model's config",
        "a model folder",
        "",
    ),
    "no_weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model\n  E503 the model folder holds no weights",
        "model.safetensors",
        "",
    ),
    "config_text": (
        replaced("config.json", b"{hello"),
        "model/config.json\n  E502 the model's config is not JSON",
        "line 1",
        "",
    ),
    "config_list": (replaced("config.json", b"[1]"), "model/config.json\n  E502", "a key 'model_type'", ""),
    "config_bytes": (replaced("config.json", b"\xff\xfe"), "model/config.json\n  E502", "not JSON", ""),
    "config_deep": (
        replaced("config.json", b"[" * 100_000),
        "model/config.json\n  E502",
        "JSON",
        "base.read_config: RecursionError",
    ),
    "weights_empty": (replaced("model.safetensors", b""), "model/model.safetensors\n  E503", "cut off", ""),
    "weights_text": (
        replaced("model.safetensors", b"x" * 99),
        "model/model.safetensors\n  E503",
        "no safetensors file",
        "",
    ),
    "weights_cut": (
        lambda f: os.truncate(f / "model.safetensors", 50_000),
        "model/model.safetensors\n  E503",
        "cut off before the end of",
        "",
    ),
    "shard_cut": (shards(cut=3000), "model/two.safetensors\n  E503", "cut off before the end of", ""),
    "shard_lost": (shards(lost=True), "model/two.safetensors\n  E503", "cannot read the file", ""),
    "index_parent": (
        shards(index={"x": "../x.safetensors"}),
        f"model/{INDEX}\n  E503",
        "'../x.safetensors' lies outside",
        "",
    ),
    "index_absolute": (shards(index={"x": "/etc/passwd"}), f"model/{INDEX}\n  E503", "'/etc/passwd' lies outside", ""),
    "index_lacks": (shards(index={"x": "one.safetensors"}), f"model/{INDEX}\n  E503", "first 'x'", ""),
    "index_nul": (shards(index={"x": "a\0b"}), "E503", "", "checkpoint.open_checkpoint: ValueError"),
    "index_text": (only(INDEX, b"{"), f"model/{INDEX}\n  E503 the index", "a 'weight_map'", ""),
    "index_list": (only(INDEX, b"[]"), f"model/{INDEX}\n  E503 the index", "", "checkpoint.open_checkpoint: TypeError"),
    "index_deep": (
        only(INDEX, b"[" * 100_000),
        f"model/{INDEX}\n  E503 the index",
        "",
        "checkpoint.open_checkpoint: RecursionError",
    ),
    "pickle_empty": (
        only("pytorch_model.bin", b""),
        "model/pytorch_model.bin\n  E503",
        "",
        "base._checkpoint: IndexError",
    ),
    "pickle_evil": (
        only("pytorch_model.bin", pickle.dumps(Evil(), 2)),
        "model/pytorch_model.bin\n  E503",
        "plain tensors",
        "",
    ),
    "pickle_torch_evil": (
        only("pytorch_model.bin", tensor_free_pickle({"a": Evil()})),
        "model/pytorch_model.bin\n  E503",
        "plain tensors",
        "",
    ),
    "pickle_number": (
        only("pytorch_model.bin", tensor_free_pickle({"a": 3})),
        "E503",
        "",
        "base._checkpoint: AttributeError",
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", [marked(name, bug) for name, (_, _, _, bug) in MODELS.items()])
def test_model_folder_is_refused(desk: Any, name: str) -> None:
    change, start, words, _ = MODELS[name]
    change(desk.copy_model())
    err = re.sub(r"^ +\d+\.\d s .*\n", "", desk.refuse(model="model").err, flags=re.MULTILINE)
    assert start in err and words in err, err
    assert not (desk.folder / "pwned").exists()


CONFIGS = {
    "architecture_unknown": (
        {"architectures": ["BretModel"]},
        "no architecture 'BretModel'",
        "hint: did you mean 'BertModel'?",
    ),
    "architecture_no_model": (
        {"architectures": ["Trainer"]},
        "no architecture 'Trainer'",
        "a model class of transformers",
    ),
    "architecture_missing": (
        {"architectures": None},
        "names no architecture",
        "hint: give the class by --architecture",
    ),
    "model_type_missing": ({"model_type": None}, "names no model type", "a key 'model_type'"),
    "model_type_unknown": ({"model_type": "brett"}, "does not describe a BertForSequenceClassification", "brett"),
    "size_wrong": ({"hidden_size": 33}, "does not describe a BertForSequenceClassification", "33"),
    "size_text": ({"hidden_size": "x"}, "does not describe a BertForSequenceClassification", "hidden_size"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_refused(desk: Any, name: str) -> None:
    change, message, words = CONFIGS[name]
    desk.copy_model(**change)
    err = desk.refuse(model="model").err
    assert re.search(rf"model/config.json.*\n  E502 .*{re.escape(message)}", err), err
    assert words in err


def test_architecture_of_another_type(desk: Any) -> None:
    desk.copy_model(architectures=[3])
    if "E502" not in desk.compile(model="model").err:
        pytest.xfail("export.export_graph: an architecture that is no text is a TypeError")


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


@pytest.mark.parametrize(
    "name", [marked(n, "artifact.staged passes this OSError on, which ends as a bug of ours") for n in PATHS]
)
def test_output_cannot_be_made(desk: Any, name: str) -> None:
    assert "E60" in desk.refuse(out=PATHS[name]).err


@pytest.mark.parametrize(
    "target", ["empty", "artifact", marked("nowhere", "artifact._exchange: the link is renamed, not where it leads")]
)
def test_output_that_is_a_link(desk: Any, target: str) -> None:
    """The artifact goes where the link leads, and the link stays."""
    if target == "artifact":
        assert desk.compile(out="there").code == 0
    elif target == "empty":
        (desk.folder / "there").mkdir()
    (desk.folder / "out").symlink_to("there")
    before = sorted(p.name for p in desk.folder.iterdir())
    outcome = desk.compile()
    after = sorted(p.name for p in desk.folder.iterdir())
    if target != "nowhere" and after != sorted({*before, "there"}):
        pytest.xfail("artifact._exchange: the link is exchanged, and lies beside the artifact under a staging name")
    assert outcome.code == 0, outcome.err
    assert (desk.folder / "out").is_symlink()
    assert (desk.folder / "there" / "pelt.json").is_file()
