"""Adapters of Hugging Face PEFT that store whole numbers, seeds, tensors of the whole model, or what spans a fused map:
what of them is read as PEFT computes it, and what is refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from import_matrix import written
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.importers.importing import import_adapter
from peltc.compiler.importers.peft.methods.vblora import logits
from peltc.compiler.importers.peft.torch_random import places
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.formula.interpreter import Deferred
from peltc.spec.method import shipped

Folder = Callable[..., Path]
Tensors = dict[str, np.ndarray[Any, Any]]
KINDS: dict[str, dict[str, Any]] = {
    "SHiRA": {"kind": peft.ShiraConfig, "r": 2},
    "FourierFT": {"kind": peft.FourierFTConfig, "n_frequency": 60, "scaling": 20.0},
    "WaveFT": {"kind": peft.WaveFTConfig, "n_frequency": 60},
    "VB-LoRA": {"kind": peft.VBLoRAConfig, "num_vectors": 12, "vector_length": 8, "topk": 3,
                "save_only_topk_weights": True},
    "RandLoRA": {"kind": peft.RandLoraConfig, "r": 5, "randlora_alpha": 3},
    "PVeRA": {"kind": peft.PveraConfig, "r": 6},
    "RoAd": {"kind": peft.RoadConfig, "group_size": 8},
    "C³A": {"kind": peft.C3AConfig, "block_size": 8},
    "DeLoRA": {"kind": peft.DeloraConfig, "r": 3},
    "GLoRA": {"kind": peft.GloraConfig, "r": 3},
    "GraLoRA": {"kind": peft.GraloraConfig, "r": 4},
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose queries, keys and values are one `nn.Linear`: one after the other, and head by head."""
    sizes: dict[str, Any] = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                             "num_attention_heads": 4}  # fmt: skip
    torch.manual_seed(0)
    found = {}
    for name, model in {
        "in order": transformers.Phi3ForCausalLM(
            transformers.Phi3Config(**sizes, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        ),
        "by head": transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)),
    }.items():
        found[name] = tmp_path_factory.mktemp("fused") / "base"
        model.save_pretrained(found[name])
    return found


def stored(settings: dict[str, Any], base: Path, out: Path) -> None:
    """Save an adapter as it starts."""
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(base)
    config = settings["kind"](**{name: value for name, value in settings.items() if name != "kind"})
    peft.get_peft_model(model, config).save_pretrained(out)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (6, 9), (8, 4)])
def test_a_wavelet_of_any_size(outputs: int, inputs: int) -> None:
    """Odd sizes are filled up to even ones, as in PEFT."""
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs))
    live: Any = peft.get_peft_model(model, peft.WaveFTConfig(target_modules=["0"], n_frequency=13, init_weights=False))
    layer, method = live.base_model.model[0], shipped()["waveft"]
    expected = layer.get_delta_weight("default").detach().numpy()
    scope: dict[str, Any] = {
        **method.defaults, "in": inputs, "out": outputs, "x": np.eye(inputs, dtype=np.float32),
        "spectrum": layer.waveft_spectrum["default"].detach().numpy(), "places": places(outputs, inputs, 13, 777),
    }  # fmt: skip
    interpreter = NumericInterpreter()
    for name, expr in method.let:
        scope[name] = Deferred(partial(interpreter.evaluate, expr, scope))
    found = interpreter.evaluate(dict(method.effects)["delta"], scope).T
    assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


PIECES = ["SHiRA", "FourierFT", "RandLoRA", "PVeRA", "RoAd", "C³A", "DeLoRA", "GLoRA"]
"""Methods whose groups of rows, where they have any, fit into a head."""


@pytest.mark.parametrize(
    ("order", "method"), [*(("in order", method) for method in KINDS), *(("by head", method) for method in PIECES)]
)
def test_a_fused_map(order: str, method: str, fused: dict[str, Path], tmp_path: Path) -> None:
    """What is of all rows of a map comes out the same at the sites that each have some of them."""
    settings = {**KINDS[method], "target_modules": ["qkv_proj" if order == "in order" else "query_key_value"]}
    expected, given = written("llama", settings, fused[order], tmp_path / "adapter")
    for mode in ("fold", "static"):
        peltc.compile(tmp_path / "adapter", fused[order], tmp_path / mode, mode=mode)
        found = peltc.Session(tmp_path / mode, ["CPUExecutionProvider"])(**given)["logits"]
        assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


def test_groups_that_sites_have_parts_of(fused: dict[str, Path], tmp_path: Path) -> None:
    settings = {"kind": peft.C3AConfig, "block_size": 16, "target_modules": ["query_key_value"]}
    stored(settings, fused["by head"], tmp_path / "adapter")
    with pytest.raises(PeltError, match=r"E431 .*layers.0.attention.query has parts of the groups of 16 outputs"):
        import_adapter(tmp_path / "adapter", fused["by head"])


