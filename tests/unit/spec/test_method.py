"""Method files: every shipped one builds, names its source, and fits; what a method file must not say."""

from __future__ import annotations

import itertools
from importlib import resources
from typing import Any

import pytest
import yaml

from peltc.spec.diagnostics import PeltError
from peltc.spec.document import parse
from peltc.spec.formula.dims import Dim
from peltc.spec.formula.interpreter import FormulaError
from peltc.spec.formula.syntax import Name, Number
from peltc.spec.interpreters.check import check_formulas, check_method, fits, site_shapes
from peltc.spec.interpreters.shape import Shape
from peltc.spec.method import EFFECTS, KINDS, NAMES, Method, build, initialiser, shipped
from peltc.spec.specification import load_spec

FILES = sorted(f.name for f in resources.files("peltc.spec.methods").iterdir() if f.name.endswith(".yaml"))
METHOD: dict[str, Any] = {
    "site": "linear",
    "options": {"r": {"type": "integer", "default": 4}},
    "parameters": {"A": {"shape": ["r", "in"], "init": "zeros"}, "B": {"shape": ["out", "r"], "init": "zeros"}},
    "delta": "linear(linear(x, A), B)",
}


def made(**changes: Any) -> Method:
    """A method that is LoRA but for changes; None takes a key away."""
    tree = {key: value for key, value in {**METHOD, **changes}.items() if value is not None}
    return build(parse(yaml.safe_dump(tree, sort_keys=False), "m.yaml"), "mine")


