"""Records on disk: whole whatever kills the writer, refused where bytes changed, and of one tenant each."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from peltc.runtime.running.records import Records, StoreLimits
from peltc.spec.diagnostics import PeltError

ABOUT = {"fingerprint": "ab" * 32}
WRITER = """
import random, sys
sys.path.insert(0, {tests!r})
from peltc.runtime.running.records import Records
from test_records import ABOUT, content
path, begin = sys.argv[1], int(sys.argv[2])
records, draw = Records(path, ABOUT), random.Random(begin)
print("ready", flush=True)
for i in range(begin, begin + 100_000):
    name = f"t{{i % 3}}/{{i}}"
    records.put([(name, content(name))])
    print("+", name, flush=True)
    if draw.random() < 0.1:
        print("?", name, flush=True)  # it may be there or not from here on
        records.delete(name)
        print("-", name, flush=True)
    if draw.random() < 0.05:
        records.compact()
"""


def content(name: str) -> bytes:
    """A record's bytes, which its name decides: 100 bytes to 60 kB."""
    seed = hashlib.sha256(name.encode()).digest()
    return seed * (3 + int.from_bytes(seed[:2], "little") % 2000)


def killed(path: Path, times: int, draw: random.Random) -> int:
    """Kill a writer at random moments; after each, all that was acknowledged is there and nothing is damaged.

    Returns:
        How many kills left a journal behind, so that a change was under way.
    """
    held: set[str] = set()
    known: dict[str, bytes] = {}
    half, program = 0, WRITER.format(tests=str(Path(__file__).parent))
    for turn in range(times):
        process = subprocess.Popen([sys.executable, "-c", program, str(path), str(turn * 100_000)], text=True,
                                   stdout=subprocess.PIPE)  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.random() * 0.1)
        process.kill()
        said = process.stdout.read().split("\n")[:-1]  # without a line that was not ended
        process.wait()
        half += path.with_name(f"{path.name}-journal").exists()
        open_to_either: set[str] = set()
        for line in said:
            sign, _, name = line.partition(" ")
            held = held | {name} if sign == "+" else held - {name}
            open_to_either = open_to_either | {name} if sign == "?" else open_to_either - {name}
        with_records = Records(path, ABOUT)
        names = {record.name for record in with_records.list()}
        more = names - held - open_to_either
        assert held <= names and len(more) <= 1, (turn, held - names, more)  # one was put and not acknowledged any more
        for name in names:
            if name not in known:
                known[name] = content(name)
                assert with_records.get(name) == known[name]
        assert with_records.stats()["profiles"] == len(names)
        if turn % 20 == 19 or turn == times - 1:
            assert with_records.check() == []
        with_records.close()
        held = names
    assert held
    return half


def test_a_killed_writer_leaves_the_file_whole(tmp_path: Path) -> None:
    killed(tmp_path / "store", 30, random.Random(0))


@pytest.mark.slow
def test_a_thousand_killed_writers(tmp_path: Path) -> None:
    half = killed(tmp_path / "store", 1000, random.Random(1))
    print(f"{half} of 1000 kills in the middle of a change")
    assert half > 100


