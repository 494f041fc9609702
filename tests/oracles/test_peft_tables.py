"""Tables of embeddings against Hugging Face PEFT: its LoRA on `nn.Embedding`, and its trainable tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import peltc
from peltc.runtime.building.compile import compile
from peltc.runtime.running.session import Session
from peltc.runtime.verification.verify import TOLERANCE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")

WORDS = {"bert": "word_embeddings", "gpt2": "wte"}
POSITIONS = {"bert": "position_embeddings", "gpt2": "wpe"}
ROWS = [4, 9, 10]


def lora_of(toys: Any, name: str, site: str, module: str) -> tuple[dict[str, Any], Any, dict[str, np.ndarray]]:
    """A spec, PEFT's model with the same values, and these by our names."""
    entry = {"method": "lora", "at": site, "r": 3, "alpha": 6}
    weights = toys.weights(name, toys.plan(name, entry))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[module])
    model = peft.get_peft_model(toys.model(name), config).eval()
    (layer,) = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Embedding)]
    layer.lora_embedding_A["default"].data = torch.from_numpy(weights[f"lora.{site}.A"])
    layer.lora_embedding_B["default"].data = torch.from_numpy(weights[f"lora.{site}.B"])
    return toys.spec(entry), model, weights


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize(("site", "modules"), [("embedding.word", WORDS), ("embedding.position", POSITIONS)])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_lora(
    name: str, site: str, modules: dict[str, str], mode: str, toys: Any, close: Callable[..., float], tmp_path: Path
) -> None:
    spec, theirs, weights = lora_of(toys, name, site, modules[name])
    inputs = toys.inputs(name)
    expected = toys.answer(theirs, inputs)
    assert (expected - toys.answer(toys.model(name), inputs)).abs().max() > 0.01 * expected.abs().max()
    ours = peltc.attach(toys.model(name), spec, weights).eval()
    close(toys.answer(ours, inputs), expected, TOLERANCE["float32"])
    compile(spec, toys.base(name).folder, tmp_path / "out", weights, mode=mode)
    found = Session(tmp_path / "out")(**{n: t.numpy() for n, t in inputs.items()})
    close(next(iter(found.values())), expected, TOLERANCE["float32"])


def test_lora_gradients(toys: Any, close: Callable[..., float]) -> None:
    spec, theirs, weights = lora_of(toys, "bert", "embedding.word", "word_embeddings")
    ours = peltc.attach(toys.model("bert"), spec, weights).eval()
    inputs = toys.inputs("bert")
    for model in (ours, theirs):
        model(**inputs).last_hidden_state.square().mean().backward()
    (layer,) = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Embedding)]
    for part in "AB":
        expected = getattr(layer, f"lora_embedding_{part}")["default"].grad
        close(ours.pelt.parameter(f"lora.embedding.word.{part}").grad, expected, 1e-4)


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_trainable_tokens(name: str, mode: str, toys: Any, close: Callable[..., float], tmp_path: Path) -> None:
    """PEFT lets a tied head follow the table; without `tied: together` it does not here."""
    entry: dict[str, Any] = {"method": "trainable_tokens", "at": "embedding.word", "rows": ROWS}
    entry |= {"tied": "together"} if name == "gpt2" else {}
    spec, weights = toys.spec(entry), toys.weights(name, toys.plan(name, entry))
    config = peft.TrainableTokensConfig(token_indices=ROWS, target_modules=[WORDS[name]])
    theirs = peft.get_peft_model(toys.model(name), config).eval()
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.trainable_tokens.layer.TrainableTokensLayer)]
    deltas = [p for layer in layers for p in layer.trainable_tokens_delta.values()]
    for delta in deltas:
        delta.data = torch.from_numpy(weights["trainable_tokens.embedding.word.values"])
    inputs = toys.inputs(name)
    inputs["input_ids"][0, :3] = torch.tensor(ROWS)
    expected = toys.answer(theirs, inputs)
    ours = peltc.attach(toys.model(name), spec, weights).eval()
    close(toys.answer(ours, inputs), expected, TOLERANCE["float32"])
    compile(spec, toys.base(name).folder, tmp_path / "out", weights, mode=mode)
    found = Session(tmp_path / "out")(**{n: t.numpy() for n, t in inputs.items()})
    close(next(iter(found.values())), expected, TOLERANCE["float32"])
    if name == "gpt2":
        ours.detach_adapter()
        apart = peltc.attach(ours, toys.spec({**entry, "tied": "apart"}), weights).eval()
        assert (toys.answer(apart, inputs) - expected).abs().max() > 0.01 * expected.abs().max()
