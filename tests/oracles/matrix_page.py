"""The page of imported methods and architectures, docs/import-matrix.md: a part for each library, and each part is
written alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "docs/import-matrix.md"
HEAD = """# Imported adapters against their own library

The largest difference between the artifact and the library's own model in eval mode, as a share of the largest logit,
folded / static, on tiny models with random weights, biases and norms.
"""


def write(title: str, told: str, rows: Sequence[str]) -> None:
    """Write the part of one library; the others stay.

    Args:
        told: what stands above its table.
        rows: the table's lines.
    """
    page = TABLE.read_text(encoding="utf-8") if TABLE.exists() else HEAD
    parts = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", page, re.MULTILINE))
    parts[title] = f"\n{told}\n\n" + "\n".join(rows) + "\n\n"
    TABLE.write_text(
        HEAD + "".join(f"\n## {name}\n\n{text.strip()}\n" for name, text in parts.items()), encoding="utf-8"
    )
