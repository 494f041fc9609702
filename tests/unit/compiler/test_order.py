"""What meets at a site: every stack can be written, what it does not say is told by name, what commutes does so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peltc
from peltc.compiler.base.opening import open_base
from peltc.compiler.plan.claims import Claim
from peltc.compiler.plan.order import STAGE, commute, follows
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.diagnostics import PeltError
from peltc.spec.recipe import Recipe
from peltc.spec.specification import load_spec

OWN = {
    "more_weight": {
        "title": "a sum with the weight",
        "site": "linear",
        "parameters": {"C": {"shape": ["out", "in"], "init": "normal(0.1)"}},
        "weight": "C + W",
    },
    "own_weight": {
        "title": "what is added reads the weight",
        "site": "linear",
        "parameters": {"s": {"shape": ["out"], "init": "normal(0.1)"}},
        "delta": "s * linear(x, W)",
    },
    "own_output": {
        "title": "what is added reads the output",
        "site": "linear",
        "parameters": {"s": {"shape": ["out"], "init": "normal(0.1)"}},
        "let": {"z": "tanh(y)"},
        "delta": "s * z",
    },
}
AT = {"linear": "attention.query", "block": "feed_forward.block"}
METHODS = {
    "linear": ["lora", "dora", "ia3", "bitfit", "oft", "lokr", "linear_adapter", "vera", "replace", "mole",
               "more_weight", "own_weight", "own_output"],
    "block": ["bottleneck", "compacter", "parallel_adapter", "tiny_attention"],
}  # fmt: skip
ADDING = {"lora", "lokr", "vera", "mole", "bitfit", "more_weight", "parallel_adapter"}
"""Methods that add to the output and read nothing that others of these change; tiny attention reads the output."""


@pytest.fixture(scope="module")
def anatomy(model_folder: Callable[..., Path], cache: Path) -> Anatomy:
    return open_base(model_folder("bert")).anatomy


def entry(name: str, method: str, kind: str, after: Any = ()) -> dict[str, Any]:
    said: dict[str, Any] = {"method": method, "name": name, "at": AT[kind]}
    sizes = {"vera": {"r": 4}, "compacter": {"reduction": 4, "n": 2}}
    return said | sizes.get(method, {}) | ({"after": after} if after else {})


def planned(anatomy: Anatomy, entries: list[dict[str, Any]]) -> tuple[Claim, ...]:
    spec = load_spec({"pelt": 1, "attach": entries, "methods": OWN})
    return make_plan(spec, anatomy, "").claims


@pytest.fixture(scope="module")
def claims(anatomy: Anatomy) -> dict[str, Claim]:
    """What each method claims at one site."""
    return {method: planned(anatomy, [entry("one", method, kind)])[0]
            for kind, known in METHODS.items() for method in known}  # fmt: skip


stacks = st.sampled_from(sorted(METHODS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(st.sampled_from(METHODS[kind]), min_size=2, max_size=6))
)


def in_order(methods: list[str], claims: dict[str, Claim]) -> list[tuple[str, str]]:
    """A stack in an order in which it can take effect, each entry under a name of its own."""
    ordered = sorted(methods, key=lambda m: min(STAGE.get(e, 0) for e in claims[m].effects))
    return [(f"e{i}", method) for i, method in enumerate(ordered)]


@given(stacks, st.randoms(use_true_random=False))
def test_every_stack_can_be_written(
    anatomy: Anatomy, claims: dict[str, Claim], stack: tuple[str, list[str]], random: Any
) -> None:  # fmt: skip
    """With each entry after all earlier ones, after those that it does not commute with, or in a chain."""
    kind, methods = stack
    names = in_order(methods, claims)
    needed = {name: [n for n, m in names[:i] if not commute(claims[m], claims[method])]
              for i, (name, method) in enumerate(names)}  # fmt: skip
    every = [entry(name, m, kind, [n for n, _ in names[:i]]) for i, (name, m) in enumerate(names)]
    least = [entry(name, m, kind, needed[name]) for name, m in names]
    chain = [entry(name, m, kind, [names[i - 1][0]] if i else ()) for i, (name, m) in enumerate(names)]
    for entries in (every, least, chain):
        assert len(planned(anatomy, entries)) == 2 * len(names)
    said = [name for name in needed if needed[name]]
    if not said:
        return
    name = random.choice(said)  # one of the names is forgotten: it is told, unless another says it too
    lost = random.choice(needed[name])
    short = [e | {"after": [n for n in e["after"] if n != lost]} if e["name"] == name else e for e in least]
    for e in short:
        if not e.get("after", True):
            del e["after"]
    known = follows(load_spec({"pelt": 1, "attach": short, "methods": OWN}).attach)
    missing = {later for later, _ in names for n in needed[later] if n not in known[later]}
    if not missing:
        assert planned(anatomy, short)
        return
    with pytest.raises(PeltError) as caught:
        planned(anatomy, short)
    told = "\n".join(str(d) for d in caught.value.diagnostics)
    assert {d.code for d in caught.value.diagnostics} == {"E206"}
    assert f"'{lost}' and '{name}' meet at encoder.layers.0." in told
    assert f" in '{name}' if that is meant" in told


def test_the_hint_can_be_followed(anatomy: Anatomy) -> None:
    """A third that meets two says both, unless one of the two follows the other."""
    first, second = entry("a", "dora", "linear"), entry("b", "ia3", "linear", "a")
    with pytest.raises(PeltError, match=r"'a' and 'b' and 'c' meet at .*\n.*\n.*say `after: b` in 'c'"):
        planned(anatomy, [first, second, entry("c", "linear_adapter", "linear", ())])
    apart = [entry("a", "lora", "linear"), entry("b", "lokr", "linear")]
    with pytest.raises(PeltError, match=r"'a' and 'b' and 'c' meet at .*\n.*\n.*say `after: \[a, b\]` in 'c'"):
        planned(anatomy, [*apart, entry("c", "ia3", "linear")])
    with pytest.raises(PeltError, match=r"'b' and 'c' meet at .*\n.*\n.*say `after: \[a, b\]` in 'c'"):
        planned(anatomy, [*apart, entry("c", "ia3", "linear", "a")])
    assert planned(anatomy, [*apart, entry("c", "ia3", "linear", ["a", "b"])])


def test_what_stands_between_does_not_hide(anatomy: Anatomy) -> None:
    """Neighbours are not all that meet: what commutes with both of its neighbours parts them."""
    entries = [entry(name, name, "linear") for name in ("more_weight", "lora", "own_weight")]
    with pytest.raises(PeltError, match="'more_weight' and 'own_weight' meet"):
        planned(anatomy, entries)
    assert planned(anatomy, [*entries[:2], entries[2] | {"after": "more_weight"}])


def test_names_of_a_list_are_checked(anatomy: Anatomy) -> None:
    with pytest.raises(PeltError, match="E202 no attachment 'lroa' stands before this one"):
        planned(anatomy, [entry("lora", "lora", "linear"), entry("c", "ia3", "linear", ["lora", "lroa"])])


def test_one_name_or_several_are_kept() -> None:
    entries = [entry("a", "lora", "linear"), entry("b", "lokr", "linear"), entry("c", "ia3", "linear", ["a", "b"]),
               entry("d", "ia3", "linear", "c")]  # fmt: skip
    spec = load_spec({"pelt": 1, "attach": entries})
    assert [e.after for e in spec.attach] == [(), (), ("a", "b"), ("c",)]
    assert [e.entry().get("after") for e in spec.attach] == [None, None, ["a", "b"], "c"]
    again = load_spec({"pelt": 1, "attach": [e.entry() for e in spec.attach]})
    assert [e.after for e in again.attach] == [e.after for e in spec.attach]


def test_recipes_name_their_own() -> None:
    """A recipe's `after:` means its own attachments, under a prefix too."""
    attach = ({"method": "lora", "at": "head"}, {"method": "ia3", "at": "head", "after": ["lora"]},
              {"method": "bitfit", "at": "head", "after": "lora"})  # fmt: skip
    recipe = Recipe("both", "", "", (), attach)
    assert [said.get("after") for said, _ in recipe.expand({"recipe": "both"})] == [None, ["lora"], "lora"]
    found = recipe.expand({"recipe": "both", "name": "my"})
    assert [(said["name"], said.get("after")) for said, _ in found] == [
        ("my_lora", None),
        ("my_ia3", ["my_lora"]),
        ("my_bitfit", "my_lora"),
    ]


