"""Pictures of real anatomies: as large for many layers as for few, every role in its place, nothing on another."""

from __future__ import annotations

import itertools
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from peltc.compiler.base.live import survey_model
from peltc.compiler.picture.drawing import draw
from peltc.compiler.survey.anatomy import Anatomy
from peltc.runtime.commands.cli import run

sys.path.insert(0, str(Path(__file__).parent))
from instances import DEPTHS, FAMILIES, config_of

SVG = "{http://www.w3.org/2000/svg}"
CHARACTER, SPACE, HALF_LINE = 6.62, 8.0, 5.0
"""What a browser makes of DejaVu Sans Mono at 11 pixels: the advance of a character, the space between words as the
picture states it, and half the height of a capital with its descender."""

KINDS = {"llama": "a decoder", "mixtral": "experts", "bamba": "layers of two kinds", "t5": "an encoder and a decoder"}
pytestmark = pytest.mark.xdist_group("drawings")
DEEP = 32
DEPTH = {"llama": DEEP, "mixtral": 4, "bamba": 2, "t5": DEEP}
"""Layers of each kind. Where the exporter cannot be spared most of the layers, 32 of them take minutes."""


@cache
def anatomy(model_type: str, depth: int) -> Anatomy:
    """What discovery finds in a tiny model of so many layers; where its layers are of several kinds, so many of each
    kind, one kind after the other."""
    torch.set_num_threads(1)
    config = config_of(model_type)
    known = config.to_dict()
    changes: dict[str, Any] = {name: depth for name in (*DEPTHS, "num_decoder_layers") if name in known}
    if model_type == "bamba":
        changes = {"num_hidden_layers": 2 * depth, "attn_layer_indices": [*range(depth, 2 * depth)]}
    config = type(config)(**{k: v for k, v in known.items() if k not in ("layer_types",)} | changes)
    model = getattr(transformers, dict(FAMILIES)[model_type])(config)
    return survey_model(model)[0]


# reading a picture


@dataclass(frozen=True)
class Extent:
    """What a mark covers, and what it is."""

    left: float
    top: float
    right: float
    bottom: float
    what: str

    def holds(self, other: Extent, slack: float = 0.0) -> bool:
        """Whether the other lies within."""
        across = self.left - slack <= other.left and other.right <= self.right + slack
        return across and self.top - slack <= other.top and other.bottom <= self.bottom + slack

    def meets(self, other: Extent) -> bool:
        """Whether both cover some place; edges may touch."""
        across = self.left + 0.5 < other.right and other.left + 0.5 < self.right
        return across and self.top + 0.5 < other.bottom and other.top + 0.5 < self.bottom


def boxes(picture: ET.Element) -> list[Extent]:
    """All rectangles but the page and the outlines of fused weights."""
    found = []
    for box in picture.iter(f"{SVG}rect"):
        x, y, width, height = (float(box.get(key, "")) for key in ("x", "y", "width", "height"))
        if box.get("class") not in ("page", "fused"):
            found.append(Extent(x, y, x + width, y + height, box.get("class", "")))
    return found


def texts(picture: ET.Element) -> list[Extent]:
    """All lines in the boxes' font, as wide as a browser draws them."""
    found = []
    for line in picture.iter(f"{SVG}text"):
        words = [word.text or "" for word in line]
        if {word.get("class") for word in line} & {"title", "stack", "note", "count"}:
            continue
        width = CHARACTER * sum(map(len, words)) + SPACE * (len(words) - 1)
        x, y = float(line.get("x", "")), float(line.get("y", "")) - 4
        left = x - width / 2 if line.get("text-anchor") == "middle" else x
        found.append(Extent(left, y - HALF_LINE, left + width, y + HALF_LINE, " ".join(words)))
    return found


def strokes(picture: ET.Element) -> list[Extent]:
    """The straight pieces of all wires but the signs within sums."""
    found = []
    for wire in picture.iter(f"{SVG}polyline"):
        corners = [tuple(map(float, corner.split(","))) for corner in wire.get("points", "").split()]
        for (ax, ay), (bx, by) in itertools.pairwise(corners):
            found.append(Extent(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by), "wire"))
    return found