@pytest.fixture
def saved(model_folder: Folder, tmp_path: Path) -> Callable[..., Path]:
    """A folder of a method for BERT, with its tensors or its config changed."""

    def make(method: str, tensors: Callable[[Tensors], None] | None = None, **config: Any) -> Path:
        stored({**KINDS[method], "target_modules": ["query"]}, model_folder("bert"), tmp_path / "adapter")
        file, said = tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_config.json"
        if tensors is not None:
            held = load_file(file)
            tensors(held)
            save_file(held, file)
        said.write_text(json.dumps(json.loads(said.read_text()) | config))
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        ("FourierFT", {"random_loc_seed": -1}, "E430 'random_loc_seed' is -1"),
        ("WaveFT", {"wavelet_family": "db2"}, "E431 'wavelet_family' is 'db2'"),
        ("WaveFT", {"proportional_parameters": True}, "E431 'proportional_parameters' is True"),
        ("RandLoRA", {"save_projection": False}, "E431 'save_projection' is False"),
        ("PVeRA", {"sample_at_inference": True}, "E431 'sample_at_inference' is True"),
        ("RoAd", {"variant": "road_3"}, "E430 'variant' is 'road_3'"),
    ],
)
def test_keys(
    method: str, config: dict[str, Any], words: str, saved: Callable[..., Path], model_folder: Folder
) -> None:
    with pytest.raises(PeltError, match=words):
        import_adapter(saved(method, **config), model_folder("bert"))


@pytest.mark.parametrize(("place", "value"), [((0, 0), 32), ((1, 3), -1), (slice(None), None)])
def test_places_that_are_none(place: Any, value: Any, saved: Callable[..., Path], model_folder: Folder) -> None:
    """Beyond the matrix, before it, or twice."""

    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("shira_indices"))
        if value is None:
            tensors[name][:, 0] = tensors[name][:, 1]
        else:
            tensors[name][place] = value

    with pytest.raises(PeltError, match=r"E404 the tensor .*places' holds what are not different places of its matrix"):
        import_adapter(saved("SHiRA", change), model_folder("bert"))


def test_whole_numbers_where_values_should_be(saved: Callable[..., Path], model_folder: Folder) -> None:
    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("shira_weight"))
        tensors[name] = tensors[name].astype(np.int32)

    with pytest.raises(PeltError, match=r"E430 the tensor '.*shira_weight' is of the type int32"):
        import_adapter(saved("SHiRA", change), model_folder("bert"))


def test_a_shared_tensor_that_differs(saved: Callable[..., Path], model_folder: Folder) -> None:
    """PEFT would take whichever it reads last."""

    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("layer.1.attention.self.query.randlora_B"))
        tensors[name] = tensors[name] + 1

    with pytest.raises(PeltError, match=r"E433 'B' of '.*' differs from that of other modules, which share it"):
        import_adapter(saved("RandLoRA", change), model_folder("bert"))


def test_a_path_that_is_none_has_no_values(saved: Callable[..., Path], model_folder: Folder) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".glora_C." in name]:
            del tensors[name]
            tensors[name.rpartition(".")[0] + ".zeros"] = np.ones((32, 1), np.float32)

    with pytest.raises(
        PeltError, match=r"E433 'C' of encoder.layers.0.attention.query is none by the config and has values"
    ):
        import_adapter(saved("GLoRA", change, config_C="none"), model_folder("bert"))


def broken(tensors: Tensors, seed: int) -> Tensors:
    """Tensors some of which have another shape, type or sign, or are left out."""
    draw = random.Random(seed)
    found = dict(tensors)
    for name in draw.sample(sorted(found), min(len(found), draw.randrange(1, 4))):
        array = found[name]
        other = np.float32 if array.dtype.kind in "iu" else np.int32
        found[name] = draw.choice([
            array.reshape(-1), array[:0], array[None], array.T, array.astype(other), np.full_like(array, 7),
            np.array(0, array.dtype), np.zeros((3, *array.shape[1:]), array.dtype), (array * 1e30).astype(np.float32),
        ])  # fmt: skip
    if draw.random() < 0.3:
        found.pop(draw.choice(sorted(found)))
    return {name: np.ascontiguousarray(array) if array.ndim else array for name, array in found.items()}


@pytest.mark.parametrize("method", KINDS)
def test_tensors_that_are_broken_raise_nothing_else(
    method: str, saved: Callable[..., Path], model_folder: Folder
) -> None:
    folder, refused = saved(method), 0
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for seed in range(40):
        save_file(broken(tensors, seed), file)
        try:
            import_adapter(folder, model_folder("bert"))
        except PeltError:
            refused += 1
    assert refused > 20


def test_logits_make_the_weights_again() -> None:
    """Also where a weight is 0, and for the last, which is not stored."""
    weights = np.array([[0.5, 0.3], [0.0, 1.0]], np.float32)
    index = np.array([[4, 0, 2], [1, 2, 3]])
    found = logits(weights, index, 6)
    mixed = np.exp(found.astype(np.float64)) / np.exp(found.astype(np.float64)).sum(-1, keepdims=True)
    np.testing.assert_allclose(mixed, [[0.3, 0, 0.2, 0, 0.5, 0], [0, 0, 1, 0, 0, 0]], atol=1e-7)
    assert (np.argsort(-found, -1)[:, :3] == [[4, 0, 2], [2, 1, 3]]).all(), "the mixed ones are the largest"


@pytest.mark.parametrize(
    ("weights", "index", "words"),
    [
        ([[0.5]], [[0, 6]], "make no mixtures"),
        ([[0.5]], [[0, -1]], "make no mixtures"),
        ([[0.5]], [[3, 3]], "make no mixtures"),
        ([[0.5, 0.2]], [[0, 1]], "make no mixtures"),
        ([[1.5]], [[0, 1]], "add up to 1.5"),
    ],
)
def test_mixtures_that_are_none(weights: list[Any], index: list[Any], words: str) -> None:
    with pytest.raises(PeltError, match=words):
        logits(np.array(weights, np.float32), np.array(index), 6)
