"""`pelt top`: what a server that runs says of itself, in between two looks at its counters."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import peltc
from peltc.runtime.commands.cli import run
from peltc.runtime.serving.top import ask, counted, told
from peltc.spec.diagnostics import PeltError

Folder = Callable[..., Path]
HISTOGRAM = """\
# TYPE pelt_request_seconds histogram
pelt_request_seconds_bucket{le="0.01"} %d
pelt_request_seconds_bucket{le="0.1"} %d
pelt_request_seconds_bucket{le="+Inf"} %d
pelt_request_seconds_sum 1.5
pelt_request_seconds_count %d
# TYPE pelt_queue_rows gauge
pelt_queue_rows 7
"""


def test_quantiles_are_of_what_was_counted_in_between() -> None:
    before, now = (counted(HISTOGRAM % counts) for counts in ((10, 10, 10, 10), (12, 19, 20, 20)))
    assert before.quantile("pelt_request_seconds", 0.99) == 0.01
    between = now.since(before)
    assert between.quantile("pelt_request_seconds", 0.2) == 0.01
    assert between.quantile("pelt_request_seconds", 0.5) == between.quantile("pelt_request_seconds", 0.9) == 0.1
    assert math.isinf(between.quantile("pelt_request_seconds", 0.95))
    assert between.of("pelt_queue_rows") == 7, "told as it is now"
    assert before.since(now) == before, "a server that was started anew has counted all that it says"
    assert math.isnan(now.since(now).quantile("pelt_request_seconds", 0.5))
    assert "half within –" in told(now.since(now), 2)[1] and "99 % within more than 10 s" in told(between, 2)[1]


def test_a_server_is_watched(model_folder: Folder, tmp_path: Path, capsys: Any) -> None:
    spec = {"pelt": 1, "name": "toy", "attach": [{"method": "lora", "at": "attention.query"}]}
    peltc.compile(spec, model_folder("bert"), tmp_path / "out", verify=False)
    command = [sys.executable, "-m", "peltc", "serve", str(tmp_path / "out"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            address = url.partition("/v2/")[0]
            body = {"inputs": [{"name": "input_ids", "shape": [1, 3], "datatype": "INT64", "data": [5, 6, 7]}]}
            for _ in range(3):
                urllib.request.urlopen(url, json.dumps(body).encode()).read()
            before = ask(address)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(url, b"{}")
            assert run(["top", address, "--once"]) == 0
            out = capsys.readouterr().out.splitlines()
            assert out[0] == address and out[1].startswith("requests   ") and "3 × 200, 1 × 400" in out[1]
            assert "batches    3, of 1.0 texts and 1.0 requests" in out[4]
            assert "1 × 400" in told(ask(address).since(before), 2.0)[0]
            # A shell that ignores the signal, as `nohup` and background jobs do, hands that down.
            default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            watching = subprocess.Popen([sys.executable, "-m", "peltc", "top", address, "--every", "0.2"],
                                        stdout=subprocess.PIPE, text=True, preexec_fn=default)  # fmt: skip
            assert watching.stdout is not None
            while "in 0 s" not in watching.stdout.readline():  # the second look at the counters
                assert watching.poll() is None
            watching.send_signal(signal.SIGINT)
            watching.communicate(timeout=60)
            assert watching.returncode == 130
        finally:
            process.kill()
    assert run(["top", address, "--once"]) == 1
    assert "E638 cannot read a server's counters" in capsys.readouterr().err


def test_whatever_else_answers_is_refused() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[0])

        def log_message(self, *words: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for answer, reason in (
            (b"<html>", "cannot read"),
            (b"\xff", "cannot read"),
            (b"a 1\n", "no server of artifacts"),
        ):
            answers = [answer]
            with pytest.raises(PeltError, match=f"E638 .*{reason}"):
                ask(address)
        server.shutdown()
    for address in ("file:///etc/passwd", "127.0.0.1:80", "http://"):
        with pytest.raises(PeltError, match="E638 cannot read a server's counters: it is no address"):
            ask(address)
