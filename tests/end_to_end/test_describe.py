"""`pelt describe` and `pelt methods`, from the command line: words, numbers, comparisons, pictures, refusals."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peltc.runtime.building.compile import plan_for
from peltc.runtime.commands.cli import run
from peltc.runtime.describe import Report, describe, read, told
from peltc.spec.combinators import COMBINATORS
from peltc.spec.interpreters.typology import PROPERTIES
from peltc.spec.method import shipped
from peltc.spec.recipe import recipes
from peltc.spec.specification import load_spec

SVG = "{http://www.w3.org/2000/svg}"
SYSTEMS = ["unipelt", "unipelt_prompt", "adamix", "xpeft", "hyperpelt"]
LORA = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 2}

Folder = Callable[..., Path]
Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pelt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    """Runs a command line on a wide terminal: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "140")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def spec_file(tmp_path: Path) -> Callable[..., Path]:
    def write(*entries: dict[str, Any], name: str = "spec", **said: Any) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"pelt": 1, "attach": list(entries), **said}))
        return file

    return write


def on(folder: Path, *entries: dict[str, Any], **said: Any) -> Report:
    return describe(load_spec({"pelt": 1, "attach": list(entries), **said}), folder)


# words


def test_a_spec(pelt: Told, spec_file: Callable[..., Path]) -> None:
    code, out, err = pelt("describe", spec_file(LORA, {"method": "prompt", "at": "embedding"}))
    assert (code, err) == (0, "")
    cells = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert cells[0] == ["", "lora", "prompt"]
    assert [line[0] for line in cells[1:]] == ["method", *PROPERTIES.values()]
    assert ["workspace", "attention query, value", "embedding"] in cells
    assert ["insertions", "all layers × 2", "1 (embedding)"] in cells


