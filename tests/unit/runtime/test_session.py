"""A session says where it runs, which classes its numbers are of, and what it was not given."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import peltc
from peltc.spec.diagnostics import PeltError
from peltc.spec.packages import EXTRAS, PACKAGES

ROOT = Path(__file__).parents[3]

SPEC: dict[str, Any] = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], cache: Path) -> Path:
    """A tiny BERT of two classes, compiled."""
    folder = tmp_path_factory.mktemp("session") / "out"
    peltc.compile(SPEC, model_folder("bert"), folder, verify=False)
    return folder


class Elsewhere(onnxruntime.InferenceSession):
    """ONNX Runtime's GPU build on a machine without CUDA: it opens the graph on the CPU, and says so in a list only."""

    def __init__(self, model: Any, options: Any = None, providers: Any = None, **rest: Any):
        super().__init__(model, options, providers=["CPUExecutionProvider"], **rest)


@pytest.fixture
def built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Elsewhere)


@pytest.mark.usefixtures("built_for_cuda")
def test_a_provider_that_was_asked_for_is_there_or_nothing_opens(out: Path) -> None:
    with pytest.raises(PeltError) as caught:
        peltc.Session(out, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert str(caught.value) == (
        f"{out}\n  E604 CUDAExecutionProvider cannot be used on this machine, though this ONNX Runtime was built with "
        "it\n  expected one of: CPUExecutionProvider"
        "\n  hint: the GPU build needs the GPU, its driver, and the libraries of CUDA and cuDNN that fit it"
    )


class Refusing(onnxruntime.InferenceSession):
    """A provider that raises when its libraries are not there, as TensorRT's does."""

    def __init__(self, model: Any, options: Any = None, providers: Any = None, **rest: Any):
        if providers != ["CPUExecutionProvider"]:
            raise RuntimeError("/src/a.cc:7 void f() Please install TensorRT libraries")
        super().__init__(model, options, providers=providers, **rest)


@pytest.mark.usefixtures("built_for_cuda")
def test_a_provider_that_raises_is_at_fault_where_the_cpu_opens_the_graph(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Refusing)
    with pytest.raises(PeltError, match=r"E604 the artifact cannot be opened on CUDAEx.*: .*Please install TensorRT"):
        peltc.Session(out, providers=["CUDAExecutionProvider"])
    broken = tmp_path / "out"
    shutil.copytree(out, broken)
    (broken / "model.onnx").write_bytes(b"none")
    with pytest.raises(PeltError, match=r"E605 ONNX Runtime cannot open the artifact"):
        peltc.Session(broken, providers=["CUDAExecutionProvider"])


@pytest.mark.usefixtures("built_for_cuda")
def test_who_asks_for_none_is_told_where_it_runs(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("peltc.runtime.running.device._has_gpu", lambda: True)
    with caplog.at_level("WARNING", "peltc"):
        session = peltc.Session(out)
    assert "CUDAExecutionProvider cannot be used on this machine" in caplog.text
    assert session.providers == ["CPUExecutionProvider"]
    assert repr(session).endswith(": CPUExecutionProvider>")


def test_providers_are_a_list(out: Path) -> None:
    with pytest.raises(PeltError, match=r'E216 (?s:.*)hint: providers=\["CPUExecutionProvider"\]'):
        peltc.Session(out, providers="CPUExecutionProvider")


def with_tokenizer(session: Any, folder: Path, saved: bool = True) -> Any:
    """The session with a tokenizer of the words w0, w1, ... in brackets, whose file says to cut at 8 tokens."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)])
    if saved:
        tokenizer.enable_truncation(8, direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    session.folder = folder
    return session


def test_texts_are_cut_only_where_it_is_asked_for(out: Path, tmp_path: Path) -> None:
    session = with_tokenizer(peltc.Session(out), tmp_path)
    text = " ".join(f"w{i}" for i in range(3, 93))
    whole = session.tokenize(text)
    assert whole["input_ids"].tolist() == [[1, *range(3, 93), 2]]
    with pytest.raises(PeltError, match="E616 a text of 92 tokens"):
        session(**whole)
    cut = session.tokenize([text, "w3"], max_length=6)
    assert cut["input_ids"].tolist() == [[1, 89, 90, 91, 92, 2], [1, 3, 2, 0, 0, 0]]
    assert cut["attention_mask"].sum() == 9
    session = with_tokenizer(session, tmp_path, saved=False)
    assert session.tokenize(text, max_length=6)["input_ids"].tolist() == [[1, 3, 4, 5, 6, 2]]


@pytest.mark.parametrize("length", [0, 2, -1, True, "8", 8.0])
def test_a_length_leaves_room_for_a_text(out: Path, tmp_path: Path, length: Any) -> None:
    session = with_tokenizer(peltc.Session(out), tmp_path)
    with pytest.raises(PeltError, match=r"E216 .*max_length(?s:.*)at least 3, since the tokenizer puts 2 around"):
        session.tokenize("w3", max_length=length)


@pytest.mark.parametrize(
    ("named", "labels"),
    [
        ({"1": "good", "0": "bad"}, ["bad", "good"]),
        ({"0": "bad", "1": "fair", "2": "good"}, None),
        ({"0": "bad", "5": "good"}, None),
        (None, None),
    ],
    ids=["names", "names of another head", "a gap", "no names"],
)
def test_classes_have_names(out: Path, tmp_path: Path, named: Any, labels: Any) -> None:
    session = peltc.Session(out)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": named} if named else {}))
    session.folder = tmp_path
    assert session.labels == labels


def test_names_are_those_of_the_spec(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    spec = {**SPEC, "model": {"labels": ["bad", "good"]}}
    peltc.compile(spec, model_folder("bert"), tmp_path / "out", verify=False)
    assert peltc.Session(tmp_path / "out").labels == ["bad", "good"]


@pytest.mark.parametrize("given", ["a text", ["a text"], [[5, 6]]])
def test_what_is_given_without_a_name_is_refused(out: Path, given: Any) -> None:
    with pytest.raises(PeltError) as caught:
        peltc.Session(out)(given)
    assert "E216 what the model reads is given as" in str(caught.value)
    assert "expected inputs by name: input_ids, attention_mask" in str(caught.value)
    assert "hint: session(**session.tokenize(text))" in str(caught.value)


def test_inputs_in_a_mapping_are_spread(out: Path) -> None:
    with pytest.raises(PeltError, match=r"hint: session\(\*\*inputs\)"):
        peltc.Session(out)({"input_ids": [[5, 6]]})


@pytest.mark.parametrize(("ids", "code"), [([5, 6], "E606"), ("a text", "E614"), (["a text"], "E614")])
def test_one_text_is_a_batch_of_one(out: Path, ids: Any, code: str) -> None:
    with pytest.raises(PeltError, match=code + r"(?s:.*)hint: .*session\(\*\*session.tokenize\(text\)\)"):
        peltc.Session(out)(input_ids=ids)


def without(packages: set[str], program: str) -> str:
    """What a program prints in a Python in which packages cannot be imported."""
    block = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
    done = subprocess.run([sys.executable, "-c", block + program], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SERVING = {"onnxruntime", "numpy", "ml_dtypes", "tokenizers"}
"""What docs/artifact.md installs beside peltc."""


def test_a_session_needs_little(out: Path, tmp_path: Path) -> None:
    """It is called, and texts are tokenized, where only what the document names can be imported; the rest is named."""
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    with_tokenizer(peltc.Session(out), folder)
    said = without(
        {*PACKAGES} - SERVING,
        f"""
import peltc
session = peltc.Session({str(folder)!r})
print(session(**session.tokenize(["w3 w4", "w5"]))["logits"].shape, session.labels)
for call in (lambda: session.generate([[1]]), lambda: peltc.attach, lambda: peltc.load_spec):
    try:
        call()
    except peltc.PeltError as error:
        print(str(error).splitlines()[0])
""",
    )
    assert said.splitlines() == [
        "(2, 2) None",
        "E623 generation needs the package 'transformers', which is not installed",
        "E623 peltc.attach needs the package 'yaml', which is not installed",
        "E623 peltc.load_spec needs the package 'yaml', which is not installed",
    ]
    install = re.search(r"--no-deps (/dist.*)", (ROOT / "docs/artifact.md").read_text(encoding="utf-8"))
    assert install is not None and set(install[1].split()) == SERVING | {"/dist/peltc-*.whl"}


@pytest.mark.parametrize(
    ("package", "call", "said"),
    [
        ("tokenizers", "peltc.Session({out!r}).tokenize('w3')", "E623 Session.tokenize needs the package 'tokenizers'"),
        ("onnxruntime", "peltc.Session({out!r})", "E623 a session needs the package 'onnxruntime'"),
    ],
)
def test_a_package_that_is_missing_is_named(out: Path, tmp_path: Path, package: str, call: str, said: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    with_tokenizer(peltc.Session(out), folder)
    call = call.format(out=str(folder))
    program = f"import peltc\ntry:\n    {call}\nexcept peltc.PeltError as error:\n    print(error)"
    found = without({package}, program)
    assert found.startswith(said) and f"hint: pip install {package}" in found


@pytest.mark.parametrize(
    ("package", "arguments", "install"),
    [
        ("click", ["--help"], "click"),
        ("tqdm", ["sites", "nowhere"], "tqdm"),
        ("uvicorn", ["serve", "nowhere"], "'peltc[serve]'"),
    ],
)
def test_the_command_line_names_what_is_missing(package: str, arguments: list[str], install: str) -> None:
    program = f"""
import io, contextlib
from peltc.__main__ import main
sys.argv = ["pelt", *{arguments!r}]
said = io.StringIO()
try:
    with contextlib.redirect_stderr(said):
        main()
except SystemExit as end:
    print(end.code, said.getvalue())
"""
    found = without({package}, program)
    assert f"needs the package '{package}', which is not installed" in found and f"pip install {install}" in found


def test_packages_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[>=]", line)[0] for line in project["dependencies"]} - {"onnxruntime-gpu"}
    extras = {extra: {re.split(r"[>=]", line)[0] for line in project["optional-dependencies"][extra]} - {"peltc[serve]"}
              for extra in ("serve", "ray", "senses")}  # fmt: skip
    assert set(PACKAGES.values()) == named.union(*extras.values()) | {"tokenizers"}, (
        "tokenizers comes with transformers"
    )
    for extra, packages in extras.items():
        assert {PACKAGES[name] for name, its in EXTRAS.items() if its == extra} == packages
