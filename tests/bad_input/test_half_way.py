"""Compilation that ends half-way, by a full disk, Ctrl-C, a signal or a bug: what was there before is as it was."""

from __future__ import annotations

import errno
import importlib
import signal
import subprocess
import sys
from functools import partial, reduce
from typing import Any

import pytest

LORA = "pelt: 1\nattach:\n  - method: lora\n    at: attention.query\n"


class Stop(Exception):
    """Not an error that the compiler knows: a bug of ours is cleaned up after as well."""


FAILURES = {
    "full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "interrupted": lambda: KeyboardInterrupt(),
    "bug": lambda: Stop("deliberate"),
}
CODES = {"full": 1, "interrupted": 130, "bug": 70}
POINTS = [
    ("peltc.compiler.pipeline", "absorb"),
    ("peltc.compiler.artifact", "DataFile.add"),
    ("peltc.compiler.artifact", "DataFile.take_from"),
    ("onnx_ir", "save"),
    ("peltc.compiler.artifact", "link_files"),
    ("shutil", "copyfile"),
    ("peltc.compiler.artifact", "manifest_of"),
    ("peltc.compiler.artifact", "write_manifest"),
    ("peltc.runtime.building.compile", "save_adapter"),
    ("peltc.compiler.artifact", "_exchange"),
]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("point", POINTS, ids=lambda p: p[1])
@pytest.mark.parametrize("previous", [True, False], ids=["replacing", "new"])
def test_failure_half_way(
    desk: Any, point: tuple[str, str], failure: str, previous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step has been done, and its end fails: the artifact that was there stays as it was, byte by byte."""
    if previous:
        assert desk.compile().code == 0
    desk.write(LORA + "    r: 2\n")
    before = desk.contents()
    *path, name = point[1].split(".")
    owner = reduce(getattr, path, importlib.import_module(point[0]))
    step = getattr(owner, name)
    calls = []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if name != "_exchange":  # which is the last step: nothing is done before it fails
            step(*arguments, **options)
        raise FAILURES[failure]()

    monkeypatch.setattr(owner, name, fail)
    outcome = desk.compile()
    monkeypatch.undo()
    assert calls, "the step is one of those that are taken"
    assert outcome.code == CODES[failure], outcome.err
    if failure == "full":
        assert "E602" in outcome.err and "No space left on device" in outcome.err
    desk.check_same(before)


@pytest.mark.parametrize("failure", ["full", "interrupted"])
def test_cache_has_no_half_entry(desk: Any, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that could not be written whole is not there; the export itself stands in for the slow one."""
    import onnx_ir as ir

    from peltc.compiler.base.opening import open_base
    from peltc.compiler.export import graph
    from peltc.compiler.export.exported import Exported

    known = open_base(desk.model)
    made = Exported(
        known.load_graph(), {n: p.shape for n, p in known.parameters.items()}, {}, "bert", dict(known.export)
    )
    cache = desk.folder / "cache"
    monkeypatch.setenv("PELTC_CACHE", str(cache))
    monkeypatch.setattr(graph, "export_graph", lambda *arguments: made)
    save = ir.save

    def fail(*arguments: Any) -> None:
        save(*arguments)
        raise FAILURES[failure]()

    monkeypatch.setattr(ir, "save", fail)
    outcome = desk.compile()
    assert outcome.code == CODES[failure], outcome.err
    assert not (desk.folder / "out").exists()
    assert [p for p in cache.rglob("*") if p != cache / "bases"] == []


CHILD = """\
import sys, time
import peltc.compiler.artifact as artifact
step = artifact.link_files
def slow(*arguments):
    result = step(*arguments)
    print("half-way", flush=True)
    time.sleep(60)
    return result
artifact.link_files = slow
from peltc.runtime.commands.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "terminated"])
def test_killed_half_way(desk: Any, number: signal.Signals) -> None:
    assert desk.compile().code == 0
    before = desk.contents()
    command = [sys.executable, "-c", CHILD, "compile", "spec.yaml", str(desk.model), "-o", "out", "--no-verify"]
    # A shell that ignores the signal, as `nohup` and background jobs do, hands that down.
    default = partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "half-way\n"
            assert any(p.name.startswith(".out-") for p in desk.folder.iterdir()), "there is something to clean up"
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in err
    desk.check_same(before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "terminated"])
def test_ignored_signals_stay_ignored(desk: Any, number: signal.Signals) -> None:
    """`nohup`, and shells that start jobs in the background, have interrupts ignored: the work goes on."""
    child = CHILD.replace("time.sleep(60)", "time.sleep(1)")
    command = [sys.executable, "-c", child, "compile", "spec.yaml", str(desk.model), "-o", "out", "--no-verify"]
    ignored = partial(signal.signal, number, signal.SIG_IGN)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ignored
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "half-way\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (desk.folder / "out" / "pelt.json").is_file()


def test_folders_of_killed_compilations_are_swept(desk: Any) -> None:
    """SIGKILL leaves the staging folder; the next compilation removes it, and none that is still being built in."""
    assert desk.compile().code == 0
    before = desk.contents()
    command = [sys.executable, "-c", CHILD, "compile", "spec.yaml", str(desk.model), "-o", "out", "--no-verify"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "half-way\n"
        assert len(list(desk.folder.glob(".out-*"))) == 2
        running[0].kill()
        running[0].communicate(timeout=30)
        assert len(list(desk.folder.glob(".out-*"))) == 2, "a killed process cleans nothing up"
        assert desk.compile().code == 0
        (alive,) = desk.folder.glob(".out-*")
        assert (alive / "content" / "model.safetensors").is_file(), "the other one still builds here"
    finally:
        for process in running:
            process.kill()
            process.communicate(timeout=30)
    assert desk.compile().code == 0
    desk.check_same(before)


LIVE = """\
import sys, time
from transformers import BertForSequenceClassification
import peltc
from peltc.compiler.base import building
def slow(*arguments):
    print("half-way", flush=True)
    time.sleep(60)
building.write_base = slow
peltc.compile("spec.yaml", BertForSequenceClassification.from_pretrained(sys.argv[1]), "out")
"""


def test_folders_of_a_killed_export_are_swept(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base in the making, in the cache, and the live model's folder beside the artifact."""
    monkeypatch.setenv("PELTC_CACHE", str(desk.folder / "cache"))
    command = [sys.executable, "-c", LIVE, str(desk.model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half-way\n"
        process.kill()
    assert [len([*desk.folder.glob(p)]) for p in (".model-*", "cache/bases/.building-*")] == [1, 1]
    outcome = desk.compile()
    assert outcome.code == 0, outcome.err
    assert [p for p in desk.folder.rglob(".*")] == []


@pytest.mark.parametrize("place", ["spec.yaml", "spec.yaml/cache", "/proc/cache", "link"])
def test_cache_that_cannot_be_written(desk: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before anything is exported. Root writes where permissions forbid it, but not into a file."""
    (desk.folder / "link").symlink_to("/proc/self/nowhere")
    monkeypatch.setenv("PELTC_CACHE", str(desk.folder / place))
    err = desk.refuse().err
    assert "E620 cannot write to the cache" in err and "PELTC_CACHE" in err
    assert "exporting" not in err


def test_cache_that_need_not_be_written(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known base, on a file system that takes no more: nothing is written to the cache, and nothing is said."""
    from peltc.compiler.files import cache, integrity

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", full)
    monkeypatch.setattr(integrity, "_replace", full)
    outcome = desk.compile()
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("r", "limit"),
    [
        pytest.param(4, 1000, id="data"),
        pytest.param(4000, 400_000, id="adapter"),
    ],
)
def test_disk_is_full(desk: Any, r: int, limit: int) -> None:
    """The writers' own errors, in a process whose files cannot grow beyond `limit` bytes."""
    import resource

    assert desk.compile().code == 0
    desk.write(LORA + f"    r: {r}\n")
    before = desk.contents()
    command = [sys.executable, "-m", "peltc", "compile", "spec.yaml", str(desk.model), "-o", "out", "--no-verify"]
    small = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=small)
    desk.check_same(before)
    assert done.returncode == 1, done.stderr
    assert "E602" in done.stderr and "File too large" in done.stderr
