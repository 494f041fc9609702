"""Torch modules that `transformers` does not have: found, trained, compiled, verified; and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import foreign
import models
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import peltc
from peltc.compiler.files.checkpoint import read_header
from peltc.runtime.commands.cli import run
from peltc.spec.diagnostics import PeltError

TOLERANCE = 1e-5
SPEC: dict[str, Any] = {
    "pelt": 1,
    "attach": [
        {"method": "lora", "at": ["attention.query", "attention.value"], "r": 3, "alpha": 5},
        {"method": "bottleneck", "at": "feed_forward.block", "reduction": 8},
        {"method": "ia3", "at": ["attention.key", "feed_forward.up"]},
    ],
}
LORA: dict[str, Any] = {"pelt": 1, "attach": SPEC["attach"][:1]}
HAND: dict[str, dict[str, tuple[str, int, int]]] = {
    "mosaic": {"query": ("strata.{}.regard.asker.weight", 0, 32), "value": ("strata.{}.regard.giver.weight", 0, 32)},
    "tower": {"query": ("storeys.{}.spin.fused.weight", 0, 32), "value": ("storeys.{}.spin.fused.weight", 48, 64)},
    "braid": {"query": ("strands.{}.slope.ask.kernel", 0, 32), "value": ("strands.{}.slope.give.kernel", 0, 32)},
}
"""Where queries and values come from, read off the modules' code: a parameter of layer {}, and its rows."""
OUTPUTS = {"mosaic": ["tokens", "verdict"], "tower": ["output"], "braid": ["output", "output_1"]}


def fill(module: nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Give attached modules random values; returns them."""
    torch.manual_seed(seed)
    for parameter in module.pelt.parameters():
        nn.init.normal_(parameter, std=0.2)
    tensors: dict[str, np.ndarray] = module.pelt.tensors()
    return tensors


def answer(module: nn.Module, inputs: dict[str, Any]) -> list[np.ndarray]:
    """A module's outputs in their order."""
    with torch.no_grad():
        found = module(**inputs)
    values = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
    return [value.float().numpy() for value in values]


def apart(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The largest difference as a share of the largest value, over all outputs."""
    assert [a.shape for a in one] == [b.shape for b in other]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(one, other, strict=True))


def state(module: nn.Module) -> tuple[Any, ...]:
    """All that compiling must leave as it is."""
    tensors = {n: (id(t), t.detach().clone(), t.requires_grad) for n, t in module.state_dict(keep_vars=True).items()}
    flags = [(n, m.training, sorted(vars(m)), len(m._forward_hooks)) for n, m in module.named_modules()]
    return {n: (i, r) for n, (i, _, r) in tensors.items()}, flags, {n: t for n, (_, t, _) in tensors.items()}


def unchanged(module: nn.Module, before: tuple[Any, ...]) -> None:
    after = state(module)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][name], tensor) for name, tensor in before[2].items())


@cache
def trained(name: str) -> nn.Module:
    """A module with the spec's modules attached, their values random."""
    module = foreign.build(name)
    peltc.attach(module, SPEC, example_inputs=foreign.inputs())
    fill(module)
    return module


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize("name", foreign.MODULES)
def test_artifact_equals_live_module(name: str, mode: str, tmp_path: Path) -> None:
    module = trained(name)
    before = state(module)
    manifest = peltc.compile(SPEC, module, tmp_path / "out", example_inputs=foreign.inputs(), mode=mode)
    unchanged(module, before)
    other = foreign.inputs(3, 7)  # of sizes that neither the example nor the verification has
    session = peltc.Session(tmp_path / "out")
    found = [*session(**other).values()]
    assert apart(found, answer(module, other)) < TOLERANCE
    assert manifest["verification"]["worst"] < TOLERANCE
    # The witness: without the modules the answer is another.
    assert apart(found, answer(foreign.build(name), other)) > 1e-2
    assert session.outputs == OUTPUTS[name]
    assert list(session.inputs) == ["input_ids", "attention_mask"]
    assert manifest["base"]["architecture"] == f"foreign.{type(module).__name__}"
    assert len(manifest["modules"]) == 10
    # The bottlenecks stay, whose non-linearity no weight can hold.
    assert sum(not claim["absorbed"] for claim in manifest["modules"]) == {"fold": 2, "static": 10}[mode]


@pytest.mark.parametrize("name", foreign.MODULES)
def test_right_parameters_change(name: str, tmp_path: Path) -> None:
    """W + (alpha / r) B A, added by hand to the parameters that the modules' code says."""
    module = foreign.build(name)
    plan = peltc.plan(LORA, module, example_inputs=foreign.inputs())
    for claim in plan.claims:
        where, start, stop = HAND[name][claim.site.role.removeprefix("attention.")]
        assert claim.site.path.startswith("decoder" if name == "tower" else "encoder")
        assert claim.site.parameters["weight"] == where.format(claim.site.layer)
        assert claim.site.rows == (((start, stop),) if name == "tower" else None)
        assert claim.site.transposed == (name == "braid")
    random = np.random.default_rng(1)
    tensors = {n: random.normal(0, 0.3, t.shape).astype(np.float32) for n, t in plan.tensors.items()}
    peltc.compile(LORA, module, tmp_path / "out", tensors, example_inputs=foreign.inputs())
    found = [*peltc.Session(tmp_path / "out")(**foreign.inputs()).values()]

    def by_hand(roles: dict[str, str]) -> list[np.ndarray]:
        changed = foreign.build(name)
        parameters = dict(changed.named_parameters())
        for layer in range(2):
            for role, source in roles.items():
                where, start, stop = HAND[name][role]
                a, b = (next(t for n, t in tensors.items() if n.endswith(f"layers.{layer}.attention.{source}.{letter}"))
                        for letter in "AB")  # fmt: skip
                delta = torch.from_numpy(5 / 3 * b @ a)
                weight = parameters[where.format(layer)].data
                (weight.T if name == "braid" else weight)[start:stop] += delta
        return answer(changed, foreign.inputs())

    assert apart(found, by_hand({"query": "query", "value": "value"})) < TOLERANCE
    # The witness: one of the two left out, or each with the other's matrices.
    assert apart(found, by_hand({"query": "query"})) > 1e-3
    if name != "tower":  # where values are narrower than queries
        assert apart(found, by_hand({"query": "value", "value": "query"})) > 1e-3


def test_training_and_detaching() -> None:
    """Attached modules are trained, the rest is not; a module in training mode stays so."""
    module = foreign.build("braid").train()
    before = state(module)
    peltc.attach(module, SPEC, example_inputs=foreign.inputs())
    assert module.training and module.pelt.training
    fill(module)
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    stream, score = module(**foreign.inputs())
    (stream.square().mean() + score.square().mean()).backward()
    optimizer.step()
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, values[name])}
    assert moved == {name for name in values if name.startswith("pelt.")}
    module.detach_adapter()
    for extra in ("pelt", "save_adapter", "detach_adapter"):
        assert not hasattr(module, extra)
    unchanged(module, before)