def findings(**changes: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(PeltError) as caught:
        made(**changes)
    return [(d.code, d.place.key, d.message) for d in caught.value.diagnostics]


def wrong(**changes: Any) -> str:
    """What the shapes' check says of a method."""
    method = made(**changes)
    return "\n".join(map(str, check_method(method, method.defaults)))


# The shipped ones.


@pytest.mark.parametrize("file", FILES)
def test_shipped_method(file: str) -> None:
    method = shipped()[file.removesuffix(".yaml")]
    assert method.name == file.removesuffix(".yaml")
    assert method.title and method.site in KINDS
    published = ("arXiv:", "openreview.net", "fine-tuning")
    assert any(word in method.source for word in published), "a paper, unless there is none"
    assert method.effects and {name for name, _ in method.effects} <= set(EFFECTS[method.site])
    assert all(option.doc and option.default is not None for option in method.options)


def test_shipped_methods_are_the_files() -> None:
    assert sorted(shipped()) == [file.removesuffix(".yaml") for file in FILES]
    assert len(shipped()) == len(FILES)


def choices(method: Method) -> list[dict[str, Any]]:
    """Options of a method: the defaults, and every combination of words and truth values."""
    values = []
    for option in method.options:
        every = [False, True] if option.schema.get("type") == "boolean" else [option.default]
        values.append([(option.name, value) for value in option.schema.get("enum", every)])
    return [dict(chosen) for chosen in itertools.product(*values)]


@pytest.mark.parametrize("file", FILES)
def test_shipped_method_fits(file: str) -> None:
    method = shipped()[file.removesuffix(".yaml")]
    assert check_method(method, method.defaults) == []
    for options in choices(method):
        assert check_method(method, options) == [], options


@pytest.mark.parametrize(
    ("name", "options"), [("bottleneck", {"size": 8}), ("lokr", {"r": 0}), ("prefix", {"width": 4}), ("lora", {"r": 1})]
)
def test_shipped_method_fits_other_numbers(name: str, options: dict[str, Any]) -> None:
    """Zeros that mean something else: a size of one's own, a full rank."""
    method = shipped()[name]
    assert check_method(method, method.defaults | options) == []


# What a method says.


def test_parts() -> None:
    method = made(let={"z": "linear(x, A)"}, delta="r * linear(z, B)", bias="b")
    assert method.name == method.title == "mine" and method.place.path == "m.yaml"
    assert method.defaults == {"r": 4}
    assert [p.name for p in method.parameters] == ["A", "B"]
    assert method.effect("delta") is not None and method.effect("weight") is None
    assert method.reads() == {"r", "z", "x", "A", "B", "b"}


def test_definitions_are_in_the_order_of_their_effect() -> None:
    method = made(output="y", delta=None, weight="W", input="x")
    assert [name for name, _ in method.effects] == ["input", "weight", "output"]


def test_start_values() -> None:
    method = made(parameters={"A": {"shape": ["r", "in"], "init": 0.5}, "B": {"shape": [3], "init": "normal(0.02)"}})
    assert method.parameters[0].init == Number(0.5)
    assert initialiser(method.parameters[0].init) is None
    assert initialiser(method.parameters[1].init) == ("normal", (Number(0.02),))
    assert initialiser(Name("zeros")) == ("zeros", ()) and initialiser(Name("W")) is None


@pytest.mark.parametrize(
    ("changes", "code", "key", "words"),
    [
        ({"delta": "x +"}, "E301", "delta", "not an expression"),
        ({"delta": "x.T"}, "E302", "delta", "attribute access"),
        ({"delta": "zeros"}, "E305", "delta", "unknown name 'zeros'"),
        ({"delta": "zz"}, "E305", "delta", "unknown name 'zz' in 'zz'"),
        ({"delta": "r + q"}, "E305", "delta", "unknown name 'q'"),
        ({"let": {"a": "b1", "b1": "x"}}, "E305", "let.a", "unknown name 'b1'"),
        ({"options": {"in": {"default": 1}}, "delta": "x"}, "E305", "options.in", "the option 'in' hides"),
        ({"parameters": {"y": {"shape": [1], "init": "zeros"}}, "delta": "x"}, "E305", "parameters.y", "'y' hides"),
        (
            {"parameters": {"A": {"shape": ["x"], "init": "zeros"}}, "delta": "x"},
            "E305",
            "parameters.A.shape[0]",
            "'x'",
        ),
        ({"parameters": {"A": {"shape": [1], "init": "x"}}, "delta": "x"}, "E305", "parameters.A.init", "'x'"),
        (
            {"parameters": {"A": {"shape": [1], "init": "zeros", "if": "x"}}, "delta": "x"},
            "E305",
            "parameters.A.if",
            "'x'",
        ),
        ({"keys": "x"}, "E306", "keys", "cannot define 'keys'"),
        ({"delta": None}, "E306", "", "defines nothing"),
    ],
)
def test_refused(changes: dict[str, Any], code: str, key: str, words: str) -> None:
    found = findings(**changes)
    assert [(c, k) for c, k, _ in found][:1] == [(code, key)] and words in found[0][2]


def test_all_findings_are_collected() -> None:
    found = findings(delta="zz", let={"a": "x."}, keys="x")
    assert [code for code, _, _ in found] == ["E301", "E306", "E305"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_of_a_kind_has_a_shape_or_a_number(kind: str) -> None:
    """What a formula may name is there when its shapes are checked."""
    effect = {"attention": "keys", "embedding": "prepend"}.get(kind, "delta")
    result = {"attention": "k", "embedding": "zeros([3, d])"}.get(kind, "y")
    for name in NAMES[kind]:
        formula = {"delta": None, effect: f"{result} if [{name}] else {result}"}
        said = wrong(site=kind, options=None, parameters=None, **formula)
        assert "unknown name" not in said, (kind, name)


# The check of shapes, without a model.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delta": "linear(x, B)"}, "'delta' of 'mine': in 'linear(x, B)'"),
        ({"delta": "linear(x, A)"}, "[B, S, 4] and [B, S, out] (output of the site) do not fit: 4 is not out"),
        ({"delta": "'abc'"}, "expected a tensor, found 'abc'"),
        ({"delta": "[y]"}, "expected a tensor"),
        ({"delta": "norm(y)"}, "this site offers no function 'norm'"),
        ({"delta": "y + unsqueeze(y, 0)"}, "has the shape [1, B, S, out]"),
        ({"delta": "reshape(y, [r])"}, "'reshape' needs tensors known at compile time"),
        ({"delta": "y if A else x"}, "not known at compile time"),
        ({"weight": "A"}, "'weight' of 'mine': in 'A': the shapes [4, in]"),
        ({"let": {"z": "linear(y, A)"}, "delta": "z"}, "in 'linear(y, A)'"),
        ({"parameters": {"A": {"shape": [0], "init": "zeros"}}, "delta": "x * 0 + y"}, "the size of 'A': '0' is 0"),
        ({"parameters": {"A": {"shape": ["1 / 2"], "init": "zeros"}}, "delta": "y"}, "'1 / 2' is 0.5"),
        (
            {"parameters": {"A": {"shape": ["in // 0"], "init": "zeros"}}, "delta": "y"},
            "in 'in // 0': division by zero",
        ),
        ({"parameters": {"A": {"shape": ["r"], "init": "W"}}, "delta": "y"}, "the start value of 'A': in 'W'"),
        ({"parameters": {"A": {"shape": ["r"], "init": "'a'"}}, "delta": "y"}, "the start value of 'A'"),
        (
            {"parameters": {"A": {"shape": ["r"], "init": "sum(zeros([99999, 99999]))"}}, "delta": "y"},
            "elements; at most",
        ),
        ({"site": "block", "options": None, "parameters": None, "delta": "norm(y, r)"}, "'norm' takes one tensor"),
        ({"site": "attention", "parameters": None, "delta": None, "keys": "permute(k, [0, 1, 3, 2])"}, "has the shape"),
        ({"site": "attention", "parameters": None, "delta": None, "keys": "concat(k, k, axis=-2)"}, "cannot be told"),
        ({"site": "embedding", "parameters": None, "delta": None, "prepend": "zeros([3, 5])"}, "[P, d]"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    said = wrong(**changes)
    assert words in said and "E310" in said and said.startswith("m.yaml:1:1")


@pytest.mark.parametrize(
    "changes",
    [
        {"delta": "x"},  # fits square maps
        {"delta": "h"},
        {"weight": "W @ W"},
        {"delta": "1"},
        {"delta": "y / sqrt(in) * max(out, 5) ** 2"},
        {"delta": "y if in > out else 2 * y"},  # a model decides
        {"parameters": {"A": {"shape": ["in if in > out else out"], "init": "zeros"}}, "delta": "y"},
        {"parameters": {"A": {"shape": ["r"], "init": "zeros", "if": "in == out"}}, "delta": "y + sum(A)"},
        {"parameters": {"A": {"shape": ["in // 4 * 4"], "init": "zeros"}}, "delta": "linear(x * A, W)"},
        {"parameters": {"A": {"shape": ["out"], "init": "b"}}, "delta": "A"},
        {"site": "block", "options": None, "parameters": None, "delta": "norm(y + r)"},
    ],
)
def test_shapes_that_may_fit(changes: dict[str, Any]) -> None:
    assert wrong(**changes) == ""


def test_shapes_at_a_site_of_known_sizes() -> None:
    """Numbers stay numbers, so that what fits is equal; what the model computes as it runs is marked."""
    values, expected = site_shapes("linear", {"in": 4, "out": 6}, "here", 4)
    assert [values[name].dims[-1] for name in "xyhWb"] == [4, 6, 4, 4, 6]
    assert all(type(values[name].dims[-1]) is int for name in "xyhWb")
    assert {name for name, shape in values.items() if shape.running} == {"x", "y", "h", "mask"}
    assert str(expected["delta"]).endswith("6] (output of here)")
    assert fits(values["h"], expected["input"], "input")
    with pytest.raises(FormulaError, match="6 is not 4"):
        fits(values["b"], expected["input"], "input")


def test_what_fits_an_attention_core() -> None:
    values, expected = site_shapes("attention", {"heads": 4, "kv_heads": 2, "head_dim": 8})
    longer = Shape((Dim.of("B"), 2, Dim.of("T") + 10, 8))
    assert fits(longer, expected["keys"], "keys") and fits(values["k"], expected["values"], "values")
    assert not fits(Shape((2, 10, 8)), expected["keys"], "keys") and not fits(
        Shape((1, 2, 3, 4)), expected["keys"], "keys"
    )


def test_check_formulas_of_a_spec() -> None:
    """Each attachment by its own options, and each finding once."""
    spec = {"pelt": 1, "methods": {"mine": {**METHOD, "title": "t", "source": "s", "delta": "linear(x, B)"}}}
    entries = [{"method": "mine", "at": "attention.query", "r": [4, 8]}, {"method": "mine", "at": "head", "name": "n"}]
    with pytest.raises(PeltError) as caught:
        check_formulas(load_spec({**spec, "attach": entries}))
    assert [d.code for d in caught.value.diagnostics] == ["E310"]
    check_formulas(load_spec({"pelt": 1, "attach": [{"method": name, "at": "x"} for name in shipped()]}))
