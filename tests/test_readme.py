"""What the documents say is true: their tables, their specs, their links, the map of the code."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import peltc
from peltc.spec.interpreters.check import check_formulas
from peltc.spec.table import insert

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
SPECS = [
    textwrap.dedent(text)
    for page in ("README.md", *(name for name in TEXTS if name != "README.md"))
    for _, text in re.findall(r"^( *)```yaml\n(.*?)^\1```", TEXTS[page], re.MULTILINE | re.DOTALL)
]


def section(page: str, title: str) -> str:
    """The text under a heading."""
    return TEXTS[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


def code_map() -> Iterator[tuple[str, str]]:
    """Paths in the code map, with what is said of each."""
    above: list[str] = []
    for line in section("CONTRIBUTING.md", "Code map").split("```")[1].splitlines()[1:]:
        if found := re.match(r"( *)(\S+)\s+(\S.*)", line):
            indent, name, text = found.groups()
            above = [*above[: len(indent) // 2], name]
            yield "".join(above), text


def test_tables_are_up_to_date() -> None:
    """`python -m peltc.spec.table README.md docs/methods.md` writes them."""
    for page in ("README.md", "docs/methods.md"):
        assert insert(TEXTS[page]) == TEXTS[page]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_table_needs_its_markers() -> None:
    with pytest.raises(ValueError, match="methods:begin"):
        insert("# no table here")


@pytest.mark.parametrize("text", SPECS, ids=[f"yaml {i}" for i in range(len(SPECS))])
def test_specs_load(text: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(text, encoding="utf-8")
    check_formulas(peltc.load_spec(file))


def test_first_spec_is_the_example() -> None:
    assert SPECS[0] == (ROOT / "examples/minilm.yaml").read_text(encoding="utf-8")


def test_code_map_is_the_code() -> None:
    """Every path in the map exists, and every room of ours stands in it, and every module that is in none."""
    paths = [path for path, _ in code_map()]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    top = [ROOT / folder for folder in ("spec", "compiler", "runtime")]
    rooms = {
        f"{room.relative_to(ROOT)}/" for folder in top for room in folder.iterdir() if (room / "__init__.py").exists()
    }
    alone = {str(file.relative_to(ROOT)) for folder in top for file in folder.glob("*.py") if file.stem != "__init__"}
    assert sorted((rooms | alone) - set(paths)) == []


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", TEXTS[page]) + re.findall(r'src="([^"]+)"', TEXTS[page])
    assert [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()] == []


def test_picture_is_up_to_date(model_folder: Callable[..., Path]) -> None:
    """`pelt sites MODEL --svg examples/anatomy.svg` draws it, MODEL being MiniLM."""
    from peltc.compiler.picture.drawing import draw

    drawn = draw(peltc.survey(model_folder("minilm")), "BertModel")
    assert drawn == (ROOT / "examples/anatomy.svg").read_text(encoding="utf-8")


def test_picture_of_modules_is_up_to_date(model_folder: Callable[..., Path]) -> None:
    """`pelt describe unipelt_prompt MODEL --svg examples/unipelt.svg` draws it."""
    from peltc.runtime.describe import describe, read

    drawn = describe(read("unipelt_prompt"), model_folder("minilm")).picture()
    assert drawn == (ROOT / "examples/unipelt.svg").read_text(encoding="utf-8")
