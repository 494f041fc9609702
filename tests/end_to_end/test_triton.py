"""An artifact as a model repository of Triton: what it answers is what a session answers, to the bit, for each profile
and in mixed batches; what is wrong with a request is refused alone; exports follow each other without wrong answers."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from safetensors.numpy import load_file
from torch import nn
from transformers.generation import logits_process
from triton_served import Asked, Refused, StandIn, Triton
from tritonclient.grpc import model_config_pb2 as messages

import peltc
from peltc.compiler.linking.linker import Linker
from peltc.runtime.building.compile import plan_for
from peltc.runtime.commands.cli import run
from peltc.runtime.triton import gate, loop
from peltc.runtime.triton.earlier import RECORD
from peltc.runtime.triton.rows import DATA, Numbers
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
CPU = ["CPUExecutionProvider"]
NAMES = ["acme/ada", "acme/bob", "zoe"]
SPEC: dict[str, Any] = {"pelt": 1, "name": "toy", "attach": [{"method": "lora", "at": "attention.*", "r": 4}]}
IDS = np.array([[5, 6, 7, 8, 9], [4, 9, 7, 3, 2], [11, 12, 13, 14, 15], [5, 6, 7, 8, 9]])
ABSENT = pytest.mark.skipif("PELT_TRITON" not in os.environ, reason="PELT_TRITON has no command of a Triton server")
SERVERS = ["stand-in", pytest.param("triton", marks=ABSENT)]
"""The variable PELT_TRITON says how Triton is started here: `tritonserver`, in an image that has it."""


class Headset(nn.Module):
    """A model of signals, as of an EEG: [B, T, channels] in, scores of three states out."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.first = nn.Linear(6, 32), nn.LayerNorm(32)
        self.query, self.key, self.value, self.output = (nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 3)

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        stream = self.first(self.patch(signals))
        q, k, v = (part(stream).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.query, self.key, self.value))
        joined = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
        return self.head((stream + self.output(joined.transpose(1, 2).flatten(2))).mean(1))


