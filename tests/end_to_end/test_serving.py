"""An artifact behind a server: requests with many profiles are answered in common batches, each as its profile alone
would; what is wrong is refused, and what is under way when the server is stopped is answered first."""

from __future__ import annotations

import http.client
import json
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from served import fill, started
from tritonclient.utils import InferenceServerException

import peltc
from peltc.runtime.commands.cli import run
from peltc.runtime.serving.batching import Batcher
from peltc.runtime.serving.joining import Ask, Joiner
from peltc.runtime.serving.limits import ServingLimits
from peltc.runtime.serving.metrics import Metrics
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
CPU = ["CPUExecutionProvider"]
NAMES = [f"t{i % 2}/{i}" for i in range(6)]
GRPC: dict[str, str] = {}
"""The address for gRPC of the server at an address for HTTP."""
HOOK = """
async def allow(caller, profile):
    tenant = caller.headers.get("x-tenant")
    return tenant is None or (profile is not None and profile.startswith(tenant + "/"))
"""


@pytest.fixture(scope="module")
def artifact(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact, `out`, and a store of six profiles."""
    folder = tmp_path_factory.mktemp("serving")
    spec = load_spec({"pelt": 1, "name": "toy", "attach": [{"method": "lora", "at": "attention.*", "r": 4}]})
    peltc.compile(spec, model_folder("llama"), folder / "out", mode="bank", verify=False)
    fill(folder, NAMES)
    (folder / "hook.py").write_text(HOOK)
    return folder


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`pelt serve` in a process of its own, and its address."""
    with started(folder, *options) as (process, line):
        assert line.endswith("/v2/models/toy/infer"), line
        yield process, line.removeprefix("http://").split("/")[0]


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[str]:
    options = ("--resident", "4", "--allow", "hook:allow", "--rows", "16", "--tokens", "160", "--body", "100000")
    with serving(artifact, *options, "--grpc-port", "0") as (process, address):
        assert process.stdout is not None
        GRPC[address] = process.stdout.readline().strip().removeprefix("grpc://")
        yield address


@pytest.fixture(scope="module")
def alone(artifact: Path) -> Callable[[list[list[int]], str | None], Array]:
    """What a text and its profile are answered alone, without a server and without padding."""
    session = peltc.Session(artifact / "out", CPU, store=artifact / "store")
    return lambda ids, name: session(input_ids=ids, profile=name)["logits"]


def close(found: Array, expected: Array) -> bool:
    return found.shape == expected.shape and bool(np.abs(found - expected).max() < 1e-5 * np.abs(expected).max())


def ask(address: str, body: object, headers: dict[str, str] | None = None, path: str = "infer") -> tuple[int, Any, Any]:
    """The status, the JSON and the headers of a response."""
    connection = http.client.HTTPConnection(address, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body)
    connection.request(
        "POST" if path == "infer" else "GET", f"/v2/models/toy/{path}".rstrip("/"), content, headers or {}
    )
    response = connection.getresponse()
    return response.status, json.loads(response.read()), response.headers


def request(ids: object = ((5, 6, 7),), profile: str | None = None, **more: Any) -> dict[str, Any]:
    array = np.array(ids)
    tensor = {"name": "input_ids", "shape": list(array.shape), "datatype": "INT64", "data": array.tolist()}
    return {"inputs": [tensor], **({"parameters": {"profile": profile}} if profile else {}), **more}


def test_each_row_is_answered_as_its_profile_alone(server: str, alone: Any) -> None:
    """The protocol's own client, sixteen threads, texts of different lengths; the batches are shared."""
    wrong: list[object] = []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        try:
            with triton.InferenceServerClient(server) as served:
                for turn in range(8):
                    rows, length = draw.randint(1, 3), draw.randint(1, 9)
                    ids = [[draw.randrange(100) for _ in range(length)] for _ in range(rows)]
                    names = [draw.choice([*NAMES, None]) for _ in ids]
                    tensors = [triton.InferInput("input_ids", [rows, length], "INT64")]
                    tensors[0].set_data_from_numpy(np.array(ids), binary_data=turn % 2 == 0)
                    tensors.append(triton.InferInput("profile", [rows], "BYTES"))
                    given = np.array([name or "" for name in names], object)
                    tensors[1].set_data_from_numpy(given, binary_data=turn % 3 == 0)
                    wanted = [triton.InferRequestedOutput("logits", binary_data=turn % 2 == 0)]
                    result = served.infer("toy", tensors, outputs=wanted, request_id=str(turn))
                    found = result.as_numpy("logits")
                    expected = np.concatenate([alone([text], name) for text, name in zip(ids, names, strict=True)])
                    if not close(found, expected) or result.get_response()["id"] != str(turn):
                        wrong.append((ids, names, np.abs(found - expected).max()))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    connection = http.client.HTTPConnection(server)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    counted = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert counted["pelt_batch_requests_sum"] >= 128 > counted["pelt_batch_requests_count"]
    assert counted["pelt_profiles_resident"] <= 4 and counted["pelt_profile_evictions_total"] > 0
    assert counted['pelt_requests_total{door="http",status="200"}'] >= 128 and counted["pelt_queue_rows"] == 0


def test_health_and_metadata(server: str) -> None:
    with triton.InferenceServerClient(server) as served:
        assert served.is_server_live() and served.is_server_ready() and served.is_model_ready("toy")
        assert not served.is_model_ready("other")
        assert served.get_server_metadata()["name"] == "peltc"
        found = served.get_model_metadata("toy")
    assert {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]} in found["inputs"]
    assert {"name": "profile", "datatype": "BYTES", "shape": [-1]} in found["inputs"]
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, -1, 100]}]


