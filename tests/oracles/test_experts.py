"""Methods on experts: the artifact computes what PyTorch does with stacked weights that were changed by hand, by each
method's closed form for one expert after the other; gradients are those of Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import peltc
from peltc.compiler.base.opening import open_base
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError

Array = np.ndarray[Any, Any]
Folder = Callable[..., Path]
Form = Callable[[Mapping[str, Array], Array, Array], tuple[Array, Array]]
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
EVERY = "feed_forward.experts.*"
EFFECT = 1e-3
"""How much of the largest logit a method must change, at least, for the comparison to mean anything."""
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def sites(base: Path) -> Anatomy:
    return open_base(base).anatomy


def lora(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    return W + 3 / 2 * p["B"] @ p["A"], b


def dora(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    V = lora(p, W, b)[0]
    return p["m"] * V / np.linalg.norm(V, axis=1, keepdims=True), b


def loha(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    return W + 4 * (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"]), b


def vera(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    A, B = p["A"][:, : W.shape[1]], p["B"][: W.shape[0]]
    return W + p["b_scale"][:, None] * (B @ (p["d"][:, None] * A)), b


def sparse(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    W = W.copy()
    W[tuple(p["places"].astype(int).T)] += p["changes"]
    return W, b


def rows(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    return p["l"][:, None] * W, p["l"] * b


def columns(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    return W * p["l"], b


def adapter(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    again = np.eye(len(W)) + p["up"] @ p["down"]
    return again @ W, again @ b + p["up"] @ p["down_bias"] + p["up_bias"]


def whole(p: Mapping[str, Array], W: Array, b: Array) -> tuple[Array, Array]:
    return p["weight"], p.get("bias", b)


FORMS: dict[str, tuple[dict[str, Any], Form]] = {
    "lora": ({"method": "lora", "r": 2, "alpha": 3}, lora),
    "dora": ({"method": "dora", "r": 2, "alpha": 3}, dora),
    "loha": ({"method": "loha", "r": 2, "alpha": 8}, loha),
    "vera": ({"method": "vera", "r": 3}, vera),
    "shira": ({"method": "shira", "r": 1}, sparse),
    "ia3, output": ({"method": "ia3"}, rows),
    "ia3, input": ({"method": "ia3", "position": "input"}, columns),
    "replace": ({"method": "replace"}, whole),
}
BIASED: dict[str, tuple[dict[str, Any], Form]] = {
    "bitfit": ({"method": "bitfit"}, lambda p, W, b: (W, b + p["change"])),
    "linear_adapter": ({"method": "linear_adapter", "size": 4}, adapter),
}
"""Methods that give a map a bias, which experts must have."""
CASES = [(n, "gpt_oss") for n in FORMS | BIASED] + [(n, f) for n in ("lora", "dora") for f in FAMILIES[:2]]


def random_tensors(spec: Any, base: Path) -> dict[str, Array]:
    plan = make_plan(spec, sites(base), "")
    draw = np.random.default_rng(0)
    tensors = {name: draw.normal(0, 0.3, t.shape).astype(np.float32) for name, t in plan.tensors.items()}
    for claim in plan.claims:
        if (places := claim.tensors.get("places")) is not None:
            rows, columns = claim.site.sizes["out"], claim.site.sizes["in"]
            flat = [draw.choice(rows * columns, places.inner[0], replace=False) for _ in range(places.experts)]
            tensors[places.name] = np.stack(np.divmod(flat, columns), -1).astype(np.float32)
    return tensors


def changed(model: Any, anatomy: Anatomy, form: Form, tensors: Mapping[str, Array]) -> None:
    """Change a torch model's stacked weights by hand, in float64."""
    parameters = dict(model.named_parameters())
    for site in anatomy:
        if site.kind == "experts":
            for number in range(site.sizes["experts"]):
                change_one(parameters, site, number, form, tensors)


def change_one(
    parameters: Mapping[str, Any], site: Site, number: int, form: Form, tensors: Mapping[str, Array]
) -> None:
    own = {}
    for name, array in tensors.items():
        where, _, parameter = name.rpartition(".")
        if where.endswith(site.path):
            own[parameter] = array[number].astype(np.float64)
        elif "layers" not in where:  # shared by all sites, and so by all experts
            own[parameter] = array.astype(np.float64)
    weight = parameters[site.parameters["weight"]].data[number]
    weight = weight.T if site.transposed else weight  # a view
    bias = parameters[site.parameters["bias"]].data[number] if "bias" in site.parameters else None
    index = [i for a, b in site.rows or ((0, len(weight)),) for i in range(a, b)]
    W = weight[index].double().numpy()
    b = np.zeros(len(W)) if bias is None else bias[index].double().numpy()
    new_W, new_b = form(own, W, b)
    weight[index] = torch.from_numpy(new_W).float()
    if bias is not None:
        bias[index] = torch.from_numpy(new_b).float()


def logits(model: Any, ids: Array) -> Array:
    with torch.no_grad():
        found: Array = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    return found


