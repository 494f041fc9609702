"""A data set that every machine has: docstrings of installed packages, to be told apart by package.

The sources are parsed, never imported; all of a module's docstrings are in one split; and the packages' own names are
blanked out, so that subject and style must decide.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

PACKAGES = ("huggingface_hub", "matplotlib", "networkx", "numpy", "setuptools", "sympy", "torch", "transformers")
OWN_NAMES = re.compile(
    r"\b(hugging ?face(_hub|'s)?|hub|hf|matplotlib|mpl|pyplot|plt|networkx|nx|numpy|np|setuptools|distutils"
    r"|sympy|(py)?torch\w*|transformers?)\b",
    re.IGNORECASE,
)
PER_MODULE, CHARACTERS = 8, 240  # at most so many texts of one module, and characters of a text
QUARTERS = 4


@dataclass(frozen=True)
class Split:
    """What a split holds.

    Attributes:
        quarters: of the modules, which ones: numbers from 0 to 3.
        count: texts of each package, where it has so many.
    """

    quarters: frozenset[int]
    count: int


TRAINING = Split(frozenset({1, 2, 3}), 300)
TESTING = Split(frozenset({0}), 60)


@dataclass(frozen=True)
class Texts:
    """Texts and the index of the package that each is from."""

    texts: list[str]
    labels: list[int]


def folder_of(package: str) -> Path:
    """Where a package is installed; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"the package {package} is not installed; `make demo` installs what the demo needs")
    return Path(found.origin).parent


def docstrings(package: str) -> Iterator[tuple[int, str]]:
    """Docstrings of a package's modules with names blanked out, each with its module's quarter.

    Modules come in the order of a hash of their path: mixed, and the same everywhere.
    """
    root = folder_of(package)
    paths = (file.relative_to(root) for file in root.rglob("*.py"))
    for digest, path in sorted((hashlib.sha256(p.as_posix().encode()).hexdigest(), p) for p in paths):
        if {"tests", "_vendor"} & {*path.parts}:
            continue
        try:
            tree = ast.parse((root / path).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = 0
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                text = " ".join(OWN_NAMES.sub("…", text).split())[:CHARACTERS]
                if len(text) > 60 and found < PER_MODULE:
                    found += 1
                    yield int(digest[-8:], 16) % QUARTERS, text


def build_dataset(*splits: Split) -> list[Texts]:
    """The splits' texts. Of texts that begin alike, one is kept."""
    found, seen = [Texts([], []) for _ in splits], set[str]()
    for label, package in enumerate(tqdm(PACKAGES, "reading docstrings")):
        wanted = [split.count for split in splits]
        for quarter, text in docstrings(package):
            for i, split in enumerate(splits):
                if quarter in split.quarters and wanted[i] and text[:60] not in seen:
                    seen.add(text[:60])
                    wanted[i] -= 1
                    found[i].texts.append(text)
                    found[i].labels.append(label)
            if not any(wanted):
                break
    return found
