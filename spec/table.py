"""The table of methods in the README, written from the method files.

python -m peltc.spec.table README.md        # bring the table up to date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from peltc.spec.method import shipped

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"


def method_table() -> str:
    """The shipped methods as a Markdown table, one row each."""
    rows = [("method", "what it is", "attaches to", "source")]
    rows += [(f"`{m.name}`", m.title, m.site, link(m.source)) for m in shipped().values()]
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---|---|---|---|", *body])


def link(source: str) -> str:
    """A source whose arXiv numbers are links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def insert(text: str) -> str:
    """A Markdown text with the table between its markers.

    Raises:
        ValueError: the text has no such markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the table: the text lacks {BEGIN} and {END}")
    return f"{head}{begin}\n{method_table()}\n{end}{tail}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(insert(file.read_text(encoding="utf-8")), encoding="utf-8")
