"""Rows of a table that differ by their layer alone, told once: `layers.0-11.attention.query × 12`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Row = tuple[str, ...]
MARK = "\0"
"""What stands for the number of a layer while rows are compared."""


def grouped(rows: Iterable[tuple[int | None, Row]]) -> list[Row]:
    """Rows, those that are equal but for their layer's number made one, where the first of them was.

    Args:
        rows: each with the number of the layer that it is of; None where it is of none. Numbers are looked for in the
            dotted names that the cells hold, once in each.

    Returns:
        The rows; the first cell says of how many it stands for.
    """
    found: dict[Row, list[int]] = {}
    for layer, cells in rows:
        key = cells if layer is None else tuple(_without(cell, layer) for cell in cells)
        found.setdefault(key, []).append(-1 if layer is None else layer)
    result = []
    for key, layers in found.items():
        first, *others = (cell.replace(MARK, spans(layers)) for cell in key)
        result.append((f"{first} × {len(layers)}" if len(layers) > 1 else first, *others))
    return result


def spans(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` → `0-2,5`."""
    ordered = sorted(set(numbers))
    begins = [n for n in ordered if n - 1 not in ordered]
    ends = [n for n in ordered if n + 1 not in ordered]
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(begins, ends, strict=True))


def columns(rows: Sequence[Row]) -> list[str]:
    """A table's lines, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _without(cell: str, layer: int) -> str:
    """A cell with a mark in place of the layer's number in each of its names."""
    return " ".join(re.sub(rf"(?<=\.){layer}(?=[.,]|$)", MARK, word, count=1) for word in cell.split(" "))
