"""The package as it is shipped: folders and names, the wheel, what may import what, and what stays unloaded."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("schemas", "spec", "compiler", "runtime", "peltc")
"""From the bottom up: each may import those before it."""


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


# folders and names


def package_of(folder: Path) -> str:
    """The import name of a folder: `spec/methods` is `peltc.spec.methods`."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "peltc" else ("peltc", *parts))


def folders_with_content() -> list[Path]:
    kept = (".py", ".yaml", ".json", ".typed")
    files = (f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix in kept)
    return sorted({f.parent for f in files if "__pycache__" not in f.parts})


def test_packages_are_the_folders_on_disk() -> None:
    """A folder that is not listed imports in an editable install, and is absent from the wheel."""
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(map(package_of, folders_with_content()))


def test_every_folder_is_a_package() -> None:
    """A mapped folder without `__init__.py` is missing from an editable install."""
    assert [f for f in folders_with_content() if not (f / "__init__.py").is_file()] == []


def test_folder_map() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {f"peltc.{f}": f for f in FOLDERS if f != "peltc"}


# the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree: setuptools ships whatever an earlier build left in `build/`."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tree / "dist"], cwd=tree, check=True, capture_output=True)
    (found,) = (tree / "dist").glob("*.whl")
    return found


def test_wheel_has_every_file_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{package_of(folder).replace('.', '/')}/{file.name}"
        for folder in folders_with_content()
        for file in folder.iterdir()
        if file.is_file()
    }
    found = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in found if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in found)
    assert {name.split("/")[0] for name in found} == {"peltc", f"peltc-{PROJECT['project']['version']}.dist-info"}


def test_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    """Installed away from the sources and run from elsewhere, every module imports and every data file is read."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", tmp_path, wheel]
    subprocess.run(install, check=True, capture_output=True)
    modules = [
        f"{package_of(f.parent)}.{f.stem}" if f.stem != "__init__" else package_of(f.parent)
        for folder in FOLDERS
        for f in python_files(folder)
    ]
    result = in_fresh_python(
        f"""
        import importlib, json, sys
        sys.path.insert(0, {str(tmp_path)!r})
        files = [importlib.import_module(name).__file__ for name in {modules!r}]
        from peltc.spec.method import shipped
        from peltc import schemas
        schemas.load("method")
        print(json.dumps({{"files": files, "methods": len(shipped())}}))
        """
    )
    assert [f for f in result["files"] if not f.startswith(str(tmp_path))] == []
    assert result["methods"] == len(list((ROOT / "spec/methods").glob("*.yaml")))


def in_fresh_python(program: str) -> Any:
    """What a program prints as JSON, run from `/`."""
    lines = program.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    text = "\n".join(line[indent:] for line in lines)
    done = subprocess.run([sys.executable, "-c", text], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# what imports what


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Modules that a file imports, with the line, imports inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names] if module.split(".")[0] == "peltc" else [module]
            yield from ((node.lineno, name) for name in names)


def offenders(folder: str, wrong: Any) -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in python_files(folder)
        for line, name in imports(file)
        if wrong(name)
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_arrows_point_one_way(folder: str) -> None:
    """schemas ← spec ← compiler ← runtime ← peltc; nobody imports the front door from inside."""
    allowed = {*FOLDERS[: FOLDERS.index(folder) + 1]} - {"peltc"}

    def wrong(name: str) -> bool:
        parts = name.split(".")
        return parts[0] == "peltc" and (len(parts) == 1 or parts[1] not in allowed)

    assert offenders(folder, wrong) == []


@pytest.mark.parametrize("folder", [*FOLDERS, "tests", "examples"])
def test_no_bare_or_relative_imports(folder: str) -> None:
    """`import spec` finds the folder as a second module of another name; a user's `schemas.py` would hijack it."""
    assert offenders(folder, lambda name: name.split(".")[0] in {"", *FOLDERS} - {"peltc"}) == []


def modules() -> dict[str, Path]:
    """The modules of the language, the compiler and the runtime, by import name."""
    files = (file for folder in ("spec", "compiler", "runtime") for file in python_files(folder))
    return {package_of(f.parent) if f.stem == "__init__" else f"{package_of(f.parent)}.{f.stem}": f for f in files}


def arrows() -> set[tuple[str, str]]:
    """Which module imports which."""
    known = modules()
    found = set()
    for name, file in known.items():
        for _, what in imports(file):
            other = what if what in known else what.rpartition(".")[0]
            if other in known and other != name:
                found.add((name, other))
    return found


