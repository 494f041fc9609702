"""YAML text → a plain tree that remembers where everything stood.

The reader is `yaml.SafeLoader` with the doors shut that a spec never needs: duplicate keys, aliases (the stuff of
YAML bombs), tags, numbers that are not finite, nesting beyond `MAX_DEPTH`, files beyond `MAX_BYTES`. Of YAML 1.1's
surprises, `yes`, `no`, `on`, `off`, `1:30`, `010` and `<<` stay strings, and `1e-4` is a number.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail

MAX_BYTES = 1 << 18
MAX_DEPTH = 24
MAX_NODES = 20_000
MAX_INTEGER = 2**63 - 1
SUFFIXES = (".yaml", ".yml")
"""What the names of YAML files end with."""

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed file.

    Attributes:
        path: the file's.
        tree: dicts, lists and scalars.
        places: where each value stands by key path; a mapping or list stands where its key does.
        keys: where each key stands.
        text: what was parsed.
    """

    path: str
    tree: Any
    places: dict[KeyPath, Place]
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    text: str = ""

    def place(self, *keys: str | int) -> Place:
        """Where the node at `keys` stands; of its nearest known ancestor where it stands nowhere."""
        for length in range(len(keys), -1, -1):
            found = self.places.get(tuple(keys[:length]))
            if found is not None:
                return Place(found.path, found.line, found.column, key_text(keys))
        return Place(self.path, key=key_text(keys))

    def key_place(self, *keys: str | int) -> Place:
        """Where the key stands that leads to the node at `keys`."""
        return self.keys.get(keys) or self.place(*keys)


def key_text(keys: KeyPath) -> str:
    """`('attach', 1, 'at')` → `attach[1].at`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's booleans and numbers."""


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == f"{_TAG}null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf)|\.(?:nan|NaN))$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper whose text `_Loader` reads back: it quotes what would be a number there, and writes no aliases."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: object) -> bool:
        return True


def dump(tree: object) -> str:
    """YAML text of plain data, as `parse` reads it.

    Raises:
        PeltError: E103 a value that is no plain data, E104 data nested without end.
    """
    try:
        return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    except yaml.representer.RepresenterError as error:
        value = error.args[-1]
        message = f"a spec cannot hold {value!r:.80}, a {type(value).__name__}"
        raise fail("E103", message, expected="mappings, lists, text, numbers and booleans") from None
    except RecursionError:
        raise fail("E104", "the spec is nested too deeply", expected=f"at most {MAX_DEPTH} levels") from None