def words(picture: ET.Element, style: str) -> list[str]:
    return [word.text or "" for word in picture.iter(f"{SVG}tspan") if word.get("class") == style]


def spilt(picture: ET.Element) -> list[str]:
    """The lines of text that leave the innermost box which holds their middle."""
    found = []
    for text in texts(picture):
        x, y = (text.left + text.right) / 2, (text.top + text.bottom) / 2
        around = [box for box in boxes(picture) if box.holds(Extent(x, y, x, y, ""))]
        inner = min(around, key=lambda box: (box.right - box.left) * (box.bottom - box.top), default=None)
        if inner is None or not inner.holds(text):
            found.append(text.what)
    return found


def collisions(picture: ET.Element) -> list[tuple[str, str]]:
    """Boxes that overlap without one holding the other, lines of text on each other, and wires through text."""
    found = []
    for a, b in itertools.combinations(boxes(picture), 2):
        if a.meets(b) and not (a.holds(b, 0.6) or b.holds(a, 0.6)):
            found.append((a.what, b.what))
    for a, b in itertools.combinations(texts(picture), 2):
        if a.meets(b):
            found.append((a.what, b.what))
    for text, stroke in itertools.product(texts(picture), strokes(picture)):
        across = text.left < stroke.right and stroke.left < text.right
        along = text.top < stroke.bottom and stroke.top < text.bottom
        if across and along:
            found.append((text.what, stroke.what))
    return found


def stacks(found: Anatomy) -> set[str]:
    return {site.stack for site in found.named if site.layer is not None}


# what is shown


