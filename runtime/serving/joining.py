"""Requests made one batch, and its outputs taken apart again."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.runtime.running.session import Session
from peltc.spec.modes import BANK

Array = np.ndarray[Any, Any]
ROWS = "batch"
"""What graphs call the axis of texts."""


@dataclass(frozen=True)
class Ask:
    """A request's texts.

    Attributes:
        feeds: what `Session.feeds` made, [texts, ...] by input name.
        profiles: the name of a profile, or None, for each text.
    """

    feeds: Mapping[str, Array]
    profiles: tuple[str | None, ...]

    @property
    def rows(self) -> int:
        """How many texts."""
        return len(self.profiles)

    @property
    def length(self) -> int:
        """How many tokens its longest text has, padding included."""
        return max((array.shape[1] for array in self.feeds.values() if array.ndim > 1), default=1)


class Joiner:
    """Joins requests to one session, as its graph allows.

    Texts of different lengths are padded at their ends where a mask hides the padding; it is cut off the outputs. Where
    no mask reads an axis, or an output's axis is none of the inputs', only requests of equal sizes are joined.

    Args:
        session: the artifact.
    """

    def __init__(self, session: Session):
        self.axes = {name: [str(axis) for axis in spec.shape] for name, spec in session.inputs.items()}
        outputs = {o.name: [str(axis) for axis in o.shape] for o in session.inference.get_outputs()}
        self.outputs = outputs
        masked = {axes[1] for name, axes in self.axes.items() if name.endswith("attention_mask") and len(axes) == 2}
        known = {axis for axes in self.axes.values() for axis in axes}
        named = {axis for axes in outputs.values() for axis in axes if not axis.isdigit()}
        self.padded = masked if named <= known else set()
        self.joins = all(axes[:1] == [ROWS] for axes in outputs.values())
        """Whether outputs can be taken apart at all."""
        self.mixes = (session.kept.record or {}).get("mode") == BANK
        """Whether rows of one batch may have different profiles."""
        self.padding = _padding(session)

    def kind(self, ask: Ask) -> Hashable:
        """What requests have in common that can be joined."""
        if not self.joins:
            return id(ask)
        sizes = tuple(
            (name, tuple(size for axis, size in zip(self.axes[name][1:], array.shape[1:], strict=True)
                         if axis not in self.padded))
            for name, array in ask.feeds.items()
        )  # fmt: skip
        return sizes, None if self.mixes else ask.profiles[0]

    def join(self, asks: Sequence[Ask]) -> tuple[dict[str, Array], Any]:
        """One batch of requests of one kind: its inputs, and what a session is given as its profiles."""
        feeds = {}
        for name in asks[0].feeds:
            arrays = [ask.feeds[name] for ask in asks]
            sizes = np.max([array.shape[1:] for array in arrays], axis=0, initial=0).astype(int)
            value = self.padding if name.endswith("input_ids") else 0
            more = [[(0, 0), *((0, int(n)) for n in sizes - array.shape[1:])] for array in arrays]
            feeds[name] = np.concatenate(
                [np.pad(array, after, constant_values=value) for array, after in zip(arrays, more, strict=True)]
            )
        if self.mixes:
            return feeds, [name for ask in asks for name in ask.profiles]
        return feeds, asks[0].profiles[0]

    def split(self, outputs: Mapping[str, Array], asks: Sequence[Ask]) -> list[dict[str, Array]]:
        """The outputs of each request, without what is padding."""
        found, begin = [], 0
        for ask in asks:
            sizes = {axis: size for name, array in ask.feeds.items()
                     for axis, size in zip(self.axes[name][1:], array.shape[1:], strict=True)}  # fmt: skip
            own = {}
            for name, array in outputs.items():
                cut = [
                    slice(sizes.get(axis)) if axis in self.padded else slice(None) for axis in self.outputs[name][1:]
                ]
                own[name] = array[(slice(begin, begin + ask.rows), *cut)] if self.joins else array
            found.append(own)
            begin += ask.rows
        return found


def _padding(session: Session) -> int:
    """The id that the model knows for padding; 0 where it knows none, for a mask hides it anyway."""
    file = session.folder / "config.json"
    said = json.loads(file.read_text(encoding="utf-8")).get("pad_token_id") if file.is_file() else None
    return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else 0