def tensor(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{**request()["inputs"][0], **changes}]}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "E801 the body is not JSON"),
        (b"[" * 90_000, 400, "E801 the body is not JSON"),
        ([], 400, "E801 the request is list"),
        ({"inputs": 5}, 400, "E801 inputs: int; expected a list"),
        ({"inputs": []}, 400, "E606 the input 'input_ids' is missing"),
        ({"inputs": request()["inputs"] * 2}, 400, "E801 the input 'input_ids' stands twice"),
        (tensor(name="ids"), 400, "E606 the model takes no input 'ids'"),
        (tensor(datatype="INT4"), 400, "E801 the input 'input_ids' has the datatype 'INT4'"),
        (tensor(shape=[2, 2]), 400, "E801 the input 'input_ids' has the shape [2, 2] and 3 values"),
        (tensor(shape=[-1, 3]), 400, "E801 the input 'input_ids' has the shape [-1, 3]"),
        (tensor(shape=[True, 3]), 400, "E801 the input 'input_ids' has the shape [True, 3]"),
        (tensor(shape=[3]), 400, "E606 the input 'input_ids' has the shape [3]"),
        (tensor(shape=[0, 3], data=[]), 400, "E617"),
        (tensor(data=[1.0, 2, 3]), 400, "E801 the input 'input_ids' holds values that are not INT64"),
        (tensor(data=[1, True, 3]), 400, "E801 the input 'input_ids' holds values that are not INT64"),
        (tensor(data=[1, 2, 1 << 70]), 400, "E801 the input 'input_ids' holds values that INT64 cannot hold"),
        (tensor(data=[[1, 2], 3]), 400, "E801 the data of an input are lists beside values"),
        (tensor(data=[1, 2, 100]), 400, "E615"),
        (tensor(data=["a", "b", "c"], datatype="BYTES"), 400, "E614"),
        (tensor(parameters={"binary_data_size": 8}), 400, "E801 the input 'input_ids' has binary_data_size 8"),
        (request([[1]] * 17), 400, "E802 the request has 17 texts"),
        (request([[1] * 20] * 9), 400, "E802 the request has 180 tokens"),
        (request(profile="t0/absent"), 404, "E626 there is no profile 't0/absent'"),
        (request(profile="../../etc/passwd"), 400, "E632"),
        ({**request(), "parameters": {"profile": 5}}, 400, "E801 the profile is said twice, or the parameter"),
        (request(outputs=[{"name": "nothing"}]), 400, "E801 the model has no output 'nothing'"),
        (b"x" * 100_001, 413, "E807 the request has more than 100,000 bytes"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_refused(body: object, status: int, message: str, server: str, artifact: Path) -> None:
    found = ask(server, body)
    assert (found[0], message in found[1]["error"]) == (status, True), found[1]
    assert str(artifact) not in found[1]["error"], "where the server has its files is nobody's business"


def test_bytes_that_are_no_tensors(server: str) -> None:
    head = json.dumps({"inputs": [{"name": "input_ids", "shape": [1, 3], "datatype": "INT64",
                                   "parameters": {"binary_data_size": 24}}]}).encode()  # fmt: skip
    header = {"Inference-Header-Content-Length": str(len(head))}
    ids = np.array([[5, 6, 7]])
    assert ask(server, head + ids.tobytes(), header)[0] == 200
    for body, size in ((head + ids.tobytes()[:-1], len(head)), (head + ids.tobytes() + b"x", len(head)), (head, "-1"),
                       (head, "9999"), (head + ids.tobytes(), "1_0")):  # fmt: skip
        status, found, _ = ask(server, body, {"Inference-Header-Content-Length": str(size)})
        assert status == 400 and "E801" in found["error"]


def test_grpc_answers_the_same(server: str, alone: Any) -> None:
    """The protocol's own client again; bytes and values, what is refused, and the hook."""
    with triton_grpc.InferenceServerClient(GRPC[server]) as served:
        assert served.is_server_live() and served.is_server_ready() and served.is_model_ready("toy")
        assert not served.is_model_ready("other")
        assert [i.name for i in served.get_model_metadata("toy").inputs][-1] == "profile"
        ids = np.array([[5, 6, 7], [8, 9, 4]])
        text = triton_grpc.InferInput("input_ids", [2, 3], "INT64")
        text.set_data_from_numpy(ids)
        names = triton_grpc.InferInput("profile", [2], "BYTES")
        names.set_data_from_numpy(np.array(["t0/0", ""], object))
        found = served.infer("toy", [text, names], request_id="a").as_numpy("logits")
        assert close(found, np.concatenate([alone([[5, 6, 7]], "t0/0"), alone([[8, 9, 4]], None)]))
        found = served.infer("toy", [text], parameters={"profile": "t1/1"}, headers={"x-tenant": "t1"})
        assert close(found.as_numpy("logits"), alone(ids.tolist(), "t1/1"))
        for given, options, code, message in (
            ([text], {"parameters": {"profile": "t0/absent"}}, "NOT_FOUND", "E626"),
            ([text], {"headers": {"x-tenant": "t1"}}, "PERMISSION_DENIED", "E804"),
            ([text, text], {}, "INVALID_ARGUMENT", "E801 the input 'input_ids' stands twice"),
            ([names], {}, "INVALID_ARGUMENT", "E606 the input 'input_ids' is missing"),
            ([text], {"outputs": [triton_grpc.InferRequestedOutput("nothing")]}, "INVALID_ARGUMENT", "E801"),
        ):
            with pytest.raises(InferenceServerException, match=message) as caught:
                served.infer("toy", given, **options)
            assert code in str(caught.value.status())
        with pytest.raises(InferenceServerException, match="E805 there is no model 'other'"):
            served.infer("other", [text])
        large = triton_grpc.InferInput("input_ids", [1, 20_000], "INT64")
        large.set_data_from_numpy(np.ones((1, 20_000), np.int64))
        with pytest.raises(InferenceServerException, match="larger than max"):
            served.infer("toy", [large])
    from tritonclient.grpc import service_pb2 as messages

    from peltc.runtime.serving.grpc_door import read

    asked = messages.ModelInferRequest(model_name="toy")  # values in place of bytes, which that client does not send
    asked.inputs.add(name="input_ids", datatype="INT64", shape=[1, 2]).contents.int64_contents.extend([3, 4])
    assert np.array_equal(read(asked).inputs["input_ids"], [[3, 4]])
    asked.inputs[0].contents.int64_contents.append(5)
    with pytest.raises(PeltError, match=r"E801 .* has the shape"):
        read(asked)
    asked.raw_input_contents.append(b"12345678")
    with pytest.raises(PeltError, match=r"E801 .* has contents beside raw_input_contents"):
        read(asked)


def test_an_address_that_is_taken(server: str, artifact: Path, capsys: Any) -> None:
    port, other = server.split(":")[1], GRPC[server].split(":")[1]
    assert run(["serve", str(artifact / "out"), "--port", port]) == 1
    assert "E808 cannot listen at 127.0.0.1" in capsys.readouterr().err
    assert run(["serve", str(artifact / "out"), "--port", "0", "--grpc-port", other]) == 1
    assert "E808 cannot listen at 127.0.0.1" in capsys.readouterr().err


def test_only_what_the_hook_allows(server: str) -> None:
    assert ask(server, request(profile="t0/0"), {"X-Tenant": "t0"})[0] == 200
    for profile in ("t1/1", None):
        status, found, _ = ask(server, request(profile=profile), {"X-Tenant": "t0"})
        assert status == 403 and "E804" in found["error"]
    both = {"name": "profile", "shape": [2], "datatype": "BYTES", "data": ["t0/0", "t1/1"]}
    asked = request([[1, 2], [3, 4]])
    asked["inputs"].append(both)
    assert ask(server, asked)[0] == 200
    assert ask(server, asked, {"X-Tenant": "t0"})[0] == 403
    status, found, _ = ask(server, request(profile="t1/absent"), {"X-Tenant": "t0"})  # whether it is there is not told
    assert status == 403


def test_a_full_queue_refuses_and_a_stopped_server_answers_first(artifact: Path, alone: Any) -> None:
    """Batches wait long enough for the queue to fill; then SIGTERM comes while requests wait."""
    with serving(artifact, "--queue", "4", "--delay", "3") as (process, address):
        found: list[tuple[int, Any, Any]] = []
        threads = [threading.Thread(target=lambda i=i: found.append(ask(address, request([[5, i]], NAMES[i % 6]))))
                   for i in range(10)]  # fmt: skip
        for thread in threads:
            thread.start()
        until = time.monotonic() + 2
        while len(found) < 6 and time.monotonic() < until:
            time.sleep(0.01)
        assert [status for status, _, _ in found] == [429] * 6
        assert all("E803 the queue is full" in said["error"] and headers["Retry-After"] == "1"
                   for _, said, headers in found)  # fmt: skip
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert sorted(status for status, _, _ in found) == [200] * 4 + [429] * 6
        assert process.wait(20) == 0
        with pytest.raises(ConnectionError):
            ask(address, request())


@pytest.fixture
def session(artifact: Path) -> peltc.Session:
    return peltc.Session(artifact / "out", CPU, store=artifact / "store", resident=3)


def asked(session: peltc.Session, ids: list[list[int]], *names: str | None) -> Ask:
    return Ask(session.feeds({"input_ids": ids}), names)


def test_what_is_joined(session: peltc.Session, alone: Any) -> None:
    """One batch as far as rows, tokens and profiles allow, in the order of arrival; outputs without the padding."""
    limits = ServingLimits(rows=4, tokens=24, delay=0.3, padding=1)
    batcher, metrics = Batcher(session, limits, m := Metrics(session)), m
    texts = [([[5, 6, 7]], NAMES[0]), ([[8, 9, 4, 3, 2]], NAMES[1]), ([[1]], None), ([[7, 7]], NAMES[2])]
    answers = [batcher.submit(asked(session, ids, name)) for ids, name in texts]
    for (ids, name), answer in zip(texts, answers, strict=True):
        assert close(answer.result(10)["logits"], alone(ids, name))
    assert metrics.registry.get_sample_value("pelt_batch_rows_sum") == 4
    assert metrics.registry.get_sample_value("pelt_batch_rows_count") == 1
    for more in ([[[1] * 7], [[2] * 7], [[3] * 7], [[4] * 7]], [[[1, 2]]] * 5):  # too many tokens, too many rows
        before = metrics.registry.get_sample_value("pelt_batch_rows_count")
        answers = [batcher.submit(asked(session, ids, NAMES[0])) for ids in more]
        assert all(close(a.result(10)["logits"], alone(ids, NAMES[0])) for a, ids in zip(answers, more, strict=True))
        assert metrics.registry.get_sample_value("pelt_batch_rows_count") == before + 2
    answers = [batcher.submit(asked(session, [[1, 2]], name)) for name in NAMES[:4]]  # more profiles than in memory
    assert all(close(a.result(10)["logits"], alone([[1, 2]], n)) for a, n in zip(answers, NAMES, strict=False))
    with pytest.raises(PeltError, match="E802 the request has 4 profiles"):
        batcher.submit(asked(session, [[1]] * 4, *NAMES[:4]))
    batcher.close()
    batcher = Batcher(session, ServingLimits(delay=0.3, padding=0.25), metrics := Metrics(session))
    answers = [batcher.submit(asked(session, [[1] * length], None)) for length in (8, 3, 7, 6, 2, 9)]
    assert all(
        close(a.result(10)["logits"], alone([[1] * n], None)) for a, n in zip(answers, (8, 3, 7, 6, 2, 9), strict=True)
    )
    assert metrics.registry.get_sample_value("pelt_batch_rows_count") == 2  # 8, 7, 9 and 6; then 3 and 2
    cancelled = batcher.submit(asked(session, [[1, 2]], None))
    assert cancelled.cancel()
    waiting = batcher.submit(asked(session, [[1, 2]], None))
    batcher.close()
    assert close(waiting.result(0)["logits"], alone([[1, 2]], None))
    with pytest.raises(PeltError, match="E806 the server is being stopped"):
        batcher.submit(asked(session, [[1, 2]], None))


def test_a_damaged_profile_fails_its_own_request_alone(artifact: Path, alone: Any, tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes((artifact / "store").read_bytes())
    with sqlite3.connect(tmp_path / "store") as db:
        db.execute("UPDATE record SET content = zeroblob(size) WHERE name = '1'")
    session = peltc.Session(artifact / "out", CPU, store=tmp_path / "store")
    batcher = Batcher(session, ServingLimits(delay=0.2), Metrics(session))
    good, bad, other = (batcher.submit(asked(session, [[1, 2, 3]], NAMES[i])) for i in (0, 1, 2))
    with pytest.raises(PeltError, match="E634 the profile 't1/1' is damaged"):
        bad.result(10)
    for i, answer in ((0, good), (2, other)):
        assert close(answer.result(10)["logits"], alone([[1, 2, 3]], NAMES[i]))
    batcher.close()


def test_axes_that_no_mask_hides_are_not_padded(model_folder: Folder, tmp_path: Path) -> None:
    """The decoder's texts of an encoder-decoder are joined where they are equally long, the encoder's always; without
    profiles, and with one for all rows."""
    spec = load_spec({"pelt": 1, "name": "toy", "attach": [{"method": "lora", "at": "attention.query", "r": 2}]})
    peltc.compile(spec, model_folder("t5"), tmp_path / "out", mode="swappable", verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    joiner = Joiner(session)
    asks = [Ask(session.feeds({"input_ids": [[5] * a], "decoder_input_ids": [list(range(1, b + 1))]}), (name,))
            for a, b, name in ((3, 2, None), (6, 2, None), (3, 4, None), (3, 2, "other"))]  # fmt: skip
    kinds = [joiner.kind(ask) for ask in asks]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3 and not joiner.mixes
    feeds, profile = joiner.join(asks[:2])
    assert profile is None and feeds["input_ids"].shape == (2, 6)
    answers = joiner.split(session.run(feeds), asks[:2])
    for ask_, answer in zip(asks, answers, strict=False):
        expected = session.run(ask_.feeds)
        assert all(close(answer[name], expected[name]) for name in expected)