def loaded(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize(("name", "family"), CASES)
def test_each_expert_is_changed_as_the_closed_form_says(
    name: str, family: str, model_folder: Folder, tmp_path: Path
) -> None:
    """Attached in torch, folded, and beside each expert's product."""
    base = model_folder(family)
    attach, form = (FORMS | BIASED)[name]
    spec = peltc.load_spec({"pelt": 1, "name": "x", "attach": [{**attach, "at": EVERY}]})
    tensors = random_tensors(spec, base)
    ids = np.random.default_rng(1).integers(3, 90, (2, 9))
    model = loaded(base)
    bare = logits(model, ids)
    changed(model, sites(base), form, tensors)
    expected = logits(model, ids)
    most = np.abs(expected).max()
    assert np.abs(expected - bare).max() > EFFECT * most
    live = peltc.attach(loaded(base), spec, tensors).eval()
    assert np.abs(logits(live, ids) - expected).max() < TOLERANCE["float32"] * most
    for mode in ("fold", "static"):
        peltc.compile(spec, base, tmp_path / mode, tensors, mode=mode)
        found = peltc.Session(tmp_path / mode, ["CPUExecutionProvider"])(input_ids=ids)["logits"]
        assert np.abs(found - expected).max() < TOLERANCE["float32"] * most


def test_experts_that_were_swapped_are_seen(model_folder: Folder) -> None:
    """The witness: tensors of one expert at another, which the comparison above must tell."""
    base = model_folder("mixtral")
    spec = peltc.load_spec({"pelt": 1, "name": "x", "attach": [{**FORMS["lora"][0], "at": EVERY}]})
    tensors = random_tensors(spec, base)
    ids = np.arange(3, 21).reshape(2, 9)
    model = loaded(base)
    changed(model, sites(base), lora, tensors)
    expected = logits(model, ids)
    wrong = peltc.attach(loaded(base), spec, {n: np.ascontiguousarray(t[::-1]) for n, t in tensors.items()}).eval()
    assert np.abs(logits(wrong, ids) - expected).max() > 100 * TOLERANCE["float32"] * np.abs(expected).max()


@pytest.mark.parametrize("name", ["lora", "dora", "replace", "vera", "ia3, input"])
def test_start_values_leave_the_base_as_it_is(name: str, model_folder: Folder) -> None:
    """Each expert's are of its own weight, and random ones are its own."""
    base = model_folder("gpt_oss")
    spec = peltc.load_spec({"pelt": 1, "name": "x", "attach": [{**FORMS[name][0], "at": EVERY}]})
    ids = np.arange(3, 21).reshape(2, 9)
    live = peltc.attach(loaded(base), spec).eval()
    bare = logits(loaded(base), ids)
    assert np.abs(logits(live, ids) - bare).max() < TOLERANCE["float32"] * np.abs(bare).max()
    for parameter_name, stack in live.named_parameters():
        if parameter_name.startswith("pelt.") and parameter_name.endswith("/A") and name != "vera":
            assert not torch.equal(stack[0], stack[1])


def test_profiles_bring_experts_modules(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("mixtral")
    spec = peltc.load_spec({"pelt": 1, "name": "x", "attach": [{**FORMS["lora"][0], "at": EVERY}]})
    manifest = peltc.compile(spec, base, tmp_path / "out", random_tensors(spec, base), mode="swappable")
    assert manifest["verification"]["worst"] < TOLERANCE["float32"]
    assert len(manifest["profiles"]["inputs"]) >= 2 * 4 * 2  # at least two for each expert of each layer


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_are_pefts(family: str, implementation: str, model_folder: Folder) -> None:
    """In whichever way the model computes its experts."""
    base = model_folder(family)
    ids = torch.arange(3, 21).reshape(2, 9)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(target_modules=[], target_parameters=parameters, r=2, lora_alpha=3, task_type="CAUSAL_LM")
    theirs: Any = peft.get_peft_model(loaded(base), config).train()
    spec = peltc.load_spec({"pelt": 1, "name": "x", "attach": [{**FORMS["lora"][0], "at": EVERY}]})
    ours = peltc.attach(loaded(base), spec).train()
    for model in (theirs.base_model.model, ours):
        model.set_experts_implementation(implementation)
    generator = torch.Generator().manual_seed(0)
    layer = theirs.base_model.model.model.layers[0].mlp.experts  # of the two wrappers, the one of `down_proj`
    site = "pelt.lora/decoder/layers/0/feed_forward/experts/down/"
    with torch.no_grad():
        A, B = (torch.randn(p.shape, generator=generator) * 0.2 for p in (
            layer.lora_A.default.weight, layer.lora_B.default.weight))  # fmt: skip
        layer.lora_A.default.weight.copy_(A)
        layer.lora_B.default.weight.copy_(B)
        own = dict(ours.named_parameters())
        own[f"{site}A"].copy_(A.reshape(4, 2, -1))
        own[f"{site}B"].copy_(B.reshape(len(B), 2, 4).permute(2, 0, 1))
    losses = [model(input_ids=ids, labels=ids).loss for model in (theirs, ours)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0].item() - losses[1].item()) < 1e-5
    wanted = layer.lora_A.default.weight.grad.reshape(4, 2, -1)
    found = own[f"{site}A"].grad
    assert wanted.abs().max() > 0 and (found - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-9
    wanted = layer.lora_B.default.weight.grad.reshape(len(B), 2, 4).permute(2, 0, 1)
    assert (own[f"{site}B"].grad - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-9
    assert not any(p.requires_grad for name, p in ours.named_parameters() if not name.startswith("pelt."))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_taken_off(family: str, model_folder: Folder) -> None:
    base = model_folder(family)
    spec = peltc.load_spec({"pelt": 1, "name": "x", "attach": [{**FORMS["lora"][0], "at": EVERY}]})
    tensors = random_tensors(spec, base)
    ids = np.arange(3, 21).reshape(2, 9)
    bare = logits(loaded(base), ids)
    live = peltc.attach(loaded(base), spec, tensors).eval()
    expected = logits(live, ids)
    with live.disable_adapter():
        assert np.array_equal(logits(live, ids), bare)
    live.merge_adapter()
    assert not hasattr(live, "pelt")
    assert np.abs(logits(live, ids) - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()
    assert np.abs(expected - bare).max() > EFFECT * np.abs(bare).max()


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generation(family: str, mode: str, model_folder: Folder, tmp_path: Path) -> None:
    """The graphs with a cache have the experts of the graph without one."""
    base = model_folder(family)
    content = {"pelt": 1, "name": "x", "attach": [{**FORMS["lora"][0], "at": EVERY}], "deploy": {"generation": True}}
    spec = peltc.load_spec(content)
    tensors = random_tensors(spec, base)
    peltc.compile(spec, base, tmp_path / "out", tensors, mode=mode)
    ids = [[5, 6, 7, 8]]
    found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"]).generate(ids, max_new_tokens=6)
    live = peltc.attach(loaded(base), spec, tensors).eval()
    expected = live.generate(torch.tensor(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert np.array_equal(np.asarray(found)[:, : expected.shape[1]], expected.numpy())


def test_sites_of_experts(model_folder: Folder) -> None:
    """The sides of a gated network are told by the dataflow: one after the other, or interleaved."""
    roles = ("gate", "up", "down")
    for family, rows in (("mixtral", ((0, 64),)), ("gpt_oss", tuple((i, i + 1) for i in range(0, 64, 2)))):
        found = {site.role: site for site in sites(model_folder(family)) if site.layer == 0 and site.kind == "experts"}
        assert list(found) == [f"feed_forward.experts.{role}" for role in roles]
        gate, up, down = found.values()
        assert gate.rows == rows and gate.parameters == up.parameters
        wide = 64 if family == "mixtral" else 32
        assert {i for s in (gate, up) for a, b in s.rows or () for i in range(a, b)} == set(range(2 * wide))
        assert gate.sizes == {"experts": 4, "in": 32, "out": wide}
        assert down.sizes["out"] == 32 and down.rows is None
        assert ("bias" in down.parameters) == (family == "gpt_oss") == down.transposed


REFUSED = {
    "what is not affine": ({"method": "mole"}, r"E205 'mole' cannot change .*'softmax' of the site's input"),
    "a gate": ({"method": "lora", "gate": True}, r"E205 'lora' cannot change .*'sigmoid' of the site's input"),
    "dropout": ({"method": "lora", "dropout": 0.1}, r"E205 'lora' cannot change .*'dropout' of the input"),
    "a bias": ({"method": "bitfit"}, "E205 'bitfit' cannot change .*it needs a bias, and there is none"),
    "a constant": ({"method": "linear_adapter"}, "E205 'linear_adapter' cannot change .*it needs a bias"),
    "a profile for each row": ({"method": "lora", "mode": "bank"}, "E208 .*cannot have a profile for each row"),
    "another kind": ({"method": "bottleneck"}, "E203 .*experts.*is a site of kind experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_cannot_have_is_refused(case: str, model_folder: Folder) -> None:
    attach, words = REFUSED[case]
    spec = peltc.load_spec({"pelt": 1, "name": "x", "attach": [{**attach, "at": EVERY}]})
    with pytest.raises(PeltError, match=words):
        make_plan(spec, sites(model_folder("mixtral")), "")


def test_experts_are_meant_by_their_name_only(model_folder: Folder) -> None:
    """A pattern that named the maps of a feed-forward network before means the same ones now."""
    spec = peltc.load_spec({"pelt": 1, "name": "x", "attach": [{"method": "lora", "at": "feed_forward.*"}]})
    plan = make_plan(spec, sites(model_folder("mixtral")), "")
    assert {claim.site.role for claim in plan.claims} == {"feed_forward.router"}
