"""Modules in the terms of PEFT-Ref: rows come out of formulas, whatever a method is called and whoever wrote it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from peltc.spec.combinators import COMBINATORS
from peltc.spec.diagnostics import PeltError
from peltc.spec.document import parse
from peltc.spec.interpreters.typology import PROPERTIES, row_at, row_of
from peltc.spec.interpreters.workspace import counted, selected, workspace
from peltc.spec.method import build, shipped
from peltc.spec.specification import Attachment, load_spec

Entry = dict[str, Any]
AT = {"linear": "attention.query", "norm": "*norm", "block": "feed_forward.block", "attention": "attention",
      "embedding": "embedding"}  # fmt: skip


def attached(*entries: Entry) -> dict[str, Attachment]:
    """Attachments by name."""
    return {entry.name: entry for entry in load_spec({"pelt": 1, "attach": [dict(e) for e in entries]}).attach}


def row(method: str, at: Any = None, **said: Any) -> dict[str, str]:
    """The row of a module."""
    (entry,) = attached({"method": method, "at": at or AT[shipped()[method].site], **said}).values()
    return row_at(entry)


def derived(site: str, options: dict[str, Any] | None = None, **said: Any) -> dict[str, str]:
    """The row of a method written on the spot; parameters are given by their shapes, `frozen` and scope after a `/`."""
    parameters = {}
    for name, text in said.pop("parameters", {}).items():
        shape, *words = text.split("/")
        scope = {"scope": words[0]} if words and words[0] != "frozen" else {}
        parameters[name] = {"shape": shape.split(), "init": "zeros", **scope, "frozen": "frozen" in words}
    tree = {"site": site, "parameters": parameters, "options": options or {}, **said}
    return row_of(build(parse(yaml.safe_dump(tree, sort_keys=False), "m.yaml"), "mine"))


# PEFT-Ref's table of seven techniques, as recalled in `methods.md`, section 5.3, in our words

SEVEN = {
    "prompt tuning": row("prompt"),
    "prefix tuning": row("prefix"),
    "LoRA": row("lora", ["attention.query", "attention.value"]),
    "adapters": row("bottleneck", ["attention.block", "feed_forward.block"]),
    "compacters": row("compacter", ["attention.block", "feed_forward.block"]),
    "(IA)³": row("ia3", ["attention.key", "attention.value", "feed_forward.down"]),
    "tiny-attention": row("tiny_attention", "attention.block"),
}
TABLE: dict[str, tuple[str, ...]] = {
    "intra_connectivity": (
        "dense: embedding",
        "dense: non-linear MLP",
        "dense: linear MLP",
        "dense: non-linear MLP",
        "dense: non-linear MLP, of Kronecker products",  # the table: hypercomplex, which is what these are
        "none: vectors",
        "dense: self-attention",
    ),
    "inter_connectivity": (*["fixed: dense"] * 6, "dynamic: attention"),
    # (IA)³: the table adds "(rescaling)", which is the integration form.
    "parameters_adapted": ("addition", "addition", "reparameterisation", *["addition"] * 4),
    "parameter_sharing": (
        "none",
        "a network shared by all sites",  # the table: a shared MLP across layers
        "none",
        "none",
        "rule shared by all sites",  # the table: the rule, across layers; here across both adapters of a layer too
        "none",
        "none",  # the table adds that heads are averaged: that is `experts`, see below
    ),
    "input_type": (
        "task embeddings",  # the table: "or data", which a prompt that is a parameter does not read
        "weights (learned prefix)",
        "hidden representation / weights",
        "hidden representation",
        "hidden representation",
        "hidden representation / weights",  # the table: weights or activations
        "hidden representations of all tokens",
    ),
    "insertion_form": (
        "parallel", "parallel", "parallel", "sequential", "sequential", "sequential (in place)", "sequential",
    ),
    "insertions": (
        "1 (embedding)",
        "all layers",
        "all layers × 2",  # the table: all layers; query and value are counted as the table counts adapters
        "all layers × 2",
        "all layers × 2",
        "all layers × 3",
        "all layers",
    ),
    "integration_form": (
        "concatenation",
        "concatenation",  # the paper: gated addition, after He et al., whose gate is attention's softmax; no gate here
        "scaled addition",
        "direct addition",
        "direct addition",
        "rescaling",
        "direct addition",
    ),
    "workspace": (
        "embedding",
        "attention keys and values",
        "attention query, value",
        "attention output + feed-forward output",
        "attention output + feed-forward output",
        "attention key, value + feed-forward down",
        "attention output",
    ),
    "binding_time": ("compile time",) * 7,
}  # fmt: skip


@pytest.mark.parametrize("cell", list(PROPERTIES))
@pytest.mark.parametrize("technique", list(SEVEN))
def test_the_seven_techniques(technique: str, cell: str) -> None:
    assert SEVEN[technique][cell] == TABLE[cell][[*SEVEN].index(technique)]


# the systems of `methods.md`, section 5.6, and HyperPELT and ProPETL, which it lacks

SYSTEMS: dict[tuple[str, str], dict[str, str]] = {
    ("adamix", "bottleneck"): {
        "intra_connectivity": "dense: non-linear MLP, one of 4 at random in training",
        "inter_connectivity": "fixed: dense, at random in training",
        "parameters_adapted": "addition",
        "parameter_sharing": "up, up_bias shared by the experts",
        "insertion_form": "sequential",
        "insertions": "all layers",
        "integration_form": "direct addition",
        "workspace": "feed-forward output",
        "binding_time": "compile time",
    },
    ("adamix_lora", "lora"): {
        "intra_connectivity": "dense: linear MLP, one of 8 at random in training",
        "parameters_adapted": "reparameterisation",
        "parameter_sharing": "B shared by the experts",
    },
    ("unipelt", "lora"): {
        "intra_connectivity": "dense: linear MLP",
        "inter_connectivity": "dynamic: a gate per sample",
        "parameters_adapted": "reparameterisation",
        "input_type": "hidden representation",  # with its gate it is no change of the map's weights any more
        "insertion_form": "parallel",
        "insertions": "all layers × 2",
        "integration_form": "gated addition",
        "workspace": "attention query, value",
        "binding_time": "compile time + run-time gate",
    },
    ("unipelt", "prefix"): {
        "intra_connectivity": "dense: non-linear MLP",
        "inter_connectivity": "dynamic: a gate per sample",
        "parameters_adapted": "addition",
        "parameter_sharing": "a network shared by all sites",
        "input_type": "weights (learned prefix)",
        "insertion_form": "parallel",
        "integration_form": "gated concatenation",
        "workspace": "attention keys and values",
        "binding_time": "compile time + run-time gate",
    },
    ("unipelt", "bottleneck"): {
        "inter_connectivity": "dynamic: a gate per sample",
        "parameters_adapted": "addition",
        "insertion_form": "sequential",
        "integration_form": "gated addition",
        "workspace": "feed-forward output",
        "binding_time": "compile time + run-time gate",
    },
    ("unipelt_ia3", "ia3"): {
        "intra_connectivity": "none: vectors",
        "inter_connectivity": "dynamic: a gate per sample",
        "insertion_form": "sequential (in place)",
        "integration_form": "gated rescaling",
        "workspace": "attention key, value + feed-forward up",
    },
    ("xpeft", "bottleneck"): {
        "intra_connectivity": "dense: non-linear MLP, a mixture of 100 in weight space",
        "inter_connectivity": "fixed: dense, for each profile",
        "parameters_adapted": "none new; selection from a frozen bank",
        "parameter_sharing": "the bank shared by all profiles",
        "insertion_form": "sequential",
        "insertions": "all layers",
        "integration_form": "direct addition",
        "workspace": "feed-forward output",
        "binding_time": "compile time or run-time mask",
    },
    ("hyperpelt", "adapter"): {
        "intra_connectivity": "dense: non-linear MLP",
        "inter_connectivity": "fixed: dense",
        "parameters_adapted": "addition",
        "parameter_sharing": "a network shared by all sites",
        "insertion_form": "sequential",
        "insertions": "all layers × 2",
        "integration_form": "direct addition",
        "workspace": "attention output + feed-forward output",
        "binding_time": "compile time",
    },
    ("hyperpelt", "prefix"): {
        "intra_connectivity": "dense: non-linear MLP",
        "parameter_sharing": "a network shared by all sites",
        "input_type": "weights (learned prefix)",
        "integration_form": "concatenation",
    },
    ("hyperpelt", "norm_tuning"): {
        "parameters_adapted": "reparameterisation",
        "insertions": "each norm that matches *norm",
        "integration_form": "replacement of parameters",
        "workspace": "norms",
    },
    ("propetl", "bottleneck"): {
        "parameters_adapted": "addition",
        "parameter_sharing": "a prototype shared by all sites, a mask for each; down_bias, up_bias shared by all sites",
        "binding_time": "compile time",
    },
    ("mam", "parallel_adapter"): {
        "insertion_form": "parallel",
        "integration_form": "scaled addition",
        "workspace": "feed-forward",
    },
}


@pytest.mark.parametrize(("recipe", "name"), list(SYSTEMS), ids="-".join)
def test_systems(recipe: str, name: str) -> None:
    found = row_at(attached({"recipe": recipe})[name])
    expected = SYSTEMS[recipe, name]
    assert {key: found[key] for key in expected} == expected


def test_prompt_beside_a_system() -> None:
    """PT+UniPELT: the other modules stay as they are, and the prompt is fixed and at the embedding."""
    alone, both = (
        attached({"recipe": "unipelt"}),
        attached({"recipe": "unipelt"}, {"method": "prompt", "at": "embedding"}),
    )
    assert {name: row_at(both[name]) for name in alone} == {name: row_at(entry) for name, entry in alone.items()}
    found = row_at(both["prompt"])
    assert (found["inter_connectivity"], found["workspace"]) == ("fixed: dense", "embedding")


# options decide conditionals


def test_activation_that_is_none() -> None:
    assert row("bottleneck", activation="identity")["intra_connectivity"] == "dense: linear MLP"


def test_prefix_without_its_network() -> None:
    found = row("prefix", reparameterise=False)
    assert (found["intra_connectivity"], found["parameter_sharing"]) == ("dense: embedding", "none")


@pytest.mark.parametrize(("scale", "form"), [(1, "direct addition"), (2, "scaled addition")])
def test_factor_of_one_is_none(scale: int, form: str) -> None:
    assert row("bottleneck", scale=scale)["integration_form"] == form
    assert row("loha", r=4, alpha=4 * scale)["integration_form"] == form, "before the last map's weight, too"


@pytest.mark.parametrize("reads", ["x", "residual"])
def test_what_a_parallel_adapter_reads(reads: str) -> None:
    assert row("parallel_adapter", reads=reads)["insertion_form"] == "parallel"


@pytest.mark.parametrize("position", ["input", "output"])
def test_either_side_of_a_map(position: str) -> None:
    found = row("ia3", position=position)
    assert (found["insertion_form"], found["integration_form"]) == ("sequential (in place)", "rescaling")


def test_layers_that_differ() -> None:
    assert row("bottleneck", activation=["relu", "identity"])["intra_connectivity"] == (
        "dense: non-linear MLP or dense: linear MLP"
    )


def test_what_only_a_model_decides_counts_both_ways() -> None:
    found = derived(
        "linear", parameters={"A": "out in", "l": "out"}, output="y + tanh(linear(x, A)) if in == out else y * l"
    )
    assert found["intra_connectivity"] == "dense: non-linear MLP"


# combinators over any method


def combined(method: str, combinator: str) -> dict[str, str] | None:
    """The row of a wrapped method, or None where they do not go together."""
    try:
        return row(method, **{combinator: True})
    except PeltError as error:
        assert {d.code for d in error.diagnostics} == {"E211"}
        return None


@pytest.mark.parametrize("method", list(shipped()))
@pytest.mark.parametrize("combinator", list(COMBINATORS))
def test_wrapped(method: str, combinator: str) -> None:
    plain, found = row(method), combined(method, combinator)
    if found is None:
        return
    kept = {"workspace", "insertions", "insertion_form"}
    assert {key: found[key] for key in kept} == {key: plain[key] for key in kept}
    written = combinator == "generate" and plain["integration_form"] == "concatenation"  # then the network's own form
    form = "dense: non-linear MLP" if written else plain["intra_connectivity"].partition(",")[0]
    assert found["intra_connectivity"].startswith(form)
    sharing, binding = found["parameter_sharing"], found["binding_time"]
    if combinator == "gate":
        kind = plain["integration_form"].removeprefix("gated ").rpartition(" ")[2]
        assert found["integration_form"] == f"gated {kind}"
        assert found["inter_connectivity"].startswith("dynamic: a gate per sample")
        assert binding.endswith("run-time gate") and sharing == plain["parameter_sharing"]
        assert found["parameters_adapted"] == plain["parameters_adapted"], "a gate changes none"
    if combinator == "experts":
        assert "one of 4 at random in training" in found["intra_connectivity"]
    if combinator == "bank":
        assert "selection from a frozen bank" in found["parameters_adapted"]
        assert "the bank shared by all profiles" in sharing and "run-time mask" in binding
    if combinator == "generate":
        assert sharing.startswith("a network shared by all sites")
    if combinator == "prototype":
        assert "a prototype shared by all sites, a mask for each" in sharing


def test_bank_with_a_part_of_its_own() -> None:
    """A norm inside whose gain each profile trains is new."""
    (entry,) = attached({"recipe": "xpeft", "inner_norm": "affine"}).values()
    assert row_at(entry)["parameters_adapted"] == "addition; selection from a frozen bank"


def test_constant_gate_is_a_factor() -> None:
    found = row("lora", gate={"constant": True})
    assert (found["integration_form"], found["inter_connectivity"]) == ("scaled addition", "fixed: dense")
    assert found["binding_time"] == "compile time"


def test_combinators_together() -> None:
    """AdaMix behind a gate: what each says stays, the gate's parameters are no experts' common property."""
    (entry,) = attached(
        {"method": "bottleneck", "at": "feed_forward.block", "experts": {"share": "up"}, "gate": True}
    ).values()
    found = row_at(entry)
    assert found["parameter_sharing"] == "up, up_bias shared by the experts"
    assert found["integration_form"] == "gated addition"


# methods of one's own: nothing goes by names


def test_names_do_not_matter() -> None:
    """LoRA's formula in other words."""
    found = derived(
        "linear", parameters={"p": "4 in", "q_": "out 4"}, let={"inner": "linear(x, p)"}, delta="2 * linear(inner, q_)"
    )
    lora = row_of(shipped()["lora"])
    assert found == lora


