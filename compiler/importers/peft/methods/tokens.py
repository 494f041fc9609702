"""Trainable tokens as Hugging Face PEFT stores them: single rows of a table, in the order in which they are listed.

A head that is the same tensor as the table changes with it. The file holds the rows once more for the head, and for
whatever else is tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peltc.compiler.importers.formats import COMMON, TARGETS, Array, Config, Entry, Format, Shapes
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """Which rows."""
    return Entry("trainable_tokens", (("rows", list(config.get("token_indices") or ())),))


def measured(shapes: Shapes, site: Site) -> dict[str, Any]:
    """Whether something is tied to the table."""
    return {"tied": "together"} if site.kind == "table" and site.ties else {}


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The rows [N, D]."""
    return dict(tensors)


TRAINABLE_TOKENS = Format(
    kind="TRAINABLE_TOKENS",
    tensors={"trainable_tokens_delta": "values"},
    read={**TARGETS, "token_indices": {"type": "array", "minItems": 1, "uniqueItems": True,
                                       "items": {"type": "integer", "minimum": 0}}},
    inert=COMMON | {"init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    kinds=("table", "linear"),
    measured=measured,
    tied=True,
)  # fmt: skip
