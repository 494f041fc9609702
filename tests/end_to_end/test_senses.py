"""Models that read images, sound, videos or series: compiled with all that they read, and equal to PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import beyond
import models
import numpy as np
import peft
import pytest
import torch
import transformers

import peltc
from peltc.compiler.base.opening import open_base
from peltc.compiler.survey.anatomy import Packed
from peltc.runtime.verification import verify
from peltc.spec.diagnostics import PeltError

TOLERANCE = verify.TOLERANCE["float32"]
TARGETS = {
    "levit": r".*queries_keys_values\.linear", "patchtst": ["q_proj", "v_proj"],
    "llava": r".*language_model.*\.(q_proj|v_proj)", "clip": r".*vision_model.*\.(q_proj|fc1)",
}  # fmt: skip
"""What HF PEFT attaches LoRA to, where it is not queries and values by their usual names."""
SPEC = {"pelt": 1, "name": "mine", "attach": [
    {"method": "lora", "at": ["attention.query", "attention.value"], "r": 2},
    {"method": "bottleneck", "at": "feed_forward.block", "reduction": 4},
    {"method": "ia3", "at": "attention.key"},
]}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("senses")
    return lambda name: home / name if (home / name).is_dir() else beyond.save(name, home / name)


def load(folder: Path, name: str) -> Any:
    return type(beyond.MADE[name]()).from_pretrained(folder).eval()


def answers(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = model(**inputs)
    return {key: value.numpy() for key, value in found.items() if isinstance(value, torch.Tensor)}


def check(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Every floating-point output, to the tolerance of its largest value."""
    shared = [key for key in found if key in wanted and wanted[key].dtype.kind == "f"]
    assert shared, (list(found), list(wanted))
    for key in shared:
        assert found[key].shape == wanted[key].shape
        assert np.abs(found[key] - wanted[key]).max() <= TOLERANCE * np.abs(wanted[key]).max(), key


