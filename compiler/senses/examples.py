"""Example inputs of a model that reads more than text: made from the model itself, and made again at other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peltc.compiler.senses import images, others, series, sound, text
from peltc.compiler.senses.asked import Asked, Sizes

SENSES: dict[str, Any] = {"image": images, "audio": sound, "time": series}
"""What there is besides text, each with its ways; see `Asked.senses` for the words."""
WORDS = {"batch": "batch", "text": "sequence", "target": "target", "sound": "time"}
"""What an axis is called that follows a size."""
Axes = Mapping[str, tuple[str | None, ...]]


@dataclass(frozen=True)
class Reading:
    """How a model is given what it reads, found once and kept with its base.

    Attributes:
        ways: the way of each sense, by its function's name.
        counts: how many tokens stand for one row's images, or its recording, by sense.
        tokens: which token that is, by sense.
        axes: the names of the axes of each input, in order; None where the axis has one size.
        varied: the sizes of `Sizes` that some axis follows.
        senses: what each input is: image, audio, time or text.
        held: sizes that the graph fixes, where they are not those of `Sizes`.
    """

    ways: Mapping[str, str]
    counts: Mapping[str, int] = field(default_factory=dict)
    axes: Axes = field(default_factory=dict)
    varied: tuple[str, ...] = ()
    senses: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    def sizes(self, **wanted: int) -> Sizes:
        """Sizes as wanted where they are free, and as the graph has them elsewhere."""
        return Sizes(**{name: size for name, size in wanted.items() if name in self.varied}, **self.held)

    def make(self, asked: Asked, sizes: Sizes, seed: int = 0) -> dict[str, Any] | None:
        """Inputs of some sizes, in the order of `forward`; None where a way does not fit."""
        found = self.by_sense(asked.sized(sizes, dict(self.counts), seed))
        if found is None:
            return None
        inputs = {name: tensor for made in found.values() for name, tensor in made.items()}
        order = [name for name in asked.names if name in inputs]
        return {name: inputs[name] for name in (*order, *(n for n in inputs if n not in order))}

    def by_sense(self, asked: Asked) -> dict[str, dict[str, Any]] | None:
        """Inputs by sense, each name once; None where a way does not fit."""
        found: dict[str, dict[str, Any]] = {"text": text.read(asked) | others.read(asked)}
        for sense, name in self.ways.items():
            made = next(way for way in SENSES[sense].WAYS if way.__name__ == name)(asked)
            if made is None:
                return None
            found["text"] = {name: tensor for name, tensor in found["text"].items() if name not in made}
            found[sense] = made
        return found

    def fixed(self, *sizes: str) -> Reading:
        """The same with some sizes no longer free; a batch that is not free is of one."""
        gone = {WORDS[size] for size in sizes}
        axes = {name: tuple(None if (word or "").split("_")[0] in gone else word for word in words)
                for name, words in self.axes.items()}  # fmt: skip
        held = {"batch": 1} if "batch" in sizes else {}
        return replace(self, axes=axes, held=held, varied=tuple(s for s in self.varied if s not in sizes))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Reading:
        """What `to_json` wrote."""
        axes = {name: tuple(words) for name, words in data["axes"].items()}
        return Reading(data["ways"], data["counts"], axes, tuple(data["varied"]), data["senses"], data["held"],
                       data["tokens"])  # fmt: skip
