"""What people get wrong is told in words that mend it; docs/mistakes.md shows them as they are."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mistakes import mistakes, page

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"


def test_the_page_is_up_to_date() -> None:
    """`python tests/bad_input/mistakes.py > docs/mistakes.md` writes it."""
    assert page() == PAGE.read_text(encoding="utf-8")


def test_each_says_what_is_wrong_and_what_would_be_right(tmp_path: Path) -> None:
    found = list(mistakes(tmp_path))
    assert len(found) >= 30
    for words, error in found:
        first = error.diagnostics[0]
        assert first.message and (first.expected or first.hint), words
        assert str(first.place) or "'" in first.message or " given as " in first.message, words
