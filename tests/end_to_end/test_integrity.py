"""A base that is overwritten changes the artifact that links it: refused when it is opened, and copies are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peltc import schemas
from peltc.compiler.files import integrity
from peltc.runtime.building import compile as compiling
from peltc.runtime.building.compile import compile, verify
from peltc.runtime.running.session import Session
from peltc.spec.diagnostics import PeltError

LORA = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}
IDS = np.random.default_rng(0).integers(3, 99, (2, 9))


@pytest.fixture
def base(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A base of one's own to overwrite."""
    return Path(shutil.copytree(model_folder("bert"), tmp_path / "base"))


@pytest.fixture
def artifact(base: Path, tmp_path: Path) -> Path:
    compile(LORA, base, tmp_path / "out", verify=False)
    return tmp_path / "out"


def other(folder: Path, longer: bool = False) -> Path:
    """Another checkpoint of the same tensors: all NaN."""
    tensors = {n: np.full_like(a, np.nan) for n, a in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "other.safetensors", {"format": "pt", **({"note": "x" * 99} if longer else {})})
    return folder / "other.safetensors"


def entry(artifact: Path) -> dict[str, Any]:
    (found,) = json.loads((artifact / "pelt.json").read_text())["base"]["files"]
    return dict(found)


def write_entry(artifact: Path, found: dict[str, Any]) -> None:
    manifest = json.loads((artifact / "pelt.json").read_text())
    manifest["base"]["files"] = [found]
    (artifact / "pelt.json").write_text(json.dumps(manifest))


def stamps(file: Path) -> dict[str, int]:
    found = file.stat()
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino, "device": found.st_dev}


def test_the_manifest_records_the_base(artifact: Path) -> None:
    found, file = entry(artifact), artifact / "model.safetensors"
    assert stamps(file).items() <= found.items()
    shown = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout
    assert found["sha256"] == shown.split()[0]
    manifest = json.loads((artifact / "pelt.json").read_text())
    jsonschema.Draft202012Validator(schemas.load("manifest")).validate(manifest)


@pytest.mark.parametrize("longer", [False, True], ids=["same_size", "longer"])
@pytest.mark.parametrize("copying", [["cp"], ["cp", "--preserve=timestamps"]], ids=["cp", "cp_preserving"])
def test_overwritten_in_place(base: Path, artifact: Path, copying: list[str], longer: bool) -> None:
    kept = Session(artifact)(input_ids=IDS)["logits"]
    shutil.copyfile(base / "model.safetensors", base / "kept")
    subprocess.run([*copying, other(base, longer), base / "model.safetensors"], check=True)
    for opening in (Session, verify):
        with pytest.raises(PeltError) as caught:
            opening(artifact)
        (finding,) = caught.value.diagnostics
        assert finding.code == "E621" and finding.place.path == str(artifact / "model.safetensors")
        assert entry(artifact)["sha256"][:16] in finding.expected
        assert ("bytes" if longer else "SHA-256") in finding.message.partition("found: ")[2]
        assert "restore" in finding.hint and "--self-contained" in finding.hint
    subprocess.run(["cp", base / "kept", base / "model.safetensors"], check=True)
    np.testing.assert_array_equal(Session(artifact)(input_ids=IDS)["logits"], kept)


def test_overwritten_before_a_graph_is_opened(base: Path, tmp_path: Path) -> None:
    """A session that generates opens each graph when it is asked for."""
    compile(LORA, models_gpt2(tmp_path), tmp_path / "out", verify=False, generation=True)
    session = Session(tmp_path / "out")
    file = tmp_path / "gpt2" / "model.safetensors"
    subprocess.run(["cp", other(tmp_path / "gpt2"), file], check=True)
    with pytest.raises(PeltError, match="E621"):
        session.generate(input_ids=IDS, max_new_tokens=2)


def models_gpt2(folder: Path) -> Path:
    import models

    return models.save("gpt2", folder / "gpt2")


def test_a_base_that_is_gone(artifact: Path) -> None:
    (artifact / "model.safetensors").unlink()
    with pytest.raises(PeltError, match=r"model.safetensors\n  E621 .*No such file"):
        Session(artifact)


def test_a_pipe_is_no_base(artifact: Path) -> None:
    (artifact / "model.safetensors").unlink()
    os.mkfifo(artifact / "model.safetensors")
    with pytest.raises(PeltError, match="E621"):
        Session(artifact)