FORMULAS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a gate written by hand": (
        {"site": "block", "parameters": {"A": "d d", "w": "1 d"},
         "let": {"g": "mean_seq(sigmoid(linear(x, w)), mask)"}, "delta": "linear(x, A) * g"},
        {"inter_connectivity": "dynamic: a gate per sample", "integration_form": "gated addition",
         "insertion_form": "parallel", "binding_time": "compile time + run-time gate"},
    ),
    "a gate for each token": (
        {"site": "block", "parameters": {"A": "d d", "w": "1 d"}, "delta": "sigmoid(linear(x, w)) * linear(x, A)"},
        {"inter_connectivity": "dynamic: a gate per token", "intra_connectivity": "dense: linear MLP"},
    ),
    "a sigmoid inside is no gate": (
        {"site": "block", "parameters": {"A": "4 d", "B": "d 4"}, "delta": "linear(sigmoid(linear(x, A)), B)"},
        {"inter_connectivity": "fixed: dense", "intra_connectivity": "dense: non-linear MLP"},
    ),
    "a product of two maps of the input is a curve": (
        {"site": "block", "parameters": {"A": "4 d", "B": "4 d", "C": "d 4"},
         "delta": "linear(silu(linear(x, A)) * linear(x, B), C)"},
        {"inter_connectivity": "fixed: dense", "intra_connectivity": "dense: non-linear MLP"},
    ),
    "attention written by hand": (
        {"site": "block", "parameters": {"Q": "4 d", "K": "4 d", "U": "d d"},
         "delta": "linear(softmax(linear(y, Q) @ transpose(linear(y, K))) @ y, U)"},
        {"intra_connectivity": "dense: self-attention", "inter_connectivity": "dynamic: attention",
         "input_type": "hidden representations of all tokens", "integration_form": "direct addition"},
    ),
    "a sum that einsum spells": (
        {"site": "linear", "parameters": {"A": "in out"}, "delta": "einsum('bsi,io->bso', x, A)"},
        {"intra_connectivity": "dense: linear MLP", "parameters_adapted": "reparameterisation"},
    ),
    "a factor that einsum spells": (
        {"site": "linear", "parameters": {"l": "out"}, "output": "einsum('bso,o->bso', y, l)"},
        {"intra_connectivity": "none: vectors", "integration_form": "rescaling"},
    ),
    "a linear network that yields a prefix": (
        {"site": "attention", "parameters": {"E": "kv_heads 4 8", "P": "8 head_dim/model"},
         "keys": "concat(E @ P, k, axis=-2)", "values": "v"},
        {"intra_connectivity": "dense: linear MLP", "parameter_sharing": "P shared by all sites",
         "integration_form": "concatenation"},
    ),
    "trained coefficients over frozen random matrices": (
        {"site": "linear", "parameters": {"c": "8", "A": "8 out in/frozen"},
         "delta": "linear(x, einsum('n,noi->oi', c, A))"},
        {"parameters_adapted": "none new; selection from a frozen bank",
         "intra_connectivity": "dense: linear MLP, a mixture of 8 in weight space",
         "binding_time": "compile time or run-time weights"},
    ),
    "a trained factor of a frozen matrix is no coefficient": (
        {"site": "linear", "parameters": {"A": "4 in/frozen", "B": "out 4"}, "delta": "linear(x, B @ A)"},
        {"parameters_adapted": "reparameterisation", "intra_connectivity": "dense: linear MLP"},
    ),
    "shared in each layer": (
        {"site": "linear", "parameters": {"A": "out in/layer"}, "delta": "linear(x, A)"},
        {"parameter_sharing": "A shared in each layer"},
    ),
    "a change of the weight": (
        {"site": "linear", "parameters": {"B": "out 4", "A": "4 in"}, "weight": "W + B @ A"},
        {"intra_connectivity": "dense: linear MLP", "parameters_adapted": "reparameterisation", "input_type": "weights",
         "insertion_form": "in place", "integration_form": "replacement of parameters"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORMULAS))
