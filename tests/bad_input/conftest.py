"""A desk to compile bad input on: a spec, a model and an output path in a folder of their own, and what was left."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from peltc.runtime.commands.cli import run

SPEC = """\
pelt: 1
attach:
  - method: lora
    at: [attention.query, attention.value]
    r: 4
"""


@dataclass(frozen=True)
class Outcome:
    """What a command line said."""

    code: int
    out: str
    err: str


class Desk:
    """A folder with a spec, commands run in it, and a look at what they leave."""

    def __init__(self, folder: Path, model: Path, cache: Path):
        self.folder, self.model, self.cache = folder, model, cache

    def write(self, text: str | bytes, name: str = "spec.yaml") -> Path:
        file = self.folder / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    def pelt(self, *arguments: str) -> Outcome:
        """Run the real command line in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(list(arguments))
        return Outcome(code, out.getvalue(), err.getvalue())

    def compile(self, *extra: str, model: str = "", out: str = "out") -> Outcome:
        return self.pelt("compile", "spec.yaml", model or str(self.model), "-o", out, "--no-verify", *extra)

    def refuse(self, *extra: str, model: str = "", out: str = "out") -> Outcome:
        """Compile what cannot be compiled: exit code 1, and nothing left behind."""
        before = self.contents()
        outcome = self.compile(*extra, model=model, out=out)
        assert outcome.code == 1, f"exit code {outcome.code}\n{outcome.out}{outcome.err}"
        assert outcome.out == "", "results only on stdout"
        self.check_same(before)
        return outcome

    def contents(self) -> dict[str, str]:
        """Every path in the folder and in the cache: a digest of a file, the target of a link."""
        found = {}
        for path in (*self.folder.rglob("*"), *self.cache.rglob("*")):
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            else:
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        return found

    def check_same(self, before: dict[str, str]) -> None:
        after = self.contents()
        assert sorted(set(after) ^ set(before)) == [], "something was left behind, or is gone"
        assert after == before

    def copy_model(self, name: str = "model", **config: object) -> Path:
        """A copy of the model here; `config` changes keys of its config, None takes one away."""
        folder = self.folder / name
        shutil.copytree(self.model, folder)
        record = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
        return folder


@pytest.fixture(scope="session")
def own_cache(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, model_folder: Callable[..., Path]
) -> tuple[Path, Path]:
    """A cache that no other process writes to, so that what is left in it was left here, with the model's base in it;
    and the model."""
    from peltc.compiler.base.opening import open_base
    from peltc.compiler.files.integrity import digest_file, remember

    model = model_folder("bert")
    base = open_base(model)
    folder = tmp_path_factory.mktemp("own-cache")
    shutil.copytree(base.graph_file.parent, folder / "bases" / base.graph_file.parent.name)
    (folder / "weights").mkdir()  # no entry yet
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PELTC_CACHE", str(folder))
        for file in base.checkpoint.files:
            remember(*digest_file(file))
    return folder, model


@pytest.fixture
def desk(tmp_path: Path, own_cache: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk with a good spec on it."""
    cache, model = own_cache
    monkeypatch.setenv("PELTC_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    made = Desk(tmp_path, model, cache)
    made.write(SPEC)
    return made