def drawn(out: Path, names: list[str] = NAMES, seed: int = 0) -> dict[str, Mapping[str, Array]]:
    """Profiles of an artifact with random values."""
    linker, draw = Linker(out), np.random.default_rng(seed)
    return {name: linker.link({n: draw.normal(0, 0.3, t.shape).astype(np.float32)
                               for n, t in linker.plan.tensors.items()}) for name in names}  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts by name: a classifier and a decoder with banks, a module of signals with one."""
    folder = tmp_path_factory.mktemp("triton")
    named = {**SPEC, "model": {"labels": ["bad", "good"]}}
    peltc.compile(named, model_folder("bert"), folder / "toy", mode="bank", verify=False)
    decoder = {**SPEC, "name": "teller", "attach": [{"method": "lora", "at": "attention.query", "r": 4}]}
    peltc.compile(decoder, model_folder("llama"), folder / "teller", mode="bank", generation=True, verify=False)
    torch.manual_seed(0)
    peltc.compile({**decoder, "name": "headset"}, Headset().eval(), folder / "headset", mode="bank", verify=False,
                  example_inputs={"signals": torch.randn(2, 9, 6)})  # fmt: skip
    return {name: folder / name for name in ("toy", "teller", "headset")}


@pytest.fixture(scope="module")
def profiles(artifacts: dict[str, Path]) -> dict[str, dict[str, Mapping[str, Array]]]:
    return {name: drawn(out) for name, out in artifacts.items()}


@pytest.fixture(scope="module")
def sessions(artifacts: Any, profiles: Any) -> dict[str, peltc.Session]:
    found = {name: peltc.Session(out, CPU) for name, out in artifacts.items()}
    for name, session in found.items():
        for each, arrays in profiles[name].items():
            session.add_profile(each, arrays)
    return found


def serving(kind: str, repositories: list[Path], folder: Path) -> Any:
    return (
        StandIn(repositories) if kind == "stand-in" else Triton(os.environ["PELT_TRITON"], repositories, folder / "log")
    )


@pytest.fixture(scope="module")
def repositories(artifacts: Any, profiles: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("repositories")
    for name, out in artifacts.items():
        peltc.export_triton(out, folder / name, profiles[name])
    return {name: folder / name for name in artifacts}


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, repositories: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    found = serving(request.param, [*repositories.values()], tmp_path_factory.mktemp("server"))
    yield found
    found.close()


def who(*names: str) -> Array:
    return np.array([[name] for name in names], object)


def test_each_row_is_answered_as_its_profile_to_the_bit(server: Any, sessions: Any) -> None:
    for names in (["acme/ada", "zoe", "", "acme/bob"], ["zoe"] * 4, [""] * 4):
        expected = sessions["toy"](input_ids=IDS, profile=[name or None for name in names])["logits"]
        assert np.array_equal(server.ask("toy", {"input_ids": IDS, "profile_name": who(*names)})["logits"], expected)
    bare = server.ask("toy", {"input_ids": IDS})["logits"]  # nobody is named, and no mask is given
    assert np.array_equal(bare, sessions["toy"](input_ids=IDS)["logits"])
    assert np.array_equal(bare, expected)
    assert not np.array_equal(bare, server.ask("toy", {"input_ids": IDS, "profile_name": who(*["zoe"] * 4)})["logits"])
    mask = np.array([[1, 1, 1, 0, 0]] * 4)
    given = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": IDS % 2}
    expected = sessions["toy"](**given, profile="zoe")["logits"]
    assert np.array_equal(server.ask("toy", {**given, "profile_name": who(*["zoe"] * 4)})["logits"], expected)


def test_what_is_wrong_with_a_request_is_said(server: Any) -> None:
    for given, said in (
        ({"input_ids": IDS + 95}, "E615 the input 'input_ids' holds 100"),
        ({"input_ids": np.zeros((1, 70), np.int64)}, "E616 a text of 70 tokens"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :3]}, "E613 'input_ids' and 'attention_mask' differ"),
        ({"input_ids": IDS, "profile_name": who("zoe", "zoe", "acme/eve", "")}, "E626 there is no profile 'acme/eve'"),
        ({"input_ids": IDS, "profile_name": who("zoe")}, "batch size|texts for"),
        ({"attention_mask": IDS}, "input_ids|output is not set"),  # which Triton says in its own words
        ({"input_ids": IDS, "other": IDS}, "other"),
        ({"input_ids": IDS.astype(np.float32)}, "input_ids"),
    ):
        with pytest.raises(Refused, match=said):
            server.ask("toy", given)
    with pytest.raises(Refused):  # numbers of rows are told by what they belong to
        server.ask("toy_model", {"input_ids": IDS, "attention_mask": IDS, "token_type_ids": IDS, "profile": IDS[:, :1]})


def test_a_module_of_ones_own_shares_its_base(server: Any, sessions: Any) -> None:
    """A model of signals: nothing of it is ids, so that the gate has names alone, and one is said for each."""
    signals = np.random.default_rng(1).normal(size=(3, 11, 6)).astype(np.float32)
    names = ["zoe", "", "acme/ada"]
    expected = sessions["headset"](signals=signals, profile=[name or None for name in names])
    found = server.ask("headset", {"signals": signals, "profile_name": who(*names)})
    assert {*found} == {*expected} == {"output"}
    assert np.array_equal(found["output"], expected["output"]) and np.ptp(found["output"], axis=0).max() > 1e-2
    with pytest.raises(Refused, match="profile_name"):
        server.ask("headset", {"signals": signals})


def asked(ids: list[int], **more: Any) -> dict[str, Array]:
    """A request for a text."""
    kinds = {"temperature": np.float32, "top_p": np.float32, "stream": np.bool_, "profile_name": object}
    return {"input_ids": np.array(ids), **{n: np.array([v], kinds.get(n, np.int64)) for n, v in more.items()}}


@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_text_is_generated_as_by_a_session(server: Any, sessions: Any, name: str | None) -> None:
    for ids in ([5, 6, 7], [9]):
        whole = sessions["teller"].generate([ids], profile=name, max_new_tokens=7)[0, len(ids) :].tolist()
        given = asked(ids, max_new_tokens=7, profile_name=name or "")
        assert [token for one in server.stream("teller_generate", given) for token in one["tokens"]] == whole
        (once,) = server.stream("teller_generate", {**given, "stream": np.array([False])})
        assert once["tokens"].tolist() == whole


def test_a_text_that_is_drawn_is_the_same_again(server: Any) -> None:
    given = asked([5, 6], max_new_tokens=20, temperature=2.0, top_k=50, top_p=0.95, seed=3, stream=False)
    first, second = (server.stream("teller_generate", given)[0]["tokens"].tolist() for _ in range(2))
    assert first == second
    assert first != server.stream("teller_generate", {**given, "seed": np.array([4])})[0]["tokens"].tolist()
    greedy = {**given, "temperature": np.array([0], np.float32)}
    assert first != server.stream("teller_generate", greedy)[0]["tokens"].tolist()


def test_what_is_wrong_with_a_text_is_said(server: Any) -> None:
    for given, said in (
        (asked([5, 100]), "E615 the input 'input_ids' holds 100"),
        (asked([5], profile_name="acme/eve"), "E626 there is no profile 'acme/eve'"),
        (asked([5], max_new_tokens=5000), "E616"),
        (asked([5], max_new_tokens=0), "E606 'max_new_tokens' is 0"),
        (asked([5], temperature=-1.0), "E606 'temperature'"),
        (asked([5], temperature=1.0, top_p=0.0), "E606 'temperature'"),
    ):
        with pytest.raises(Refused, match=said):
            server.stream("teller_generate", given)


def test_a_text_ends_when_nobody_listens(repositories: Any) -> None:
    """And no more are generated at once than were said."""
    model = StandIn([repositories["teller"]]).models["teller_generate"]
    for cancelled, queue, tokens, wrong in ((False, 512, 5, 0), (True, 512, 0, 0), (False, 0, 0, 1)):
        one = Asked(asked([5, 6], max_new_tokens=5))
        one.sender.cancelled, model.python.about["queue"] = cancelled, queue
        asyncio.run(model.python.execute([one]))
        assert one.sender.done and sum(response.has_error() for response in one.sender.sent) == wrong
        assert len(one.sender.sent) == tokens + wrong
    assert "E803" in one.sender.sent[0].error().message()


@pytest.mark.parametrize(("k", "p", "t"), [(0, 1.0, 1.0), (5, 1.0, 0.7), (0, 0.6, 1.5), (7, 0.8, 1.0), (1, 0.1, 3.0)])
def test_drawing_is_that_of_transformers(k: int, p: float, t: float) -> None:
    """The shares of tokens are those that its processors of logits leave."""
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32)
    chain = [logits_process.TemperatureLogitsWarper(t)]
    chain += [logits_process.TopKLogitsWarper(k)] if k else []
    chain += [logits_process.TopPLogitsWarper(p)] if p < 1 else []
    scores = torch.tensor(logits)[None].double()
    for one in chain:
        scores = one(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    found = loop.shares(logits.astype(np.float64) / t, k, p)
    assert np.abs(found - expected).max() < 1e-12 and ((found > 0) == (expected > 0)).all()
    draw = np.random.default_rng(1)
    counted = np.bincount([loop.pick(logits, t, k, p, draw) for _ in range(4000)], minlength=40) / 4000
    assert np.abs(counted - expected).max() < 0.05
    assert loop.pick(logits, 0.0, k, p, draw) == logits.argmax()


@pytest.mark.parametrize("kind", SERVERS)
def test_exports_follow_each_other(kind: str, artifacts: Any, tmp_path: Path) -> None:
    """A name keeps its row; rows of names that are gone keep their values until they are given anew."""
    out, place = artifacts["toy"], tmp_path / "repository"
    own = drawn(out, ["a", "b", "c", "d", "e"])
    session = peltc.Session(out, CPU)
    for name, arrays in own.items():
        session.add_profile(name, arrays)

    def export(names: str, **options: Any) -> dict[str, Any]:
        made = peltc.export_triton(out, place, {name: own[name] for name in names}, **options)
        assert [folder.name for folder in (place / "toy_model").iterdir() if folder.is_dir()] == [str(made.version)]
        found: dict[str, Any] = json.loads((place / RECORD).read_text())["profiles"]
        return {**found, "stamp": made.stamp}

    def right(name: str) -> bool:
        expected = session(input_ids=IDS[:1], profile=name)["logits"]
        return np.array_equal(server.ask("toy", {"input_ids": IDS[:1], "profile_name": who(name)})["logits"], expected)

    first = export("ab")
    server = serving(kind, [place], tmp_path)
    try:
        assert first["rows"] == {"a": 0, "b": 1} and right("a") and right("b")
        second = export("acd")
        assert (second["rows"], second["gone"], second["stamp"]) == ({"a": 0, "c": 2, "d": 3}, [1], first["stamp"])
        server.load("toy_model")  # the graph of this export, behind the names of the one before
        assert right("a") and right("b")
        server.load("toy")
        assert right("a") and right("c") and right("d")
        with pytest.raises(Refused, match="E626"):
            right("b")
        again = export("acde")
        assert again["rows"]["e"] == 4
        server.load("toy_gate")  # the names of this export, before the graph that has what they name
        session.add_profile("e", own["e"])
        mixed = server.ask("toy", {"input_ids": IDS, "profile_name": who("a", "e", "", "c")})["logits"]
        expected = session(input_ids=IDS, profile=["a", "e", None, "c"])["logits"]
        assert np.isnan(mixed[1]).all() and np.array_equal(mixed[[0, 2, 3]], expected[[0, 2, 3]])
        server.load("toy_model")
        mixed = server.ask("toy", {"input_ids": IDS, "profile_name": who("a", "e", "", "c")})["logits"]
        assert np.array_equal(mixed, expected)
        third = export("dc", renumber=True)
        assert third["rows"] == {"c": 0, "d": 1} and third["gone"] == [] and third["stamp"] != first["stamp"]
        server.load("toy")
        assert right("c") and right("d")
        assert export("c")["gone"] == [1]
    finally:
        server.close()


def test_numbers_are_not_taken_for_those_of_another_time() -> None:
    """Of another artifact, numbers have another stamp, and so has the first artifact when it comes again."""
    one = Numbers("").following(["a", "b"], "first")
    other = one.following(["b"], "second")
    again = other.following(["b", "a"], "first")
    assert len({one.stamp, other.stamp, again.stamp}) == 3
    assert one.following(["c", "b"], "first").rows == {"c": 2, "b": 1}
    assert one.following([], "first").following(["c"], "first").rows == {"c": 2}


def test_the_disk_has_the_base_once(artifacts: Any, repositories: Any, profiles: Any, tmp_path: Path) -> None:
    inode = (artifacts["teller"] / "model.safetensors").stat().st_ino
    found = [*repositories["teller"].glob("*/*/model.safetensors")]
    assert len(found) == 2 and {file.stat().st_ino for file in found} == {inode}
    assert len({file.stat().st_ino for file in repositories["teller"].glob(f"*/*/{DATA}")}) == 1
    made = peltc.export_triton(artifacts["teller"], tmp_path / "copied", profiles["teller"], copy=True)
    own = {file.stat().st_ino for file in (tmp_path / "copied").glob("*/*/model.safetensors")}
    assert len(own) == 1 and inode not in own and {*made.how.values()} == {"copy"}
    # A link of the other kind would not do: ONNX Runtime refuses it.
    weights = tmp_path / "copied/teller_model/1/model.safetensors"
    weights.unlink()
    weights.symlink_to(artifacts["teller"] / "model.safetensors")
    with pytest.raises(Exception, match=r"model\.safetensors|escapes|External data"):
        onnxruntime.InferenceSession(weights.with_name("model.onnx"), providers=CPU)


def test_configs_are_triton_s_own(artifacts: Any, profiles: Any, tmp_path: Path) -> None:
    tuned = peltc.TritonTuning(rows=8, delay=50, queue=9, instances=2, threads=3)
    peltc.export_triton(artifacts["toy"], tmp_path / "r", profiles["toy"], tuning=tuned)
    read = {folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())
            for folder in (tmp_path / "r").iterdir() if folder.is_dir()}  # fmt: skip
    assert {*read} == {"toy", "toy_gate", "toy_model"} and all(one.max_batch_size == 8 for one in read.values())
    graph = read["toy_model"]
    assert graph.backend == "onnxruntime" and graph.version_policy.latest.num_versions == 1
    assert graph.dynamic_batching.max_queue_delay_microseconds == 50
    assert graph.dynamic_batching.default_queue_policy.max_queue_size == 9
    assert [(g.kind, g.count) for g in graph.instance_group] == [(messages.ModelInstanceGroup.KIND_AUTO, 2)]
    assert graph.parameters["intra_op_thread_count"].string_value == "3"
    peltc.export_triton(artifacts["teller"], tmp_path / "t", profiles["teller"], tuning=tuned)
    step = text_format.Parse((tmp_path / "t/teller_decode/config.pbtxt").read_text(), messages.ModelConfig())
    assert not any(config.HasField("optimization") for config in (*read.values(), step))
    assert step.HasField("dynamic_batching") and step.dynamic_batching.max_queue_delay_microseconds == 0
    row = graph.input[-1]
    assert row.name.startswith("profile@") and row.HasField("reshape") and [*row.dims] == [1]
    assert [(o.name, [*o.dims], o.label_filename) for o in graph.output] == [("logits", [2], "logits.txt")]
    assert (tmp_path / "r/toy/logits.txt").read_text() == "bad\ngood\n"
    steps = read["toy"].ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["toy_gate", "toy_model"]
    assert {t.name: t.optional for t in read["toy"].input} == {
        "input_ids": False, "attention_mask": True, "token_type_ids": True, "profile_name": True}  # fmt: skip


@pytest.mark.parametrize("change", ["size", "type", "name", "axis", "optional"])
def test_the_stand_in_is_strict(repositories: Any, tmp_path: Path, change: str) -> None:
    """What Triton refuses to load, it refuses."""
    shutil.copytree(repositories["toy"], tmp_path / "r")
    file = tmp_path / "r/toy_model/config.pbtxt"
    config = text_format.Parse(file.read_text(), messages.ModelConfig())
    if change == "size":
        config.output[0].dims[0] = 3
    elif change == "type":
        config.input[0].data_type = messages.TYPE_FP32
    elif change == "name":
        config.input[0].name = "ids"
    elif change == "axis":
        config.max_batch_size = 0
    else:
        config.input[1].optional = True
    StandIn([tmp_path / "r"])
    file.write_text(text_format.MessageToString(config))
    with pytest.raises(Refused, match="toy_model"):
        StandIn([tmp_path / "r"])


def test_an_artifact_without_profiles(model_folder: Folder, tmp_path: Path, capsys: Any) -> None:
    peltc.compile(SPEC, model_folder("bert"), tmp_path / "out", verify=False)
    assert run(["export-triton", str(tmp_path / "out"), "-o", str(tmp_path / "r")]) == 0
    assert "toy_model, toy_gate, toy, version 1; 0 profiles" in capsys.readouterr().out
    found = StandIn([tmp_path / "r"]).ask("toy", {"input_ids": IDS})["logits"]
    assert np.array_equal(found, peltc.Session(tmp_path / "out", CPU)(input_ids=IDS)["logits"])
    assert run(["export-triton", str(tmp_path / "out"), "-o", str(tmp_path / "r"), "--profile", "a=b"]) == 1
    assert "E624" in capsys.readouterr().err
    assert run(["export-triton", str(tmp_path / "out"), "-o", str(tmp_path / "r"), "--profile", "a"]) == 2


def test_graphs_in_half_precision_are_kept_from_a_step_that_ends_the_server(
    model_folder: Folder, tmp_path: Path
) -> None:
    """ONNX Runtime's highest level of optimisation ends the process on this graph with a cache, in float16."""
    spec = {**SPEC, "deploy": {"mode": "static", "generation": True}}
    peltc.compile(spec, model_folder("gpt2", "float16"), tmp_path / "out", verify=False)
    peltc.export_triton(tmp_path / "out", tmp_path / "r")
    for name in ("toy_model", "toy_decode"):
        config = text_format.Parse((tmp_path / "r" / name / "config.pbtxt").read_text(), messages.ModelConfig())
        assert config.optimization.graph.level == 1
    found = StandIn([tmp_path / "r"]).ask("toy", {"input_ids": IDS})["logits"]
    assert found.dtype == np.float16
    expected = peltc.Session(tmp_path / "out", CPU)(input_ids=IDS)["logits"].astype(np.float32)
    assert np.abs(found - expected).max() <= 2.0**-9 * np.abs(expected).max()


