"""Profiles with fewer labels than there is room for: each answers as a model of its own labels does, and the others are
far below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import transformers
from profiled import CPU, LORA, Array, Folder, given

import peltc
from peltc.compiler.files.labels import FAR, LABELS
from peltc.runtime.commands.cli import run
from peltc.runtime.running.form import END, write_profile
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

pytestmark = pytest.mark.xdist_group("labels")

NAMES = ["anger", "doubt", "fear", "joy", "trust"]
ATTACH = [LORA[0], {"method": "replace", "at": "head"}]


def spec_of(labels: Any, attach: list[dict[str, Any]] = ATTACH, **deploy: Any) -> Any:
    content: dict[str, Any] = {"pelt": 1, "name": "first", "model": {"labels": labels}, "attach": attach}
    return load_spec({**content, **({"deploy": deploy} if deploy else {})})


def trained(base: Path, count: int, seed: int) -> Any:
    """A torch model of so many labels, its modules at random values."""
    model = transformers.BertForSequenceClassification.from_pretrained(
        base, num_labels=count, ignore_mismatched_sizes=True,
        id2label=dict(enumerate(NAMES[:count])), label2id={n: i for i, n in enumerate(NAMES[:count])},
    )  # fmt: skip
    peltc.attach(model, spec_of(NAMES[:count]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    return model.eval()


def answers(model: Any) -> Array:
    with torch.no_grad():
        found: Array = model(**{name: torch.tensor(value) for name, value in given("bert").items()}).logits.numpy()
    return found


@pytest.fixture(scope="module")
def adapters(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Array]]:
    """Adapters by their number of labels, and what their torch models answer."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for count in (1, 3, 5):
        model = trained(model_folder("bert"), count, count)
        model.save_adapter(folder / f"{count}.safetensors")
        found[count] = folder / f"{count}.safetensors", answers(model)
    return found


