"""The table of quirks in the documents, written from the files of the libraries' methods.

python -m peltc.compiler.importers.quirk_table docs/import.md        # bring the table up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from peltc.compiler.importers.adapters.average import TWICE
from peltc.compiler.importers.adapters.library import FACTS
from peltc.compiler.importers.peft.methods import FORMATS
from peltc.compiler.importers.quirks import Quirk
from peltc.spec.foreign import ADAPTERS, PEFT
from peltc.spec.table import insert, link, markdown


def known() -> dict[str, tuple[Quirk, ...]]:
    """The quirks of each library, in the order of their names."""
    found = {
        PEFT: [misread.quirk for one in FORMATS.values() for misread in one.quirks],
        ADAPTERS: [TWICE, *(quirk for facts in FACTS.values() for quirk in facts.quirks)],
    }
    return {name: tuple(sorted(dict.fromkeys(of), key=lambda quirk: quirk.name)) for name, of in found.items()}


def table() -> str:
    """What the libraries compute otherwise than the methods say, as a Markdown table."""
    head = ("library", "quirk", "what it computes", "`fixed`", "the method says so in")
    rows = [
        (library, f"`{one.name}`", one.trained, one.fixed or f"has none: {one.source}",
         link(one.source) if one.fixed else "")
        for library, of in known().items() for one in of
    ]  # fmt: skip
    return "\n".join(markdown((head, *rows)))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(insert(file.read_text(encoding="utf-8"), {"quirks": table()}), encoding="utf-8")
