"""Legal specs off the beaten track, each of which once gave a wrong answer, a wrong graph or a traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from meaning import disagreements, meaning, opened

import peltc
from peltc.compiler.files.manifest import read_manifest
from peltc.compiler.pipeline import build
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.plan.planner import make_plan
from peltc.runtime.building.compile import plan_for
from peltc.runtime.building.trained import save_adapter
from peltc.runtime.commands.cli import run
from peltc.runtime.training import interface
from peltc.runtime.training.attached import Attached
from peltc.runtime.verification import exact, verify
from peltc.runtime.verification.samples import example
from peltc.runtime.verification.verify import TOLERANCE, load_model, verify_folder
from peltc.spec.diagnostics import PeltError
from peltc.spec.interpreters.check import check_formulas
from peltc.spec.specification import load_spec

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
from instances import FAMILIES, save

Content = dict[str, Any]
PAIR = {"K": ["kv_heads", 3, "head_dim"], "V": ["kv_heads", 3, "head_dim"]}
DOWN = "feed_forward.down"


def own(site: str = "linear", parameters: dict[str, list[Any]] | None = None, at: str = "", **effects: str) -> Content:
    """A spec of one method, which is written out."""
    at = at or {"linear": "attention.query", "attention": "attention", "block": "attention.block",
                "norm": "attention.norm"}[site]  # fmt: skip
    shapes = {name: {"shape": shape, "init": "zeros"} for name, shape in (parameters or {}).items()}
    method = {"title": "own", "source": "tests", "site": site, **({"parameters": shapes} if shapes else {}), **effects}
    return {"pelt": 1, "name": "own", "attach": [{"method": "own", "at": at}], "methods": {"own": method}}


def listed(*attach: Content) -> Content:
    return {"pelt": 1, "name": "listed", "attach": list(attach)}


STATIC = {"mode": "static"}
IA3 = {"method": "ia3", "at": DOWN, "position": "input"}
EQUAL: dict[str, tuple[tuple[str, ...], Content]] = {
    "keys-behind": (
        ("bert", "llama", "t5"),
        own("attention", PAIR, keys="concat(k, K, axis=-2)", values="concat(v, V, axis=-2)"),
    ),
    "keys-on-both-sides": (
        ("bert", "llama", "t5"),
        own("attention", PAIR, keys="concat(K, k, K, axis=-2)", values="concat(V, v, V, axis=-2)"),
    ),
    "mask-of-what-cross-attention-reads": (
        ("t5",),
        listed({"method": "lora", "at": ["cross_attention.key", "cross_attention.value"], "r": 2,
                "gate": {"mask_padding": True}}),
    ),
    "mask-that-is-not-given": (
        ("t5",), own(parameters={"A": ["out", "in"]}, delta="linear(x, A) * unsqueeze(mask, -1)")),
    "mixture-after-scaled-input": (("bert",), listed(IA3, {"method": "mole", "at": DOWN, "r": 2, "after": "ia3"})),
    "gate-after-scaled-input": (
        ("llama",), listed(IA3, {"method": "lora", "at": DOWN, "r": 2, "gate": True, "after": "ia3"})),
    "static-after-scaled-input": (
        ("t5",), listed(IA3, {"method": "lora", "at": DOWN, "r": 2, "mode": "static", "after": "ia3"})),
    "two-prefixes": (
        ("bert", "llama", "t5"),
        listed({"method": "prefix", "at": "attention", "length": 3, "hidden": 8},
               {"method": "prefix", "name": "second", "at": "attention", "length": 2, "hidden": 8, "after": "prefix"}),
    ),
    "output-is-the-input": (("bert",), own(output="x")),
    "output-is-the-input-scaled": (("bert",), own(parameters={"s": ["in"]}, output="x * s")),
    "one-feature-added-to-all": (("bert",), own(parameters={"w": [1, "in"]}, delta="linear(x, w)")),
    "one-feature-for-all": (("bert",), own(parameters={"w": [1, "in"]}, output="linear(x, w)")),
    "one-feature-and-a-bias": (
        ("bert",), own("block", {"w": [1, "d"], "c": ["d"]}, at="feed_forward.block", output="linear(h, w) + c")),
    "a-constant-input": (("bert",), own(parameters={"s": ["in"]}, input="s")),
    "one-input-for-all": (("bert",), own(parameters={"w": [1, "in"]}, input="linear(x, w)")),
    "one-row-for-all": (("bert",), own(parameters={"s": [1, "in"]}, weight="s")),
    "other-formulas-by-layer": (
        ("bert",),
        own(parameters={"A": ["out", "in"]}, delta="linear(x, A) if layer == 0 else relu(linear(x, A))"),
    ),
    "W-in-delta": (("bert",), own(parameters={"s": ["out"]}, delta="linear(x, W) * s")),
    "b-in-output": (("bert",), own(parameters={"s": ["out"]}, output="(y - b) * s")),
    "W-in-bias": (("bert",), own(parameters={"s": ["in"]}, bias="b + linear(s, W)")),
    "b-in-weight": (("bert",), own(parameters={"s": ["out"]}, weight="W * unsqueeze(s * b, -1)")),
    "b-in-a-norm-without-one": (("llama",), own("norm", {"p": ["d"]}, weight="W + b + p")),
    "v-in-keys": (("bert",), own("attention", {"s": ["head_dim"]}, keys="k + v * s")),
    "q-in-values": (("bert", "llama", "t5"), own("attention", values="v + mean(mean(q, axis=2), axis=1)")),
    **{f"a-parameter-called-{name}": (("bert",), own(parameters={name: ["out"]}, delta=f"y * {name}"))
       for name in "vkqr"},
    "stacked-behind-stacked": (
        ("bert",),
        own(parameters={"a": ["in", "in"], "c": [4, "in"]}, at="feed_forward.up",
            input="attend(linear(linear(x, a), c), linear(x, c), linear(x, a), mask)"),
    ),
    "layer-and-its-last-norm": (
        ("bert",),
        {**(layer := own("block", {"p": ["d"]}, at="layer", output="layer_norm(y) * p")),
         "attach": [*layer["attach"], {"method": "norm_tuning", "at": "feed_forward.norm"}]},
    ),
    "a-folded-bias-that-reads-a-weight-which-stays": (
        ("bert", "llama", "t5"),
        {"pelt": 1, "name": "reads", "attach": [{"method": "reading", "at": DOWN, "mode": "fold"},
                                                {"method": "changing", "at": DOWN, "after": "reading", **STATIC}],
         "methods": {"reading": own(parameters={"s": ["in"]}, bias="b + linear(s, W)")["methods"]["own"],
                     "changing": own(parameters={"p": ["out", "in"]}, weight="W + p")["methods"]["own"]}},
    ),
    "a-norm-that-is-changed-and-called-by-a-block": (
        ("bert", "llama", "t5"),
        {"pelt": 1, "name": "called", "attach": [{"method": "calling", "at": "attention.block"},
                                                 {"method": "changing", "at": "attention.norm"}],
         "methods": {"calling": own("block", {"p": ["d", "d"]}, output="linear(norm(y), p)")["methods"]["own"],
                     "changing": own("norm", {"s": ["d"]}, delta="x * s")["methods"]["own"]}},
    ),
    "a-bias-that-is-put-in-place-of-a-folded-one": (
        ("t5",),
        {**(put := own(parameters={"p": ["out"]}, at="attention.value", bias="p / 2")),
         "attach": [{"method": "bitfit", "at": "attention.value", "mode": "fold"},
                    {**put["attach"][0], "mode": "static", "after": "bitfit"}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "family"), [(case, family) for case, (families, _) in EQUAL.items() for family in families]
)
def test_means_what_it_says(case: str, family: str, shared: Path) -> None:
    what, _, _ = disagreements(EQUAL[case][1], family, shared / "models")
    assert what == "equal"


REFUSED = {
    "keys-without-values": (own("attention", PAIR, keys="concat(K, k, axis=-2)"), "keys and T values"),
    "keys-and-values-on-other-sides": (
        own("attention", PAIR, keys="concat(K, k, axis=-2)", values="concat(v, V, axis=-2)"), "stand before"),
    "the-text's-keys-are-gone": (
        own("attention", PAIR, keys="unsqueeze(K, 0)", values="unsqueeze(V, 0)"), "E310"),
    "another-text": (own(parameters={"p": ["out"]}, delta="mean(y, axis=0) * p"), "texts of a batch read each other"),
    "a-gate-of-the-input-that-reads-the-output": (listed({**IA3, "gate": {"reads": "y"}}), "'y' is what the map makes"),
    "a-weight-of-the-input": (own(parameters={"p": ["out", "in"]}, weight="W + p * mean(mean(x, axis=1))"), "E310"),
    "a-residual-of-a-layer": (own("block", at="layer", delta="r"), "which encoder.layers.0 does not have"),
    "a-norm-of-a-parameter": (own("block", {"p": ["d"]}, delta="norm(p)"), "norm needs"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_before_anything_is_exported(case: str, shared: Path) -> None:
    content, words = REFUSED[case]
    base, _, _ = opened("bert", shared / "models")
    with pytest.raises(PeltError, match=words):
        spec = load_spec(content)
        check_formulas(spec)
        make_plan(spec, base.anatomy, base.fingerprint)


@pytest.mark.parametrize(
    ("layers", "ranks"),
    [([1, 0], {0: 8, 1: 4}), ([0, 1], {0: 4, 1: 8}), ("all", {0: 4, 1: 8}), ([1, "0-1"], {0: 8, 1: 4})],
    ids=str,
)
def test_lists_follow_the_layers_as_written(layers: Any, ranks: dict[int, int], shared: Path) -> None:
    base, _, _ = opened("bert", shared / "models")
    entry = {"method": "lora", "at": "attention.query", "layers": layers, "r": [4, 8]}
    plan = make_plan(load_spec(listed(entry)), base.anatomy, base.fingerprint)
    assert {claim.site.layer: claim.options["r"] for claim in plan.claims} == ranks


def test_lists_follow_the_stacks_of_the_model(shared: Path) -> None:
    base, _, _ = opened("t5", shared / "models")
    entry = {"method": "lora", "at": "attention.query", "r": [1, 2, 3, 4]}
    plan = make_plan(load_spec(listed(entry)), base.anatomy, base.fingerprint)
    found = [(claim.site.stack, claim.site.layer, claim.options["r"]) for claim in plan.claims]
    assert found == [("encoder", 0, 1), ("encoder", 1, 2), ("decoder", 0, 3), ("decoder", 1, 4)]


@pytest.mark.parametrize(
    "formula",
    ["sum(linear(x, A), axis=1)", "linear(x, A) + take(linear(x, A), 0, axis=1) * 0", "softmax(linear(x, A), axis=1)",
     "einsum('bsd,btd->bsd', linear(x, A), linear(x, A))", "mean_seq(linear(x, A))"],
)  # fmt: skip
def test_a_formula_over_the_sequence_is_not_generated_with(formula: str, tmp_path: Path, model_folder: Any) -> None:
    content = own(parameters={"A": ["out", "in"]}, delta=formula)
    with pytest.raises(PeltError, match=r"E208.*whole sequence|E310"):
        peltc.compile(load_spec(content), model_folder("llama"), tmp_path / "out", generation=True)


@pytest.mark.parametrize(
    "effects",
    [{"keys": "concat(K, k * s, axis=-2)", "values": "concat(V, v, axis=-2)"}, {"values": "v * s"},
     {"keys": "concat(k, K, axis=-2)", "values": "concat(v, V, axis=-2)"}],
    ids=["scaled-behind-a-prefix", "scaled", "behind"],
)  # fmt: skip
def test_a_cache_of_what_is_more_than_joined(effects: dict[str, str], tmp_path: Path, shared: Path) -> None:
    """Tokens that are generated one by one, with a cache, against the naive interpreter on the whole text."""
    used = {name: shape for name, shape in {**PAIR, "s": ["head_dim"]}.items() if name in "".join(effects.values())}
    spec = load_spec(own("attention", used, **effects))
    base, model, _ = opened("llama", shared / "models")
    plan = make_plan(spec, base.anatomy, base.fingerprint)
    random = np.random.default_rng(0)
    values = {name: random.normal(0, 0.3, t.shape).astype(np.float32) for name, t in plan.tensors.items()}
    peltc.compile(spec, base.folder, tmp_path / "out", values, generation=True, verify=False)
    text = random.integers(2, 90, (1, 6))
    found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"]).generate(
        input_ids=text, max_new_tokens=8, min_new_tokens=8, do_sample=False)  # fmt: skip
    for _ in range(8):
        logits = meaning(model, "llama", plan, values, {"input_ids": text, "attention_mask": np.ones_like(text)})
        text = np.concatenate([text, logits[:, -1].argmax(-1)[:, None]], 1)
    assert np.array_equal(np.asarray(found), text)


QKV = ["attention.query", "attention.key", "attention.value"]


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize(
    ("model", "attach"),
    [
        *((m, [{"method": "ia3", "at": QKV[0], "position": "input", "mode": "static"},
               {"method": "bitfit", "at": QKV, "after": "ia3"}]) for m in ("falcon", "phi3")),
        ("albert", [{"method": "dora", "at": QKV[0], "r": 2}]),
        ("albert", [{"method": "oft", "at": QKV[2], "block": 8}]),
        ("albert", [{"method": "bitfit", "at": ["attention.*", "feed_forward.*"]}]),
        ("albert", [{"method": "norm_tuning", "at": "*norm"}]),
    ],
    ids=["falcon-bias", "phi3-bias", "albert-dora", "albert-oft", "albert-bitfit", "albert-norm"],
)  # fmt: skip
def test_graphs_of_fused_maps_and_shared_layers(model: str, attach: list[Any], mode: str, tmp_path: Path) -> None:
    folder = save(model, dict(FAMILIES)[model], tmp_path / "model")
    spec = load_spec({**listed(*attach), "deploy": {"mode": mode}})
    plan, base = plan_for(spec, folder)
    random = np.random.default_rng(0)
    values = {name: random.normal(0, 0.2, t.shape).astype(np.float32) for name, t in plan.tensors.items()}
    manifest = peltc.compile(spec, folder, tmp_path / "out", values)
    assert manifest["verification"]["worst"] <= TOLERANCE["float32"]
    ids = random.integers(5, 90, (2, 7))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    expected = by_hand(load_model(base), plan, values, given)
    found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"])(**given)["logits"]
    assert np.abs(found - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()


def by_hand(model: Any, plan: Plan, values: dict[str, Any], given: dict[str, Any]) -> Any:
    """What a model answers whose own parameters are those that the formulas say, evaluated by Python; and whose fused
    maps, which have no bias, are computed anew by their parts."""
    claims = [claim for claim in plan.claims if not claim.follows]  # what follows is the same parameter
    parts: dict[str, list[Any]] = {}
    for claim, use in zip(claims, naive.uses_of(claims, values), strict=True):
        path = claim.site.parameters["weight"].rpartition(".")[0]
        if claim.site.rows is not None:
            parts.setdefault(path, []).append((claim, use, [i for a, b in claim.site.rows for i in range(a, b)]))
            continue
        own = {role: model.get_parameter(name) for role, name in claim.site.parameters.items()}
        for role in set(own) & set(claim.effects):
            own[role].data = use.value(role, {"W": own["weight"].data, "b": own["bias"].data}).detach()
    for path, made in parts.items():

        def hook(module: Any, args: Any, output: Any, made: list[Any] = made) -> Any:
            x, y = args[0], output.clone()
            for claim, use, rows in made:
                if "input" in claim.effects:
                    y[..., rows] = use.value("input", {"x": x}) @ module.weight[rows].T
                if "bias" in claim.effects:
                    y[..., rows] += use.value("bias", {"b": torch.zeros(len(rows))})
            return y

        model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        return model(**{name: torch.as_tensor(array) for name, array in given.items()}).logits.numpy()


def test_heads_that_cannot_be_told_apart(tmp_path: Path) -> None:
    folder = save("bloom", dict(FAMILIES)["bloom"], tmp_path / "model")
    with pytest.raises(PeltError, match="E205 the heads of"):
        plan_for(load_spec(listed({"method": "prefix", "at": "attention", "length": 3})), folder)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_text_that_is_padding_throughout_changes_no_other(family: str, shared: Path, tmp_path: Path) -> None:
    """What is answered for it itself depends on the kernel: PyTorch's own sees all of it, or nothing."""
    content = listed({"method": "prefix", "at": "attention", "length": 3, "hidden": 8})
    base, _, values = attached_with(content, family, shared)
    peltc.compile(load_spec(content), base.folder, tmp_path / "out", values)
    session = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"])
    given = example(base, 3, 7, 2, 1)
    hidden = {**given, "attention_mask": given["attention_mask"] * np.array([[1], [0], [1]])}
    for name, with_it in session(**hidden).items():
        without = session(**given)[name]
        assert np.isfinite(with_it).all()
        for row in (0, 2):
            assert np.abs(with_it[row] - without[row]).max() <= TOLERANCE["float32"] * np.abs(without).max()


