"""A store of profiles behind a session: each row has what its profile alone answers, whatever comes and goes."""

from __future__ import annotations

import json
import random
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save, save_file

import peltc
from peltc.compiler.linking.linker import Linker
from peltc.runtime.building.compile import plan_for
from peltc.runtime.commands.cli import run
from peltc.runtime.running.form import write_profile
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
CPU = ["CPUExecutionProvider"]
MANY = 12
LORA = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}
GIVEN = {"input_ids": [[5, 6, 7, 8], [4, 9, 7, 3]], "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]]}


def drawn(linker: Linker, seed: int) -> dict[str, Array]:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, 0.3, tensor.shape).astype(np.float32) for name, tensor in linker.plan.tensors.items()}


@pytest.fixture(scope="module")
def linked(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An artifact of each mode, a store of profiles `t0/0`, `t1/1`, ..., and what each of them answers alone: by an
    artifact into which its weights are compiled."""
    folder, base = tmp_path_factory.mktemp("store"), model_folder("bert")
    spec = load_spec({"pelt": 1, "name": "first", "attach": [LORA]})
    for mode in ("bank", "swappable"):
        peltc.compile(spec, base, folder / mode, mode=mode, verify=False)
    linker, alone = Linker(folder / "bank"), {}
    store = peltc.ProfileStore(folder / "store", folder / "bank")
    store.put_all({f"t{i % 3}/{i}": linker.link(drawn(linker, i)) for i in range(MANY)})
    for i in range(MANY):
        if i < 2:
            peltc.compile(spec, base, folder / str(i), drawn(linker, i), mode="static", verify=False)
            alone[f"t{i % 3}/{i}"] = peltc.Session(folder / str(i), CPU)(**GIVEN)["logits"]
    session = peltc.Session(folder / "bank", CPU)
    for i in range(MANY):
        name = f"t{i % 3}/{i}"
        session.add_profile(name, linker.link(drawn(linker, i)))
        found = session(profile=name, **GIVEN)["logits"]
        if name in alone:
            assert np.abs(found - alone[name]).max() < 1e-6 * np.abs(found).max()
        alone[name] = found
    assert all(np.abs(alone["t0/0"] - alone[name]).max() > 1e-3 for name in alone if name != "t0/0")
    return {"folder": folder, "store": store, "linker": linker, "alone": alone}


def rows(linked: dict[str, Any], names: list[str | None]) -> Array:
    return np.stack([linked["alone"][name][i % 2] for i, name in enumerate(names)])


def batch(texts: int) -> dict[str, Any]:
    return {name: [value[i % 2] for i in range(texts)] for name, value in GIVEN.items()}


@pytest.mark.parametrize("mode", ["bank", "swappable"])
def test_a_run_brings_its_profiles_in(mode: str, linked: dict[str, Any]) -> None:
    session = peltc.Session(linked["folder"] / mode, CPU, store=linked["folder"] / "store", resident=3)
    for _ in range(2):
        for name, expected in linked["alone"].items():
            found = session(profile=name, **GIVEN)["logits"]
            assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    stats = session.residents.stats()
    assert stats == {"resident": 3, "hits": 0, "misses": 2 * MANY, "evictions": 2 * MANY - 3}
    session(profile="t2/11", **GIVEN)
    assert session.residents.stats()["hits"] == 1 and session.profiles == []
    with pytest.raises(PeltError, match="E626 there is no profile 't0/absent'"):
        session(profile="t0/absent", **GIVEN)


def test_the_least_recently_used_goes(linked: dict[str, Any]) -> None:
    session = peltc.Session(linked["folder"] / "bank", CPU, store=linked["store"], resident=3)
    for name in ("t0/0", "t1/1", "t2/2", "t0/0", "t0/3"):
        session(profile=name, **GIVEN)
    assert [name for name, _ in session.residents.entries] == ["t2/2", "t0/0", "t0/3"]
    mixed = ["t0/0", None, "t1/1", "t0/0"]
    found = session(profile=mixed, **batch(4))["logits"]
    bare = session(**GIVEN)["logits"]
    expected = np.stack([linked["alone"]["t0/0"][0], bare[1], linked["alone"]["t1/1"][0], linked["alone"]["t0/0"][1]])
    assert np.abs(found - expected).max() < 1e-6
    assert [name for name, _ in session.residents.entries] == ["t0/3", "t0/0", "t1/1"]


def test_all_or_nothing(linked: dict[str, Any]) -> None:
    """What cannot be brought in whole changes nothing of what is there."""
    session = peltc.Session(linked["folder"] / "bank", CPU, store=linked["store"], resident=2)
    session(profile=["t0/0", "t1/1"], **GIVEN)
    before = session.residents.stats()
    for names, message in (
        (["t2/2", "t0/absent"], "E626 there is no profile 't0/absent'"),
        (["t2/2", "../etc"], "E632"),
        (["t2/2", "t0/0", "t1/1"], "E216 the profiles of a batch"),
        (["t2/2", 5], "E216 the profiles of a batch"),
    ):
        with pytest.raises(PeltError, match=message):
            session(profile=names, **GIVEN)
        assert session.residents.stats() == before
    with pytest.raises(PeltError, match=r"E636 a run asks for 3 profiles at once[\s\S]*at most 2"):
        session(profile=["t2/2", "t0/0", "t1/1"], **batch(3))
    assert session.residents.stats() == before
    session.add_profile("own", linked["linker"].link(drawn(linked["linker"], 0)))  # beside those of the store
    found = session(profile=["own", "t1/1", "t2/2"], **batch(3))["logits"]
    assert np.abs(found - rows(linked, ["t0/0", "t1/1", "t2/2"])).max() < 1e-6
    assert session.profiles == ["own"]


def test_threads_that_take_each_others_room(linked: dict[str, Any]) -> None:
    """Eight threads ask for random rows of twelve profiles, of which four are in memory; a ninth puts one of them again
    and again, in two versions: each row is the answer of its profile alone."""
    linker, store = linked["linker"], peltc.ProfileStore(linked["folder"] / "shared", linked["folder"] / "bank")
    names = list(linked["alone"])
    store.put_all({name: linked["store"].get(name) for name in names})
    versions = [linked["store"].get("t0/0"), linked["store"].get("t0/3")]
    either = [linked["alone"]["t0/0"], linked["alone"]["t0/3"]]
    session = peltc.Session(linked["folder"] / "bank", CPU, store=store, resident=4)
    wrong: list[object] = []
    done = threading.Event()

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(60):
                chosen = [draw.choice(names) for _ in range(draw.randint(1, 4))]
                found = session(profile=chosen, **batch(len(chosen)))["logits"]
                for i, name in enumerate(chosen):
                    known = [v[i % 2] for v in either] if name == "t0/0" else [linked["alone"][name][i % 2]]
                    if min(np.abs(found[i] - value).max() for value in known) > 1e-6:
                        wrong.append((name, found[i], known))
        except BaseException as error:
            wrong.append(error)

    def put() -> None:
        turn = 0
        while not done.is_set():
            store.put("t0/0", versions[(turn := turn + 1) % 2])

    writer = threading.Thread(target=put)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in (writer, *threads):
        thread.start()
    for thread in threads:
        thread.join(300)
    done.set()
    writer.join()
    assert not wrong, wrong[:3]
    assert not any(thread.is_alive() for thread in threads)
    bank, stats = session.kept, session.residents.stats()
    assert stats["resident"] <= 4 and stats["evictions"] > 100
    assert not bank.running and not bank.left and bank.rows == 5  # never more than there is room for
    store.put("t0/0", versions[0])
    other = peltc.ProfileStore(linked["folder"] / "shared")  # as another process has it
    for version, expected in ((1, either[1]), (0, either[0])):
        other.put("t0/0", versions[version])
        assert np.abs(session(profile="t0/0", **GIVEN)["logits"] - expected).max() < 1e-6
    other.delete("t0/0")
    with pytest.raises(PeltError, match="E626 there is no profile 't0/0'"):
        session(profile="t0/0", **GIVEN)
    assert linker.record["fingerprint"] == store.fingerprint


def test_a_damaged_profile_is_refused_by_name_and_no_other(linked: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "store"
    store = peltc.ProfileStore(path, linked["folder"] / "bank")
    store.put_all({name: linked["store"].get(name) for name in ("t0/0", "t1/1")})
    store.close()
    with sqlite3.connect(path) as db:
        content = bytearray(db.execute("SELECT content FROM record WHERE name = '1'").fetchone()[0])
        content[-5] ^= 1  # within a tensor's values
        db.execute("UPDATE record SET content = ? WHERE name = '1'", (bytes(content),))
    session = peltc.Session(linked["folder"] / "bank", CPU, store=path)
    with pytest.raises(PeltError, match="E634 the profile 't1/1' is damaged"):
        session(profile=["t0/0", "t1/1"], **GIVEN)
    assert np.abs(session(profile="t0/0", **GIVEN)["logits"] - linked["alone"]["t0/0"]).max() < 1e-6
    assert run(["profiles", "check", str(path)]) == 1
    assert "E634 the profile 't1/1' is damaged" in capsys.readouterr().err


def test_what_is_put_is_held_against_the_artifact(linked: dict[str, Any], model_folder: Folder, tmp_path: Path) -> None:
    """Files of both kinds, and what is neither; a store of another artifact."""
    folder, linker = linked["folder"], linked["linker"]
    store = peltc.ProfileStore(tmp_path / "store", folder / "bank")
    save_file(drawn(linker, 1), tmp_path / "adapter.safetensors")
    store.put("t/adapter", tmp_path / "adapter.safetensors")
    store.put("t/bytes", save(drawn(linker, 1)))
    arrays = linker.link(drawn(linker, 1))
    write_profile(tmp_path / "x.onnx_adapter", arrays, store.fingerprint)
    store.put("t/linked", tmp_path / "x.onnx_adapter")
    assert store.get("t/linked") == (tmp_path / "x.onnx_adapter").read_bytes()
    for name in ("t/adapter", "t/bytes", "t/linked"):
        found = store.read(name)[1]
        assert all(np.array_equal(found[key], arrays[key]) for key in arrays)
    session = peltc.Session(folder / "bank", CPU, store=tmp_path / "store")
    found = session(profile=["t/adapter", "t/linked"], **GIVEN)["logits"]
    assert np.abs(found - linked["alone"]["t1/1"]).max() < 1e-6
    write_profile(tmp_path / "y.onnx_adapter", arrays, "f" * 64)
    name = next(iter(arrays))
    alone = peltc.ProfileStore(tmp_path / "store")
    for held, source, message in (
        (store, tmp_path / "y.onnx_adapter", "E625 .* was made for another artifact"),
        (alone, tmp_path / "y.onnx_adapter", "E625 .* was made for another artifact"),
        (store, {**arrays, name: arrays[name] * np.nan}, "E625 the profile 't/new' has values"),
        (store, b"\0" * 400, "E401"),
        (store, b"\0\0\0\0TORT" + b"\0" * 400, "E625 the file is no profile"),
        (store, tmp_path / "absent", "E625 cannot read the profile"),
        (store, save({**drawn(linker, 1), "more": np.zeros(2, np.float32)}), "E403"),
        (alone, save(drawn(linker, 1)), "E631 an adapter is linked by its artifact"),
        (store, 5, "E216 a profile is given as int"),
    ):
        with pytest.raises(PeltError, match=message):
            held.put("t/new", source)
    with pytest.raises(PeltError, match=r"E632 '\.\./new' is no name in a store"):
        store.put("../new", tmp_path / "x.onnx_adapter")
    few = peltc.ProfileStore(tmp_path / "store", limits=peltc.StoreLimits(size=100))
    with pytest.raises(PeltError, match="E633 the profile 't/new' has"):
        few.put("t/new", tmp_path / "x.onnx_adapter")
    assert {record.name for record in store.list()} == {"t/adapter", "t/bytes", "t/linked"}
    other = load_spec({"pelt": 1, "name": "first", "attach": [{**LORA, "r": 2}]})
    peltc.compile(other, model_folder("bert"), tmp_path / "other", mode="bank", verify=False)
    for wrong in (tmp_path / "store", alone):
        with pytest.raises(PeltError, match="E631 the store belongs to another artifact"):
            peltc.Session(tmp_path / "other", CPU, store=wrong)
    with pytest.raises(PeltError, match="E631 the store belongs to another artifact"):
        peltc.ProfileStore(tmp_path / "store", tmp_path / "other")
    with pytest.raises(PeltError, match="E631 there is no store"):
        peltc.Session(folder / "bank", CPU, store=tmp_path / "absent")
    peltc.compile(other, model_folder("bert"), tmp_path / "fixed", verify=False)
    with pytest.raises(PeltError, match="E624"):
        peltc.Session(tmp_path / "fixed", CPU, store=tmp_path / "store")
    with pytest.raises(PeltError, match="E216 how many profiles are resident"):
        peltc.Session(folder / "bank", CPU, store=tmp_path / "store", resident=0)


def test_masks_over_a_bank_are_small_in_the_store_and_in_memory(model_folder: Folder, tmp_path: Path) -> None:
    """A profile of bits is stored as such, and its bits are what a session takes of it."""
    base = model_folder("bert")
    spec = load_spec({"pelt": 1, "name": "first", "attach": [{"recipe": "xpeft", "n": 100, "k": 4, "reduction": 4}]})
    peltc.compile(spec, base, tmp_path / "out", mode="bank", verify=False)
    plan, _ = plan_for(spec, base)
    from peltc.compiler.adapter.profile import pack
    from peltc.compiler.adapter.weights import sourced

    draw = np.random.default_rng(0)
    own = {n: draw.normal(size=t.shape).astype(np.float32) for n, t in plan.tensors.items() if not t.source}
    store = peltc.ProfileStore(tmp_path / "store", tmp_path / "out")
    bits = pack(plan, own | sourced(plan))
    store.put("t/bits", bits)
    session = peltc.Session(tmp_path / "out", CPU, store=store)
    session.add_profile("linked", peltc.link(tmp_path / "out", own))
    found = session(profile=["t/bits", "linked"], **{name: [value[0]] * 2 for name, value in GIVEN.items()})["logits"]
    assert np.abs(found[0] - found[1]).max() < 1e-6 * np.abs(found).max()
    assert np.abs(found[0] - session(**GIVEN)["logits"][0]).max() > 1e-4
    layers, masks, size = 2, 2, 13
    assert sum(array.nbytes for array in store.read("t/bits")[1].values()) == layers * masks * size
    assert len(bits) < 500


def test_memory_of_a_resident_profile(model_folder: Folder, tmp_path: Path) -> None:
    """A profile takes its own bytes of the bank's arrays, and none before it is brought in."""
    base = model_folder("bert")
    spec = load_spec({"pelt": 1, "name": "first", "attach": [{**LORA, "r": 2048}]})
    peltc.compile(spec, base, tmp_path / "out", mode="bank", verify=False)
    linker = Linker(tmp_path / "out")
    store = peltc.ProfileStore(tmp_path / "store", tmp_path / "out")
    store.put_all({f"t/{i}": linker.link(drawn(linker, i)) for i in range(33)})
    peltc.Session(tmp_path / "out", CPU)(**GIVEN)
    before = psutil.Process().memory_info().rss
    session = peltc.Session(tmp_path / "out", CPU, store=store, resident=200)
    for i in range(33):
        session(profile=f"t/{i}", **GIVEN)
    own = sum(array[:1].nbytes for array in session.kept.arrays.values())
    each = (psutil.Process().memory_info().rss - before) / 33
    assert own > 1 << 20 and each < 1.2 * own, (each, own)


def test_the_command_line(linked: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    store, artifact = str(tmp_path / "store"), str(linked["folder"] / "bank")
    file = tmp_path / "one.onnx_adapter"
    file.write_bytes(linked["store"].get("t1/1"))
    assert run(["profiles", "add", store, "t/one", str(file)]) == 1
    assert "E631 there is no store" in capsys.readouterr().err
    assert run(["profiles", "add", store, "t/one", str(file), "--artifact", artifact]) == 0
    assert run(["profiles", "add", store, "t/two", str(file), "-q"]) == 0
    assert f"2 profiles, {2 * file.stat().st_size:,} bytes" in capsys.readouterr().out
    assert run(["profiles", "add", store, "two", str(file)]) == 1
    assert "E632 'two' is no name in a store" in capsys.readouterr().err
    assert run(["profiles", "list", store, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["profiles"]] == ["t/one", "t/two"] and found["stats"]["tenants"] == 1
    assert run(["profiles", "list", store, "--tenant", "t"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["PROFILE", "BYTES"]
    assert run(["profiles", "check", store]) == 0
    assert run(["profiles", "remove", store, "t/one", "t/two"]) == 0
    assert run(["profiles", "compact", store]) == 0
    out = capsys.readouterr().out
    assert "2 profiles, all as they were put" in out and "0 profiles are left" in out and "bytes before" in out
    assert run(["profiles", "remove", store, "t/one"]) == 1
