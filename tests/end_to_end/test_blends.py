"""Several profiles for one text, each with a weight: what the modules of each compute is added up by the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from profiled import ATTACHED, CPU, LORA, Array, Folder, drawn, given, spec_of

import peltc
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

WEIGHTS = {"one": 0.7, "other": -0.4}
SHARES = {"one": 0.7, "other": 0.3}
NAMES = ("one", "other")
KEYS = [{"method": "prefix", "at": "attention", "length": 3, "reparameterise": False}]


def blending(attach: list[dict[str, Any]], **deploy: Any) -> Any:
    return load_spec(
        {"pelt": 1, "name": "first", "attach": attach, "deploy": {"mode": "bank", "blend": True, **deploy}}
    )


def session_of(attach: list[dict[str, Any]], base: Path, out: Path, **deploy: Any) -> tuple[Any, dict[str, Any]]:
    """An artifact that blends, verified with its first profile, and the profiles that were added."""
    spec = blending(attach, **deploy)
    own = {name: drawn(spec, base, seed) for seed, name in enumerate(NAMES)}
    peltc.compile(spec, base, out, own["one"])
    session = peltc.Session(out, CPU)
    for name, tensors in own.items():
        session.add_profile(name, peltc.link(out, tensors))
    return session, own


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("bert", list(ATTACHED)),
        ("gpt2", ["weights", "keys", "norms"]),
        ("llama", ["blocks", "gates"]),
        ("t5", ["keys"]),
    ],
)
def test_one_profile_is_as_without_blending(
    family: str, kinds: list[str], model_folder: Folder, tmp_path: Path
) -> None:
    """By its name or with the weight 1, beside texts with two; and every text of a mixed batch is as if it were
    alone."""
    base = model_folder(family)
    for kind in kinds:
        session, own = session_of(ATTACHED[kind], base, tmp_path / kind)
        peltc.compile(spec_of(ATTACHED[kind]), base, tmp_path / "plain", own["one"], mode="bank", verify=False)
        plain = peltc.Session(tmp_path / "plain", CPU)
        for name, tensors in own.items():
            plain.add_profile(name, peltc.link(tmp_path / "plain", tensors))
        ask: Callable[..., Array] = partial(lambda s, p: s(profile=p, **given(family))["logits"], session)
        expected = plain(profile=["one", "other"], **given(family))["logits"]
        scale = np.abs(expected).max()
        assert np.abs(ask(["one", {"other": 1}]) - expected).max() <= 1e-6 * scale, kind
        both = ask(SHARES)
        assert np.abs(both - expected)[0].max() > 1e-4 * scale, kind
        assert np.abs(ask([SHARES, "other"]) - np.stack([both[0], expected[1]])).max() <= 1e-6 * scale, kind
        if not session.manifest["profiles"]["no_bare_base"]:
            bare = plain(**given(family))["logits"]
            assert np.abs(ask([None, {}]) - bare).max() <= 1e-6 * scale, kind


def concatenated(own: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """LoRA of twice the rank, whose change is the weighted sum; the scale is taken for alpha / r of the rank 4."""
    found = {}
    for name in own["one"]:
        parts = [own[n][name] * (WEIGHTS[n] if name.endswith(".B") else 1) for n in NAMES]
        found[name] = np.concatenate(parts, axis=1 if name.endswith(".B") else 0)
    return found


def averaged(own: Mapping[str, Mapping[str, Array]], weights: Mapping[str, float], rest: float) -> dict[str, Array]:
    return {name: sum(weights[n] * own[n][name] for n in NAMES) + rest for name in own["one"]}  # type: ignore[misc]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_what_is_linear_is_one_module_of_the_weighted_sum(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """LoRA's changes are added up, as LoRA of both ranks does it in an artifact of its own; (IA)³'s factors and a
    prefix's keys and values are averaged. What is left of 1 is the base's."""
    base = model_folder(family)
    double = [{**LORA[0], "r": 8, "alpha": 2 * (LORA[0].get("alpha") or 4)}]
    for kind, attach, alone, weights, combine in (
        ("lora", [{**LORA[0], "alpha": 4}], double, WEIGHTS, concatenated),
        ("ia3", ATTACHED["outputs"], ATTACHED["outputs"], WEIGHTS, lambda own: averaged(own, WEIGHTS, 1 - 0.3)),
        ("prefix", KEYS, KEYS, SHARES, lambda own: averaged(own, SHARES, 0)),
    ):  # fmt: skip
        session, own = session_of(attach, base, tmp_path / kind)
        peltc.compile(spec_of(alone), base, tmp_path / f"{kind} alone", combine(own), mode="static", verify=False)
        expected = peltc.Session(tmp_path / f"{kind} alone", CPU)(**given(family))["logits"]
        found = session(profile=weights, **given(family))["logits"]
        assert np.abs(found - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max(), kind


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_changes_are_added_up_in_the_weights(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """LoRA against torch, whose weights gain Σ w · B A by hand; alpha is r, so that the scale is 1."""
    base = model_folder(family)
    session, own = session_of([{**LORA[0], "alpha": 4}], base, tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification if family == "bert" else transformers.AutoModelForCausalLM
    torch_model = model.from_pretrained(base).eval()
    names = {
        "bert": ("encoder", "bert.encoder.layer.{}.attention.self.{}", ("query", "value")),
        "llama": ("decoder", "model.layers.{}.self_attn.{}", ("q_proj", "v_proj")),
    }
    stack, path, maps = names[family]
    with torch.no_grad():
        for i in range(torch_model.config.num_hidden_layers):
            for role, name in zip(("query", "value"), maps, strict=True):
                site = f"lora.{stack}.layers.{i}.attention.{role}"
                weight = torch_model.get_submodule(path.format(i, name)).weight
                for profile, share in WEIGHTS.items():
                    weight += share * torch.tensor(own[profile][f"{site}.B"] @ own[profile][f"{site}.A"])
        expected = torch_model(**{n: torch.tensor(value) for n, value in given(family).items()}).logits.numpy()
    shown = np.array(given(family)["attention_mask"], bool) if expected.ndim == 3 else ...
    found = session(profile=WEIGHTS, **given(family))["logits"]
    assert np.abs(found - expected)[shown].max() <= TOLERANCE["float32"] * np.abs(expected).max()


def test_what_is_not_linear_is_added_up_where_it_acts(model_folder: Folder, tmp_path: Path) -> None:
    """Adapters after each feed-forward network of BERT, against hooks in torch."""
    base = model_folder("bert")
    session, own = session_of(ATTACHED["blocks"], base, tmp_path / "out")
    model = transformers.BertForSequenceClassification.from_pretrained(base).eval()

    def hook(layer: int, module: Any, inputs: Any, y: torch.Tensor) -> torch.Tensor:
        site = f"encoder.layers.{layer}.feed_forward.block"
        change = torch.zeros_like(y)
        for name, weight in WEIGHTS.items():
            down, down_bias, up, up_bias = (torch.tensor(own[name][f"bottleneck.{site}.{part}"])
                                            for part in ("down", "down_bias", "up", "up_bias"))  # fmt: skip
            change += weight * (torch.relu(y @ down.T + down_bias) @ up.T + up_bias)
        return y + change

    for i, layer in enumerate(model.bert.encoder.layer):
        layer.output.dense.register_forward_hook(partial(hook, i))
    with torch.no_grad():
        expected = model(**{name: torch.tensor(value) for name, value in given("bert").items()}).logits.numpy()
    found = session(profile=WEIGHTS, **given("bert"))["logits"]
    assert np.abs(found - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()


def test_generation(model_folder: Folder, tmp_path: Path) -> None:
    """Each text, and all of its beams, with profiles and weights of its own."""
    base = model_folder("llama")
    attach = [{**LORA[0], "alpha": 4}]
    session, own = session_of(attach, base, tmp_path / "out", generation=True)
    double = spec_of([{**LORA[0], "r": 8, "alpha": 8}])
    peltc.compile(double, base, tmp_path / "alone", concatenated(own), generation=True, verify=False)
    alone = peltc.Session(tmp_path / "alone", CPU)
    ids, options = torch.tensor([[5, 6, 7], [8, 4, 9]]), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for beams in (1, 3):
        found = session.generate(ids, profile=["other", WEIGHTS], num_beams=beams, **options)
        assert torch.equal(found[1], alone.generate(ids, num_beams=beams, **options)[1])
        assert torch.equal(found[0], session.generate(ids, profile="other", num_beams=beams, **options)[0])


def test_texts_that_grow_together(model_folder: Folder, tmp_path: Path) -> None:
    """What each of several choices takes, taken together: texts with one profile beside texts with two."""
    session, _ = session_of(LORA, model_folder("llama"), tmp_path / "out")
    ids = {"input_ids": np.array([[5, 6, 7]] * 3), "attention_mask": np.ones((3, 3), np.int64)}
    chosen = ["other", WEIGHTS, None]
    expected = session(profile=chosen, **ids)["logits"]
    with ExitStack() as stack:
        each = [stack.enter_context(session.taken([one], 1)) for one in chosen]
        taken = session.kept.joined(each)(3)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in session.feeds(ids).items()}
        found = session.inference.run_with_ort_values(None, {**values, **taken})[0].numpy()
    assert np.array_equal(found, expected)


def test_of_a_store(model_folder: Folder, tmp_path: Path) -> None:
    session, _ = session_of(LORA, model_folder("bert"), tmp_path / "out")
    expected = session(profile=[WEIGHTS, "one"], **given("bert"))["logits"]
    store = peltc.ProfileStore(tmp_path / "profiles.store", tmp_path / "out")
    for seed, name in enumerate(NAMES):
        store.put(f"acme/{name}", peltc.link(tmp_path / "out", drawn(spec_of(LORA), model_folder("bert"), seed)))
    stored = peltc.Session(tmp_path / "out", CPU, store=store, resident=2)
    named = {f"acme/{name}": weight for name, weight in WEIGHTS.items()}
    assert np.array_equal(stored(profile=[named, "acme/one"], **given("bert"))["logits"], expected)


def test_refused(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("bert")
    for mode in ("swappable", "static"):
        with pytest.raises(PeltError, match=r"E207 .*(\n.*)*expected mode: bank"):
            peltc.compile(blending(LORA, mode=mode), base, tmp_path / "no")
    gated = blending([{**LORA[0], "gate": {}}], generation=True, gates={"at": "prefill"})
    with pytest.raises(PeltError, match=r"E208 what 'lora' makes of a whole text is kept once for each text"):
        peltc.compile(gated, model_folder("llama"), tmp_path / "no")
    for attach, family, more in (
        ([{"method": "prompt", "at": "embedding.word"}], "bert", {}),
        (KEYS, "llama", {"generation": True}),
    ):
        with pytest.raises(PeltError, match=r"E208 what '\w+' puts before a text is there once"):
            peltc.compile(blending(attach, **more), model_folder(family), tmp_path / "no")
    session, _ = session_of(KEYS, base, tmp_path / "keys")
    with pytest.raises(PeltError, match="E811 a text of this artifact may have several profiles"):
        peltc.export_triton(tmp_path / "keys", tmp_path / "repository")
    with pytest.raises(PeltError, match=r"E627 a part of 1 is left, and this artifact has no bare base"):
        session(profile=[{"one": 0.5}, "other"], **given("bert"))
    for wrong in ({"one": float("nan")}, {"one": "1"}, {1: 1.0}, {"one": True}):
        with pytest.raises(PeltError, match="E216 the weight of a profile"):
            session(profile=wrong, **given("bert"))
    with pytest.raises(PeltError, match="E626 there is no profile 'third'"):
        session(profile=[{"one": 0.5, "third": 0.5}, "one"], **given("bert"))
    peltc.compile(spec_of(LORA), base, tmp_path / "plain", mode="bank", verify=False)
    plain = peltc.Session(tmp_path / "plain", CPU)
    with pytest.raises(PeltError, match=r"E216 the profile of a text .*(\n.*)*blend: true"):
        plain(profile=[{"one": 1.0}, None], **given("bert"))
