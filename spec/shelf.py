"""A shelf of YAML files that come with the package, one entry each, read when first asked for: a spec names few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import TypeVar

from peltc.spec.diagnostics import Diagnostic, PeltError
from peltc.spec.document import Document, parse
from peltc.spec.validation import check_defaults, validate

T = TypeVar("T")


class Shelf(Mapping[str, T]):
    """The entries of a folder by name.

    Args:
        package: where the files lie.
        kind: the key that holds an entry's name, and the name of the schema: `method`, `recipe`.
        build: an entry from a valid document.
    """

    def __init__(self, package: str, kind: str, build: Callable[[Document], T]):
        found = (f for f in resources.files(package).iterdir() if f.name.endswith(".yaml"))
        self.files = {f.name.removesuffix(".yaml"): f for f in sorted(found, key=lambda f: f.name)}
        self.kind, self.build = kind, build
        self.read: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, name: str) -> T:
        if name not in self.read:
            document = parse(self.files[name].read_text(encoding="utf-8"), self.files[name].name)
            validate(document, self.kind)
            findings = list(check_defaults(document, "options"))
            if (own := document.tree[self.kind]) != name:
                message = f"the file is called '{name}' and its {self.kind} '{own}'"
                findings.append(Diagnostic("E201", message, document.place(self.kind), "one name"))
            if findings:
                raise PeltError(findings)
            self.read[name] = self.build(document)
        return self.read[name]