@pytest.mark.parametrize("model_type", [pytest.param(k, marks=pytest.mark.slow if k == "t5" else ()) for k in KINDS])
def test_as_large_for_many_layers_as_for_few(model_type: str) -> None:
    """Repeated layers stand once, with their number; all that is written beside the numbers is the same."""
    deep = DEPTH[model_type]
    few, many = (ET.fromstring(draw(anatomy(model_type, depth))) for depth in (4 if deep == DEEP else deep // 2, deep))
    assert all(picture.tag == f"{SVG}svg" for picture in (few, many))
    assert (few.get("width"), few.get("height")) == (many.get("width"), many.get("height"))
    assert words(few, "name") == words(many, "name")
    kinds = 2 if model_type == "bamba" else 1
    assert len(words(many, "count")) == kinds * len(stacks(anatomy(model_type, deep)))
    assert all(count.startswith(f"× {deep} ") for count in words(many, "count"))


def test_as_large_as_layers_that_differ() -> None:
    """The witness: where one of the layers differs, the picture grows."""
    found = anatomy("llama", DEEP)
    sites = tuple(
        replace(s, sizes={**s.sizes, "out": 1}) if s.path == "decoder.layers.7.feed_forward.up" else s for s in found
    )
    odd, even = (ET.fromstring(draw(a)) for a in (replace(found, sites=sites), found))
    assert float(odd.get("height", "")) > 2 * float(even.get("height", ""))
    assert [count.split()[1] for count in words(odd, "count")] == ["7", "1", "24"]


@pytest.mark.parametrize("model_type", KINDS)
def test_every_role_is_drawn(model_type: str) -> None:
    """Each role stands as often as there are kinds of layers, or stacks, that have it; a table and the stream that
    leaves it, which have one path, stand as one."""
    found = anatomy(model_type, DEPTH[model_type])
    picture = ET.fromstring(draw(found))
    looks = {
        (site.stack, site.layer): frozenset(s.role for s in found if (s.stack, s.layer) == (site.stack, site.layer))
        for site in found.named
        if site.layer is not None
    }
    kinds = {(stack, roles) for (stack, _), roles in looks.items()}
    expected = Counter(role for _, roles in kinds for role in roles)
    expected += Counter(role for role, _ in {(site.role, site.path) for site in found.named if site.layer is None})
    assert Counter(words(picture, "name")) == expected
    tips = "".join(title.text or "" for title in picture.iter(f"{SVG}title"))
    first = [s for s in found.named if s.layer in (None, 0)]
    assert [s.path for s in first if s.kind == "linear" and s.path not in tips] == []


@pytest.mark.parametrize("model_type", KINDS)
def test_nothing_overflows_or_overlaps(model_type: str) -> None:
    picture = ET.fromstring(draw(anatomy(model_type, DEPTH[model_type]), model_type))
    assert len(texts(picture)) > 15
    assert spilt(picture) == []
    assert collisions(picture) == []


def test_what_overflows_or_overlaps_is_seen() -> None:
    """The witness: a longer text, and a box that moves half over its neighbour."""
    picture = ET.fromstring(draw(anatomy("llama", DEEP)))
    word = next(word for word in picture.iter(f"{SVG}tspan") if word.text == "attention.query")
    word.text = "attention.query.and.more"
    assert [text for text in spilt(picture) if "and.more" in text]
    picture = ET.fromstring(draw(anatomy("llama", DEEP)))
    box = next(box for box in picture.iter(f"{SVG}rect") if box.get("class") == "linear")
    box.set("x", str(float(box.get("x", "")) + float(box.get("width", "")) / 2))
    assert ("linear", "linear") in collisions(picture)


def test_experts_stand_between_the_norm_and_the_sum() -> None:
    """Experts have their roles, number and sizes in the feed-forward's frame; the router stands beside the first of
    their maps, and all feed the last."""
    picture = ET.fromstring(draw(anatomy("mixtral", DEPTH["mixtral"])))
    lines = {text.what.split()[0]: text for text in texts(picture)}
    (frame,) = (box for box in boxes(picture) if box.what == "block" and box.holds(lines["feed_forward.block"]))
    roles = ("router", "experts.gate", "experts.up", "experts.down")
    router, gate, up, down = (lines[f"feed_forward.{role}"] for role in roles)
    assert frame.holds(router) and frame.holds(gate) and frame.holds(up) and frame.holds(down)
    assert gate.top == up.top and lines["feed_forward.norm"].top > max(router.top, gate.top)
    assert min(router.top, gate.top) > down.top
    assert down.top > lines["feed_forward.block"].top
    assert not frame.holds(lines["attention.output"]) and not frame.holds(lines["feed_forward.norm"])
    assert {"64 → 4", "4 × 64 → 128", "4 × 128 → 64"} <= set(words(picture, "size"))
    assert "4 × 64 → 128: a map for each of 4 experts" in " ".join(words(picture, "note"))


def test_mixers_stand_in_layers_of_their_own() -> None:
    """Layers with a mixer stand below those with attention, as the model has them, and have none of their sites."""
    picture = ET.fromstring(draw(anatomy("bamba", DEPTH["bamba"])))
    mixers, attentions = (
        {word.text or "" for word in run.iter(f"{SVG}tspan") if word.get("class") == "name"}
        for run in picture.iter(f"{SVG}g")
        if run.get("class") == "run"
    )
    assert {"mixer.input", "mixer.output", "mixer.block", "feed_forward.down"} <= mixers
    assert {"attention", "attention.query", "attention.output", "feed_forward.down"} <= attentions
    assert not [name for name in mixers if name.startswith("attention")]
    assert not [name for name in attentions if name.startswith("mixer")]
    lines = {text.what.split()[0]: text.top for text in texts(picture)}
    assert lines["mixer.input"] > lines["mixer.output"] > lines["attention.query"] > lines["attention.output"]


def test_the_command_writes_the_same(tmp_path: Path) -> None:
    """`pelt sites --svg` on a folder."""
    config = config_of("llama")
    config.num_hidden_layers = DEEP
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    assert run(["sites", str(tmp_path / "model"), "--svg", str(tmp_path / "sites.svg")]) == 0
    picture = ET.parse(tmp_path / "sites.svg").getroot()
    assert words(picture, "count") == [f"× {DEEP}  (layers 0-{DEEP - 1})"]
    assert spilt(picture) == []
