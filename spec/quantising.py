"""How weights of the base are quantised: `deploy: {quantise: ...}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peltc.spec.diagnostics import fail, one_of

BITS = {"int4": 4, "int8": 8}
"""The types that weights are quantised to, and how many bits a value has."""
BLOCKS = (16, 32, 64, 128, 256)
"""How many inputs of an output may share a scale: what ONNX Runtime has kernels for."""
COMPUTED = ("int8", "float")
"""What products are computed in: inputs rounded to eight bits, block by block, or as they are."""
SPARED = ("head", "feed_forward.router", "embedding.word")
"""What stays as it is unless a spec says otherwise: maps whose outputs are compared with each other, so that a small
error is another answer; and words, which all layers read. What modules are trained beside stays so too."""


@dataclass(frozen=True)
class Quantise:
    """Which maps and tables are quantised, and how.

    Attributes:
        to: `int4` or `int8`.
        block: how many inputs of an output share a scale.
        zeros: whether a block has a zero point beside its scale.
        compute: `int8`, where inputs are rounded as well, or `float`.
        spared: selectors of maps and tables that stay as they are.
    """

    to: str
    block: int = 32
    zeros: bool = True
    compute: str = "int8"
    spared: tuple[str, ...] = SPARED

    @property
    def bits(self) -> int:
        """How many bits a value has."""
        return BITS[self.to]


def quantise_of(said: str | Mapping[str, Any] | None) -> Quantise | None:
    """What a spec says, after it has been held against the schema."""
    if said is None:
        return None
    if isinstance(said, str):
        return Quantise(said)
    known = dict(said)
    spared = known.pop("except", SPARED)
    return Quantise(**known, spared=(spared,) if isinstance(spared, str) else tuple(spared))


def quantised_to(to: str, said: Quantise | None) -> Quantise:
    """What a spec says with the type that was asked for beside it.

    Raises:
        PeltError: E113 there is no such type.
    """
    if to not in BITS:
        raise fail("E113", f"weights cannot be quantised to '{to}'", expected=one_of([*BITS]))
    return Quantise(to) if said is None else replace(said, to=to)


def quantise_schema() -> dict[str, Any]:
    """The JSON Schema of it."""
    word = {"type": "string", "minLength": 1}
    return {
        "description": "weights of the base's maps and tables become blocks of small whole numbers, and modules stay as"
        " they are: the type alone, or the type with options",
        "anyOf": [
            {"enum": list(BITS)},
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["to"],
                "properties": {
                    "to": {"enum": list(BITS), "description": "the type of the weights"},
                    "block": {
                        "enum": list(BLOCKS),
                        "default": 32,
                        "description": "how many inputs of an output share a scale",
                    },
                    "zeros": {
                        "type": "boolean",
                        "default": True,
                        "description": "each block has a zero point beside its scale",
                    },
                    "compute": {
                        "enum": list(COMPUTED),
                        "default": "int8",
                        "description": "what products are computed in: with inputs rounded to eight bits, which is"
                        " faster on the CPU, or with inputs as they are",
                    },
                    "except": {
                        "anyOf": [word, {"type": "array", "items": word}],
                        "default": list(SPARED),
                        "description": "selectors of the maps and tables that stay as they are; `[]` for none",
                    },
                },
            },
        ],
    }