def test_a_store_that_does_not_wait_for_the_disk_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: here a writer acknowledges what it has not committed."""
    program = WRITER.replace("records.put([(name, content(name))])", "pass")
    monkeypatch.setattr(sys.modules[__name__], "WRITER", program)
    with pytest.raises(AssertionError):
        killed(tmp_path / "store", 5, random.Random(0))


def test_changed_bytes_are_never_taken_for_a_record(tmp_path: Path) -> None:
    """A byte changed anywhere: each record is as it was or refused by name, and what is refused `check` finds too."""
    original = tmp_path / "original"
    names = [f"t{i % 3}/{i}" for i in range(60)]
    with_records = Records(original, ABOUT)
    with_records.put((name, content(name)) for name in names)
    with_records.close()
    intact, draw, path = original.read_bytes(), random.Random(0), tmp_path / "changed"
    refused = 0
    for i in range(150):
        changed = bytearray(intact)
        at = draw.randrange(100 if i % 5 == 0 else len(intact))  # the file's header, or anywhere
        changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            records = Records(path, ABOUT)
        except PeltError as error:
            assert error.diagnostics[0].code in ("E630", "E631", "E602")
            refused += 1
            continue
        wrong = []
        for name in names:
            try:
                assert records.get(name) == content(name)
            except PeltError as error:
                assert error.diagnostics[0].code in ("E634", "E626") and name in str(error)
                wrong.append(name)
        found = "\n".join(map(str, records.check()))
        assert found or not wrong, (at, wrong)
        refused += bool(wrong)
        records.close()
    assert refused > 75
    middle = intact.index(content(names[7])[:400])  # in the middle of a certain record
    path.write_bytes(intact[: middle + 300] + b"!" + intact[middle + 301 :])
    records = Records(path, ABOUT)
    with pytest.raises(PeltError, match=f"E634 the profile '{names[7]}' is damaged: its checksum is another"):
        records.get(names[7])
    assert [f.message.split("'")[1] for f in records.check()] == [names[7]]


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    records = Records(tmp_path / "store", ABOUT)
    records.put((f"t/{i}", content(str(i))) for i in range(50))
    size = (tmp_path / "store").stat().st_size
    with (tmp_path / "store").open("r+b") as stream:
        stream.truncate(size // 2)
    with pytest.raises(PeltError, match=r"E630|E634"):
        for i in range(50):
            records.get(f"t/{i}")
    assert records.check()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeltError, match="E631 there is no store"):
        Records(tmp_path / "absent", None)
    (tmp_path / "text").write_bytes(b"no database" * 100)
    with pytest.raises(PeltError, match="E630 the file is no store"):
        Records(tmp_path / "text", ABOUT)
    with pytest.raises(PeltError, match="E630 a store is a file"):
        Records(tmp_path, ABOUT)
    with pytest.raises(PeltError, match="E602"):
        Records(tmp_path / "no/folder", ABOUT)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE x (y)")
    other.close()
    with pytest.raises(PeltError, match="E630 the file is no store, or of another version"):
        Records(tmp_path / "other", ABOUT)
    Records(tmp_path / "store", ABOUT).close()
    with pytest.raises(PeltError, match="E631 the store belongs to another artifact"):
        Records(tmp_path / "store", {"fingerprint": "cd" * 32})
    with sqlite3.connect(tmp_path / "store") as db:  # something in the file that would act of itself
        db.execute("CREATE TRIGGER t AFTER INSERT ON record BEGIN DELETE FROM record; END")
    with pytest.raises(PeltError, match="E630 the file is no store"):
        Records(tmp_path / "store", ABOUT)


@pytest.mark.parametrize(
    "name",
    ["", "a", "/a", "a/", "a/b/c", "../a", "a/..", ".a/b", "a/.b", "a/b\n", "a\0/b", "ä/b", "a" * 65 + "/b", 5, None,
     "a\\b/c", "a b/c", "a/b%2f"],
)  # fmt: skip
def test_names_of_another_form(name: object, tmp_path: Path) -> None:
    records = Records(tmp_path / "store", ABOUT)
    for call in (records.get, records.delete, records.digest, lambda n: records.put([(n, b"x")])):
        with pytest.raises(PeltError, match="E632"):
            call(name)  # type: ignore[arg-type]


def test_limits_of_a_tenant(tmp_path: Path) -> None:
    """What one tenant puts changes nothing of another's, and what is too much is not there at all."""
    records = Records(tmp_path / "store", ABOUT, StoreLimits(size=100, records=3, total=250))
    records.put([("b/1", b"b" * 100)])
    records.put([("a/1", b"a" * 100), ("a/2", b"a" * 100)])
    for items, message in (
        ([("a/3", b"a" * 101)], "E633 the profile 'a/3' has 101 bytes"),
        ([("a/3", b"a" * 51)], "E633 with 'a/3', 'a' would have 251 bytes"),
        ([("a/3", b"a"), ("a/4", b"a")], "E633 with 'a/4', 'a' would have 4 profiles"),
        ([("a/3", b"a"), ("b/../a/1", b"x")], "E632"),
    ):
        with pytest.raises(PeltError, match=message):
            records.put(items)
        assert [r.name for r in records.list()] == ["a/1", "a/2", "b/1"]
    records.put([("a/2", b"c" * 50)])  # in place of the larger one
    records.put([("a/3", b"d" * 100)])
    assert records.stats("a") == {"profiles": 3, "bytes": 250}
    assert records.stats("b") == {"profiles": 1, "bytes": 100} and records.get("b/1") == b"b" * 100
    assert records.stats("nobody") == {"profiles": 0, "bytes": 0}
    records.delete("a/3")
    with pytest.raises(PeltError, match="E626 there is no profile 'a/3'"):
        records.get("a/3")
    with pytest.raises(PeltError, match="E626"):
        records.delete("a/3")
    assert records.stats("a") == {"profiles": 2, "bytes": 150} and records.check() == []


def test_listing_and_compacting(tmp_path: Path) -> None:
    records = Records(tmp_path / "store", ABOUT)
    records.put((f"t{i % 2}/{i:05}", b"x" * 300) for i in range(2500))
    assert [r.name for r in records.list("t1")] == [f"t1/{i:05}" for i in range(1, 2500, 2)]
    assert len({r.name for r in records.list()}) == 2500 and next(records.list()).size == 300
    records.delete(*[record.name for record in records.list("t0")])
    before, after = records.compact()
    assert after < 0.6 * before and records.stats()["free"] == 0
    assert records.stats()["tenants"] == 1 and records.check() == []
    assert b"x" * 300 in (tmp_path / "store").read_bytes()
    with pytest.raises(PeltError, match="E626 there is no profile 't0/00000'"):
        records.delete("t1/00001", "t0/00000")
    records.delete(*[record.name for record in records.list()])
    assert b"x" * 30 not in (tmp_path / "store").read_bytes()  # what is deleted is overwritten


def test_two_that_write_wait_for_each_other(tmp_path: Path) -> None:
    """Threads with connections of their own, and one that they share; a reader sees each change."""
    path = tmp_path / "store"
    one, other = Records(path, ABOUT), Records(path, ABOUT)
    seen = {other.state()}
    threads = [threading.Thread(target=lambda r=r, t=t: [r.put([(f"{t}/{i}", b"x" * 5000)]) for i in range(25)])
               for r, t in ((one, "a"), (other, "b"), (one, "c"))]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.stats() | {"file": 0} == {"profiles": 75, "bytes": 375_000, "tenants": 3, "file": 0, "free": 0}
    seen.add(other.state())
    one.put([("a/0", b"y")])
    seen.add(other.state())
    other.put([("a/0", b"z")])
    seen.add(other.state())
    assert len(seen) == 4 and other.state() in seen
    with sqlite3.connect(path, isolation_level=None) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(PeltError, match=r"E635 another process has kept the store for 0\.05 s"):
            Records(path, ABOUT, wait=0.05)
        writer.execute("ROLLBACK")
