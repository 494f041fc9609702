"""What an export gives, and the sizes and names that it is made with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peltc.compiler.senses.examples import Reading

OPSET = 20
DECODE = "decode"
GRAPHS = (DECODE, "encoder")
"""The variants of a model that generates: graphs with a cache of keys and values; see `generation`."""
BATCH, SEQUENCE, TARGET = 2, 8, 6
"""Example sizes: at least 2, since torch takes an axis of size 1 for a constant."""
AXES = ("sequence", "target")
"""What the axes after the batch are called, by their lengths in the example inputs, in order of appearance."""


def stages(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Which graphs generation with a model takes, by its config."""
    return GRAPHS if config.get("is_encoder_decoder") else GRAPHS[:1]


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported graph: its parameters are graph inputs, named as in the model.

    Attributes:
        parameters: shapes by fully qualified name, of those that the graph reads.
        ties: other names of the same tensor.
        stem: what precedes the base model's names in a task model.
        metadata: `transformers`' own record of the export.
        repeats: which layers were exported for all that equal them, or why none were.
        reading: how the model is given its inputs, where it reads more than text.
    """

    model: Any
    parameters: dict[str, tuple[int, ...]]
    ties: dict[str, tuple[str, ...]]
    stem: str
    metadata: dict[str, Any]
    repeats: str = ""
    reading: Reading | None = None

    @property
    def senses(self) -> Mapping[str, str]:
        """What each input is: see `Reading`; nothing where all is text."""
        return self.reading.senses if self.reading else {}

    @classmethod
    def of(
        cls,
        model: Any,
        component: Any,
        parameters: dict[str, tuple[int, ...]],
        ties: Mapping[str, tuple[str, ...]],
        repeats: str,
    ) -> Exported:
        """An export from what `transformers` gives of a model: its graph and its record of it."""
        record = dataclasses.asdict(component.metadata)
        record["export_config"] = {k: repr(v) for k, v in record["export_config"].items()}
        kept = {name: ties[name] for name in parameters if ties.get(name)}
        return cls(component.program, parameters, kept, getattr(model, "base_model_prefix", ""), record, repeats)