def test_formulas(name: str) -> None:
    method, expected = FORMULAS[name]
    found = derived(**method)
    assert {key: found[key] for key in expected} == expected


def test_experts_whose_size_a_network_hides() -> None:
    assert "one of several at random" in row("lora", experts=True, generate=True)["intra_connectivity"]


# where


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"at": ["attention.query", "attention.value"]}, "all layers × 2"),
        ({"at": "attention.query", "layers": "last 4"}, "the last 4 layers"),
        ({"at": "attention.query", "layers": [0, 2, "4-7"]}, "layers 0, 2, 4-7"),
        ({"at": "attention.query", "layers": 3}, "layer 3"),
        ({"at": "decoder.layers.0.attention.query"}, "1 (attention.query)"),
        ({"at": ["decoder.layers.*.attention.query", "head"]}, "all layers + 1 (head)"),
        ({"at": "*_attention.*"}, "each linear map that matches *_attention.*"),
        ({"parameter": "**.q_proj.weight"}, "each map that matches **.q_proj.weight"),
    ],
)
def test_insertions_without_a_model(entry: Entry, words: str) -> None:
    (found,) = attached({"method": "lora", **entry}).values()
    assert selected(found) == words


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([f"layers.{i}.attention.{part}" for i in range(6) for part in ("query", "value")], "12 (6 layers × 2)"),
        (["encoder.layers.0.layer", "decoder.layers.0.layer"], "2 (2 layers)"),
        (["layers.3.attention"], "1 (1 layer)"),
        (["embedding.norm", "layers.0.attention.norm", "layers.1.attention.norm"], "3 (2 layers + 1 outside)"),
        (["layers.0.attention.query", "layers.1.attention.query", "layers.1.attention.value"], "3"),
        (["embedding"], "1"),
        (["", ""], "2"),
    ],
)
def test_insertions_on_a_model(paths: list[str], words: str) -> None:
    assert counted(paths) == words


