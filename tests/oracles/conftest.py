"""Tiny models for the oracles, random weights for a plan, and the one comparison that every oracle makes."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from peltc.compiler.adapter.weights import start_tensors
from peltc.compiler.base.base import Base
from peltc.compiler.base.live import survey_model
from peltc.compiler.base.opening import open_base
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.planner import make_plan
from peltc.spec.method import initialiser
from peltc.spec.specification import load_spec

Array = np.ndarray[Any, Any]
Close = Callable[[Any, Any, float], float]

WIDTH, HEADS, KV_HEADS, INNER, LAYERS, VOCAB, POSITIONS = 32, 4, 2, 64, 2, 72, 48
"""Small sizes that blocks of 8 and Kronecker factors of 4 divide."""

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS: dict[str, tuple[str, transformers.PreTrainedConfig]] = {
    "bert": (
        "BertModel",
        transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=INNER, max_position_embeddings=POSITIONS, **QUIET,
        ),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, n_positions=POSITIONS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
    ),
    "llama": (
        "LlamaForCausalLM",
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, intermediate_size=INNER, max_position_embeddings=POSITIONS,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
    ),
}  # fmt: skip
"""A post-norm encoder with biases, a pre-norm decoder with a fused projection, and one with grouped queries."""


@pytest.fixture(scope="session", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this run's own: an old anatomy must not answer for a new survey. The suite's own, where it has set
    one, is shared, so that no model is exported twice."""
    with pytest.MonkeyPatch.context() as patch:
        given = os.environ.get("PELTC_CACHE")
        if not given or not Path(given).is_relative_to(tmp_path_factory.getbasetemp().parent):
            patch.setenv("PELTC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch cost more than they give on sizes like these, ten times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Toys:
    """Tiny models by name. Each is built once; `model` gives a copy, since attaching changes a model in place."""

    def __init__(self, folder: Path):
        self.root = folder
        self.built: dict[str, Any] = {}
        self.bases: dict[str, Base] = {}

    def model(self, name: str) -> Any:
        """A fresh copy, in evaluation."""
        if name not in self.built:
            architecture, config = CONFIGS[name]
            torch.manual_seed(len(self.built))
            model = getattr(transformers, architecture)(copy.deepcopy(config)).eval()
            randomise(model)
            self.built[name] = model
        return copy.deepcopy(self.built[name])

    def base(self, name: str) -> Base:
        """The compiler's view of the same model, from a checkpoint on disk."""
        if name not in self.bases:
            folder = self.root / name
            self.model(name).save_pretrained(folder)
            self.bases[name] = open_base(folder)
        return self.bases[name]

    def plan(self, name: str, *entries: Mapping[str, Any], methods: Mapping[str, Any] | None = None) -> Plan:
        """The plan of a spec with these entries under `attach:`."""
        return make_plan(load_spec(self.spec(*entries, methods=methods)), *survey_model(self.model(name)))

    @staticmethod
    def spec(*entries: Mapping[str, Any], methods: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A spec's content."""
        own = {"methods": dict(methods)} if methods else {}
        return {"pelt": 1, "attach": [dict(entry) for entry in entries], **own}

    def weights(self, name: str, plan: Plan, seed: int = 0) -> dict[str, Array]:
        """Random values for every tensor of a plan, none of them neutral: start values and noise; places are random and
        stay whole numbers."""
        random = np.random.default_rng(seed)
        parameters = dict(self.model(name).named_parameters(remove_duplicate=False))
        start = start_tensors(plan, lambda key: parameters[key].detach().numpy())
        whole = {key for key, tensor in plan.tensors.items() if (initialiser(tensor.init) or [""])[0] == "places"}
        noise = {key: random.normal(0, 0.25, a.shape) for key, a in start.items()}
        return {key: (a if key in whole else a + noise[key]).astype(np.float32) for key, a in start.items()}

    @staticmethod
    def inputs(name: str, seed: int = 0, width: int = 3, length: int = 9, padding: int = 3) -> dict[str, torch.Tensor]:
        """A batch whose last sequence is padded: at the end for encoders, at the start for decoders."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB, (width, length), generator=generator)
        mask = torch.ones_like(ids)
        gone = slice(length - padding, None) if name == "bert" else slice(None, padding)
        if padding:
            mask[-1, gone] = 0
            ids[-1, gone] = 0
        found = {"input_ids": ids, "attention_mask": mask}
        if name == "bert":
            found["token_type_ids"] = (torch.arange(length) >= length // 2).long().expand(width, -1)
        return found

    @staticmethod
    def answer(model: Any, inputs: Mapping[str, torch.Tensor], **more: Any) -> torch.Tensor:
        """What a model answers: the last hidden state of an encoder, the logits of a decoder."""
        with torch.no_grad():
            output = model(**inputs, **more)
        return output["logits"] if "logits" in output else output["last_hidden_state"]


def randomise(model: torch.nn.Module) -> None:
    """Give every parameter a value that matters: biases and norms are 0 and 1 in a fresh model, and an oracle on
    such a model does not see who forgets them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.2)
            else:
                parameter.copy_(noise * 0.2 + (1.0 if name.endswith("weight") else 0.0))


@pytest.fixture(scope="session")
def toys(fresh_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """The tiny models of this session."""
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def close() -> Close:
    """`close(found, expected, tolerance)`: the largest difference as a share of the largest reference.

    Raises AssertionError where it exceeds the tolerance, where shapes differ, and where anything is not a number.
    """

    def compare(found: Any, expected: Any, tolerance: float) -> float:
        a, b = (
            np.asarray(v.detach().numpy() if isinstance(v, torch.Tensor) else v, np.float64) for v in (found, expected)
        )
        assert a.shape == b.shape, f"the shape {list(a.shape)}, expected {list(b.shape)}"
        assert np.isfinite(b).all(), "the reference is not finite"
        error = float(np.abs(a - b).max() / np.abs(b).max())
        assert error <= tolerance, f"differs by {error:.2e} of the largest value, at most {tolerance:.0e} allowed"
        return error

    return compare