@pytest.mark.parametrize("how", ["copied", "touched"])
def test_the_same_under_another_stamp_is_accepted_and_remembered(
    artifact: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, place = Session(artifact)(input_ids=IDS)["logits"], artifact
    if how == "copied":
        place = artifact.with_name("copied")
        subprocess.run(["cp", "-r", artifact, place], check=True)
    else:
        subprocess.run(["touch", artifact / "model.safetensors"], check=True)
    file = place / "model.safetensors"
    assert not stamps(file).items() <= entry(place).items()
    np.testing.assert_array_equal(Session(place)(input_ids=IDS)["logits"], kept)
    assert stamps(file).items() <= entry(place).items()
    assert sorted(p.name for p in place.iterdir() if p.name.startswith(".")) == []

    def read(file: Path) -> None:
        raise AssertionError("the bytes are read again")

    monkeypatch.setattr(integrity, "digest_file", read)
    Session(place)


@pytest.fixture
def stranger() -> Iterator[Path]:
    """A folder that everybody can read, while this process is nobody: root is not stopped by permissions."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_folder_that_cannot_be_written(artifact: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(shutil.copytree(artifact, stranger / "out"))
    (place / "model.safetensors").chmod(0o644)
    before = (place / "pelt.json").read_bytes()
    manifest = json.loads(before)
    monkeypatch.setenv("PELTC_CACHE", "/proc/nowhere")
    place.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(OSError, match="denied"):
            (place / "file").touch()
        integrity.check_record(place / "pelt.json", manifest)
    finally:
        if root:
            os.seteuid(0)
        place.chmod(0o755)
    assert (place / "pelt.json").read_bytes() == before
    assert stamps(place / "model.safetensors").items() <= manifest["base"]["files"][0].items(), "known to this process"


OPENING = """\
import sys
from pathlib import Path
from peltc import Session
from peltc.compiler.files.integrity import amend
def forget(manifest):
    manifest["base"]["files"][0]["mtime_ns"] = 0
for _ in range(20):
    amend(Path(sys.argv[1]) / "pelt.json", forget)
    Session(sys.argv[1])
"""


def test_processes_at_once(artifact: Path) -> None:
    """All of them open a copy, and the manifest is whole whoever writes it last."""
    place = Path(shutil.copytree(artifact, artifact.with_name("copied")))
    running = [subprocess.Popen([sys.executable, "-c", OPENING, place], stderr=subprocess.PIPE) for _ in range(3)]
    failed = [err for process in running if (err := process.communicate()[1]) and process.returncode]
    assert failed == []
    Session(place)
    assert entry(place)["sha256"] == entry(artifact)["sha256"]
    assert sorted(p.name for p in place.iterdir() if p.name.startswith(".")) == []


def test_artifacts_of_earlier_versions_open(base: Path, artifact: Path) -> None:
    write_entry(artifact, {key: entry(artifact)[key] for key in ("file", "bytes", "how")})
    Session(artifact)
    subprocess.run(["cp", other(base, longer=True), base / "model.safetensors"], check=True)
    with pytest.raises(PeltError, match="E621"):
        Session(artifact)


@pytest.mark.parametrize("change", [{"file": "../base/model.safetensors"}, {"file": 3}, {"bytes": "x"}, {"file": "\0"}])
def test_a_hostile_record(artifact: Path, change: dict[str, Any]) -> None:
    write_entry(artifact, entry(artifact) | change)
    with pytest.raises(PeltError, match="E603"):
        Session(artifact)


def test_overwritten_while_it_is_compiled(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = compiling.save_adapter

    def overwritten(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        subprocess.run(["cp", other(base), base / "model.safetensors"], check=True)

    monkeypatch.setattr(compiling, "save_adapter", overwritten)
    with pytest.raises(PeltError, match="E622"):
        compile(LORA, base, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_replaced_between_reading_and_linking(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_on = compiling.plan_on

    def replaced(*arguments: Any) -> Any:
        other(base).replace(base / "model.safetensors")
        return plan_on(*arguments)

    monkeypatch.setattr(compiling, "plan_on", replaced)
    with pytest.raises(PeltError, match="E622"):
        compile(LORA, base, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_file_is_read_for_its_digest_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest that the cache has is taken: here it is another than the file's."""
    monkeypatch.setenv("PELTC_CACHE", str(tmp_path / "cache"))
    file = base / "model.safetensors"
    os.utime(file, (time.time() - 60,) * 2)
    first = compile(LORA, base, tmp_path / "out", verify=False)["base"]["files"][0]["sha256"]
    (known,) = (tmp_path / "cache" / "digests").iterdir()
    assert known.read_text() == first
    known.write_text("0" * 64)
    assert compile(LORA, base, tmp_path / "out", verify=False)["base"]["files"][0]["sha256"] == "0" * 64
    os.utime(file, (time.time() - 30,) * 2)
    assert compile(LORA, base, tmp_path / "out", verify=False)["base"]["files"][0]["sha256"] == first


def test_a_file_of_this_moment_is_not_remembered(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be written once more under the same time stamp."""
    monkeypatch.setenv("PELTC_CACHE", str(tmp_path / "cache"))
    os.utime(base / "model.safetensors")
    integrity.digest_file(base / "model.safetensors")
    assert not (tmp_path / "cache").exists()