@pytest.mark.parametrize(
    ("kind", "paths", "words"),
    [
        ("linear", ["attention.query", "attention.value", "feed_forward.up"],
         "attention query, value + feed-forward up"),
        ("linear", ["layers.0.attention.query", "layers.1.attention.query"], "attention query"),
        ("linear", ["encoder.layers.0.attention.key", "decoder.layers.0.cross_attention.key"],
         "encoder attention key + decoder cross-attention key"),
        ("linear", ["head", "pooler"], "head + pooler"),
        ("linear", ["*"], "linear maps"),
        ("linear", ["*.query"], "linear maps *.query"),
        ("norm", ["*norm"], "norms"),
        ("norm", ["attention.norm", "final_norm"], "attention norm + final norm"),
        ("block", ["feed_forward.block", "layer"], "feed-forward output + layer output"),
        ("attention", ["cross_attention"], "cross-attention keys and values"),
        ("embedding", ["embedding"], "embedding"),
        ("embedding", ["embedding.word"], "word embedding"),
    ],
)  # fmt: skip
def test_workspaces(kind: str, paths: list[str], words: str) -> None:
    assert workspace(kind, paths, sequential=True) == words


def test_parameters_without_a_role() -> None:
    (entry,) = attached({"method": "lora", "parameter": "**.odd.weight"}).values()
    assert row_at(entry)["workspace"] == "parameters **.odd.weight"
    assert row_at(entry, ["", "layers.0.attention.query"])["workspace"] == "attention query + parameters **.odd.weight"


def test_every_shipped_method_has_a_whole_row() -> None:
    for name in shipped():
        found = row(name)
        assert list(found) == list(PROPERTIES)
        assert all(re.fullmatch(r"\S.*\S|\d", cell) for cell in found.values()), name