def parse(text: str, path: str = "<text>") -> Document:
    """Parse YAML text.

    Raises:
        PeltError: E101 malformed YAML, E102 a duplicate key, E103 a construct a spec must not have, E104 too large.
    """
    if len(text) > MAX_BYTES:
        raise fail("E104", f"the file has {len(text):,} characters", Place(path), f"at most {MAX_BYTES:,}")
    try:
        _check_bounds(text, path)
        loader = _Loader(text)
        builder = _Builder(loader, path)
        try:
            node = loader.get_single_node()
            tree = builder.build(node, ()) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _malformed(error, path) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = Place(path, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise fail("E101", f"malformed YAML: the character U+{ord(text[error.position]):04X}", place, "text") from None
    except yaml.YAMLError as error:
        raise fail("E101", f"malformed YAML: {error}", Place(path), "well-formed YAML 1.2") from None
    except RecursionError:
        raise fail("E104", "the document is nested too deeply", Place(path), f"at most {MAX_DEPTH} levels") from None
    if builder.findings:
        raise PeltError(builder.findings)
    return Document(path, tree, builder.places, builder.keys, text)


def _malformed(error: yaml.MarkedYAMLError, path: str) -> PeltError:
    """What the YAML parser says, in one sentence: what it found, and inside what."""
    mark = error.problem_mark or error.context_mark
    place = Place(path, mark.line + 1, mark.column + 1) if mark else Place(path)
    problem, context = error.problem or str(error), error.context or ""
    if problem.startswith("but "):  # the parser's sentence begins in the context
        problem, context = f"{context}, {problem}", ""
    if context and context != "while scanning for the next token":
        start = error.context_mark
        begun = f" that begins on line {start.line + 1}" if start and mark and start.line != mark.line else ""
        problem += f", {context}{begun}"
    hint = "indent with spaces, not tabs" if "\\t" in problem else ""
    return fail("E101", f"malformed YAML: {problem}", place, "well-formed YAML 1.2", hint)


def read(path: str | Path) -> Document:
    """Parse a YAML file.

    Raises:
        PeltError: as `parse`, and E100 where the file cannot be read.
    """
    place = Place(str(path))
    if os.path.isdir(path):  # also of text that is no path
        inside = sorted(file.name for file in Path(path).iterdir() if file.suffix in SUFFIXES)
        raise fail("E100", "a folder is given where a YAML file is wanted", place, "a readable YAML file",
                   f"the folder has {', '.join(inside[:4])}" if inside else "")  # fmt: skip
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise fail("E100", f"cannot read the file: {error.strerror}", place, "a readable YAML file") from None
    if len(data) > MAX_BYTES:
        raise fail("E104", f"the file has more than {MAX_BYTES:,} bytes", place, f"at most {MAX_BYTES:,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = Place(str(path), data.count(b"\n", 0, error.start) + 1)
        raise fail("E100", f"the file is not UTF-8 text: {error.reason}", place, "UTF-8 text") from None
    return parse(text, str(path))


def _check_bounds(text: str, path: str) -> None:
    """Refuse what would cost more than a spec is worth before any tree is built: depth, size, aliases, tags."""
    depth = 0
    for nodes, event in enumerate(yaml.parse(text, Loader=_Loader)):
        mark = event.start_mark
        place = Place(path, mark.line + 1, mark.column + 1) if mark else Place(path)
        if nodes > MAX_NODES:
            raise fail("E104", "the document has too many nodes", place, f"at most {MAX_NODES:,}")
        if isinstance(event, yaml.AliasEvent):
            raise fail("E103", f"alias '*{event.anchor}'", place, "a document without aliases", "write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise fail("E104", "the document is nested too deeply", place, f"at most {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if getattr(event, "tag", None) is not None:
            raise fail("E103", f"tag '{getattr(event, 'tag', None)}'", place, "a document without tags")


class _Builder:
    """Makes plain data of YAML nodes, and notes where each stands."""

    def __init__(self, loader: _Loader, path: str):
        self.loader, self.path = loader, path
        self.places: dict[KeyPath, Place] = {}
        self.keys: dict[KeyPath, Place] = {}
        self.findings: list[Diagnostic] = []

    def build(self, node: yaml.Node, keys: KeyPath) -> Any:
        self.places[keys] = self.place(node, keys)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*keys, i)) for i, item in enumerate(node.value)]
        return self.scalar(node, self.places[keys])

    def place(self, node: yaml.Node, keys: KeyPath) -> Place:
        return Place(self.path, node.start_mark.line + 1, node.start_mark.column + 1, key_text(keys))

    def find(self, code: str, message: str, place: Place, expected: str = "", hint: str = "") -> None:
        self.findings.append(Diagnostic(code, message, place, expected, hint))

    def mapping(self, node: yaml.MappingNode, keys: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag != f"{_TAG}str":
                shown = f"'{key_node.value}'" if isinstance(key_node, yaml.ScalarNode) else "..."
                self.find("E103", f"the key {shown} is not text", self.place(key_node, keys), "keys that are text")
                continue
            key = key_node.value
            path = (*keys, key)
            where = self.place(key_node, path)
            if key in result:
                hint = f"it stands on line {self.keys[path].line} too"
                self.find("E102", f"duplicate key '{key}'", where, "each key once", hint)
                continue
            self.keys[path] = where
            result[key] = self.build(value_node, path)
            if isinstance(value_node, yaml.CollectionNode):
                self.places[path] = where
        return result

    def scalar(self, node: yaml.Node, place: Place) -> Any:
        try:
            value = self.loader.construct_object(node, deep=True)
        except ValueError:  # more digits than Python converts
            value = MAX_INTEGER + 1
        if isinstance(value, float) and not math.isfinite(value):
            self.find("E103", f"the number {node.value:.20} is not finite", place, "a finite number")
            return None
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            self.find("E103", f"the number {node.value:.20}... is too large", place, f"at most {MAX_INTEGER:,}")
            return None
        return value
