"""Texts that grow behind a server: OpenAI's own client, the extension `generate`, what is refused, callers who go away,
and a short load."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import numpy as np
import openai
import pytest
import torch
import transformers
from served import fill, started
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import peltc
from peltc.runtime.serving.asking import Asked, Manner
from peltc.runtime.serving.service import Caller, Service
from peltc.runtime.serving.top import counted, told
from peltc.spec.diagnostics import PeltError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import load

pytestmark = pytest.mark.xdist_group("completions")

CPU = ["CPUExecutionProvider"]
NAMES = ["t0/0", "t0/1", "t1/2", "t1/3"]
HOOK = """
async def allow(caller, profile):
    tenant = caller.headers.get("x-tenant")
    return tenant is None or (profile is not None and profile.startswith(tenant + "/"))
"""
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}{% endfor %}<s>assistant:"
)


def with_tokenizer(folder: Path) -> Path:
    """A model's folder with a tokenizer of its hundred tokens: characters, and bytes of `é`."""
    letters = ["Ġ", "Ã", "©", *map(chr, range(33, 127))]
    vocabulary = {"<s>": 0, "<unk>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(letters[:97])}}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    whole.chat_template = TEMPLATE
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact that generates, `out`, and a store of four profiles."""
    folder = tmp_path_factory.mktemp("completions")
    model = with_tokenizer(models.save("llama", folder / "model"))
    spec = {"pelt": 1, "name": "toy", "attach": [{"method": "lora", "at": ["attention.query", "attention.value"]}]}
    peltc.compile(spec, model, folder / "out", mode="bank", generation=True, verify=False)
    fill(folder, NAMES)
    (folder / "hook.py").write_text(HOOK)
    return folder


@contextmanager
def serving(folder: Path, *options: str, store: str = "store") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`pelt serve` in a process of its own, and its address."""
    with started(folder, *options, store=store) as (process, line):
        address = line.removeprefix("http://").split("/")[0]
        assert process.stdout is not None
        assert process.stdout.readline().strip() == f"http://{address}/v1"
        yield process, address


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[str]:
    with serving(artifact, "--allow", "hook:allow", "--new-tokens", "1500", "--rows", "8") as (_, address):
        yield address


@pytest.fixture(scope="module")
def session(artifact: Path) -> peltc.Session:
    return peltc.Session(artifact / "out", CPU, store=artifact / "store")


def client(address: str, **headers: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="-", max_retries=0, default_headers=headers)


def ask(address: str, path: str, body: object, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, content, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def counters(address: str) -> Any:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics")
    return counted(connection.getresponse().read().decode())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def alone(session: peltc.Session, ids: list[int], profile: str | None, seed: int | None = None, **more: Any) -> str:
    """The text that `Session.generate` gives alone, greedy or drawn."""
    if seed is not None:
        torch.manual_seed(seed)
        more |= {"do_sample": True, "top_k": 0}
    found = session.generate([ids], profile=profile, **more)[0].tolist()
    return str(Tokenizer.from_file(str(session.folder / "tokenizer.json")).decode(found[len(ids) :]))


def ids_of(session: peltc.Session, text: str) -> list[int]:
    ids: list[int] = session.tokenize(text)["input_ids"][0].tolist()
    return ids


def test_openais_client(server: str, session: peltc.Session) -> None:
    asked, ids = client(server), ids_of(session, "hello")
    whole = asked.completions.create(model="t0/0", prompt="hello", max_tokens=12, temperature=0)
    assert whole.choices[0].text == alone(session, ids, "t0/0", max_new_tokens=12)
    assert whole.choices[0].finish_reason == "length" and whole.model == "t0/0"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 12, 17)
    several = asked.completions.create(model="toy", prompt=["hello", "abc"], max_tokens=7, n=2, seed=5, temperature=0.8)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    for i, choice in enumerate(several.choices):
        prompt = ids if i < 2 else ids_of(session, "abc")
        assert choice.text == alone(session, prompt, None, 5 + i, temperature=0.8, max_new_tokens=7)
    options = {"model": "t1/2", "prompt": ids, "max_tokens": 20, "seed": 3, "extra_body": {"return_token_ids": True}}
    once = asked.completions.create(**options, logprobs=2)
    pieces = list(asked.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces[:-1]) == once.choices[0].text
    assert [t for p in pieces[:-1] for t in p.choices[0].token_ids] == once.choices[0].token_ids  # type: ignore[attr-defined]
    assert pieces[-1].usage == once.usage and not pieces[-1].choices
    weighed = once.choices[0].logprobs
    assert weighed is not None and len(weighed.tokens or ()) == 20 == len(weighed.top_logprobs or ())
    logits = session(input_ids=[[*ids, *once.choices[0].token_ids[:-1]]], profile="t1/2")["logits"][0, len(ids) - 1 :]  # type: ignore[attr-defined]
    logprobs = torch.tensor(logits).log_softmax(-1)
    expected = [float(step[token]) for step, token in zip(logprobs, once.choices[0].token_ids, strict=True)]  # type: ignore[attr-defined]
    assert np.allclose(weighed.token_logprobs, expected, atol=1e-4)
    stop = whole.choices[0].text[4:6]
    cut = asked.completions.create(model="t0/0", prompt="hello", max_tokens=12, temperature=0, stop=[stop], echo=True)
    assert cut.choices[0].text == "hello" + whole.choices[0].text.split(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    biased = asked.completions.create(model="toy", prompt="hello", max_tokens=3, temperature=0, logit_bias={"50": 100})
    assert biased.choices[0].text == chr(33 + 50 - 6) * 3


def test_chats(server: str, session: peltc.Session) -> None:
    asked = client(server)
    messages: Any = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answer = asked.chat.completions.create(model="t1/3", messages=messages, max_completion_tokens=9, seed=2, n=2,
                                           logprobs=True, top_logprobs=1)  # fmt: skip
    tokenizer = Tokenizer.from_file(str(session.folder / "tokenizer.json"))
    ids = tokenizer.encode("<s>system: be<s>user: hi<s>assistant:", add_special_tokens=False).ids
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    for i, choice in enumerate(answer.choices):
        assert choice.message.content == alone(session, ids, "t1/3", 2 + i, max_new_tokens=9)
        assert choice.logprobs is not None and len(choice.logprobs.content or ()) == answer.usage.completion_tokens / 2
    pieces = list(asked.chat.completions.create(model="t1/3", messages=messages, max_tokens=9, seed=2, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match=r"E810 .* no robots"):
        asked.chat.completions.create(model="toy", messages=[{"role": "robot", "content": "hi"}])  # type: ignore[list-item,misc]
    for more in ({"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"top_logprobs": 2},
                 {"functions": [{}]}, {"reasoning_effort": "low"}):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=r"E80[19]"):
            asked.chat.completions.create(model="toy", messages=messages, extra_body=more)
    answer = asked.chat.completions.create(model="toy", messages=messages, seed=1)
    assert answer.usage is not None and answer.usage.completion_tokens <= 1500, "as many as there may be"


def test_models_are_those_that_the_caller_may_use(server: str) -> None:
    assert [m.id for m in client(server).models.list()] == ["toy", *NAMES]
    tenant = client(server, **{"x-tenant": "t1"})
    assert [m.id for m in tenant.models.list()] == ["t1/2", "t1/3"]
    assert tenant.models.retrieve("t1/2").id == "t1/2"
    for name, error in (("t1/9", openai.NotFoundError), ("other", openai.PermissionDeniedError)):
        with pytest.raises(error):
            tenant.models.retrieve(name)
        with pytest.raises(error):
            tenant.completions.create(model=name, prompt="a")
    with pytest.raises(openai.PermissionDeniedError, match="E804"):
        tenant.completions.create(model="toy", prompt="a")
    for name in ("other", "t1/9"):
        with pytest.raises(openai.NotFoundError) as caught:
            client(server).completions.create(model=name, prompt="a")
        assert caught.value.code == "model_not_found"


def test_the_extension_generate(server: str, session: peltc.Session) -> None:
    said = {"id": "7", "text_input": "hello", "parameters": {"profile": "t0/1", "max_tokens": 8}}
    status, found = ask(server, "/v2/models/toy/generate", said)
    expected = alone(session, ids_of(session, "hello"), "t0/1", max_new_tokens=8)
    assert status == 200
    assert found == {"id": "7", "model_name": "toy", "text_output": expected, "details": {"finish_reason": "length"}}
    connection = http.client.HTTPConnection(server, timeout=60)
    connection.request("POST", "/v2/models/toy/generate_stream", json.dumps(said))
    events = connection.getresponse().read().decode().strip().split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(piece["text_output"] for piece in pieces) == expected and len(pieces) == 8
    drawn = ask(server, "/v2/models/toy/generate", {"text_input": "hello", "parameters": {"seed": 4, "top_p": 0.9}})[1]
    assert drawn["text_output"] == alone(session, ids_of(session, "hello"), None, 4, top_p=0.9, max_new_tokens=20)
    for path, body, code in (
        ("other/generate", said, "E805"), ("toy/generate", {"text_input": "a", "stream": True}, "E809 'stream'"),
        ("toy/generate", {"text_input": "a", "parameters": {"n": 2}}, "E801 'parameters.n'"),
        ("toy/generate", {"text_input": "a", "parameters": {"profile": "t0/9"}}, "E626"), ("toy/generate", {}, "E801"),
    ):  # fmt: skip
        status, found = ask(server, f"/v2/models/{path}", body)
        assert status in (400, 404) and code in found["error"], found
    assert ask(server, "/v2", None)[1]["extensions"] == ["binary_tensor_data", "generate"]


REFUSED: list[tuple[dict[str, Any] | bytes, str]] = [
    (b"{", "E801"), (b"[" * 90_000, "E801"), (b"[]", "E801"), (b'{"model": "toy", "prompt": "\xff"}', "E801"),
    ({"model": 5}, "E801 model"), ({"model": None}, "E801 model"), ({"prompt": None}, "E801 prompt"),
    ({"prompt": ""}, "E617"), ({"prompt": []}, "E801 prompt"), ({"prompt": [[]]}, "E801 prompt"),
    ({"prompt": ["a", 5]}, "E801 prompt"), ({"prompt": [5, True]}, "E801 prompt"), ({"prompt": [-1]}, "E801 prompt"),
    ({"prompt": [100]}, "E615"), ({"prompt": ["a"] * 9}, "E802"), ({"n": 9}, "E802"), ({"n": 0}, "E801 n"),
    ({"max_tokens": 1501}, "E802"), ({"max_tokens": 0}, "E801 max_tokens"), ({"max_tokens": 1.0}, "E801 max_tokens"),
    ({"temperature": -1}, "E801 temperature"), ({"temperature": True}, "E801 temperature"),
    ({"top_p": 0}, "E801 top_p"), ({"stop": ["a"] * 17}, "E801 stop"), ({"stop": [""]}, "E801 stop"),
    ({"seed": 0.5}, "E801 seed"), ({"stream": 1}, "E801 stream"), ({"stream_options": {}}, "E801 stream_options"),
    ({"stream": True, "stream_options": {"a": 1}}, "E809 stream_options.a"), ({"logprobs": 21}, "E801 logprobs"),
    ({"echo": True, "logprobs": 1}, "E801 echo"), ({"suffix": "b"}, "E809 suffix"), ({"best_of": 2}, "E809 best_of"),
    ({"logit_bias": {"a": 1}}, "E801 logit_bias"), ({"logit_bias": {"100": 1}}, "E801"),
    ({"logit_bias": {"5": 101}}, "E801 logit_bias.5"), ({"logit_bias": []}, "E801 logit_bias"),
    ({"min_tokens": 17}, "E801"), ({"temprature": 1}, "E809 temprature"), ({"use_beam_search": True}, "E809"),
    ({"frequency_penalty": 3}, "E801 frequency_penalty"), ({"top_k": -1}, "E801 top_k"),
]  # fmt: skip


def test_what_is_refused(server: str, artifact: Path) -> None:
    for changes, expected in REFUSED:
        body = changes if isinstance(changes, bytes) else {"model": "toy", "prompt": "a", **changes}
        status, found = ask(server, "/v1/completions", body)
        error, (code, *field) = found["error"], expected.split()
        assert (status, error["type"], error["code"]) == (400, "invalid_request_error", code), (changes, found)
        assert error["param"] == (field[0] if field else error["param"]) and code in error["message"], (changes, found)
        assert str(artifact) not in error["message"]
    fine = {"model": "toy", "prompt": "a", "user": "me", "best_of": 1, "n": None, "suffix": None, "max_tokens": 1}
    assert ask(server, "/v1/completions", fine)[0] == 200
    assert ask(server, "/v1/completions", b"x", **{"Content-Encoding": "gzip"})[0] == 400


def test_who_goes_away_is_let_go_of(server: str) -> None:
    """In the middle of a stream, while the whole is awaited, and while the request is still being sent."""
    asked = client(server)
    options: dict[str, Any] = {"model": "toy", "prompt": "a", "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    before = counters(server).by("pelt_requests_total", "status").get("499", 0)
    stream = asked.completions.create(**options, stream=True, n=4)
    next(iter(stream))
    until(lambda: counters(server).of("pelt_growing_rows") == 4)
    stream.close()
    until(lambda: counters(server).of("pelt_growing_rows") == 0)
    host, port = server.split(":")
    body = (
        json.dumps({**options, "extra_body": None, "ignore_eos": True, "n": 3})
        .encode()
        .replace(b'"extra_body": null, ', b"")
    )
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        until(lambda: counters(server).of("pelt_growing_rows") == 3)
    until(lambda: counters(server).of("pelt_growing_rows") == 0)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body[:10])
    until(lambda: counters(server).by("pelt_requests_total", "status").get("499", 0) == before + 3)
    now = counters(server)
    assert now.of("pelt_generated_tokens_total") > 0 < now.of("pelt_first_token_seconds_count")
    lines = "\n".join(told(now, 0))
    assert "generated" in lines and "texts a run" in lines and "0 texts grow" in lines


def test_a_full_queue_and_a_server_that_is_stopped(artifact: Path, session: peltc.Session) -> None:
    """More than wait are refused; on SIGTERM those that grow, and those that wait, are answered first. A damaged
    profile is the server's own fault, and that of its own text alone."""
    (artifact / "damaged").write_bytes((artifact / "store").read_bytes())
    with sqlite3.connect(artifact / "damaged") as db:
        db.execute("UPDATE record SET content = zeroblob(size) WHERE name = '1'")
    with serving(artifact, "--rows", "1", "--queue", "2", store="damaged") as (process, address):
        asked, found = client(address), list[Any]()
        with pytest.raises(openai.InternalServerError, match="E634"):
            asked.completions.create(model="t0/1", prompt="a")
        with pytest.raises(openai.InternalServerError, match="E634"):
            asked.completions.create(model="t0/1", prompt="a", stream=True)
        options: dict[str, Any] = {"prompt": "a", "max_tokens": 400, "temperature": 0}
        options["extra_body"] = {"ignore_eos": True}

        def one(name: str) -> None:
            try:
                found.append((name, asked.completions.create(model=name, **options).choices[0].text))
            except openai.RateLimitError as error:
                found.append((error.code, error.response.headers["retry-after"]))

        stream = asked.completions.create(model="t0/0", **options, stream=True)
        first = next(iter(stream))
        threads = [threading.Thread(target=one, args=(NAMES[2 + i % 2],)) for i in range(5)]
        for thread in threads:
            thread.start()
        until(lambda: len(found) == 3)
        assert found == [("E803", "1")] * 3
        process.send_signal(signal.SIGTERM)
        text = first.choices[0].text + "".join(piece.choices[0].text for piece in stream)
        for thread in threads:
            thread.join()
        assert process.wait(30) == 0
    expected = [alone(session, ids_of(session, "a"), name, max_new_tokens=400, eos_token_id=None)
                for name in ("t0/0", *NAMES[2:])]  # fmt: skip
    assert text == expected[0]
    alike = dict(zip(NAMES[2:], expected[1:], strict=True))
    assert [text for _, text in found[3:]] == [alike[name] for name, _ in found[3:]]  # whoever came first
    assert len(found) == 5


def test_where_nothing_grows(
    artifact: Path, session: peltc.Session, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    """An artifact without a cache, one without a tokenizer, a package that is missing, room for one profile."""

    async def refused(service: Service, prompt: Any = "a", **more: Any) -> str:
        try:
            await service.grow(Asked([prompt], None, Manner(4), **more), Caller({}, ""))
        except PeltError as error:
            return str(error)
        finally:
            await service.close()
        return ""

    spec = {"pelt": 1, "name": "toy", "attach": [{"method": "lora", "at": "attention.query"}]}
    peltc.compile(spec, models.save("bert", tmp_path / "bert"), tmp_path / "plain", verify=False)
    plain = peltc.Session(tmp_path / "plain", CPU)
    assert "E611" in asyncio.run(refused(Service(plain)))
    monkeypatch.setattr("peltc.runtime.generating.texts.FILE", "absent.json")
    assert "E607" in asyncio.run(refused(Service(session)))
    assert "E607" in asyncio.run(refused(Service(session), [5, 6]))
    assert asyncio.run(refused(Service(session), [5, 6], ids=True)) == ""
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    service = Service(session)
    assert "E623 generation in pelt serve needs the package 'torch'" in caplog.text
    assert service.metadata()["name"] == "toy" and "E623" in asyncio.run(refused(service))
    monkeypatch.undo()
    with pytest.raises(PeltError, match="E636"):
        Service(peltc.Session(artifact / "out", CPU, store=artifact / "store", resident=1))


def test_a_short_load(artifact: Path) -> None:
    """Twenty clients for some seconds, single passes and texts that grow, at once and in pieces, while another process
    puts and deletes profiles."""
    out, store = artifact / "out", artifact / "loaded"
    load.stored(out, store)
    with (
        load.served(out, store, "--resident", "16", "--queue", "12", "--rows", "6") as (port, pid),
        load.changing(out, store),
    ):
        grown = load.load(port, pid, 20, 3, load.growing(out, store, new=10))
        passed = load.load(port, pid, 20, 2, load.passes(out, store, "logits"))
    assert not grown.wrong and not passed.wrong, (grown.wrong[:3], passed.wrong[:3])
    for one in (grown, passed):
        assert one.statuses[200] > 20 and one.checked and {*one.statuses} <= {200, 404, 429, 499}