def test_module_in_training_mode_is_compiled_in_eval_mode(tmp_path: Path) -> None:
    class Dropping(foreign.Mosaic):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            found = super().forward(input_ids, attention_mask)
            return {name: nn.functional.dropout(value, 0.5, self.training) for name, value in found.items()}

    torch.manual_seed(0)
    module = Dropping(layers=1).train()
    before = state(module)
    peltc.compile(LORA, module, tmp_path / "out", example_inputs=foreign.inputs())
    unchanged(module, before)
    found = [*peltc.Session(tmp_path / "out")(**foreign.inputs()).values()]
    assert apart(found, answer(copy.deepcopy(module).eval(), foreign.inputs())) < TOLERANCE
    assert apart(found, answer(module, foreign.inputs())) > 0.1  # the witness: dropout is on in the live module


def test_tied_parameters_are_stored_once_and_told_apart(tmp_path: Path) -> None:
    module = foreign.build("tower", layers=1)
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "head", "r": 2}]}
    plan = peltc.plan(spec, module, example_inputs=foreign.inputs())
    random = np.random.default_rng(0)
    tensors = {n: random.normal(0, 0.3, t.shape).astype(np.float32) for n, t in plan.tensors.items()}
    manifest = peltc.compile(spec, module, tmp_path / "out", tensors, example_inputs=foreign.inputs())
    assert manifest["verification"]["worst"] < TOLERANCE
    stored = read_header(tmp_path / "out" / "model.safetensors")
    assert "words.weight" in stored and "voice.weight" not in stored
    size = sum(p.nbytes for p in module.parameters())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < size + 2000
    # By hand: the head alone changes, not the table.
    changed = foreign.build("tower", layers=1)
    a, b = (next(t for n, t in tensors.items() if n.endswith(letter)) for letter in ("A", "B"))
    table = changed.words.weight.detach()
    changed.voice.weight = nn.Parameter(table + torch.from_numpy(16 / 2 * b @ a))
    found = [*peltc.Session(tmp_path / "out")(**foreign.inputs()).values()]
    assert apart(found, answer(changed, foreign.inputs())) < TOLERANCE
    changed.words.weight = changed.voice.weight
    assert apart(found, answer(changed, foreign.inputs())) > 1e-2


