"""A tiny BERT with modules of random weights; what its tests share lies beside them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import peltc

sys.path.insert(0, str(Path(__file__).parent))
from tiny import batch, shake

Attach = Callable[..., Any]


@pytest.fixture(scope="session")
def base() -> Any:
    """The tiny BERT; take a copy."""
    return models.build("bert")


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return batch()


@pytest.fixture
def attached(base: Any, cache: Any) -> Attach:
    """`attached(entry, ...)`: a copy of the model with these attachments and random weights. The base is in
    evaluation, without dropout; the modules are in training where `training` says so."""

    def attach(*entries: Mapping[str, Any], training: bool = False, dtype: str = "float32", std: float = 0.2) -> Any:
        model = copy.deepcopy(base).to(getattr(torch, dtype))
        peltc.attach(model, {"pelt": 1, "attach": [dict(entry) for entry in entries]})
        shake(model.pelt, std)
        model.pelt.train(training)
        return model

    return attach
