"""Folders in the making: locked while their process lives, swept when it is dead, and never anybody else's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peltc.compiler.files.staging import staging, sweep

BUILDER = """\
import sys, time
from pathlib import Path
from peltc.compiler.files.staging import staging
with staging(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "half").write_text("x")
    if len(sys.argv) > 3:
        (folder.parent / "old").mkdir()
        (folder.parent / "old" / "pelt.json").write_text("{}")
    print("built", flush=True)
    time.sleep(60)
"""


def kill_half_way(parent: Path, prefix: str, *more: str) -> Path:
    """What a process leaves that is killed while it builds."""
    before = set(parent.iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", BUILDER, parent, prefix, *more], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "built\n"
        (left,) = set(parent.iterdir()) - before
        assert sweep(parent, prefix) == [], "it lives"
        process.kill()
    assert (left / "content" / "half").is_file()
    return left


@pytest.mark.parametrize("prefix", [".out-", ".model-", ".building-", ".a[b]*-"])
def test_dead_folders_are_swept(tmp_path: Path, prefix: str) -> None:
    left = kill_half_way(tmp_path, prefix)
    assert sweep(tmp_path, ".other-") == []
    assert sweep(tmp_path, prefix) == [left]
    assert [*tmp_path.iterdir()] == []


def test_nothing_is_left_by_a_living_process(tmp_path: Path) -> None:
    with staging(tmp_path, ".out-") as folder:
        (folder / "file").touch()
        assert sweep(tmp_path, ".out-") == [], "not even by the process itself"
        assert (folder / "file").is_file()
    assert [*tmp_path.iterdir()] == []


def test_what_is_moved_away_stays(tmp_path: Path) -> None:
    with staging(tmp_path, ".out-") as folder:
        (folder / "file").touch()
        folder.rename(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("inside", ["nothing", "settings", "lock_and_more", "link"])
def test_folders_of_others_stay(tmp_path: Path, inside: str) -> None:
    """A folder may be called like ours by chance."""
    mine = tmp_path / ".out-settings"
    if inside == "link":
        left = kill_half_way(tmp_path, ".elsewhere-")
        mine.symlink_to(left)
    else:
        mine.mkdir()
    if inside == "settings":
        (mine / "mine.txt").write_text("mine")
    if inside == "lock_and_more":
        (mine / "peltc.lock").touch()
        (mine / "mine.txt").write_text("mine")
    assert sweep(tmp_path, ".out-") == []
    assert mine.exists()


def test_an_artifact_moved_aside_returns(tmp_path: Path) -> None:
    """Killed between the two renames of a file system that cannot exchange folders: nothing is at the place."""
    kill_half_way(tmp_path, ".out-", "aside")
    sweep(tmp_path, ".out-", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "pelt.json").read_text() == "{}"


def test_an_artifact_moved_aside_does_not_replace_another(tmp_path: Path) -> None:
    kill_half_way(tmp_path, ".out-", "aside")
    (tmp_path / "out").mkdir()
    sweep(tmp_path, ".out-", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [*(tmp_path / "out").iterdir()] == []


def test_no_folder_to_sweep(tmp_path: Path) -> None:
    assert sweep(tmp_path / "nowhere", ".out-") == []