# what verification sees by itself, though PyTorch's side is as wrong as the graph's


def attached_with(content: Content, family: str, shared: Path, scale: float = 0.3) -> Any:
    base, _, _ = opened(family, shared / "models")
    plan, _ = plan_for(load_spec(content), base.folder)
    random = np.random.default_rng(0)
    return base, plan, {n: random.normal(0, scale, t.shape).astype(np.float32) for n, t in plan.tensors.items()}


@pytest.mark.parametrize(
    ("family", "law"),
    [("bert", "depends on its padding"), ("llama", "depends on later ones"), ("t5", "depends on later ones")],
)
def test_a_mask_that_is_widened_on_the_wrong_side(
    family: str, law: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, values = attached_with(content := EQUAL["keys-behind"][1], family, shared)
    peltc.compile(load_spec(content), base.folder, tmp_path / "out", values)
    longer = interface.longer
    monkeypatch.setattr(interface, "longer", lambda mask, before, behind, fill: longer(mask, before + behind, 0, fill))
    with pytest.raises(PeltError, match=f"E706 .*{law}"):
        peltc.compile(load_spec(content), base.folder, tmp_path / "out", values)


def test_a_mask_of_another_text(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"method": "lora", "at": "attention.key", "r": 2, "gate": {"mask_padding": True}}
    base, _, values = attached_with(content := listed(entry), "bert", shared)
    peltc.compile(load_spec(content), base.folder, tmp_path / "out", values)
    right = Attached.mask_of
    monkeypatch.setattr(Attached, "mask_of", lambda self, *others: right(self, *others).flip(0))
    with pytest.raises(PeltError, match="E706"):
        peltc.compile(load_spec(content), base.folder, tmp_path / "out", values)


def test_a_cache_that_does_not_hold_what_is_read(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A formula over the sequence, were it not refused: a step reads its own token alone."""
    content = own(parameters={"A": ["out", "in"]}, delta="mean_seq(linear(x, A))")
    base, _, values = attached_with(content, "llama", shared)
    monkeypatch.setattr(Claim, "mixed", "")
    with pytest.raises(PeltError, match=r"E706 .*a token at a time"):
        peltc.compile(load_spec(content), base.folder, tmp_path / "out", values, generation=True)


# rounding


MIXTURES = listed(*({"method": "mole", "name": f"m{i}", "at": ["attention.query", "attention.value", DOWN], "r": 4,
                     **({"after": f"m{i - 1}"} if i else {})} for i in range(3)))  # fmt: skip


def test_rounding_alone_is_no_fault(shared: Path, tmp_path: Path, capsys: Any) -> None:
    """Large values and sharp softmaxes, where PyTorch itself is off by more than the tolerance of two float32."""
    base, _, values = attached_with(MIXTURES, "llama", shared, scale=1.0)
    found = peltc.compile(load_spec(MIXTURES), base.folder, tmp_path / "out", values)["verification"]
    assert found["tolerance"] > TOLERANCE["float32"] and found["worst"] <= found["tolerance"]
    assert {output["output"] for output in found["rounding"]} == {"logits"}
    schema = json.loads((Path(peltc.__file__).parents[1] / "schemas/manifest.schema.json").read_text())
    Draft202012Validator(schema).validate(read_manifest(tmp_path / "out"))
    assert run(["verify", str(tmp_path / "out"), "-q"]) == 0
    assert "PYTORCH" in capsys.readouterr().out


def test_a_fault_is_not_taken_for_rounding(shared: Path, tmp_path: Path) -> None:
    base, plan, values = attached_with(MIXTURES, "llama", shared, scale=1.0)
    name = next(name for name in values if name.endswith(".B"))
    build(plan, base, {**values, name: np.float32(1.001) * values[name]}, tmp_path)
    save_adapter(tmp_path, plan, values)
    with pytest.raises(PeltError, match=r"E701 (.|\n)*twice what PyTorch itself is off"):
        verify_folder(tmp_path, plan, base, values)


def test_in_float64_nothing_is_rounded_to_float32(shared: Path) -> None:
    """The reference is good to more digits than it is asked for: two that differ by a last place agree to 1e-12."""
    base, plan, values = attached_with(MIXTURES, "llama", shared)
    model = verify.attached(load_model(base), plan, values).double()
    inputs = {name: torch.from_numpy(array) for name, array in example(base, 2, 9, 3, 1).items()}
    with torch.no_grad(), exact.double():
        one = model(**inputs).logits
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-14)
        other = model(**inputs).logits
    assert one.dtype == torch.float64
    assert 0 < (one - other).abs().max() < 1e-10 * one.abs().max()