def test_recipe_by_name(pelt: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `recipe:` or without; a file of that name comes first."""
    assert pelt("describe", "recipe:adamix") == pelt("describe", "adamix")
    monkeypatch.chdir(tmp_path)
    Path("adamix").write_text(yaml.safe_dump({"pelt": 1, "attach": [LORA]}))
    assert [module.name for module in describe(read("adamix")).modules] == ["lora"]
    assert [module.name for module in describe(read("recipe:adamix")).modules] == ["bottleneck"]


def test_json(pelt: Told) -> None:
    code, out, _ = pelt("describe", "unipelt", "--json", "--compare", "adamix")
    reports = json.loads(out)
    assert code == 0 and [report["name"] for report in reports] == ["unipelt", "adamix"]
    (adapter,) = reports[1]["modules"]
    assert adapter["method"] == "bottleneck" and adapter["combinators"] == ["experts"]
    assert list(adapter["row"]) == list(PROPERTIES) and adapter["numbers"] is None


# side by side


def test_five_systems_side_by_side(pelt: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = pelt("describe", "unipelt", "--compare", *(f"recipe:{name}" for name in SYSTEMS[1:]))
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 140
    assert lines[0].split() == SYSTEMS
    assert [line.split("  ")[0] for line in lines[1:] if line[0] != " "] == ["method", *PROPERTIES.values()]


def test_columns_have_all_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow the terminal, every word of every cell is there, and no line is wider."""
    reports = [describe(read(name)) for name in SYSTEMS]
    wide = told(reports, 1000)
    for width in (60, 100, 140):
        narrow = told(reports, width)
        assert max(map(len, narrow.splitlines())) <= width
        assert sorted(set(narrow.split())) == sorted(set(wide.split()))


def test_modules_that_agree_are_told_together(spec_file: Callable[..., Path], pelt: Told) -> None:
    other = spec_file(LORA, {**LORA, "name": "second", "at": "attention.key"}, name="two")
    _, out, _ = pelt("describe", "adamix", "--compare", other)
    assert re.search(r"^integration form +direct addition +scaled addition$", out, re.M)
    assert "attention query, value [lora]" in out and "attention key [second]" in out


# numbers


def test_numbers(model_folder: Folder) -> None:
    """What is folded stores nothing; what is not stores its constants."""
    report = on(model_folder("bert"), LORA, {"method": "bottleneck", "at": "feed_forward.block", "size": 4})
    folded, staying = (module.numbers for module in report.modules)
    assert folded and staying and report.total
    assert (folded.trained, folded.unabsorbed) == (4 * 2 * 64, 4 * 2 * 64)
    assert (folded.deployed, folded.bytes, folded.flops, folded.nodes) == (0, 0, 0, 0)
    values = 2 * (32 * 4 + 4 + 4 * 32 + 32)
    assert (staying.trained, staying.deployed, staying.bytes) == (values, values, 4 * values)
    assert staying.flops >= 2 * values and staying.nodes > 0
    assert report.total.trained == folded.trained + staying.trained
    assert report.total.share == report.total.trained / report.base
    assert report.modules[0].row["insertions"] == "4 (2 layers × 2)"
    assert report.modules[0].row["workspace"] == "attention query, value", "the only stack goes without saying"


def test_numbers_are_the_plan_s(model_folder: Folder) -> None:
    spec = read("recipe:hyperpelt")
    plan, _ = plan_for(spec, model_folder("t5"))
    total = describe(spec, model_folder("t5")).total
    assert total and (total.trained, total.flops, total.nodes) == (plan.trained(), plan.cost.flops, plan.cost.nodes)


def test_static_mode_stores_what_folding_would_not(model_folder: Folder) -> None:
    total = on(model_folder("bert"), LORA, deploy={"mode": "static"}).total
    assert total and total.deployed == total.unabsorbed == total.trained


@pytest.mark.parametrize(("mask", "size"), [("hard", 2 * 2 * 2), ("soft", 0)])
def test_profile_of_packed_masks(mask: str, size: int, model_folder: Folder) -> None:
    """Two masks of ⌈N / 8⌉ bytes at each of two sites."""
    report = on(model_folder("bert"), {"recipe": "xpeft", "n": 12, "k": 3, "mask": mask})
    assert report.total and report.modules[0].numbers
    assert report.total.profile == report.modules[0].numbers.profile == size
    assert report.total.trained == 2 * 2 * 12, "masks, not the bank"


def test_networks_that_attachments_share(model_folder: Folder) -> None:
    """Embeddings that two attachments share count once in the total, and each row names the other."""
    report = describe(read("hyperpelt"), model_folder("bert"))
    adapter, prefix, norms = report.modules
    assert adapter.row["parameter_sharing"].endswith("task_embedding, layer_embedding shared with prefix")
    assert prefix.row["parameter_sharing"].endswith("task_embedding, layer_embedding shared with adapter")
    both = sum(module.numbers.trained for module in report.modules if module.numbers)
    assert report.total and both - report.total.trained == (1 + 2) * 64
    assert norms.row["workspace"] == "embedding norm + attention norm + feed-forward norm"


def test_two_stacks_are_told_apart(model_folder: Folder) -> None:
    row = on(model_folder("t5"), {**LORA, "at": "*attention.value"}).modules[0].row
    assert row["workspace"] == (
        "encoder attention value + decoder attention value + decoder cross-attention value"
    )  # fmt: skip
    assert row["insertions"] == "6"


def test_sites_without_a_role(model_folder: Folder) -> None:
    """What is chosen by its parameter is told by its place where it has one."""
    (module,) = on(model_folder("gpt2"), {"method": "lora", "parameter": "**.c_fc.weight"}).modules
    assert (module.row["workspace"], module.row["insertions"]) == ("feed-forward up", "2 (2 layers)")


def test_numbers_in_words(pelt: Told, model_folder: Folder) -> None:
    code, out, _ = pelt("describe", "pfeiffer", model_folder("bert"), "-q", "--compare", "recipe:xpeft")
    assert code == 0 and out.startswith("pfeiffer, xpeft, on a base of ")
    assert re.search(r"^trained parameters +324 +400$", out, re.M)
    assert re.search(r"^packed masks +52 bytes$", out, re.M)
    _, out, _ = pelt("describe", "mam", model_folder("bert"), "-q")
    assert re.search(r"^ +prefix +parallel_adapter +all$", out, re.M)


# pictures


def boxes(text: str) -> dict[str, set[str]]:
    """The words in each module's colour: where its name stands, and in the legend."""
    found: dict[str, set[str]] = {}
    for line in ET.fromstring(text).iter(f"{SVG}text"):
        words = [(word.get("class") or "", word.text or "") for word in line]
        for style, word in words:
            if style.startswith("ink"):
                found.setdefault(word, set()).add(" ".join(w for s, w in words if s in ("name", "size")))
    return found


def test_picture(pelt: Told, model_folder: Folder, tmp_path: Path) -> None:
    code, _, err = pelt("describe", "unipelt", model_folder("gpt2"), "-q", "--svg", tmp_path / "a.svg")
    assert code == 0 and "drawn into" in err
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    found = boxes(text)
    assert sorted(found) == ["bottleneck", "lora", "prefix"]
    assert found["bottleneck"] == {
        "feed_forward.block",
        "bottleneck + gate, in the graph: gated addition, 2 (2 layers)",
    }
    framed = [box.get("class", "") for box in ET.fromstring(text).iter(f"{SVG}rect")]
    assert sum(style.startswith("linear ink") for style in framed) == 2, "query and value"
    assert "unipelt on GPT2LMHeadModel" in text


def test_picture_tells_layers_apart(model_folder: Folder) -> None:
    """Layers look alike only where they carry the same modules."""
    everywhere, once = ({**LORA, "layers": layers} for layers in ("all", "last 1"))
    runs = [on(model_folder("bert"), entry).picture().count('class="run"') for entry in (everywhere, once)]
    assert runs == [1, 2]


def test_picture_without_modules_is_that_of_sites(model_folder: Folder) -> None:
    """Marking modules changes nothing in the picture of a bare model."""
    from peltc.compiler.picture.drawing import draw

    report = on(model_folder("bert"), LORA)
    assert "ink" not in draw(report.anatomy, "BERT") and "ink0" in report.picture()


# refusals


def test_picture_needs_a_model(pelt: Told, tmp_path: Path) -> None:
    code, out, err = pelt("describe", "unipelt", "--svg", tmp_path / "a.svg")
    assert (code, out) == (1, "") and "E501 a picture shows a model" in err
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["recipe:unipel"], 1, "E201 there is no recipe 'unipel'"),
        (["nothing.yaml"], 1, "E100"),
        (["unipelt", "/nowhere"], 1, "E501"),
        (["unipelt", "--compare"], 2, "requires an argument"),
        (["unipelt", "--compare", "adamix", "nothing.yaml"], 1, "E100"),
        ([], 2, "SPEC"),
    ],
)
def test_refusals(arguments: list[str], code: int, words: str, pelt: Told) -> None:
    found, out, err = pelt("describe", *arguments)
    assert (found, out) == (code, "") and words in err


