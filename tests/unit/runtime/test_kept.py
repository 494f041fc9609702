"""What a cache carries goes with its rows, and is each copy's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from peltc.runtime.kept import carried, carry
from peltc.runtime.training.keeping import holds_text


def filled(rows: int = 3) -> DynamicCache:
    cache = DynamicCache()
    cache.update(*(torch.arange(rows, dtype=torch.float32).reshape(rows, 1, 1, 1).expand(rows, 2, 4, 8),) * 2, 0)
    return cache


@pytest.fixture(params=["decoder", "both"])
def cache(request: Any) -> Any:
    found = filled() if request.param == "decoder" else EncoderDecoderCache(filled(), filled())
    carry(found, {"gate": torch.arange(3.0).reshape(3, 1, 1)})
    return found


def rows(cache: Any) -> tuple[list[float], list[float]]:
    """Which rows a cache has, by its keys and by what it carries."""
    own = getattr(cache, "self_attention_cache", cache)
    return own.layers[0].keys[:, 0, 0, 0].tolist(), carried(cache)["gate"].flatten().tolist()


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]), ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
     ("batch_select_indices", torch.tensor([1, 2]), [1, 2])],
)  # fmt: skip
def test_what_is_carried_follows_the_rows(cache: Any, name: str, argument: Any, expected: list[int]) -> None:
    twin = copy.deepcopy(cache)
    getattr(twin, name)(argument)
    assert rows(twin) == (expected, expected)
    assert rows(cache) == ([0, 1, 2], [0, 1, 2]), "a copy has its own"
    carry(twin, {"gate": carried(twin)["gate"] + 10})
    getattr(twin, name)(argument if name == "batch_repeat_interleave" else torch.tensor([0]))
    assert carried(twin)["gate"].flatten()[0] == expected[0] + 10, "carried anew, it goes on following"


def test_a_cache_tells_whether_there_is_text_in_it() -> None:
    assert holds_text(filled()) and not holds_text(DynamicCache()) and not holds_text(None)
    assert holds_text((torch.ones(1),)), "of what cannot tell there may be some"
    assert carried(DynamicCache()) == {}
