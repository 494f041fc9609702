"""Specs: what is read from a file or a mapping, with defaults filled in; and names that do not hang together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peltc.spec.diagnostics import PeltError, Place
from peltc.spec.document import parse
from peltc.spec.specification import Attachment, Spec, build_spec, load_spec

MINE = {"title": "t", "source": "s", "site": "linear", "options": {"k": {"default": 2}}, "delta": "k * y"}


def spec(**changes: Any) -> dict[str, Any]:
    return {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}], **changes}


def refusal(source: Any) -> list[str]:
    with pytest.raises(PeltError) as caught:
        load_spec(source)
    return [f"{d.code} {d.place.key}: {d.message}" for d in caught.value.diagnostics]


def test_defaults() -> None:
    found = load_spec(spec())
    assert (found.name, found.mode, found.precision, found.seed, found.weights, found.path) == (
        "<spec>", "fold", "checkpoint", 0, None, "",
    )  # fmt: skip
    (entry,) = found.attach
    assert (entry.name, entry.at, entry.layers, entry.expect, entry.mode, entry.after, entry.by_parameter) == (
        "lora", ("attention.query",), "all", None, None, (), False,
    )  # fmt: skip
    assert found.provider == "any"
    assert entry.options == {"r": 8, "alpha": 16, "rank_stabilised": False, "dropout": 0, "bias": False}


def test_everything_given() -> None:
    text = """\
pelt: 1
name: tickets
attach:
  - {method: lora, name: first, at: [a, b], layers: [0, 2-3], r: [4, 8], expect: 4, mode: static}
  - {method: dora, parameter: "**.q", layers: last 2, after: first}
weights: adapter.safetensors
seed: 7
deploy: {mode: static, precision: float16, provider: cuda}
"""
    found = build_spec(parse(text, "folder/s.yaml"))
    first, second = found.attach
    assert (found.name, found.weights, found.seed, found.mode, found.precision) == (
        "tickets", "adapter.safetensors", 7, "static", "float16",
    )  # fmt: skip
    assert found.folder == Path("folder") and found.text == text
    assert found.provider == "cuda" and found.on("cpu").provider == "cpu"
    with pytest.raises(PeltError, match="E113 there is no provider 'gpu' to compile for"):
        found.on("gpu")
    assert (first.name, first.at, first.layers, first.expect, first.mode) == (
        "first",
        ("a", "b"),
        (0, "2-3"),
        4,
        "static",
    )
    assert first.options["r"] == [4, 8] and first.options["alpha"] == 16
    assert (second.by_parameter, second.at, second.layers, second.after) == (True, ("**.q",), "last 2", ("first",))


def test_places() -> None:
    """An attachment, and the spec, know where the value of each of their keys stands."""
    text = "pelt: 1\nattach:\n  - method: lora\n    at: x\n    layers: all\nweights: w\n"
    found = build_spec(parse(text, "s.yaml"))
    (entry,) = found.attach
    assert entry.place == Place("s.yaml", 3, 5, "attach[0]")
    assert entry.at_key("layers") == Place("s.yaml", 5, 13, "attach[0].layers")
    assert entry.at_key("expect") == Place("s.yaml", 3, 5, "attach[0].expect")
    assert found.places["weights"] == Place("s.yaml", 6, 10, "weights")
    assert Attachment("a", entry.method, ("x",)).at_key("at").line == 0


def test_a_mapping_and_its_text_are_the_same_spec(tmp_path: Path) -> None:
    tree = spec(name="n", seed=3)
    found = load_spec(tree)
    (tmp_path / "s.yaml").write_text(found.text)
    again = load_spec(tmp_path / "s.yaml")
    assert again.path == str(tmp_path / "s.yaml") and again.folder == tmp_path
    strip = [(e.name, e.at, e.options) for e in again.attach]
    assert strip == [(e.name, e.at, e.options) for e in found.attach] and again.text == found.text


def test_a_file_names_its_spec(tmp_path: Path) -> None:
    (tmp_path / "tickets.yaml").write_text(load_spec(spec()).text)
    assert load_spec(str(tmp_path / "tickets.yaml")).name == "tickets"


def test_shared_values_in_a_mapping() -> None:
    """Python's mappings may hold one list twice; YAML would call that an alias."""
    sites = ["attention.query"]
    entries = [{"method": "lora", "at": sites}, {"method": "lora", "at": sites, "name": "other"}]
    assert [e.at for e in load_spec(spec(attach=entries)).attach] == [("attention.query",)] * 2


def test_tuples_and_text_that_looks_like_numbers() -> None:
    entry = {"method": "lora", "at": ("a", "b"), "layers": (0, 1)}
    assert load_spec(spec(attach=(entry,), name="1e4")).name == "1e4"
    assert load_spec(spec(attach=(entry,))).attach[0].layers == (0, 1)


def test_values_that_are_no_plain_data() -> None:
    assert "E103 : a spec cannot hold np.float32(0.5), a float32" in refusal(spec(seed=np.float32(0.5)))


