"""What is drawn: boxes, texts, rings, wires and groups of them, and the document that they make."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peltc.compiler.picture.style import RADIUS, SPACE, Words, clean

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """Something to draw, at a place."""

    x: float
    y: float

    def moved(self, dx: float, dy: float) -> Mark:
        """The same elsewhere."""
        return replace(self, x=self.x + dx, y=self.y + dy)

    def write(self, parent: ET.Element) -> None:
        """Append it to an SVG element."""
        raise NotImplementedError


@dataclass(frozen=True)
class Box(Mark):
    """A rectangle; `tip` appears where a viewer points at it."""

    width: float
    height: float
    style: str
    tip: tuple[str, ...] = ()
    radius: float = 3.0

    def write(self, parent: ET.Element) -> None:
        """As `rect`."""
        place = {"x": self.x, "y": self.y, "width": self.width, "height": self.height, "rx": self.radius}
        rectangle = _child(parent, "rect", {"class": self.style}, place)
        if self.tip:
            _child(rectangle, "title", {}).text = "\n".join(map(clean, self.tip))


@dataclass(frozen=True)
class Text(Mark):
    """A line of text in words of different styles; `y` is its middle."""

    words: Words
    anchor: str = "middle"

    def write(self, parent: ET.Element) -> None:
        """As `text`, with a `tspan` for each word."""
        line = _child(parent, "text", {"text-anchor": self.anchor}, {"x": self.x, "y": self.y + 4})
        for position, (style, word) in enumerate(self.words):
            _child(line, "tspan", {"class": style}, {"dx": SPACE} if position else None).text = clean(word)


@dataclass(frozen=True)
class Ring(Mark):
    """Where values meet: a circle around a plus, or around a dot for a product."""

    product: bool = False

    def write(self, parent: ET.Element) -> None:
        """As `circle`, with its sign."""
        _child(parent, "circle", {"class": "ring"}, {"cx": self.x, "cy": self.y, "r": RADIUS})
        if self.product:
            _child(parent, "circle", {"class": "tip"}, {"cx": self.x, "cy": self.y, "r": 2})
            return
        for dx, dy in ((RADIUS, 0.0), (0.0, RADIUS)):
            wire(((self.x - dx, self.y - dy), (self.x + dx, self.y + dy))).write(parent)


@dataclass(frozen=True)
class Wire(Mark):
    """A path of the stream, through corners relative to its place."""

    corners: tuple[Point, ...]
    arrow: bool = False

    def write(self, parent: ET.Element) -> None:
        """As `polyline`."""
        corners = " ".join(f"{_number(self.x + x)},{_number(self.y + y)}" for x, y in self.corners)
        arrow = {"marker-end": "url(#tip)"} if self.arrow else {}
        _child(parent, "polyline", {"class": "wire", "points": corners, **arrow})


@dataclass(frozen=True)
class Group(Mark):
    """Marks that belong together, relative to its place."""

    style: str
    marks: tuple[Mark, ...]

    def write(self, parent: ET.Element) -> None:
        """As `g`."""
        inner = _child(parent, "g", {"class": self.style})
        for mark in self.marks:
            mark.moved(self.x, self.y).write(inner)


def wire(corners: tuple[Point, ...], arrow: bool = False) -> Wire:
    """A wire through points of its panel."""
    return Wire(0.0, 0.0, corners, arrow)


def _child(
    parent: ET.Element, tag: str, attributes: dict[str, str], place: Mapping[str, float] | None = None
) -> ET.Element:
    """Append an element, on a line of its own where that adds no space to a text."""
    element = ET.SubElement(parent, tag, attributes | {key: _number(value) for key, value in (place or {}).items()})
    element.tail = None if tag == "tspan" else "\n"
    return element


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def as_document(width: float, height: float, marks: Sequence[Mark], name: str, style: str) -> str:
    """Marks on a page as an SVG document."""
    size = {"width": _number(width), "height": _number(height)}
    box = f"0 0 {size['width']} {size['height']}"
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "anatomy", "role": "img", **size,
                              "viewBox": box})  # fmt: skip
    _child(root, "title", {}).text = clean(name)
    _child(root, "style", {}).text = style
    place = {"refX": 6.5, "refY": 3.5, "markerWidth": 7, "markerHeight": 7}
    kind = {"id": "tip", "orient": "auto", "markerUnits": "userSpaceOnUse"}
    marker = _child(_child(root, "defs", {}), "marker", kind, place)
    _child(marker, "path", {"class": "tip", "d": "M0 0.5L7 3.5L0 6.5z"})
    Box(0.0, 0.0, width, height, "page", radius=0.0).write(root)
    for mark in marks:
        mark.write(root)
    text: str = ET.tostring(root, encoding="unicode")
    return text + "\n"