@pytest.fixture(scope="module")
def bank(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "out"
    peltc.compile(spec_of(NAMES, mode="bank", fewer_labels=True), model_folder("bert"), out)
    return out


@pytest.mark.parametrize("mode", ["swappable", "bank"])
def test_each_answers_as_a_model_of_its_labels(
    mode: str, adapters: dict[int, tuple[Path, Array]], model_folder: Folder, tmp_path: Path
) -> None:
    spec = spec_of(NAMES, mode=mode, fewer_labels=True)
    manifest = peltc.compile(spec, model_folder("bert"), tmp_path / "out", adapters[5][0])  # verified
    assert manifest["profiles"]["labels"]["names"] == NAMES
    session = peltc.Session(tmp_path / "out", CPU)
    for count, (file, expected) in adapters.items():
        assert run(["link", str(tmp_path / "out"), "--weights", str(file), "-o", str(tmp_path / "p.onnx_adapter")]) == 0
        session.add_profile(str(count), tmp_path / "p.onnx_adapter")
        found = session(profile=str(count), **given("bert"))["logits"]
        assert found.shape == (2, 5)
        assert np.abs(found[:, :count] - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()
        assert (found[:, count:] < FAR / 2).all() and np.isfinite(found).all()
        assert (np.exp(found[:, count:]) == 0).all()
        assert session.labels_of(str(count)) == NAMES[:count]
    assert session.labels_of(None) == session.labels == NAMES
    with pytest.raises(PeltError, match="E626 there is no profile 'x'"):
        session.labels_of("x")
    if mode == "bank":
        mixed = session(profile=["3", "1"], **given("bert"))["logits"]
        alone = [session(profile=name, **given("bert"))["logits"] for name in ("3", "1")]
        assert np.abs(mixed - np.stack([alone[0][0], alone[1][1]])).max() <= 1e-6
    with pytest.raises(PeltError, match=r"E627 .* the checkpoint lacks 'classifier.weight', which profiles bring"):
        session(**given("bert"))
    session.remove_profile("3")
    assert session.profiles == ["1", "5"]


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_peft(bank: Path, model_folder: Folder, tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(
        model_folder("bert"), num_labels=3, ignore_mismatched_sizes=True
    )
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4, lora_alpha=16,
                             init_lora_weights=False)  # fmt: skip
    live = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "classifier" in name:
                parameter.normal_(0, 0.2)
    live.save_pretrained(tmp_path / "adapter")
    session = peltc.Session(bank, CPU)
    session.add_profile("theirs", peltc.link(bank, tmp_path / "adapter", labels=["x", "y", "z"]))
    expected, found = answers(live), session(profile="theirs", **given("bert"))["logits"]
    assert np.abs(found[:, :3] - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()
    assert session.labels_of("theirs") == ["x", "y", "z"]
    session.add_profile("numbered", peltc.link(bank, tmp_path / "adapter"))
    assert session.labels_of("numbered") == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_the_names_go_with_the_file(bank: Path, adapters: dict[int, tuple[Path, Array]], tmp_path: Path) -> None:
    """Through a store, and ONNX Runtime reads the tensors of the same file."""
    linked, file = peltc.link(bank, adapters[3][0]), tmp_path / "p.onnx_adapter"
    record = json.loads((bank / "pelt.json").read_text())["profiles"]
    write_profile(file, linked, record["fingerprint"])
    theirs = ort.AdapterFormat.read_adapter(str(file)).get_parameters()
    assert set(theirs) == set(record["inputs"]) == set(linked) - {LABELS}
    assert all(np.array_equal(value.numpy(), linked[name]) for name, value in theirs.items())
    ort.LoraAdapter().Load(str(file))
    peltc.export_triton(bank, tmp_path / "repository", {"mine": linked})  # of which the names are no part
    store = peltc.ProfileStore(tmp_path / "store", bank)
    store.put("acme/linked", file)
    store.put("acme/arrays", linked)
    store.put("acme/adapter", adapters[3][0])
    session = peltc.Session(bank, CPU, store=tmp_path / "store", resident=1)
    answers = [session(profile=f"acme/{name}", **given("bert"))["logits"] for name in ("linked", "arrays", "adapter")]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    for name in ("linked", "arrays", "adapter"):
        assert session.labels_of(f"acme/{name}") == NAMES[:3]


def test_wrong_files(bank: Path, adapters: dict[int, tuple[Path, Array]], tmp_path: Path) -> None:
    linked, file, session = peltc.link(bank, adapters[3][0]), tmp_path / "p.onnx_adapter", peltc.Session(bank, CPU)
    record = json.loads((bank / "pelt.json").read_text())["profiles"]
    write_profile(file, linked, record["fingerprint"])
    whole = file.read_bytes()
    names = json.dumps(NAMES[:3]).encode()
    assert names in whole
    for broken in (
        whole.replace(names, names.replace(b'"fear"', b'"fe"r')),
        whole[: -len(END) - 8] + (1 << 40).to_bytes(8, "little") + END,
        whole[: -len(END) - 8] + bytes(8) + END,
        whole.replace(names, b"[" * len(names)),
        whole.replace(names, json.dumps(NAMES[:2]).encode().ljust(len(names))),
    ):
        assert broken != whole
        file.write_bytes(broken)
        with pytest.raises(PeltError, match="E625"):
            session.add_profile("x", file)
    hiding = record["labels"]["input"]
    for values in ([0, FAR, 0, FAR, FAR], [FAR] * 5, [0, 0, 0, 1, 1], [0, 0, 0, np.nan, FAR]):
        with pytest.raises(PeltError, match=r"E625 .* does not say in .* which labels it has"):
            session.add_profile("x", {**linked, hiding: np.array(values, np.float32)})
    assert session.profiles == []


def test_refused(bank: Path, adapters: dict[int, tuple[Path, Array]], model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("bert")
    with pytest.raises(PeltError, match="E207 profiles may have fewer labels, and there are none"):
        peltc.compile(spec_of(NAMES, fewer_labels=True), base, tmp_path / "no", adapters[5][0])
    with pytest.raises(PeltError, match="E208 profiles cannot have fewer labels: no attachment is at the model's head"):
        headless = {"pelt": 1, "attach": LORA, "deploy": {"mode": "bank", "fewer_labels": True}}
        peltc.compile(headless, base, tmp_path / "no")
    fixed = [LORA[0], {"method": "replace", "at": "head", "mode": "static"}]
    with pytest.raises(PeltError, match=r"E208 .*no attachment is at the model's head"):
        peltc.compile(spec_of(NAMES, fixed, mode="bank", fewer_labels=True), base, tmp_path / "no", adapters[5][0])
    own = {
        "title": "of all labels",
        "source": "a test",
        "site": "linear",
        "parameters": {"m": {"shape": ["out"], "init": "ones"}},
        "output": "softmax(y) * m",
    }
    content = {"pelt": 1, "methods": {"mixed": own}, "attach": [{"method": "mixed", "at": "head"}],
               "deploy": {"mode": "bank", "fewer_labels": True}}  # fmt: skip
    with pytest.raises(PeltError, match=r"E208 .*what 'mixed' makes of one label depends on the others"):
        peltc.compile(content, base, tmp_path / "no")
    peltc.compile(spec_of(3, mode="bank", fewer_labels=True), base, tmp_path / "small", verify=False)
    with pytest.raises(PeltError, match="E412 the adapter has 5 labels, and the artifact has room for 3"):
        peltc.link(tmp_path / "small", adapters[5][0])
    for labels in (["a"], ["a", "a", "b"], "abc", [1, 2, 3]):
        with pytest.raises(PeltError, match="E216 the labels of a profile"):
            peltc.link(bank, adapters[3][0], labels=labels)  # type: ignore[arg-type]
    peltc.compile(spec_of(NAMES, mode="bank"), base, tmp_path / "plain", adapters[5][0], verify=False)
    with pytest.raises(PeltError, match=r"E408 .* bias = \[3\] in .replace."):
        peltc.link(tmp_path / "plain", adapters[3][0])
    with pytest.raises(PeltError, match="E216 the labels of a profile"):
        peltc.link(tmp_path / "plain", adapters[5][0], labels=NAMES)