def test_methods_of_ones_own() -> None:
    found = load_spec(spec(methods={"mine": MINE}, attach=[{"method": "mine", "at": "x", "k": 3}]))
    assert found.attach[0].method.name == "mine" and found.attach[0].options == {"k": 3}
    assert load_spec(spec(methods={"mine": {**MINE, "method": "mine"}})).attach[0].method.name == "lora"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (spec(attach=[{"method": "mine", "at": "x"}]), "E113 attach[0].method: unknown value 'mine'"),
        (spec(methods={"lora": MINE}), "E201 methods.lora: there is a shipped method 'lora'"),
        (
            spec(methods={"mine": {**MINE, "method": "other"}}),
            "E201 methods.mine.method: the method is called 'mine' and 'other'",
        ),
        (spec(methods={"Mine": MINE}), "E115 methods.Mine: a key cannot be called 'Mine' here"),
        (spec(methods={"mine": {**MINE, "site": "liner"}}), "E113 methods.mine.site: unknown value 'liner'"),
        (
            spec(methods={"mine": {**MINE, "delta": "x.y"}}),
            "E302 methods.mine.delta: attribute access in a formula: 'x.y'",
        ),
        (
            spec(methods={"mine": {**MINE, "options": {"k": {"type": "integer", "default": "a"}}}}),
            "E112 methods.mine.options.k.default: 'a' is not a whole number",
        ),
        (
            spec(attach=[{"method": "lora", "at": "x"}, {"method": "lora", "at": "y"}]),
            "E201 attach[1]: two attachments are called 'lora', this one and that on line 3",
        ),
        (
            spec(attach=[{"method": "lora", "at": "x", "after": "dora"}, {"method": "dora", "at": "x"}]),
            "E202 attach[0].after: no attachment 'dora' stands before this one",
        ),
        (
            spec(attach=[{"method": "lora", "at": "x", "parameter": "y"}]),
            "E111 attach[0]: the keys 'at' and 'parameter' stand together",
        ),
        (spec(attach=[{"method": "lora", "at": "x", "k": 1}]), "E110 attach[0].k: unknown key 'k'"),
        (spec(weights=""), "E115 weights: '' does not have the right form"),
        (spec(deploy={"mode": "fast"}), "E113 deploy.mode: unknown value 'fast'"),
        (spec(deploy={"provider": "rocm"}), "E113 deploy.provider: unknown value 'rocm'"),
        ({"pelt": 2, "attach": []}, "E113 pelt: unknown value 2"),
        ({"attach": [{"method": "lora", "at": "x"}]}, "E111 : the key 'pelt' is missing"),
        ({}, "E111 : the key 'pelt' is missing"),
    ],
)
def test_refused(tree: dict[str, Any], message: str) -> None:
    assert message in refusal(tree)


def test_three_of_one_name_are_two_findings() -> None:
    entries = [{"method": "lora", "at": site} for site in "xyz"]
    assert [m.split(":")[0] for m in refusal(spec(attach=entries))] == ["E201 attach[1]", "E201 attach[2]"]


@pytest.mark.parametrize("tree", [None, 3, "x", []])
def test_a_spec_is_a_mapping(tree: object) -> None:
    with pytest.raises(PeltError, match="E112 the spec is not a mapping"):
        build_spec(parse("" if tree is None else str(tree)))


def test_a_spec_is_a_value() -> None:
    assert load_spec(spec()) == load_spec(spec())
    assert Spec("base", ()) == Spec("base", ())
    with pytest.raises(AttributeError):
        load_spec(spec()).name = "other"  # type: ignore[misc]


OWN: dict[str, Any] = {
    "pelt": 1,
    "methods": {"bend": {"title": "t", "site": "linear", "delta": "tanh(x)"}},
    "recipes": {"ours": {"title": "t", "attach": [{"method": "lora", "at": "attention.query"}]}},
}


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ({"method": "ours", "at": "attention.query"}, "hint: 'ours' is a recipe: `recipe: ours`"),
        ({"method": "mam", "at": "attention.query"}, "hint: 'mam' is a recipe: `recipe: mam`"),
        ({"recipe": "bend"}, "hint: 'bend' is a method: `method: bend`"),
        ({"recipe": "lora"}, "hint: 'lora' is a method: `method: lora`"),
        ({"recipe": "our"}, "hint: did you mean 'ours'?"),
        ({"method": "bent", "at": "attention.query"}, "hint: did you mean 'bend'?"),
    ],
)
def test_a_recipe_is_no_method(entry: dict[str, Any], hint: str) -> None:
    """What is known under the other key is said to be, and lists have what the spec brings itself."""
    with pytest.raises(PeltError) as caught:
        load_spec({**OWN, "attach": [entry]})
    said = str(caught.value)
    assert hint in said
    listed = said.split("expected one of: ")[1].split("\n")[0]
    assert ("ours" if "recipe" in entry else "bend") in listed.split(", ")


@pytest.mark.parametrize("key", ["r", "method", "mode", "at"])
def test_braces_without_quotes_are_a_mapping(key: str) -> None:
    entry = {"method": "lora", "at": "attention.query", key: {"r": None}}
    bundle = {"title": "t", "options": {"r": {"type": "integer", "default": 8}}, "attach": [entry]}
    with pytest.raises(PeltError, match=r'hint: quote it, "\{r\}": braces alone are a mapping in YAML'):
        load_spec({"pelt": 1, "recipes": {"ours": bundle}, "attach": [{"recipe": "ours"}]})


def test_findings_about_shipped_formulas_stand_at_the_attachment(tmp_path: Path) -> None:
    """Whoever uses a method has not its file; whoever wrote one is shown where. The spec is called as a shipped one."""
    file = tmp_path / "oft.yaml"
    file.write_text(
        "pelt: 1\nattach:\n  - {method: lora, at: attention.query}\n  - {method: oft, at: attention.key}\n"
        "  - {method: mine, at: attention.key}\nmethods:\n  mine: {title: t, site: linear, delta: tanh(x)}\n"
    )
    places = [entry.formulas for entry in load_spec(file).attach]
    assert [(place.path, place.line, place.key) for place in places] == [
        (str(file), 3, "attach[0]"), (str(file), 4, "attach[1]"), (str(file), 7, "methods.mine")]  # fmt: skip