@pytest.mark.parametrize(("dtype", "computed"), [("bfloat16", "float32"), ("float16", "float16")])
def test_half_precision(dtype: str, computed: str, tmp_path: Path) -> None:
    module = foreign.build("mosaic", layers=1).to(getattr(torch, dtype))
    before = state(module)
    manifest = peltc.compile(LORA, module, tmp_path / "out", example_inputs=foreign.inputs())
    unchanged(module, before)
    assert (manifest["base"]["stored"], manifest["base"]["precision"]) == (dtype, computed)
    assert manifest["verification"]["worst"] < TOLERANCE
    assert (manifest["verification"]["arithmetic"] or {}).get("status") == ("proven" if dtype == computed else None)
    size = sum(p.nbytes for p in module.parameters())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < size + 4000


def test_equal_layers_are_exported_once(tmp_path: Path) -> None:
    module = foreign.build("mosaic", layers=7)
    told: list[str] = []
    manifest = peltc.compile(LORA, module, tmp_path / "out", example_inputs=foreign.inputs(), talk=told.append)
    assert any("of strata are equal: 3 of 7 exported" in line for line in told), told
    assert manifest["verification"]["worst"] < TOLERANCE
    assert len(manifest["modules"]) == 14


def test_verified_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = foreign.build("mosaic", layers=1)
    first = peltc.compile(LORA, module, tmp_path / "out", example_inputs=foreign.inputs())
    again = peltc.verify(tmp_path / "out", foreign.build("mosaic", layers=1))
    assert again["verification"]["worst"] == first["verification"]["worst"]
    with pytest.raises(PeltError, match=r"E610.*foreign\.Mosaic") as caught:
        peltc.verify(tmp_path / "out")
    assert "peltc.verify(out, module)" in str(caught.value)
    assert run(["verify", str(tmp_path / "out")]) == 1
    assert "E610" in capsys.readouterr().err
    # Other weights, and the same weights with other code.
    other = foreign.build("mosaic", layers=1)
    other.judge.bias.data += 1
    with pytest.raises(PeltError, match="E608"):
        peltc.verify(tmp_path / "out", other)

    class Mosaic(foreign.Mosaic):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {n: 2 * v for n, v in super().forward(input_ids, attention_mask).items()}

    Mosaic.__module__, Mosaic.__qualname__ = "foreign", "Mosaic"
    changed = Mosaic(layers=1).eval()
    changed.load_state_dict(module.state_dict())
    with pytest.raises(PeltError, match="E608"):
        peltc.verify(tmp_path / "out", changed)


def test_verification_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peltc.runtime.verification import verify

    whole = verify.load_model

    def wrong(base: Any) -> Any:
        module = whole(base)
        module.judge.bias = nn.Parameter(module.judge.bias + 1e-2)
        return module

    monkeypatch.setattr(verify, "load_model", wrong)
    monkeypatch.setattr(verify, "base_error", lambda *_: 0.0)
    with pytest.raises(PeltError, match=r"E701.*'verdict'"):
        peltc.compile(LORA, foreign.build("mosaic", layers=1), tmp_path / "out", example_inputs=foreign.inputs())
    assert not (tmp_path / "out").exists()


# modules of other kinds


