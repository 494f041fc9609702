"""An artifact on Ray Serve: two replicas, one of which is killed while clients ask. It runs where Ray is installed,
which `make` does not do: 485 MB that nothing else needs."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peltc
from peltc.compiler.linking.linker import Linker
from peltc.spec.diagnostics import PeltError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'peltc[ray]'")
psutil = pytest.importorskip("psutil")

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
CPU = ["CPUExecutionProvider"]
NAMES = [f"t{i % 2}/{i}" for i in range(4)]
CLIENTS = 6


@pytest.fixture(scope="module")
def artifact(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact, `out`, and a store of four profiles."""
    folder = tmp_path_factory.mktemp("ray")
    spec = {"pelt": 1, "name": "toy", "attach": [{"method": "lora", "at": "attention.*", "r": 4}]}
    peltc.compile(spec, model_folder("bert"), folder / "out", mode="bank", verify=False)
    linker, draw = Linker(folder / "out"), np.random.default_rng(0)
    with peltc.ProfileStore(folder / "store", folder / "out") as store:
        for name in NAMES:
            tensors = {n: draw.normal(0, 0.3, t.shape).astype(np.float32) for n, t in linker.plan.tensors.items()}
            store.put(name, linker.link(tensors))
    return folder


def refuse_other_tenants(caller: Any, profile: str | None) -> bool:
    tenant = caller.headers.get("x-tenant")
    return tenant is None or (profile or "").startswith(f"{tenant}/")


@pytest.fixture(scope="module")
def port(artifact: Path) -> Iterator[int]:
    """Where an application of two replicas listens."""
    import socket

    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": number})
    app = peltc.ray_app(artifact / "out", artifact / "store", resident=3, allow=refuse_other_tenants, num_replicas=2,
                        health_check_period_s=1)  # fmt: skip
    serve.run(app, name="toy")
    yield number
    serve.shutdown()
    ray.shutdown()


def ask(
    port: int, body: object, headers: dict[str, str] | None = None, path: str = "models/toy/infer"
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", f"/v2/{path}", content, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def request(ids: list[list[int]], names: list[str]) -> dict[str, Any]:
    return {"inputs": [
        {"name": "input_ids", "shape": [len(ids), len(ids[0])], "datatype": "INT64", "data": ids},
        {"name": "profile", "shape": [len(names)], "datatype": "BYTES", "data": names},
    ]}  # fmt: skip


def replicas() -> set[int]:
    """The processes of replicas that this test has started."""
    mine = psutil.Process().children(recursive=True)
    return {one.pid for one in mine if "ServeReplica" in " ".join(_words(one))}


def _words(process: Any) -> list[str]:
    try:
        return [process.name(), *process.cmdline()]
    except psutil.Error:
        return []


def test_a_replica_that_is_killed_answers_nothing_wrong(port: int, artifact: Path) -> None:
    """Clients ask on; what the replica had in hand fails and may be asked again, all else is answered, each row as its
    profile alone; and there are two replicas again."""
    session = peltc.Session(artifact / "out", CPU, store=artifact / "store")
    ids = [[5, 6, 7, 8], [4, 9, 7, 3]]
    expected = {name: session(input_ids=ids, profile=name)["logits"] for name in [*NAMES, None]}
    apart = [np.abs(expected[a] - expected[b]).max() for a in expected for b in expected if a != b]
    assert min(apart) > 1e-2  # so that another profile's answer is told from the right one
    counted: Counter[str] = Counter()
    begun, over, killed = threading.Event(), threading.Event(), threading.Event()

    def client(seed: int) -> None:
        draw = np.random.default_rng(seed)
        while not over.is_set():
            names = [str(draw.choice([*NAMES, ""])) for _ in ids]
            try:
                status, content = ask(port, request(ids, names))
            except OSError:
                status, content = 0, b""
            when = "after" if killed.is_set() else "before"
            if status != 200:
                counted[f"failed {when}"] += 1
                continue
            found = np.array(json.loads(content)["outputs"][0]["data"]).reshape(2, -1)
            each = np.stack([expected[name or None][row] for row, name in enumerate(names)])
            counted[f"{'right' if np.abs(found - each).max() < 1e-5 else 'wrong'} {when}"] += 1
            if counted["right before"] > 50:
                begun.set()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(120)
        before = replicas()
        assert len(before) == 2
        killed.set()
        os.kill(min(before), signal.SIGKILL)
        until = time.monotonic() + 120
        while len(now := replicas()) < 2 or min(before) in now:
            assert time.monotonic() < until
            time.sleep(0.2)
        since = counted["right after"]
        while counted["right after"] < since + 50:
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert counted["wrong before"] == counted["wrong after"] == counted["failed before"] == 0
    assert counted["right after"] > 50
    # Each client has one request at a time, and the door learns of the death by the requests that it costs.
    assert counted["failed after"] <= 4 * CLIENTS


def test_the_door_is_that_of_pelt_serve(port: int) -> None:
    assert ask(port, None, path="health/ready")[0] == 200
    status, content = ask(port, None, path="models/toy")
    assert status == 200 and {"name": "profile", "datatype": "BYTES", "shape": [-1]} in json.loads(content)["inputs"]
    status, content = ask(port, request([[5, 6]], ["t0/9"]))
    assert status == 404 and b"E626" in content
    status, content = ask(port, request([[5, 100]], [""]))
    assert status == 400 and b"E615" in content
    assert ask(port, request([[5, 6]], ["t0/0"]), {"x-tenant": "t0"})[0] == 200
    status, content = ask(port, request([[5, 6]], ["t1/1"]), {"x-tenant": "t0"})
    assert status == 403 and b"E804" in content


def test_what_is_no_artifact_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(PeltError, match="E603"):
        peltc.ray_app(tmp_path)
