"""Bad input, through the real command line: exit code 1; the place, what is wrong and what would be right; nothing
left behind. `PELTC_UPDATE_GOLDEN=1` rewrites the golden texts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"
HEAD = "pelt: 1\nattach:\n"
LORA = HEAD + "  - method: lora\n    at: attention.query\n"


def method(formula: str, *, options: str = "n: {type: integer, default: 2}", **changes: str) -> str:
    """A spec with a method of its own, whose delta is a formula; `changes` replaces or adds lines of the method."""
    lines = {
        "title": "t",
        "source": "s",
        "site": "linear",
        "options": "{" + options + "}",
        "parameters": "{A: {shape: [4, in], init: zeros}, B: {shape: [out, 4], init: zeros}}",
        **changes,
        "delta": json.dumps(formula),
    }
    body = "".join(f"    {key}: {value}\n" for key, value in lines.items() if value)
    return f"{HEAD}  - method: mine\n    at: attention.query\nmethods:\n  mine:\n{body}"


DELTA = "spec.yaml:12:12  methods.mine.delta"


@dataclass(frozen=True)
class Case:
    """A spec that is refused: the code, the place, and words of the message and its hint."""

    name: str
    text: str | bytes
    code: str
    place: str
    words: tuple[str, ...]


def case(name: str, text: str | bytes, code: str, place: str, *words: str) -> Any:
    """A parameter of a test."""
    return pytest.param(Case(name, text, code, place, words), id=name)


def check_message(err: str, wanted: Case) -> None:
    """The finding stands in the message with its place, code and words."""
    blocks = [block for block in re.split(r"\n\n|(?m:^ *\d+\.\d s .*\n)", err) if wanted.code in block]
    assert blocks, err
    found = next((b for b in blocks if b.strip().startswith(wanted.place) and all(w in b for w in wanted.words)), "")
    assert found, f"no {wanted.code} at {wanted.place!r} with {wanted.words}:\n{err}"
    assert re.search(r"^\d+ errors?$", err, re.MULTILINE)
    assert "Traceback" not in err


# The document.

DOCUMENTS = [
    case(
        "malformed", "pelt: 1\nattach: [\n  - a: b\n", "E101", "spec.yaml:3:3", "found '-', while parsing a flow node"
    ),
    case(
        "open_quote", 'pelt: 1\nname: "x\nattach: []\n', "E101", "spec.yaml:4:1", "quoted scalar that begins on line 2"
    ),
    case("tab", HEAD + "\t- method: lora\n", "E101", "spec.yaml:3:1", "'\\t'", "hint: indent with spaces, not tabs"),
    case("two_documents", LORA + "---\n" + LORA, "E101", "spec.yaml:5:1", "a single document", "another document"),
    case("control_character", LORA + "name: a\x07\n", "E101", "spec.yaml:5:8", "U+0007"),
    case("duplicate_key", LORA + "pelt: 1\n", "E102", "spec.yaml:5:1  pelt", "'pelt'", "hint: it stands on line 1 too"),
    case("duplicate_nested", LORA + "    r: 4\n    r: 8\n", "E102", "spec.yaml:6:5  attach[0].r", "line 5 too"),
    case(
        "duplicate_in_method",
        method("x", options="n: {default: 1, default: 2}"),
        "E102",
        "spec.yaml:10:31  methods.mine.options.n.default",
        "line 10",
    ),
    case("number_key", LORA + "3: x\n", "E103", "spec.yaml:5:1", "the key '3' is not text"),
    case("list_key", LORA + "? [a]\n: x\n", "E103", "spec.yaml:5:3", "is not text"),
    case("alias", "pelt: 1\na: &x [1]\nattach: *x\n", "E103", "spec.yaml:3:9", "alias '*x'", "write the value out"),
    case("tag", "pelt: 1\nname: !!str x\n", "E103", "spec.yaml:2:7", "tag 'tag:yaml.org,2002:str'"),
    case("not_a_number", LORA + "    alpha: .nan\n", "E103", "spec.yaml:5:12  attach[0].alpha", ".nan", "finite"),
    case("infinite", LORA + "    alpha: 1e999\n", "E103", "spec.yaml:5:12  attach[0].alpha", "1e999", "finite"),
    case("long_number", LORA + f"    r: {'9' * 5000}\n", "E103", "spec.yaml:5:8  attach[0].r", "too large"),
    case("not_utf8", LORA.encode() + b"name: caf\xe9\n", "E100", "spec.yaml:5", "not UTF-8"),
    case("utf16", LORA.encode("utf-16"), "E100", "spec.yaml:1", "not UTF-8"),
    case("empty", "", "E112", "spec.yaml", "not a mapping", "'pelt' and 'attach'"),
    case("text", "hello", "E112", "spec.yaml:1:1", "not a mapping"),
]

# The spec's form.

FORMS = [
    case("no_version", LORA.replace("pelt: 1\n", ""), "E111", "spec.yaml:1:1", "the key 'pelt' is missing"),
    case("version", LORA.replace("1", "2", 1), "E113", "spec.yaml:1:7  pelt", "unknown value 2", "expected 1"),
    case("key_top", LORA + "waights: x\n", "E110", "spec.yaml:5:1  waights", "hint: did you mean 'weights'?"),
    case("key_attachment", LORA + "    alpah: 4\n", "E110", "spec.yaml:5:5  attach[0].alpah", "mean 'alpha'?"),
    case("key_deploy", LORA + "deploy: {mod: fold}\n", "E110", "spec.yaml:5:10  deploy.mod", "mean 'mode'?"),
    case("key_method", method("x", notse="n"), "E110", "spec.yaml:12:5  methods.mine.notse", "mean 'notes'?"),
    case(
        "key_option",
        method("x", options="n: {default: 1, minimun: 0}"),
        "E110",
        "spec.yaml:10:31  methods.mine.options.n.minimun",
        "mean 'minimum'?",
    ),
    case(
        "key_parameter",
        method("x", parameters="{A: {shape: [4], init: zeros, scop: site}}"),
        "E110",
        "spec.yaml:11:47  methods.mine.parameters.A.scop",
        "mean 'scope'?",
    ),
    case(
        "method_unknown",
        HEAD + "  - {method: loar, at: x}\n",
        "E113",
        "spec.yaml:3:14  attach[0].method",
        "'loar'",
        "expected one of: adalora, bat, bitfit",
        "hint: did you mean 'lora'?",
    ),
    case(
        "option_unknown", LORA + "    rank: 4\n", "E110", "spec.yaml:5:5  attach[0].rank", "'rank'", "rank_stabilised"
    ),
    case("option_range", LORA + "    r: 0\n", "E114", "spec.yaml:5:8  attach[0].r", "0 is out", "at least 1"),
    case("option_upper", LORA + "    dropout: 1\n", "E114", "spec.yaml:5:14  attach[0].dropout", "a number below 1"),
    case(
        "option_word",
        LORA + "    r: four\n",
        "E112",
        "spec.yaml:5:8  attach[0].r",
        "'four'",
        "a whole number, or a list",
    ),
    case(
        "option_float", LORA + "    r: 4.0\n", "E112", "spec.yaml:5:8  attach[0].r", "a whole number", "hint: write 4"
    ),
    case("option_octal", LORA + "    r: 010\n", "E112", "spec.yaml:5:8  attach[0].r", "'010'", "a whole number"),
    case("option_time", LORA + "    r: 1:30\n", "E112", "spec.yaml:5:8  attach[0].r", "'1:30'", "a whole number"),
    case("option_true", LORA + "    r: true\n", "E112", "spec.yaml:5:8  attach[0].r", "true is not a whole number"),
    case(
        "option_yes",
        LORA + "    rank_stabilised: yes\n",
        "E112",
        "spec.yaml:5:22  attach[0].rank_stabilised",
        "'yes'",
        "hint: write true",
    ),
    case("option_missing", LORA + "    r:\n", "E112", "spec.yaml:5:7  attach[0].r", "there is nothing here"),
    case(
        "option_enum",
        HEAD + "  - {method: bottleneck, at: x, reads: row}\n",
        "E113",
        "spec.yaml:3:40  attach[0].reads",
        "'row'",
        "raw, sum, normed",
        "mean 'raw'?",
    ),
    case("option_list_item", LORA + "    r: [4, 0]\n", "E114", "spec.yaml:5:12  attach[0].r[1]", "0 is out of range"),
    case("option_empty_list", LORA + "    r: []\n", "E115", "spec.yaml:5:5  attach[0].r", "at least 1 entry"),
    case(
        "default_wrong",
        method("x", options="n: {enum: [a, b], default: c}"),
        "E113",
        "spec.yaml:10:42  methods.mine.options.n.default",
        "'c'",
        "one of: a, b",
    ),
    case("attach_empty", "pelt: 1\nattach: []\n", "E115", "spec.yaml:2:1  attach", "at least 1 entry"),
    case("attach_nothing", "pelt: 1\nattach:\n", "E112", "spec.yaml:2:8  attach", "nothing here", "a list"),
    case("attach_mapping", "pelt: 1\nattach: {method: lora}\n", "E112", "spec.yaml:2:1  attach", "a list"),
    case("attach_text", "pelt: 1\nattach: [lora]\n", "E112", "spec.yaml:2:10  attach[0]", "'lora' is not a mapping"),
    case("site_missing", HEAD + "  - method: lora\n", "E111", "spec.yaml:3:5  attach[0]", "'at' or 'parameter'"),
    case("site_twice", LORA + '    parameter: "**.q"\n', "E111", "spec.yaml:3:5  attach[0]", "'at' and 'parameter'"),
    case("site_empty", HEAD + '  - {method: lora, at: ""}\n', "E115", "spec.yaml:3:24  attach[0].at", "1 character"),
    case("site_number", HEAD + "  - {method: lora, at: 3}\n", "E112", "spec.yaml:3:24  attach[0].at", 'quote it, "3"'),
    case("layers_words", LORA + "    layers: lats 2\n", "E115", "spec.yaml:5:13  attach[0].layers", "'last 4'"),
    case("expect_zero", LORA + "    expect: 0\n", "E114", "spec.yaml:5:13  attach[0].expect", "at least 1"),
    case("name_form", LORA + '    name: "a b"\n', "E115", "spec.yaml:5:11  attach[0].name", "letters, digits"),
    case("mode_unknown", LORA + "deploy: {mode: flod}\n", "E113", "spec.yaml:5:16  deploy.mode", "mean 'fold'?"),
    case(
        "same_name",
        LORA + "  - method: lora\n    at: attention.key\n",
        "E201",
        "spec.yaml:5:5  attach[1]",
        "called 'lora'",
        "line 3",
        "`name:`, 'lora_2' say",
    ),
    case(
        "after_unknown",
        LORA + "  - {method: dora, at: attention.key, after: lroa}\n",
        "E202",
        "spec.yaml:5:46  attach[1].after",
        "no attachment 'lroa'",
        "one of: lora",
        "mean 'lora'?",
    ),
    case(
        "after_list_unknown",
        LORA + "  - {method: dora, at: attention.key, after: [lora, dorra]}\n",
        "E202",
        "spec.yaml:5:39  attach[1].after",
        "no attachment 'dorra' stands before this one",
    ),
    case(
        "after_number",
        LORA + "  - {method: dora, at: attention.key, after: 3}\n",
        "E112",
        "spec.yaml:5:46  attach[1].after",
    ),
    case("after_itself", LORA + "    after: lora\n", "E202", "spec.yaml:5:12  attach[0].after", "this is the first"),
    case("method_shipped", method("x").replace("mine", "lora"), "E201", "spec.yaml:6:3  methods.lora", "shipped"),
    case("method_renamed", method("x", method="other"), "E201", "spec.yaml:12:13  methods.mine.method", "'other'"),
    case(
        "option_hides_site_name",
        method("x", options="in: {type: integer, default: 2}"),
        "E305",
        "spec.yaml:10:15  methods.mine.options.in",
        "the option 'in' hides a name of the site",
    ),
    case(
        "option_reserved",
        method("x", options="at: {default: 2}"),
        "E115",
        "spec.yaml:10:15  methods.mine.options.at",
        "cannot be called 'at'",
    ),
    case(
        "parameter_hides_option",
        method("x", parameters="{n: {shape: [4], init: zeros}}"),
        "E305",
        "spec.yaml:11:18  methods.mine.parameters.n",
        "hides an option",
    ),
    case(
        "definition_of_other_kind",
        method("x", keys="x"),
        "E306",
        "spec.yaml:12:11  methods.mine.keys",
        "cannot define 'keys'",
        "one of: input, weight",
    ),
    case("weights_nul", LORA + 'weights: "a\\0b"\n', "E115", "spec.yaml:5:10  weights", "a safetensors file"),
]

# Formulas: nothing of Python but the language's own.

FORBIDDEN = [
    case("attribute", method("x.shape"), "E302", DELTA, "attribute access in a formula: 'x.shape'"),
    case("escape", method("x.__class__.__mro__[1].__subclasses__()"), "E302", DELTA, "not a name"),
    case("import", method("__import__('os').system('true')"), "E302", DELTA, "not a name"),
    case("subscript", method("A[0]"), "E302", DELTA, "an index in a formula: 'A[0]'", "`take` and `slice`"),
    case("unknown_function", method("liner(x, A)"), "E303", DELTA, "'liner'", "one of: abs", "mean 'linear'?"),
    case("eval", method("eval('1')"), "E303", DELTA, "unknown function 'eval'"),
    case("operator_by_name", method("add(x, x)"), "E303", DELTA, "unknown function 'add'"),
    case("comprehension", method("[a for a in x]"), "E302", DELTA, "a comprehension"),
    case("generator", method("sum(a for a in x)"), "E302", DELTA, "a comprehension"),
    case("lambda", method("(lambda: x)()"), "E302", DELTA, "not a name"),
    case("lambda_alone", method("lambda: x"), "E302", DELTA, "a lambda"),
    case("walrus", method("(z := x)"), "E302", DELTA, "an assignment", "`let:`"),
    case("f_string", method("f'{x}'"), "E302", DELTA, "an f-string"),
    case("starred", method("linear(*x)"), "E302", DELTA, "an unpacked argument"),
    case("double_starred", method("linear(x, **A)"), "E302", DELTA, "an unpacked argument"),
    case("argument_twice", method("softmax(x, axis=1, axis=2)"), "E302", DELTA, "an argument given twice"),
    case("dictionary", method("{1: 2}"), "E302", DELTA, "a dictionary"),
    case("set", method("{1}"), "E302", DELTA, "a set"),
    case("await", method("await x"), "E302", DELTA, "a coroutine or generator"),
    case("membership", method("x if 1 in [1] else y"), "E302", DELTA, "the operator 'in'", "'1 in [1]'"),
    case("chain", method("x if 1 < 2 < 3 else y"), "E302", DELTA, "a chain of comparisons"),
    case("bits", method("1 << 99999"), "E302", DELTA, "the operator '<<'"),
    case("bytes", method("b'a'"), "E302", DELTA, "no number, text or truth value"),
    case("complex", method("x * 1j"), "E302", DELTA, "no number, text or truth value"),
    case("statement", method("import os"), "E301", DELTA, "not an expression"),
    case("two_expressions", method("x; y"), "E301", DELTA, "not an expression"),
    case("nul", method("x\0y"), "E301", DELTA, "null bytes"),
    case("nothing", method(" "), "E301", DELTA, "the formula is empty"),
    case("giant_number", method("x * 99999999999"), "E304", DELTA, "too large", "below 2**31"),
    case("giant_digits", method("x * " + "9" * 3900), "E304", DELTA, "too large", "below 2**31"),
    case("giant_float", method("x * 1e400"), "E304", DELTA, "1e400", "1e+30"),
    case("deep_parentheses", method("(" * 1500 + "x" + ")" * 1500), "E304", DELTA, "nested too deeply"),
    case("deep_signs", method("-" * 1900 + "x"), "E304", DELTA, "too large", "40 deep"),
    case("deep_and", method("x if " + " and ".join(["1"] * 190) + " else y"), "E304", DELTA, "nested too deeply"),
    case("long", method("x" + " + x" * 2000), "E304", DELTA, "8,001 characters", "at most 4,000"),
    case("many_parts", method("x" + " + x" * 300), "E304", DELTA, "400 parts"),
    case("unknown_name", method("linear(x, AA)"), "E305", DELTA, "unknown name 'AA' in 'linear(x, AA)'", "mean 'A'?"),
    case("look_alike", method("ｘ"), "E305", DELTA, "unknown name 'ｘ'"),
    case("let_cycle", method("p", let="{p: q, q: p}"), "E305", "spec.yaml:12:14  methods.mine.let.p", "'q'"),
    case(
        "bad_size",
        method("x", parameters="{A: {shape: [x, 4], init: zeros}}"),
        "E305",
        "spec.yaml:11:30  methods.mine.parameters.A.shape[0]",
        "unknown name 'x'",
    ),
    case(
        "bad_start",
        method("x", parameters="{A: {shape: [4], init: zero}}"),
        "E305",
        "spec.yaml:11:40  methods.mine.parameters.A.init",
        "mean 'zeros'?",
    ),
]

COMBINED = [
    case("gate_on_weight", LORA.replace("lora", "dora") + "    gate: true\n", "E211", "spec.yaml:5:11  attach[0].gate",
         "`gate:` does not go with 'dora'", "known before any input is"),
    case("gate_option", LORA + "    gate: {masking: true}\n", "E110", "spec.yaml:5:12  attach[0].gate.masking",
         "unknown key 'masking'", "mask_padding"),
    case("gate_number", LORA + "    gate: 0.5\n", "E112", "spec.yaml:5:11  attach[0].gate", "0.5 is not"),
    case("no_such_output", LORA + "    gate: {central: c, output: 2}\n", "E211", "spec.yaml:5:5  attach[0].gate",
         "there is no output 2 among 2"),
    case("output_of_no_gate", LORA + "    gate: {output: 1}\n", "E211", "spec.yaml:5:5  attach[0].gate",
         "share it by name"),
    case("two_sources", LORA + "    bank: true\n    generate: true\n", "E211", "spec.yaml:5:11  attach[0].bank",
         "do not go together", "one of them"),
    case("bank_too_small", LORA + "    bank: {size: 8}\n", "E211", "spec.yaml:5:5  attach[0].bank",
         "a mask cannot choose 50 of 8 modules"),
    case("no_such_task", LORA + "    generate: {tasks: 3, task: 3}\n", "E211", "spec.yaml:5:5  attach[0].generate",
         "there is no task 3 among 3"),
    case("share_unknown", LORA + "    experts: {share: down}\n", "E211", "spec.yaml:5:5  attach[0].experts",
         "it has no parameter 'down' to share"),
    case("recipe_unknown", HEAD + "  - recipe: unipel\n", "E113", "spec.yaml:3:13  attach[0].recipe",
         "unknown value 'unipel'", "did you mean 'unipelt'?"),
    case("recipe_option", HEAD + "  - recipe: unipelt\n    lenght: 4\n", "E110", "spec.yaml:4:5  attach[0].lenght",
         "unknown key 'lenght'", "did you mean 'length'?"),
    case("recipe_value", HEAD + "  - recipe: xpeft\n    k: 200\n", "E211", "spec.yaml:3:5  attach[0]",
         "a mask cannot choose 200 of 100 modules"),
    case("recipe_and_site", HEAD + "  - recipe: mam\n    at: attention\n", "E110", "spec.yaml:4:5  attach[0].at",
         "unknown key 'at'"),
]  # fmt: skip
"""Combinators and recipes."""

WITHOUT_MODEL = [*DOCUMENTS, *FORMS, *FORBIDDEN, *COMBINED]


@pytest.mark.parametrize("wanted", WITHOUT_MODEL)
def test_spec_is_refused(desk: Any, wanted: Case) -> None:
    """Compiling and checking say the same, and neither looks at the model before."""
    desk.write(wanted.text)
    outcome = desk.refuse(model="no-such-model")
    check_message(outcome.err, wanted)
    assert desk.pelt("check", "spec.yaml") == outcome


def test_all_findings_at_once(desk: Any) -> None:
    desk.write(LORA + "    r: 0\n    alpah: 3\nnaem: x\ndeploy: {mode: flod}\n")
    err = desk.refuse().err
    assert re.findall(r"^spec.yaml:(\d+):", err, re.MULTILINE) == ["5", "6", "7", "8"]
    assert err.endswith("4 errors\n")


def test_findings_as_json(desk: Any) -> None:
    desk.write(LORA + "    r: 0\n")
    outcome = desk.compile("--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["errors"] == [
        {
            "code": "E114",
            "message": "0 is out of range",
            "place": {"path": "spec.yaml", "line": 5, "column": 8, "key": "attach[0].r"},
            "expected": "a number of at least 1",
            "hint": "",
        }
    ]


@pytest.mark.parametrize("path", ["nope.yaml", "spec.yaml/x"])
def test_no_such_spec(desk: Any, path: str) -> None:
    outcome = desk.pelt("check", path)
    assert outcome.code == 1
    assert outcome.err.startswith(f"{path}\n  E100 cannot read the file: ")


# Bombs, and code that wants to run.

BOMBS = {
    "aliases": "a: &a [x]\n"
    + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "ten_megabytes": "[" * 10_000_000,
    "brackets": "[" * 250_000,
    "braces": "{a: " * 60_000,
    "indented": "".join(f"{' ' * i}a:\n" for i in range(500)),
    "dashes": "- " * 120_000,
    "keys": "".join(f"key{i}: 1\n" for i in range(100_000)),
    "short_keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "list": "[" + "a, " * 80_000 + "]",
    "anchors": "&a " * 80_000,
    "text": '"' + "\\x41" * 60_000,
    "comment": "#" * 262_000 + "\n[",
    "lines": "\n" * 262_000 + "[",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_quickly(desk: Any, name: str) -> None:
    desk.write(BOMBS[name])
    start = time.monotonic()
    err = desk.refuse().err
    assert time.monotonic() - start < 5
    assert re.search(r"E10[134]", err), err
    assert len(err) < 500, "the message is no bomb either"


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch pwned']\n",
        "!!python/object/apply:os.system ['touch pwned']\n",
        "a: !!python/object/new:os.system ['touch pwned']\n",
        "a: !!python/name:os.system\n",
        "? !!python/object/apply:os.system ['touch pwned']\n: x\n",
        "%TAG !p! tag:yaml.org,2002:python/\n---\na: !p!object/apply:os.system ['touch pwned']\n",
    ],
)
def test_tags_run_nothing(desk: Any, text: str) -> None:
    desk.write(text)
    assert "E103 tag 'tag:yaml.org,2002:python/" in desk.refuse().err
    assert not (desk.folder / "pwned").exists()


@pytest.mark.parametrize("verb", [["check", "spec.yaml"], ["compile", "spec.yaml", "model", "-o", "out"]])
def test_formulas_run_nothing(desk: Any, verb: list[str]) -> None:
    desk.write(method("__import__('os').system('touch pwned')"))
    assert desk.pelt(*verb).code == 1
    assert not (desk.folder / "pwned").exists()


# The spec against the model.

QUERY = "encoder.layers.0.attention.query"
FIT = [
    case(
        "site_unknown",
        HEAD + "  - {method: lora, at: atention.query}\n",
        "E203",
        "spec.yaml:3:",
        "no site 'atention.query' in this model",
        "one of: attention.key",
        "hint: did you mean 'attention.query'?",
    ),
    case(
        "site_kind",
        HEAD + "  - {method: lora, at: attention}\n",
        "E203",
        "spec.yaml:3:",
        "'attention' is a site of kind attention, and 'lora' needs kind linear",
        "attention.query",
    ),
    case(
        "site_kind_back",
        HEAD + "  - {method: prefix, at: attention.query}\n",
        "E203",
        "spec.yaml:3:",
        "of kind linear, and 'prefix' needs kind attention",
    ),
    case(
        "no_match", HEAD + "  - {method: lora, at: cross_attention.*}\n", "E203", "spec.yaml:3:", "'cross_attention.*'"
    ),
    case(
        "no_match_of_two",
        HEAD + "  - {method: lora, at: [attention.query, nothing]}\n",
        "E203",
        "spec.yaml:3:",
        "'nothing'",
    ),
    case(
        "no_parameter",
        HEAD + '  - {method: lora, parameter: "**.q_proj.weight"}\n',
        "E203",
        "spec.yaml:3:",
        "no parameter '**.q_proj.weight'",
        "self.query.weight",
    ),
    case("layer_number", LORA + "    layers: 5\n", "E203", "spec.yaml:", "the encoder has no layer 5", "layers 0 to 1"),
    case("layer_range", LORA + "    layers: [0, 1-4]\n", "E203", "spec.yaml:", "no layer 2", "layers 0 to 1"),
    case("layer_reversed", LORA + "    layers: [1-0]\n", "E203", "spec.yaml:", "matches nothing"),
    case("layer_far", LORA + "    layers: [0-999999999]\n", "E203", "spec.yaml:", "no layer 2"),
    case("expected_other", LORA + "    expect: 12\n", "E204", "spec.yaml:", "matches 2 sites", "expected 12 sites"),
    case("list_length", LORA + "    r: [1, 2, 3]\n", "E205", "spec.yaml:", "'r' lists 3 values for 2 layers", "or 2"),
    case(
        "no_order",
        HEAD + "  - {method: dora, at: attention.query}\n  - {method: lora, at: attention.query}\n",
        "E206",
        "spec.yaml:4:",
        "'dora' and 'lora' meet at",
        QUERY,
        "depends on their order",
        "hint: say `after: dora` in 'lora' if that is meant",
    ),
    case(
        "no_order_of_two",
        HEAD
        + "  - {method: lora, at: attention.query}\n  - {method: vera, at: attention.query, r: 4}\n"
        + "  - {method: ia3, at: attention.query, after: vera}\n",
        "E206",
        "spec.yaml:5:",
        "'lora' and 'ia3' meet at",
        QUERY,
        "hint: say `after: [vera, lora]` in 'ia3' if that is meant",
    ),
    case(
        "order_of_effect",
        LORA + "  - {method: dora, at: attention.query}\n",
        "E206",
        "spec.yaml:5:",
        "'dora' stands after 'lora'",
        QUERY,
        "takes effect before it",
        "hint: put 'dora' before 'lora'",
    ),
    case(
        "no_size",
        HEAD + "  - {method: bottleneck, at: feed_forward.block, reduction: 100}\n",
        "E205",
        "spec.yaml:3:",
        "'size if size else d // reduction' is 0",
        "positive whole numbers",
    ),
    case(
        "no_divisor",
        HEAD + "  - {method: oft, at: attention.query, block: 5}\n",
        "E310",
        "spec.yaml:3:5  attach[0]",
        "[32, 32]",
        "[30, 30]",
    ),
    case("too_large", LORA + "    r: 1000000000000000\n", "E205", "spec.yaml:", "r"),
]

# Shapes and functions inside a user's formula.

GRAPH = "norm is offered at every kind of site, and only blocks have one"
SHAPES = [
    case(
        "shape",
        method("linear(linear(x, A), A)"),
        "E310",
        "spec.yaml:6:3  methods.mine",
        "in 'linear(linear(x, A), A)'",
        "x is [B, S, 4]",
        "the weight is [4, 32] (parameter A [4, in])",
        "4 is not 32",
    ),
    case(
        "shape_inner",
        method("relu(linear(x, B)) + y"),
        "E310",
        "spec.yaml:6:3",
        "in 'linear(x, B)'",
        f"[B, S, 32] (input of {QUERY})",
        "[32, 4] (parameter B [out, 4])",
        "32 is not 4",
    ),
    case(
        "shape_result", method("linear(x, A)"), "E310", "spec.yaml:6:3", "in 'linear(x, A)'", "[B, S, 4]", "[B, S, 32]"
    ),
    case("shape_let", method("p + y", let='{p: "linear(x, B)"}'), "E310", "spec.yaml:6:3", "in 'linear(x, B)'"),
    case(
        "too_many_arguments",
        method("linear(x, A, B, x)"),
        "E310",
        "spec.yaml:6:3",
        "linear(x, weight, bias=None) takes at most 3",
    ),
    case("argument_missing", method("linear(x)"), "E310", "spec.yaml:6:3", "lacks its argument 'weight'"),
    case("argument_unknown", method("softmax(x, foo=1)"), "E310", "spec.yaml:6:3", "takes no argument 'foo'"),
    case("no_axis", method("softmax(x, axis=7)"), "E310", "spec.yaml:6:3", "has no axis 7"),
    case(
        "activation_unknown",
        method("activation(y, 'rleu')"),
        "E310",
        "spec.yaml:6:3",
        "unknown activation 'rleu'",
        "relu",
    ),
    case("equation", method("einsum('ij,jk->ik', x, A)"), "E310", "spec.yaml:6:3", "'ij' has 2 letters"),
    case("condition", method("x if x else y"), "E310", "spec.yaml:6:3", "not known at compile time"),
    case("text_as_tensor", method("x + 'abc'"), "E310", "spec.yaml:6:3", "expected a tensor, found 'abc'"),
    case("text_result", method("'abc'"), "E310", "spec.yaml:6:3", "'abc'"),
    case("list_result", method("[x, x]"), "E310", "spec.yaml:6:3", "tensor"),
    case(
        "compile_time_only",
        method("y + reshape(x, [1, out])"),
        "E310",
        "spec.yaml:6:3",
        "'reshape' needs tensors known at compile time",
    ),
    case("norm_elsewhere", method("norm(y)"), "E3", "spec.yaml:", "norm"),
    case("size_compared", method("x > y"), "E310", "spec.yaml:6:3", "works on options and sizes"),
    case("power_tower", method("x * 9**9**9"), "E310", "spec.yaml:6:3", "in '9**9**9'", "387420489 is too large"),
    case("power_nested", method("x * (2**64)**64"), "E310", "spec.yaml:6:3", "out of bounds"),
    case("division_by_zero", method("x / (n - 2)"), "E310", "spec.yaml:6:3", "division by zero"),
    case("root_of_negative", method("sqrt(-2) * x"), "E310", "spec.yaml:6:3", "no real number"),
    case("repeated_text", method("'a' * 1000000000"), "E310", "spec.yaml:6:3", "expected a number, found 'a'"),
    case("repeated_list", method("zeros([1] * 1000000000)"), "E310", "spec.yaml:6:3", "expected a number, found [1]"),
    case("format_bomb", method("'%999999999d' % 1"), "E310", "spec.yaml:6:3", "expected a number"),
    case(
        "giant_tensor", method("x + zeros([1000000000, 1000000000])"), "E310", "spec.yaml:6:3", "at most 2,147,483,648"
    ),
    case("giant_identity", method("linear(x, eye(100000000))"), "E310", "spec.yaml:6:3", "at most 2,147,483,648"),
    case(
        "giant_parameter",
        method("x", parameters="{A: {shape: [1000000000, 1000000000], init: zeros}}"),
        "E",
        "spec.yaml:",
        "A",
    ),
    case(
        "size_negative", method("x", parameters="{A: {shape: [-3], init: zeros}}"), "E205", "spec.yaml:3:", "'-3' is -3"
    ),
    case(
        "size_fraction",
        method("x", parameters="{A: {shape: [in / 5], init: zeros}}"),
        "E205",
        "spec.yaml:3:",
        "'in / 5' is 6.4",
    ),
    case(
        "start_shape",
        method("x", parameters="{A: {shape: [4, in], init: W}}"),
        "E405",
        "spec.yaml:6:3",
        "start value",
        "(4,32)",
    ),
    case(
        "start_singular",
        method("x", parameters="{A: {shape: [2, 2], init: 'inverse(zeros([2, 2]))'}}"),
        "E405",
        "spec.yaml:6:3",
        "Singular matrix",
    ),
    case(
        "start_giant",
        method("x", parameters="{A: {shape: [2], init: 'sum(zeros([100000000, 100000000]))'}}"),
        "E",
        "spec.yaml:",
        "A",
    ),
]

AGAINST_MODEL = [*FIT, *SHAPES]


@pytest.mark.parametrize("wanted", AGAINST_MODEL)
def test_spec_does_not_fit(desk: Any, wanted: Case) -> None:
    desk.write(wanted.text)
    check_message(desk.refuse().err, wanted)


def test_real_process_refuses(desk: Any) -> None:
    desk.write(LORA + "    rnak: 4\n")
    done = subprocess.run([sys.executable, "-m", "peltc", "check", "spec.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == desk.pelt("check", "spec.yaml").err


# Golden texts.

CASES = {param.values[0].name: param.values[0] for param in (*WITHOUT_MODEL, *AGAINST_MODEL)}
EXACT = [
    "gate_on_weight",
    "recipe_option",
    "open_quote",
    "tab",
    "duplicate_nested",
    "alias",
    "key_attachment",
    "method_unknown",
    "option_word",
    "option_enum",
    "same_name",
    "after_unknown",
    "attribute",
    "unknown_function",
    "unknown_name",
    "site_unknown",
    "site_kind",
    "expected_other",
    "no_order",
    "shape",
    "power_tower",
]


@pytest.mark.parametrize("name", EXACT)
def test_golden(desk: Any, name: str) -> None:
    """The whole of what the user reads."""
    desk.write(CASES[name].text)
    err = desk.refuse().err.replace(str(desk.folder), "<here>").replace(str(desk.model), "<model>")
    text = re.sub(r"^ +\d+\.\d s ", "<time> ", err, flags=re.MULTILINE)
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("PELTC_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_golden_texts_are_all_used() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(EXACT)