class Mixed(nn.Module):
    """Reads floats, a mask of booleans, another length and a number per sample; answers with a nest, one of its inputs,
    and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.frame, self.note = nn.Embedding(20, 32), nn.Linear(5, 32), nn.Linear(6, 32)
        self.stratum, self.end = foreign.Stratum(32, 4), nn.Linear(32, 7)

    def forward(self, ids: Any, *, frames: Any, keep: Any, notes: Any, who: Any, factor: float = 0.5) -> dict[str, Any]:
        stream = self.table(ids) + self.frame(frames) + self.note(notes).mean(1, keepdim=True) + who[:, None, None]
        veil = torch.zeros_like(keep, dtype=stream.dtype).masked_fill(~keep, -1e4)[:, None, None, :]
        stream = self.stratum(stream, veil) * factor
        return {"parts": [stream, (self.end(stream), None)], "keep": keep, "version": 3}


def test_inputs_and_outputs_of_all_kinds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Mixed().eval()

    def inputs(batch: int, length: int, others: int) -> dict[str, Any]:
        return {"ids": torch.randint(0, 20, (batch, length)), "frames": torch.randn(batch, length, 5),
                "keep": torch.ones(batch, length, dtype=torch.bool), "notes": torch.randn(batch, others, 6),
                "who": torch.arange(batch)}  # fmt: skip

    manifest = peltc.compile(LORA, module, tmp_path / "out", example_inputs=inputs(2, 9, 6))
    assert manifest["verification"]["worst"] < TOLERANCE
    session = peltc.Session(tmp_path / "out")
    assert session.inputs["frames"].shape == ["batch", "sequence", 5]
    assert session.inputs["notes"].shape == ["batch", "target", 6]
    assert session.inputs["who"].shape == ["batch"]
    assert session.outputs == ["parts.0", "parts.1.0", "output.keep"]
    other = inputs(4, 3, 2)
    other["keep"][0, -1] = False
    found = session(**other)
    with torch.no_grad():
        stream, (scores, _) = module(**other)["parts"]
    assert apart([found["parts.0"], found["parts.1.0"]], [stream.numpy(), scores.numpy()]) < TOLERANCE
    assert (found["output.keep"] == other["keep"].numpy()).all()


def test_class_of_transformers_with_example_inputs(tmp_path: Path) -> None:
    """Given examples, its class and config are not asked what it reads."""
    model = models.build("llama")
    peltc.attach(model, LORA, example_inputs=foreign.inputs())
    fill(model)
    manifest = peltc.compile(LORA, model, tmp_path / "out", example_inputs=foreign.inputs())
    assert manifest["base"]["inputs"]["input_ids"]["high"] == 99  # the vocabulary's last
    assert peltc.verify(tmp_path / "out", model)["verification"]["worst"] < TOLERANCE
    found, known = peltc.survey(model, example_inputs=foreign.inputs()), peltc.survey(model)
    assert [(s.path, s.parameters, s.sizes) for s in found] == [(s.path, s.parameters, s.sizes) for s in known]


# models on transformers' base class that transformers does not have


class OwnConfig(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "own-words"

    def __init__(self, width: int = 32, layers: int = 1, vocab_size: int = 90, **rest: Any):
        super().__init__(**rest)
        self.width, self.layers, self.vocab_size = width, layers, vocab_size


class BertModel(transformers.PreTrainedModel):  # type: ignore[misc]
    """Called like a class of `transformers`, which it is not."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.inner = foreign.Mosaic(config.layers, config.width, words=config.vocab_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        found = self.inner(input_ids, attention_mask)
        return transformers.modeling_outputs.BaseModelOutputWithPooling(found["tokens"], found["verdict"])


@pytest.mark.parametrize("given", [True, False])
def test_own_class_on_transformers_base(given: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertModel(OwnConfig()).eval()
    inputs = foreign.inputs() if given else None
    peltc.attach(model, LORA, example_inputs=inputs)
    fill(model)
    manifest = peltc.compile(LORA, model, tmp_path / "out", example_inputs=inputs)
    found = peltc.Session(tmp_path / "out")(**foreign.inputs())
    assert list(found) == ["last_hidden_state", "pooler_output"]
    with torch.no_grad():
        expected = model(**foreign.inputs())
    assert apart([*found.values()], [v.numpy() for v in expected.to_tuple()]) < TOLERANCE
    assert manifest["base"]["architecture"].endswith(".BertModel") and manifest["base"]["model_type"] == "own-words"
    assert (tmp_path / "out" / "config.json").is_file()
    assert peltc.verify(tmp_path / "out", model)["verification"]["worst"] < TOLERANCE
    with pytest.raises(PeltError, match="E610"):
        peltc.verify(tmp_path / "out")


# refusals


def refused(code: str, act: Callable[[], Any]) -> str:
    with pytest.raises(PeltError) as caught:
        act()
    assert code in str(caught.value), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "Mosaic is no class of transformers, and no example inputs are given"),
        ({"input_ids": torch.ones(2, 8).long()}, "'attention_mask' is missing"),
        ({**foreign.inputs(), "token_ids": torch.ones(2, 8)}, "takes no 'token_ids'"),
        ({**foreign.inputs(), "input_ids": torch.ones(1, 8).long()}, r"has the shape \[1, 8\]"),
        ({**foreign.inputs(), "input_ids": torch.ones(3, 8).long()}, "different batches"),
        ({**foreign.inputs(), "attention_mask": "ones"}, "is no tensor, but str"),
    ],
)
def test_example_inputs_are_checked(inputs: Any, words: str, tmp_path: Path) -> None:
    module = foreign.Mosaic(layers=1)
    with pytest.raises(PeltError, match=f"E506.*{words}"):
        peltc.survey(module, example_inputs=inputs)
    with pytest.raises(PeltError, match=f"E506.*{words}"):
        peltc.compile(LORA, module, tmp_path / "out", example_inputs=inputs)
    assert not (tmp_path / "out").exists()