def test_what_cannot_be_exported_leaves_what_is_there(artifacts: Any, profiles: Any, tmp_path: Path) -> None:
    out, place = artifacts["toy"], tmp_path / "repository"
    peltc.export_triton(out, place, profiles["toy"])
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}

    def refused(code: str, where: Path = place, artifact: Path = out, **options: Any) -> str:
        with pytest.raises(PeltError, match=code) as caught:
            peltc.export_triton(artifact, where, **options)
        assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before
        assert {entry.name for entry in tmp_path.iterdir()} <= {"repository", "other", "swappable"}
        return str(caught.value)

    broken = {**profiles["toy"]["zoe"], next(iter(profiles["toy"]["zoe"])): np.zeros((2, 2), np.float32)}
    refused("E625", profiles={"zoe": broken})
    refused("E216", profiles=3)
    refused("E631", profiles=tmp_path / "none.store")
    refused("E603", artifact=tmp_path)
    for key, value in (("name", "../../toy"), ("graphs", ["model", "../decode"]), ("graphs", [])):
        shutil.copytree(out, tmp_path / "other")
        manifest = json.loads((out / "pelt.json").read_text())
        (tmp_path / "other/pelt.json").write_text(json.dumps({**manifest, key: value}))
        refused("E603", artifact=tmp_path / "other")
        shutil.rmtree(tmp_path / "other")
    (place / "mine").mkdir()
    assert "mine" in refused("E601")
    (place / "mine").rmdir()
    for content in ("{}", "[", '{"version": "1"}', '{"version": 1, "models": [], "configs": {}, "profiles": {}}'):
        (place / RECORD).write_text(content)
        before[place / RECORD] = content.encode()
        refused("E603")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    refused("E601", where=tmp_path / "other")


