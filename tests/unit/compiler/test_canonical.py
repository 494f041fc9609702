"""Formulas as what they compute, and sites told shortly."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from peltc.compiler.adapter.canonical import DRAWS, PASSES, Settler, text
from peltc.compiler.adapter.identity import Sample, pick, public_name
from peltc.compiler.adapter.mathematics import spans, spread
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.spec.formula.functions import FUNCTIONS
from peltc.spec.formula.reader import parse


def settled(formula: str, **constants: Any) -> str:
    return text(Settler(constants).settle(parse(formula)))


@pytest.mark.parametrize(
    "formula, expected",
    [
        ("(alpha / r) * linear(x, A)", "(2 * linear(x, A))"),
        ("(alpha / (sqrt(r) if stabilised else r)) * x", "(2 * x)"),
        ("linear(dropout(x, p), A)", "linear(x, A)"),
        ("m / detach(norm2(V))", "(m / norm2(V))"),
        ("choose(A_experts, 3)", "choose(A_experts)"),
        ("choose(A_experts, 3, 'layer')", "choose(A_experts)"),
        ("take(both, index, axis=1)", "take(both, index, axis=1)"),
        ("take(both, 0, axis=0)", "take(both, 0)"),
        ("take(both, 0)", "take(both, 0)"),
        ("linear(x, A, bias=c)", "linear(x, A, bias=c)"),
        ("linear(x, A, c)", "linear(x, A, bias=c)"),
        ("activation(x, act)", "relu(x)"),
        ("activation(x, 'identity') + identity(x)", "(x + x)"),
        ("relu(x)", "relu(x)"),
        ("a - (b - c)", "(a - (b - c))"),
        ("a - b - c", "((a - b) - c)"),
        ("reshape(A, [size if size else d // reduction, d])", "reshape(A, [4, 32])"),
        ("A if layer == 0 else B", "(A if (layer == 0) else B)"),
        ("x if act == 'relu' and not stabilised else y", "x"),
        ("einsum('ij,jk->ik', A, B)", "einsum('ij,jk->ik', [A, B])"),
        ("concat(k, v, axis=-2)", "concat([k, v], axis=-2)"),
        ("norm(y + r)", "norm((y + 8))"),
        ("1e-5 * x", "(1e-05 * x)"),
        ("1 / 0 * x", "((1 / 0) * x)"),
    ],
)
def test_settled(formula: str, expected: str) -> None:
    known: dict[str, Any] = {"alpha": 16, "r": 8, "stabilised": False, "p": 0.1, "act": "relu", "size": 0, "d": 32}
    found = settled(formula, **known, reduction=8, layer=1, index=3)
    assert found == expected


def test_what_had_a_say() -> None:
    settler = Settler({"size": 4, "reduction": 8, "d": 32, "p": 0.1, "unused": 1})
    settler.settle(parse("dropout(x, p) * (size if size else d // reduction)"))
    assert settler.read == {"size"}


@pytest.mark.parametrize("name", [*PASSES, *DRAWS])
def test_what_is_left_out_means_nothing_in_deployment(name: str) -> None:
    """By the interpreter that deployment's constants come from: another value of it gives the same result."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    kept, *_ = (p for p, _ in FUNCTIONS[name].parameters)
    results = []
    for value in (0.1, 0.7):
        arguments = {p: x if p == kept else value for p, _ in FUNCTIONS[name].parameters}
        results.append(NumericInterpreter().call(name, arguments))
    assert np.array_equal(*results)
    if name in PASSES:
        assert PASSES[name] == kept and np.array_equal(results[0], x)


@pytest.mark.parametrize(
    "sites, expected",
    [
        ([], ()),
        (["pooler"], ("pooler",)),
        (["layers.0.attention.query"], ("layers.0.attention.query",)),
        ([f"encoder.layers.{i}.attention.{r}" for i in range(12) for r in ("query", "value")],
         ("encoder.layers.0-11.{attention.query, attention.value}",)),
        (["layers.0.a", "layers.2.a", "layers.3.a", "head"], ("layers.0.a", "layers.2-3.a", "head")),
        (["layers.1.a", "layers.0.a"], ("layers.1.a", "layers.0.a")),
        (["layers.0.a", "layers.0.b", "layers.1.b", "layers.1.a"], ("layers.0.{a, b}", "layers.1.{b, a}")),
        (["encoder.layers.0", "encoder.layers.1"], ("encoder.layers.0-1",)),
        (["a.0.b.1.weight", "a.0.b.2.weight"], ("a.0.{b.1.weight, b.2.weight}",)),
    ],
)  # fmt: skip
def test_spans(sites: list[str], expected: tuple[str, ...]) -> None:
    assert spans(sites) == expected


def test_spread() -> None:
    assert spread(3, 4) == [0, 1, 2] and spread(0, 4) == [] and spread(1, 1) == [0]
    assert spread(101, 3) == [0, 50, 100] and len(set(spread(10**9, 64))) == 64
    assert pick([f"{i:03}" for i in range(200)], 3) == ["000", "099", "199"]


@pytest.mark.parametrize(
    "path, public",
    [
        ("bert-base-uncased", "bert-base-uncased"),
        ("organisation/model", "organisation/model"),
        ("/home/anna/secret client/model", "model"),
        ("/cache/models--organisation--model/snapshots/abc", "organisation/model"),
        ("C:\\Users\\anna\\model", "model"),
        ("a/b/c", "c"),
        ("../model", "model"),
        ("", ""),
        ("/tmp/.model-x1", ""),
    ],
)
def test_public_name(path: str, public: str) -> None:
    assert public_name(path) == public


@pytest.mark.parametrize("narrow", [np.float16, ml_dtypes.bfloat16])
def test_roundings_of_one_value_agree(narrow: Any) -> None:
    values = np.random.default_rng(0).normal(0, 0.1, (1000, 4)).astype(np.float32)
    values[0] = [-0.06251808, 0.0, 1e-8, 2.0]
    for row in values:
        assert Sample.of(9, row).agrees(Sample.of(9, row.astype(narrow)))
        between = Sample.of(9, row.astype(np.float16)), Sample.of(9, row.astype(ml_dtypes.bfloat16))
        assert between[0].agrees(between[1])
        up = np.nextafter(row.astype(narrow), np.array(9, narrow))
        assert not Sample.of(9, np.nextafter(up, np.array(9, narrow))).agrees(Sample.of(9, row))
    row = values[1]
    assert not Sample.of(9, row).agrees(Sample.of(9, np.nextafter(row, np.float32(9)))), "one type: to the bit"
    assert not Sample.of(9, row).agrees(Sample.of(10, row))
