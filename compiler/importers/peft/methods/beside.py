"""What folders of Hugging Face PEFT hold beside a method's own tensors: parameters of the model, whole or by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WRAPPED = ".base_layer"
"""What PEFT puts after the name of a module that it has wrapped."""
COPY, ORIGINAL = ".modules_to_save", ".original_module"
"""What PEFT calls a module's trained copy, and what it was before; it saves them again beside the module at times."""
ROWS = ".token_adapter.trainable_tokens_delta"
"""What follows the name of a table of which single rows are trained. The rows are values, whatever their name says."""
SINGLE_ROWS = "trainable_tokens"
"""The method that replaces them."""


@dataclass(frozen=True)
class Whole:
    """How the parameters of a kind of site are replaced.

    Attributes:
        method: the method that does.
        called: the model's name of a parameter → the method's.
        without: the option that leaves one out.
    """

    method: str
    called: Mapping[str, str]
    without: Mapping[str, tuple[str, Any]]


MAP = Whole("replace", {"weight": "weight", "bias": "bias"}, {"weight": ("only", "bias"), "bias": ("only", "weight")})
NORM = Whole("norm_tuning", {"weight": "gain", "bias": "shift"}, {"weight": ("weight", False), "bias": ("bias", False)})
WHOLE = {"linear": MAP, "table": MAP, "norm": NORM}
"""By the kind of site, how its parameters are replaced."""
