"""YAML text → a tree and where everything stands, with the doors shut that a spec never needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peltc.spec.diagnostics import PeltError, Place
from peltc.spec.document import MAX_DEPTH, MAX_INTEGER, dump, key_text, parse, read


def refusal(text: str) -> tuple[str, str]:
    """Place and code of the first finding."""
    with pytest.raises(PeltError) as caught:
        parse(text, "f")
    found = caught.value.diagnostics[0]
    return str(found.place), found.code


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-5", -5),
        ("+5", 5),
        ("0", 0),
        ("1.5", 1.5),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("2.", 2.0),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("=", "="),
        ("'1'", "1"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"a: {text}\n").tree["a"]
    assert found == value and type(found) is type(value)


def test_merge_keys_are_plain_keys() -> None:
    assert parse("<<: {a: 1}\n").tree == {"<<": {"a": 1}}


def test_places() -> None:
    """A scalar's place is the value's, a collection's is its key's; keys have places of their own."""
    document = parse("pelt: 1\nattach:\n  - method: lora\n    at: [x, y]\n", "s.yaml")
    assert document.place("pelt") == Place("s.yaml", 1, 7, "pelt")
    assert document.key_place("pelt") == Place("s.yaml", 1, 1, "pelt")
    assert document.place("attach") == Place("s.yaml", 2, 1, "attach")
    assert document.place("attach", 0) == Place("s.yaml", 3, 5, "attach[0]")
    assert document.place("attach", 0, "at", 1) == Place("s.yaml", 4, 13, "attach[0].at[1]")
    assert document.key_place("attach", 0, "at") == Place("s.yaml", 4, 5, "attach[0].at")


def test_place_of_what_stands_nowhere_is_its_nearest_ancestor() -> None:
    document = parse("a:\n  b: 1\n", "s.yaml")
    assert document.place("a", "c", 2) == Place("s.yaml", 1, 1, "a.c[2]")
    assert document.key_place("a", "c") == Place("s.yaml", 1, 1, "a.c")
    assert parse("", "s.yaml").place("a") == Place("s.yaml", key="a")


def test_place_as_text() -> None:
    assert str(Place("s.yaml", 3, 5, "a.b[1]")) == "s.yaml:3:5  a.b[1]"
    assert key_text(("a", 1, "b", 0)) == "a[1].b[0]"


@pytest.mark.parametrize(
    ("text", "place", "code"),
    [
        ("a: [", "f:1:5", "E101"),
        ("a:\n\tb: 1", "f:2:1", "E101"),
        ("a: 1\n---\nb: 2", "f:2:1", "E101"),
        ("a: \x01", "f:1:4", "E101"),
        ("a: b\nc: d\x07e", "f:2:5", "E101"),
        ("a: 1\na: 2", "f:2:1  a", "E102"),
        ("a: {b: 1, b: 2}", "f:1:11  a.b", "E102"),
        ("1: a", "f:1:1", "E103"),
        ("a: {null: 1}", "f:1:5  a", "E103"),
        ("? {a: 1}\n: b", "f:1:3", "E103"),
        ("a: &x 1\nb: *x", "f:2:4", "E103"),
        ("a: !t 1", "f:1:4", "E103"),
        ("a: !!map {}", "f:1:4", "E103"),
        ("a: .inf", "f:1:4  a", "E103"),
        ("a: [1, -.inf]", "f:1:8  a[1]", "E103"),
        ("a: [1, .nan]", "f:1:8  a[1]", "E103"),
        ("a: 1e400", "f:1:4  a", "E103"),
        (f"a: {MAX_INTEGER + 1}", "f:1:4  a", "E103"),
        (f"a: -{'9' * 5000}", "f:1:4  a", "E103"),
        ("[" * (MAX_DEPTH + 1), f"f:1:{MAX_DEPTH + 1}", "E104"),
    ],
)
def test_refused(text: str, place: str, code: str) -> None:
    assert refusal(text) == (place, code)


def test_bounds_are_inclusive() -> None:
    assert parse(f"a: {MAX_INTEGER}").tree == {"a": MAX_INTEGER}
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH).tree is not None


def test_all_findings_are_collected() -> None:
    with pytest.raises(PeltError) as caught:
        parse("a: 1\na: 2\n3: x\nb: .nan\n", "f")
    assert [(d.place.line, d.code) for d in caught.value.diagnostics] == [(2, "E102"), (3, "E103"), (4, "E103")]


def test_read_files(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_bytes("\ufeffa: é\r\nb: 2\r\n".encode())
    document = read(file)
    assert document.tree == {"a": "é", "b": 2}
    assert document.text == "\ufeffa: é\r\nb: 2\r\n"
    assert document.place("b").line == 2


@pytest.mark.parametrize("content", [b"a: \xff", "a: 1".encode("utf-16")])
def test_bytes_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.yaml").write_bytes(b"# one line\n" + content)
    with pytest.raises(PeltError, match="not UTF-8 text") as caught:
        read(tmp_path / "s.yaml")
    assert caught.value.diagnostics[0].place.line == 2


def test_endless_files_are_not_read_to_their_end() -> None:
    with pytest.raises(PeltError, match="E104"):
        read("/dev/zero")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)
    | st.sampled_from(["yes", "no", "010", "1e4", "1:30", "<<", "=", "~", "null", "true", "- a", "a: b", "2024-01-02"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


@given(plain)
def test_what_is_dumped_is_read_back(tree: Any) -> None:
    assert parse(dump({"a": tree})).tree == {"a": tree}


def test_dump_repeats_what_is_shared() -> None:
    sites = ["x"]
    assert parse(dump({"a": sites, "b": sites})).tree == {"a": ["x"], "b": ["x"]}


def test_dump_refuses_what_is_no_plain_data() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    for tree in ({"a": object()}, {"a": Path("x")}, endless):
        with pytest.raises(PeltError, match=r"E10[34]"):
            dump(tree)
