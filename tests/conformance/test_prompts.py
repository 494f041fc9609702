"""Tokens before the sequence: where they join, where they leave, and what a head then reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch

import peltc
from peltc.runtime.building.compile import plan_for
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.verification.verify import TOLERANCE, load_model

JOINS = ("embedding", "embedding.word")


def artifact(folder: Path, out: Path, *entries: dict[str, Any], scale: float = 0.1) -> dict[str, Any]:
    spec = peltc.load_spec({"pelt": 1, "attach": list(entries)})
    plan, _ = plan_for(spec, folder)
    return peltc.compile(spec, folder, out, cases.tensors(plan, scale))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("at", JOINS)
@pytest.mark.parametrize("class_token", ["prompt", "text"])
def test_equal_to_torch(
    family: str, at: str, class_token: str, model_folder: Callable[..., Path], tmp_path: Path,
    figures: Callable[[str, float], None],
) -> None:  # fmt: skip
    entry = {"recipe": "unipelt_prompt", "at": at, "class_token": class_token, "r": 2, "length": 3, "prompt": 2,
             "hidden": 8, "reduction": 4}  # fmt: skip
    found = artifact(model_folder(family), tmp_path / "out", entry)["verification"]
    figures("prompts against PyTorch, float32", found["worst"])
    assert found["worst"] <= found["tolerance"]


def test_rotary_models_join_after_the_embedding_too(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    entry = {"method": "prompt", "at": "embedding", "length": 3}
    found = artifact(model_folder("llama"), tmp_path / "out", entry)["verification"]
    assert found["worst"] <= found["tolerance"]


def by_hand(bare: Any, prompt: torch.Tensor, text: torch.Tensor, places: torch.Tensor, behind: bool) -> torch.Tensor:
    """What a bare model makes of a prompt before a text at given positions: nothing of ours takes part."""
    tokens = prompt.expand(len(text), *prompt.shape)
    if behind and hasattr(bare.base_model, "embeddings"):  # the text is embedded first, at its own positions
        joined = bare.base_model.embeddings.register_forward_hook(lambda m, a, given: torch.cat([tokens, given], 1))
        found = bare(input_ids=text, position_ids=places).logits
        joined.remove()
    else:
        before = places.min() + torch.arange(len(prompt)).expand(len(text), -1)
        embedded = torch.cat([tokens, bare.get_input_embeddings()(text)], 1)
        found = bare(inputs_embeds=embedded, position_ids=torch.cat([before, places + len(prompt)], 1)).logits
    return found[:, len(prompt) :] if found.dim() > 2 else found


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("at", JOINS)
def test_positions_that_are_given_move_with_the_text(family: str, at: str, model_folder: Callable[..., Path]) -> None:
    """The positions that a model counts by itself, given: nothing changes. Rotary ones may begin anywhere."""
    spec = peltc.load_spec({"pelt": 1, "attach": [{"method": "prompt", "at": at, "length": 3}]})
    plan, base = plan_for(spec, model_folder(family))
    values = cases.tensors(plan, 1.0)
    model, bare = attach_plan(load_model(base), plan, values).eval(), load_model(base)
    (prompt,) = (torch.from_numpy(value) for value in values.values())
    text = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    first = 2 if family == "roberta" else 0  # behind the padding's
    random = torch.randperm(6, generator=torch.Generator().manual_seed(2)) + first
    with torch.no_grad():
        counted = model(input_ids=text).logits
        for start in (first, first + 5) if family == "llama" else (first,):
            given = model(input_ids=text, position_ids=torch.arange(start, start + 6)[None].expand(2, 6)).logits
            assert (given - counted).abs().max() < 1e-5
        for places in (torch.arange(first, first + 6).expand(2, 6), random.expand(2, 6)):
            found = model(input_ids=text, position_ids=places).logits
            expected = by_hand(bare, prompt, text, places, at == "embedding")
            assert (found - expected).abs().max() <= TOLERANCE["float32"] * expected.abs().max()


def logits(folder: Path, length: int = 6) -> np.ndarray:
    """What the head makes of the first token that it sees."""
    ids = np.arange(2 * length).reshape(2, length) % 90
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return peltc.Session(folder)(**inputs)["logits"]


def test_the_places_are_different_functions(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Witness: were one built as another, this would show it."""
    found = {}
    for at in JOINS:
        for class_token in ("prompt", "text"):
            out = tmp_path / f"{at}-{class_token}"
            entry = {"method": "prompt", "at": at, "length": 3, "class_token": class_token}
            artifact(model_folder("bert"), out, entry, scale=1.0)
            found[at, class_token] = logits(out)
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert np.abs(a - b).max() > 1e-3, f"{one} and {other}"


def test_after_the_embedding_text_keeps_its_positions(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A text of as many tokens as there are positions still fits, and before the embedding it does not."""
    for at in JOINS:
        artifact(model_folder("bert"), tmp_path / at, {"method": "prompt", "at": at, "length": 3})
    positions = json.loads((model_folder("bert") / "config.json").read_text())["max_position_embeddings"]
    assert np.isfinite(logits(tmp_path / "embedding", positions)).all()
    assert np.isfinite(logits(tmp_path / "embedding.word", positions - 3)).all()
    with pytest.raises(peltc.PeltError, match=f"E616 .*\nexpected at most {positions - 3} tokens"):
        logits(tmp_path / "embedding.word", positions - 2)


@pytest.mark.parametrize(
    "family, entry, reason",
    [
        ("gpt2", {"at": "embedding"}, "no module of its own"),
        ("t5", {"at": "encoder.embedding"}, "no module of its own"),
        ("gpt2", {"at": "embedding.word", "class_token": "text"}, "does not end in a norm"),
        ("t5", {"at": "decoder.embedding.word"}, "decoder are not available"),
    ],
)
def test_refused_with_the_reason(
    family: str, entry: dict[str, Any], reason: str, model_folder: Callable[..., Path]
) -> None:
    spec = peltc.load_spec({"pelt": 1, "attach": [{"method": "prompt", **entry}]})
    with pytest.raises(peltc.PeltError, match=reason):
        plan_for(spec, model_folder(family))


def test_tokens_of_two_attachments_join_at_one_place(model_folder: Callable[..., Path]) -> None:
    entries = [{"method": "prompt", "name": at.replace(".", "_"), "at": at} for at in JOINS]
    with pytest.raises(peltc.PeltError, match="join or leave at different places"):
        plan_for(peltc.load_spec({"pelt": 1, "attach": entries}), model_folder("bert"))