PAIRS = [(kind, a, b) for kind, known in METHODS.items() for a, b in combinations(known, 2)]


@pytest.mark.parametrize(("kind", "one", "other"), [p for p in PAIRS if {p[1], p[2]} <= ADDING])
def test_what_commutes_does_so(claims: dict[str, Claim], kind: str, one: str, other: str) -> None:
    """In torch, with random weights, both orders answer the same; so does the artifact's fold (see the next test)."""
    assert commute(claims[one], claims[other])
    base, answers = models.build("bert"), []
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    for pair in ((one, other), (other, one)):
        model = copy.deepcopy(base)
        peltc.attach(model, {"pelt": 1, "attach": [entry(m, m, kind) for m in pair], "methods": OWN})
        with torch.no_grad():
            for name in sorted(model.pelt.plan.tensors):
                tensor = model.pelt.parameter(name)
                seed = torch.Generator().manual_seed(len(name))
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=seed))
            answers.append(model.eval()(input_ids=ids).logits)
    assert torch.allclose(*answers, rtol=0, atol=1e-5)


def test_what_does_not_is_told_apart(claims: dict[str, Claim]) -> None:
    """All other pairs need an order; those that read what the other changes among them."""
    for _, one, other in PAIRS:
        if not {one, other} <= ADDING and "own_weight" not in (one, other):
            assert not commute(claims[one], claims[other]), (one, other)
    assert commute(claims["own_weight"], claims["lora"])
    assert not commute(claims["own_weight"], claims["more_weight"])
    assert not commute(claims["own_output"], claims["lora"])


@pytest.mark.parametrize("mode", ["fold", "static"])
def test_stacks_hold_against_torch(mode: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Sums in an order that is not that of their effect, and a third after two that do not commute with it."""
    entries = [
        entry("lora", "lora", "linear"),
        entry("bitfit", "bitfit", "linear"),
        entry("weight", "more_weight", "linear"),
        entry("ia3", "ia3", "linear", ["lora", "bitfit", "weight"]),
        entry("linear_adapter", "linear_adapter", "linear", ["ia3"]),
    ]
    spec = load_spec({"pelt": 1, "attach": entries, "methods": OWN})
    base = open_base(model_folder("bert"))
    random = np.random.default_rng(0)
    tensors = {name: (0.2 * random.standard_normal(t.shape)).astype(np.float32)
               for name, t in make_plan(spec, base.anatomy, "").tensors.items()}  # fmt: skip
    manifest = peltc.compile(spec, model_folder("bert"), tmp_path / "out", tensors, mode=mode)
    assert manifest["verification"]["worst"] <= 1e-5