def test_profiles_that_come_one_at_a_time_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    peltc.compile(SPEC, model_folder("bert"), tmp_path / "swappable", mode="swappable", verify=False)
    with pytest.raises(PeltError, match="E811"):
        peltc.export_triton(tmp_path / "swappable", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_store_and_the_artifact_s_own_profile(
    model_folder: Folder, artifacts: Any, profiles: Any, tmp_path: Path
) -> None:
    with peltc.ProfileStore(tmp_path / "store", artifacts["toy"]) as store:
        store.put_all({name: arrays for name, arrays in profiles["toy"].items() if "/" in name})
    made = peltc.export_triton(artifacts["toy"], tmp_path / "r", tmp_path / "store")
    assert made.profiles == 2
    file = load_file(artifacts["toy"] / "link/starts.safetensors")
    record = json.loads((tmp_path / "r" / RECORD).read_text())["profiles"]
    assert record["rows"] == {"acme/ada": 0, "acme/bob": 1}
    content = (tmp_path / "r/toy_model/1" / DATA).read_bytes()
    name = next(iter(file))
    assert content.count(profiles["toy"]["acme/bob"][name].tobytes()) == 1
    with pytest.raises(PeltError, match="E631"):
        peltc.export_triton(artifacts["teller"], tmp_path / "t", tmp_path / "store")
    peltc.compile(SPEC, model_folder("bert"), tmp_path / "own", mode="bank", verify=False,
                  weights=artifacts["toy"] / "adapter.safetensors")  # fmt: skip
    assert peltc.export_triton(tmp_path / "own", tmp_path / "o").profiles == 1


@pytest.mark.parametrize("module", [gate, loop])
def test_what_runs_in_the_server_needs_numpy_alone(module: Any) -> None:
    """And a Python that Triton's images have."""
    text = Path(module.__file__).read_text()
    tree = ast.parse(text, feature_version=(3, 10))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"__future__", "asyncio", "json", "pathlib", "typing", "numpy", "triton_python_backend_utils"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("what", ["encoder", "gates", "tokens"])
def test_the_loop_keeps_what_graphs_keep(kind: str, what: str, model_folder: Folder, tmp_path: Path) -> None:
    """An encoder's keys and values; gates of the text's beginning; caches that begin with a soft prompt."""
    if what == "encoder":
        base = models.save("t5", tmp_path / "base", decoder_start_token_id=0)
        peltc.compile(SPEC, base, tmp_path / "toy", mode="bank", generation=True, verify=False)
        own = drawn(tmp_path / "toy")
    else:
        more = {"gates": {"at": "prefill"}} if what == "gates" else {}
        one = {"recipe": "unipelt"} if what == "gates" else {"method": "prompt", "at": "embedding.word", "length": 3}
        spec = {**SPEC, "attach": [one], "deploy": {"generation": True, **more}}
        plan, _ = plan_for(load_spec(spec), model_folder("llama"))
        draw = np.random.default_rng(0)
        tensors = {n: draw.normal(0, 0.3, t.shape).astype(np.float32) for n, t in plan.tensors.items()}
        peltc.compile(spec, model_folder("llama"), tmp_path / "toy", tensors, verify=False)
        own = {}
    peltc.export_triton(tmp_path / "toy", tmp_path / "r", own or None)
    session = peltc.Session(tmp_path / "toy", CPU)
    for name, arrays in own.items():
        session.add_profile(name, arrays)
    server = serving(kind, [tmp_path / "r"], tmp_path)
    try:
        for name in own or [""]:
            for ids in ([5, 6, 7, 8], [9]):
                found = server.stream("toy_generate", asked(ids, max_new_tokens=6, profile_name=name))
                whole = session.generate([ids], profile=name or None, max_new_tokens=6)[0].tolist()
                assert [t for one in found for t in one["tokens"]] == whole[1 if what == "encoder" else len(ids) :]
    finally:
        server.close()