def test_formulas_that_do_not_fit(pelt: Told, spec_file: Callable[..., Path]) -> None:
    parameters = {"A": {"shape": ["4", "in"], "init": "zeros"}}
    bad = {"site": "linear", "parameters": parameters, "delta": "linear(linear(x, A), A)"}
    code, _, err = pelt("describe", spec_file({"method": "bad", "at": "head"}, methods={"bad": bad}))
    assert code == 1 and "E310" in err


# methods, recipes, combinators


def test_methods_lists_all_kinds(pelt: Told) -> None:
    code, out, _ = pelt("methods")
    tables = [table.splitlines() for table in out.split("\n\n")]
    assert code == 0 and [table[0].split()[0] for table in tables] == ["METHOD", "RECIPE", "COMBINATOR"]
    listed = [[line.split()[0] for line in table[1:]] for table in tables]
    assert listed == [list(shipped()), list(recipes()), list(COMBINATORS)]


@pytest.mark.parametrize("name", [*shipped(), *recipes(), *COMBINATORS])
def test_methods_shows_one(name: str, pelt: Told) -> None:
    one: Any = {**shipped(), **recipes(), **COMBINATORS}[name]
    code, out, _ = pelt("methods", name)
    assert code == 0 and out.startswith(f"{one.title}\n{one.source}\n")
    assert all(f"  {option.name} = {option.default!r}" in out for option in one.options)
    assert one.notes in out


def test_methods_as_json(pelt: Told) -> None:
    found = json.loads(pelt("methods", "--json")[1])
    kinds = [next(iter(entry)) for entry in found]
    assert [kinds.count(kind) for kind in ("method", "recipe", "combinator")] == [
        len(shipped()), len(recipes()), len(COMBINATORS),
    ]  # fmt: skip
    (recipe,) = json.loads(pelt("methods", "mam", "--json")[1])
    assert recipe["recipe"] == "mam" and len(recipe["attach"]) == 2


def test_methods_unknown(pelt: Told) -> None:
    code, _, err = pelt("methods", "unipel")
    assert code == 1 and "E201 there is no method, recipe or combinator 'unipel'" in err
    assert "did you mean 'unipelt'?" in err


def test_gates_of_a_prompt_are_told(model_folder: Folder) -> None:
    def told_of(**deploy: Any) -> str:
        (module,) = on(model_folder("llama"), {**LORA, "gate": {}}, deploy=deploy).modules
        return module.row["inter_connectivity"]

    assert told_of() == "dynamic: a gate per sample"
    assert told_of(gates={"at": "prefill"}) == "dynamic: a gate per sample, of the prompt while tokens are generated"
