"""The tables of methods, recipes and combinators in the documents, written from their files.

python -m peltc.spec.table README.md docs/methods.md        # bring the tables up to date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from peltc.spec.combinators import COMBINATORS
from peltc.spec.method import shipped
from peltc.spec.recipe import recipes


def tables() -> dict[str, str]:
    """What stands between a document's markers, by their name: Markdown tables, one row each."""
    return {
        "methods": table("method", [(m.name, m.title, m.site, m.source) for m in shipped().values()], "attaches to"),
        "recipes": table("recipe", [(r.name, r.title, r.source) for r in recipes().values()]),
        "combinators": table("combinator", [(f"{c.name}:", c.title, c.source) for c in COMBINATORS.values()]),
    }


def table(kind: str, rows: list[tuple[str, ...]], *columns: str) -> str:
    """Rows of name, title, further columns and source as a Markdown table."""
    head = (kind, "what it is", *columns, "source")
    body = [(f"`{name}`", *middle, link(source)) for name, *middle, source in rows]
    return "\n".join(markdown((head, *body)))


def markdown(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The lines of a Markdown table, its header the first of the rows."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return [head, "|---" * len(cells[0]) + "|", *body]


def link(source: str) -> str:
    """A source whose arXiv numbers are links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def insert(text: str, contents: Mapping[str, str] | None = None) -> str:
    """A Markdown text with each table between its markers, where it has these.

    Args:
        contents: the tables by the names of their markers; `tables()` where absent.

    Raises:
        ValueError: the text has the markers of no table, or one of a pair.
    """
    before, places = text, 0
    contents = tables() if contents is None else contents
    for name, content in contents.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text and end not in text:
            continue
        head, _, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not closed:
            raise ValueError(f"no place for the table of {name}: the text lacks {begin} or {end}")
        text, places = f"{head}{begin}\n{content}\n{end}{tail}", places + 1
    if not places:
        raise ValueError(
            f"no place for a table: the text has no <!-- {next(iter(contents))}:begin -->: {before[:60]!r}"
        )
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(insert(file.read_text(encoding="utf-8")), encoding="utf-8")