def test_inputs_beside_a_folder(tmp_path: Path) -> None:
    refused("E506", lambda: peltc.compile(LORA, tmp_path, tmp_path / "out", example_inputs=foreign.inputs()))


class Odd(foreign.Mosaic):
    """Does what no graph can."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        if input_ids.sum() > 3:
            raise ValueError("too many")
        return super().forward(input_ids, attention_mask)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    module = Odd(layers=1).train()
    before = state(module)
    said = refused("E505", lambda: peltc.compile(LORA, module, tmp_path / "out", example_inputs=foreign.inputs()))
    assert "cannot export Odd to ONNX" in said
    unchanged(module, before)
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_copied() -> None:
    module = foreign.Mosaic(layers=1)
    module.kept = module.judge.weight * 2  # type: ignore[assignment]
    assert "cannot be copied" in refused("E505", lambda: peltc.survey(module, example_inputs=foreign.inputs()))
    quantised = foreign.Mosaic(layers=1)
    quantised.judge.weight = nn.Parameter(torch.ones(3, 32, dtype=torch.int8), requires_grad=False)
    assert "'judge.weight'" in refused("E505", lambda: peltc.survey(quantised, example_inputs=foreign.inputs()))


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ({"method": "prefix", "at": "attention", "length": 2}, "E209", "attention interface"),
        ({"method": "prompt", "at": "embedding.word", "length": 2}, "E209", "inputs_embeds"),
    ],
)
def test_sites_out_of_reach(spec: dict[str, Any], code: str, words: str, tmp_path: Path) -> None:
    module = foreign.build("tower", layers=1)
    before = state(module)
    whole = {"pelt": 1, "attach": [spec]}
    assert words in refused(code, lambda: peltc.attach(module, whole, example_inputs=foreign.inputs()))
    unchanged(module, before)
    where = {"prefix": "E209", "prompt": "E505"}[spec["method"]]
    assert words in refused(
        where, lambda: peltc.compile(whole, module, tmp_path / "out", example_inputs=foreign.inputs())
    )
    assert not (tmp_path / "out").exists()


class Bundle(nn.Module):
    """Maps as bare parameters of one module, which reads and writes none of them alone."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(width, width) / 6) for _ in range(4))

    def forward(self, stream: torch.Tensor, veil: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            (stream @ m).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )  # fmt: skip
        joined = torch.softmax(q @ k.mT / 3 + veil, -1) @ v
        return joined.transpose(1, 2).flatten(2) @ self.o


class Late(nn.Linear):
    """Owns a map, and does more than it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh() + 1


@pytest.mark.parametrize(("kind", "words"), [(Bundle, "has more parameters"), (Late, "computes something else")])
def test_maps_without_a_module_of_their_own(kind: Any, words: str, tmp_path: Path) -> None:
    """The hooks would read and change something else there, silently."""
    module = foreign.Mosaic(layers=1)
    if kind is Bundle:
        module.strata[0].regard = Bundle(32, 4)
    else:
        module.strata[0].regard.giver = Late(32, 32)
    said = refused("E209", lambda: peltc.attach(module, LORA, example_inputs=foreign.inputs()))
    assert words in said and "a torch module of its own" in said
    assert not hasattr(module, "pelt")
    refused("E209", lambda: peltc.compile(LORA, module, tmp_path / "out", example_inputs=foreign.inputs()))