@pytest.mark.parametrize("name", beyond.MADE)
def test_folders_of_peft(folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """What HF PEFT wrote of it is imported by name, and computes what HF PEFT computes, at another batch size."""
    targets = TARGETS.get(name, r".*(q_proj|v_proj|query|value)")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(load(folder(name), name), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    batch = 1 if name == "llava" else 5  # its graph is of one image, see below
    inputs = beyond.feeds(name, batch)
    wanted = answers(model.base_model.model, inputs)
    bare = answers(load(folder(name), name), inputs)
    key = next(k for k in ("logits", "prediction_outputs", "image_embeds", "last_hidden_state") if k in wanted)
    assert np.abs(wanted[key] - bare[key]).max() > 100 * TOLERANCE * np.abs(bare[key]).max()
    peltc.compile(tmp_path / "adapter", folder(name), tmp_path / "out")
    with peltc.Session(tmp_path / "out") as session:
        check(session(**{k: v.numpy() for k, v in inputs.items()}), wanted)


@pytest.mark.parametrize("name", ["vit", "wav2vec2", "whisper", "patchtst", "clip", "swin"])
def test_trained_modules(folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """Attached, trained, compiled from the live model in the graph and folded where that can be."""
    model = load(folder(name), name)
    peltc.attach(model, SPEC)
    inputs = beyond.feeds(name, 3)
    found = model(**inputs)
    loss = sum(v.square().mean() for v in found.values() if isinstance(v, torch.Tensor) and v.requires_grad)
    torch.manual_seed(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.add_(0.05 * torch.randn_like(parameter))
    wanted = answers(model, inputs)
    for mode in ("fold", "static"):
        manifest = peltc.compile(SPEC, model, tmp_path / mode, mode=mode)
        assert manifest["verification"]["worst"] <= TOLERANCE
        with peltc.Session(tmp_path / mode) as session:
            check(session(**{k: v.numpy() for k, v in inputs.items()}), wanted)


def test_towers_are_named_by_what_they_read(folder: Callable[[str], Path]) -> None:
    roles = {site.path for site in open_base(folder("clip")).anatomy.named}
    assert {"vision.layers.1.attention.query", "text.layers.1.attention.query", "vision.projection",
            "text.projection", "text.embedding.word", "text.final_norm"} <= roles  # fmt: skip
    roles = {site.path for site in open_base(folder("llava")).anatomy.named}
    assert {"vision.layers.0.feed_forward.up", "vision.projector.0", "vision.projector.1", "head",
            "text.layers.1.feed_forward.gate", "text.embedding.word"} <= roles  # fmt: skip
    roles = {site.path for site in open_base(folder("whisper")).anatomy.named}
    assert {"encoder.layers.0.attention.query", "decoder.layers.0.cross_attention.key", "head"} <= roles
    assert not any(path.startswith(("vision.", "speech.", "text.")) for path in roles)


def test_one_tower_leaves_the_other_alone(folder: Callable[[str], Path], tmp_path: Path) -> None:
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "vision.layers.*.attention.query", "r": 2}]}
    plan = peltc.plan(spec, folder("clip"))
    assert {claim.site.path for claim in plan.claims} == {f"vision.layers.{i}.attention.query" for i in range(2)}
    tensors = {n: np.full(t.shape, 0.3, np.float32) for n, t in plan.tensors.items()}
    peltc.compile(spec, folder("clip"), tmp_path / "out", tensors)
    inputs = beyond.feeds("clip", 2)
    bare = answers(load(folder("clip"), "clip"), inputs)
    with peltc.Session(tmp_path / "out") as session:
        found = session(**{k: v.numpy() for k, v in inputs.items()})
    assert np.abs(found["text_embeds"] - bare["text_embeds"]).max() <= TOLERANCE * np.abs(bare["text_embeds"]).max()
    assert np.abs(found["image_embeds"] - bare["image_embeds"]).max() > 1e-3


def test_axes_that_may_be_of_any_size(folder: Callable[[str], Path]) -> None:
    """As many as the exporter leaves free; what it cannot is fixed, and the manifest says at which size."""

    def axes(name: str) -> dict[str, tuple[str | None, ...]]:
        reading = open_base(folder(name)).reading
        assert reading is not None
        return dict(reading.axes)

    assert axes("vit") == {"pixel_values": ("batch", None, None, None)}
    assert axes("wav2vec2") == {"input_values": ("batch", "time"), "attention_mask": ("batch", "time")}
    assert axes("whisper")["decoder_input_ids"] == ("batch", "target")
    assert axes("clip")["input_ids"] == ("batch", "sequence")
    reading = open_base(folder("llava")).reading
    assert reading is not None and reading.axes["input_ids"] == (None, "sequence") and reading.held == {"batch": 1}
    assert reading.counts == {"image": 4}


def test_stored_buffers_come_from_the_checkpoint(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The running statistics of batch norms, and the routers' corrections of a language model: what a class starts
    them with is not the model's."""
    base = open_base(folder("levit"))
    stored = [name for name in base.parameters if name.endswith(("running_mean", "running_var"))]
    assert stored and all(not base.lacks(name) for name in stored)
    small = {
        **models.SMALL,
        **models.TEXT,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    }
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**small)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    corrections = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for buffer in corrections:
        buffer.copy_(torch.tensor([0.0, 9.0, -9.0, 0.5]))
    assert corrections
    model.save_pretrained(tmp_path / "model")
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.output", "r": 2}]}
    peltc.compile(spec, tmp_path / "model", tmp_path / "out")
    ids = torch.randint(0, 100, (2, 9))
    with peltc.Session(tmp_path / "out") as session:
        found = session(input_ids=ids.numpy(), attention_mask=np.ones((2, 9), np.int64))
    check(found, answers(model, {"input_ids": ids}))


def test_references_hold_stored_buffers(folder: Callable[[str], Path]) -> None:
    """Of a checkpoint with packed weights, which PyTorch itself does not load."""
    base = open_base(folder("levit"))
    packed = Packed("gptq", "int4", 32, frozenset())
    reference = verify.load_model(replace(base, anatomy=replace(base.anatomy, packed=packed)))
    wanted = load(folder("levit"), "levit").state_dict()
    stored = [name for name in base.parameters if name.endswith(("running_mean", "running_var"))]
    assert stored and all(torch.equal(reference.state_dict()[name], wanted[name]) for name in stored)


def test_inputs_that_do_not_fit(folder: Callable[[str], Path], tmp_path: Path) -> None:
    peltc.compile(SPEC, folder("vit"), tmp_path / "out")
    with peltc.Session(tmp_path / "out") as session:
        for shape in ((2, 3, 48, 48), (3, 32, 32), (2, 1, 32, 32)):
            with pytest.raises(PeltError, match=r"E606 .*'pixel_values'") as caught:
                session(pixel_values=np.zeros(shape, np.float32))
            assert "[batch, 3, 32, 32]" in str(caught.value)
        with pytest.raises(PeltError, match="pixel_values"):
            session(input_ids=np.zeros((1, 4), np.int64))


def test_prepared_images(folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the checkpoint's own processor makes them; by hand, since the artifact carries it."""
    from PIL import Image

    from peltc.runtime.commands.cli import run

    beyond.save("vit", tmp_path / "model")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}
    peltc.compile(spec, tmp_path / "model", tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with peltc.Session(tmp_path / "out") as session:
        for image in (pixels, str(tmp_path / "a.png"), Image.fromarray(pixels)):
            made = session.prepare(image=image)
            assert np.abs(made["pixel_values"][0] - (pixels.transpose(2, 0, 1) / 127.5 - 1)).max() < 1e-5
        assert session(**session.prepare(image=[pixels, pixels]))["logits"].shape[0] == 2
        (tmp_path / "b.png").write_bytes(b"no image")
        with pytest.raises(PeltError, match="E641 the image cannot be read"):
            session.prepare(image=tmp_path / "b.png")
        with pytest.raises(PeltError, match="E641"):
            session.prepare(text="a cat", image=pixels)
    assert run(["run", str(tmp_path / "out"), "--image", str(tmp_path / "a.png")]) == 0
    assert "logits [1, 2]" in capsys.readouterr().out
    assert run(["run", str(tmp_path / "out")]) == 2
    (tmp_path / "out" / "preprocessor_config.json").unlink()
    with peltc.Session(tmp_path / "out") as session, pytest.raises(PeltError, match="E607"):
        session.prepare(image=pixels)


def test_prepared_sound(folder: Callable[[str], Path], tmp_path: Path) -> None:
    import soundfile

    beyond.save("wav2vec2", tmp_path / "model")
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "model")
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}
    peltc.compile(spec, tmp_path / "model", tmp_path / "out")
    wave = (0.1 * np.random.default_rng(0).standard_normal(4000)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", wave, 8000)
    with peltc.Session(tmp_path / "out") as session:
        made = session.prepare(sound=wave, rate=16000)
        assert np.abs(made["input_values"][0] - (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)).max() < 1e-4
        found = session(**session.prepare(sound=str(tmp_path / "a.wav")))["logits"]
        assert np.abs(found - session(**made)["logits"]).max() <= TOLERANCE * np.abs(found).max()
        with pytest.raises(PeltError, match=r"E641 no rate is given, and the model was trained on 16000"):
            session.prepare(sound=wave)
        with pytest.raises(PeltError, match=r"E641 the sound has 8000 samples a second"):
            session.prepare(sound=tmp_path / "b.wav")
        with pytest.raises(PeltError, match=r"E641 the sound has the shape \[0\]"):
            session.prepare(sound=[], rate=16000)
        assert len(session.prepare(sound=[wave, wave[:2000]], rate=16000)["attention_mask"]) == 2


def test_tokens_that_stand_for_an_image(folder: Callable[[str], Path], tmp_path: Path) -> None:
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "text.layers.*.attention.query", "r": 2}]}
    peltc.compile(spec, folder("llava"), tmp_path / "out")
    inputs = {name: tensor.numpy() for name, tensor in beyond.feeds("llava", 1).items()}
    with peltc.Session(tmp_path / "out") as session:
        session(**inputs)
        inputs["input_ids"][0, 3] = 7
        with pytest.raises(PeltError, match=r"E642 text 0 in 'input_ids' has 3 tokens 99") as caught:
            session(**inputs)
    assert "4 of them" in str(caught.value)


class Seeing(torch.nn.Module):
    """A module of one's own that reads images: patches, a residual block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 32, 8, 8)
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        self.head = torch.nn.Linear(32, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.mean(1))


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Seeing().eval()
    spec = {"pelt": 1, "attach": [{"method": "lora", "at": "feed_forward.up", "r": 2}]}
    examples = {"pixels": torch.randn(2, 3, 32, 32)}
    peltc.attach(module, spec, example_inputs=examples)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    manifest = peltc.compile(spec, module, tmp_path / "out", example_inputs=examples)
    assert manifest["base"]["inputs"]["pixels"]["axes"] == ["batch"]
    pixels = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        wanted = module(pixels).numpy()
    with peltc.Session(tmp_path / "out") as session:
        check(session(pixels=pixels.numpy()), {"output": wanted})
