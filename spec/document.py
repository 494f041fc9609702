"""YAML text → a plain tree that remembers where everything stood.

The reader is `yaml.SafeLoader` with the doors shut that a spec never needs: duplicate keys, aliases (the stuff of
YAML bombs), tags, nesting beyond `MAX_DEPTH`, files beyond `MAX_BYTES`. Of YAML 1.1's surprises, `yes`, `no`, `on`
and `off` stay strings, and `1e-4` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail

MAX_BYTES = 1 << 20
MAX_DEPTH = 24
MAX_NODES = 50_000

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed file: `tree` of dicts, lists and scalars, and the place of each of its nodes by key path."""

    path: str
    tree: Any
    places: dict[KeyPath, Place]

    def place(self, *keys: str | int) -> Place:
        """Where the node at `keys` stands; of its nearest known ancestor where it stands nowhere."""
        for length in range(len(keys), -1, -1):
            found = self.places.get(tuple(keys[:length]))
            if found is not None:
                return Place(found.path, found.line, found.column, key_text(keys))
        return Place(self.path, key=key_text(keys))


def key_text(keys: KeyPath) -> str:
    """`('attach', 1, 'at')` → `attach[1].at`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's booleans and floats."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT, _TIME)]
    for _BOOL, _FLOAT, _TIME in [("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf)|\.(?:nan|NaN))$"),
    list("-+0123456789."),
)


def parse(text: str, path: str = "<text>") -> Document:
    """Parse YAML text.

    Raises:
        PeltError: E101 malformed YAML, E102 a duplicate key, E103 a construct a spec must not have, E104 too large.
    """
    if len(text) > MAX_BYTES:
        raise fail("E104", f"the file has {len(text):,} characters", Place(path), f"at most {MAX_BYTES:,}")
    places: dict[KeyPath, Place] = {}
    findings: list[Diagnostic] = []
    try:
        _check_depth(text, path)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            tree = _build(loader, node, (), path, places, findings) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(path, mark.line + 1, mark.column + 1) if mark else Place(path)
        problem = error.problem or str(error)
        hint = "indent with spaces, not tabs" if "\\t" in problem else ""
        raise fail("E101", f"malformed YAML: {problem}", place, "well-formed YAML 1.2", hint) from None
    except yaml.YAMLError as error:
        raise fail("E101", f"malformed YAML: {error}", Place(path), "well-formed YAML 1.2") from None
    except RecursionError:
        raise fail("E104", "the document is nested too deeply", Place(path), f"at most {MAX_DEPTH} levels") from None
    if findings:
        raise PeltError(findings)
    return Document(path, tree, places)


def read(path: str | Path) -> Document:
    """Parse a YAML file.

    Raises:
        PeltError: as `parse`, and E100 where the file cannot be read.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise fail(
                "E104", f"the file has {file.stat().st_size:,} bytes", Place(str(path)), f"at most {MAX_BYTES:,}"
            )
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise fail(
            "E100", f"cannot read the file: {error.strerror}", Place(str(path)), "a readable YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise fail("E100", f"the file is not UTF-8 text: {error.reason}", Place(str(path)), "UTF-8 text") from None
    return parse(text, str(path))


def _check_depth(text: str, path: str) -> None:
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


def _build(
    loader: _Loader, node: yaml.Node, keys: KeyPath, path: str, places: dict[KeyPath, Place], out: list[Diagnostic]
) -> Any:
    place = Place(path, node.start_mark.line + 1, node.start_mark.column + 1, key_text(keys))
    places[keys] = place
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key: Hashable = loader.construct_object(key_node, deep=True)
            where = Place(
                path, key_node.start_mark.line + 1, key_node.start_mark.column + 1, key_text((*keys, str(key)))
            )
            if not isinstance(key, str):
                out.append(Diagnostic("E103", f"the key {key!r} is not a string", where, "string keys"))
                key = str(key)
            if key in result:
                first = places[(*keys, key)]
                out.append(
                    Diagnostic(
                        "E102", f"duplicate key '{key}'", where, "each key once", f"it stands on line {first.line} too"
                    )
                )
                continue
            result[key] = _build(loader, value_node, (*keys, key), path, places, out)
            places[(*keys, key)] = where if isinstance(value_node, yaml.CollectionNode) else places[(*keys, key)]
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*keys, i), path, places, out) for i, item in enumerate(node.value)]
    try:
        return loader.construct_object(node, deep=True)
    except ValueError as error:
        out.append(Diagnostic("E101", f"malformed scalar {node.value!r}: {error}", place))
        return None
