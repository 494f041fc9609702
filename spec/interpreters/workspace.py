"""Where an attachment is at work, in words: which sub-layers, which layers, which stacks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from peltc.spec.specification import Attachment
from peltc.spec.stacks import STACKS

SUBLAYERS = {"attention": "attention", "cross_attention": "cross-attention", "feed_forward": "feed-forward"}
_PATH = re.compile(rf"^(?:({'|'.join(STACKS)})\.)?(?:layers\.([^.]+)(?:\.|$))?(.*)$")
_GLOB = re.compile(r"[*?\[]")


def place(path: str) -> tuple[str, str, str]:
    """The stack, layer and role that a path or a selector names; each may be empty. A layer's own role is `layer`."""
    found = _PATH.match(path)
    assert found
    stack, layer, role = found.groups(default="")
    return stack, layer, role or ("layer" if layer else "")


def workspace(kind: str, paths: Iterable[str], sequential: bool) -> str:
    """Where in the reference architecture modules work: `attention query, value + feed-forward output`.

    Args:
        kind: the kind of site.
        paths: of sites, or selectors.
        sequential: whether the module stands behind its sites rather than beside them.
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        stack, _, role = place(path)
        head, _, part = role.partition(".")
        words = SUBLAYERS.get(head, head.replace("_", " "))
        if _GLOB.search(role):
            exact = role in ("*", f"*{kind}", f"*.{kind}")
            words, part = f"{_kind(kind)}s" + ("" if exact else f" {role}"), ""
        elif kind == "attention":
            part = "keys and values"
        elif kind == "embedding":
            words, part = f"{part} {words}".strip(), ""
        elif kind == "block" and head in SUBLAYERS | {"layer": ""}:
            part = "output" if sequential else ""
        groups.setdefault(" ".join(filter(None, (stack, words))), []).append(part.replace("_", " "))
    told = ((words, ", ".join(filter(None, dict.fromkeys(parts)))) for words, parts in groups.items())
    return " + ".join(" ".join(filter(None, pair)) for pair in told)


def counted(sites: Sequence[str]) -> str:
    """How many insertions there are: `12 (6 layers x 2)`."""
    layers = Counter((stack, layer) for stack, layer, _ in map(place, sites) if layer)
    if len(each := set(layers.values())) != 1:
        return str(len(sites))
    words = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
    words += f" × {number}" if (number := each.pop()) > 1 else ""
    outside = len(sites) - layers.total()
    return f"{len(sites)} ({words}{f' + {outside} outside' if outside else ''})"


def selected(entry: Attachment) -> str:
    """How many insertions an attachment asks for, in words: `all layers × 2`."""
    if entry.by_parameter:
        return f"each map that matches {', '.join(entry.at)}"
    places = [place(path) for path in dict.fromkeys(entry.at)]
    inside = [role for _, layer, role in places if not _GLOB.search(role) and _in_layer(role) and not layer.isdigit()]
    single = [role for _, layer, role in places if not _GLOB.search(role) and (layer.isdigit() or not _in_layer(role))]
    found = []
    if inside:
        found.append(_layers(entry) + (f" × {len(inside)}" if len(inside) > 1 else ""))
    if single:
        found.append(f"{len(single)} ({', '.join(role.replace('_', ' ') for role in single)})")
    if globs := [role for _, _, role in places if _GLOB.search(role)]:
        found.append(f"each {_kind(entry.method.site)} that matches {', '.join(globs)}")
    return " + ".join(found)


def _kind(kind: str) -> str:
    return "linear map" if kind == "linear" else kind


def _in_layer(role: str) -> bool:
    return role.partition(".")[0] in (*SUBLAYERS, "layer")


def _layers(entry: Attachment) -> str:
    """An attachment's layers in words."""
    chosen = entry.layers if isinstance(entry.layers, tuple) else (entry.layers,)
    words = ", ".join(map(str, chosen))
    if words == "all":
        return "all layers"
    if words[0].isalpha():
        return f"the {words} layers"
    return f"layer{'' if words.isdigit() else 's'} {words}"