def room(module: str) -> str:
    """The folder of a module; what lies beside the folders of the three great ones stands for itself."""
    return ".".join(module.split(".")[:3])


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    graph = nx.DiGraph((a, b) for a, b in pairs if a != b)
    return [sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1]


def test_no_modules_import_each_other() -> None:
    assert circles(arrows()) == []


def test_no_rooms_import_each_other() -> None:
    """Data flows from room to room in one direction, and so do the imports."""
    assert circles({(room(a), room(b)) for a, b in arrows()}) == []


def test_circles_are_seen() -> None:
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == [["a", "b", "c"]]


def test_files_hold_one_idea() -> None:
    """What cannot be said in 400 lines is more than one; the first sentence of a file says which it is."""
    sizes = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules().items()
             if file.stem != "__init__"}  # fmt: skip
    assert {name: lines for name, lines in sizes.items() if lines > 400} == {}
    assert statistics.median(sizes.values()) < 170
    for name, file in modules().items():
        said = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        assert said.endswith((".", ":")) and not said[0].islower(), f"{name}: {said!r}"


@pytest.mark.parametrize(
    ("folder", "heavy"),
    [
        ("schemas", ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")),
        ("spec", ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")),
        ("compiler", ("onnxruntime",)),
    ],
)
def test_heavy_libraries_stay_in_their_folders(folder: str, heavy: tuple[str, ...]) -> None:
    assert offenders(folder, lambda name: name.split(".")[0] in heavy) == []


def test_reading_a_spec_loads_nothing_heavy() -> None:
    loaded = in_fresh_python(
        f"""
        import json, sys
        import peltc
        assert len(peltc.load_spec({str(ROOT / "examples/minilm.yaml")!r}).attach) == 3
        print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
        """
    )
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "networkx"}
    assert sorted(heavy & set(loaded)) == []


# no method and no architecture is known by name

ORDINARY = {
    "prefix",  # what names begin with, and an argument of tempfile's functions
    "clip",  # an operator of ONNX
    "replace",  # what dataclasses and strings do
}


GENERATING = ("runtime/generating/", "runtime/serving/", "runtime/triton/")
"""Where a prompt is what a text begins with, and a field of the protocols for it."""


def words(file: Path) -> Iterator[tuple[int, str]]:
    """Names and strings of a file with their lines. Comments, docstrings and messages may give examples: no code
    decides by a string with spaces in it."""
    kinds = {tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        if token.type in kinds and not re.search(r"\s", token.string):
            yield token.start[0], token.string


def mentions(folder: str, names: list[str]) -> list[str]:
    """Where names stand as words; `Bert` in `BertModel` is one."""
    whole = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    first = "|".join(re.escape(name.capitalize()) for name in names)
    pattern = re.compile(rf"(?<![A-Za-z0-9])(?:(?i:{whole})(?![A-Za-z0-9])|(?:{first})(?=[A-Z]))")
    return [
        f"{file.relative_to(ROOT)}:{line} says {found.group()}"
        for file in python_files(folder)
        for line, word in words(file)
        for found in pattern.finditer(word)
        if found.group().lower() not in ORDINARY
    ]


@pytest.mark.parametrize("folder", ["compiler", "runtime"])
def test_no_method_is_known_by_name(folder: str) -> None:
    from peltc.spec.method import shipped

    said = mentions(folder, [*shipped()])
    places = ("compiler/importers/peft/methods/", "compiler/importers/adapters/", "compiler/exporters/hf_")
    said = [line for line in said if not line.startswith(places)]  # their names for our methods
    said = [
        line for line in said if not (line.endswith(" fusion") and line.startswith("compiler/lowering/"))
    ]  # of nodes
    assert [line for line in said if not (line.endswith(" prompt") and line.startswith(GENERATING))] == []


@pytest.mark.parametrize("folder", ["spec", "compiler", "runtime"])
def test_no_architecture_is_known_by_name(folder: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert mentions(folder, [name for name in CONFIG_MAPPING if len(name) > 3]) == []


def test_names_are_found_where_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two tests above can fail."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "compiler").mkdir()
    (tmp_path / "compiler/a.py").write_text('"""As in lora."""\nif kind == "lora":\n    x = BertModel  # bert\n')
    assert mentions("compiler", ["lora", "bert"]) == ["compiler/a.py:2 says lora", "compiler/a.py:3 says Bert"]
