"""What a model asks for: the names that its `forward` takes, and the sizes that its config says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FIRST, LAST = 6, 96
"""The range that ordinary token ids are drawn from, where the vocabulary is as large."""


@dataclass(frozen=True)
class Sizes:
    """How large to make what may vary.

    Attributes:
        batch: B.
        text: S, tokens of a text, those that stand for an image or a recording not counted.
        target: T, tokens that a decoder is given.
        sound: frames of a recording.
    """

    batch: int = 2
    text: int = 8
    target: int = 6
    sound: int = 64


@dataclass(frozen=True)
class Asked:
    """What inputs are made from.

    Attributes:
        config: the model's, of `transformers`.
        names: what `forward` takes; `needed` those without a default.
        senses: what the class says that it reads: image, video, audio, time, text.
        main: the name of the input that it calls its main one.
        sizes: how large to make what may vary.
        counts: tokens that stand for one row's images, or its recording, by sense.
        draw: where random numbers come from.
    """

    config: Any
    names: tuple[str, ...]
    needed: tuple[str, ...]
    senses: frozenset[str]
    main: str
    sizes: Sizes
    counts: dict[str, int]
    draw: torch.Generator = field(repr=False)

    @staticmethod
    def of(model: Any, config: Any = None) -> Asked:
        """What a model of `transformers`, or a class and a config, ask for."""
        import torch

        accepted = inspect.signature(model.forward).parameters.values()
        named = [p for p in accepted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        read = getattr(model, "input_modalities", None) or ()
        return Asked(
            model.config if config is None else config,
            tuple(p.name for p in named),
            tuple(p.name for p in named if p.default is p.empty),
            frozenset([read] if isinstance(read, str) else read),
            str(getattr(model, "main_input_name", "") or ""),
            Sizes(),
            {},
            torch.Generator().manual_seed(0),
        )

    def sized(self, sizes: Sizes, counts: dict[str, int], seed: int = 0) -> Asked:
        """The same, for other sizes and other numbers."""
        import torch

        return replace(self, sizes=sizes, counts=counts, draw=torch.Generator().manual_seed(seed))

    def name(self, *names: str) -> str:
        """The first of some names that `forward` takes, or empty."""
        return next((name for name in names if name in self.names), "")

    def parts(self, under: str = "") -> Iterator[Any]:
        """The config and the configs within it, outermost first.

        Args:
            under: a pattern; parts whose names match, and what they contain, come before all others.
        """
        from transformers import PreTrainedConfig

        def walk(config: Any) -> Iterator[Any]:
            yield config
            for value in list(vars(config).values()):
                if isinstance(value, PreTrainedConfig):
                    yield from walk(value)

        every = list(walk(self.config))
        if under:
            for part in every:
                for name, value in vars(part).items():
                    if isinstance(value, PreTrainedConfig) and re.search(under, name):
                        yield from walk(value)
        yield from every

    def number(self, *names: str, default: int = 0, under: str = "") -> int:
        """The first of some settings that is a whole number above 0."""
        found = self.setting(*names, kinds=(int,), under=under)
        return default if found is None or found <= 0 else int(found)

    def setting(self, *names: str, kinds: tuple[type, ...], under: str = "") -> Any:
        """The first of some settings that is of some types; None where there is none."""
        for name in names:
            for part in self.parts(under):
                value = getattr(part, name, None)
                if isinstance(value, kinds) and not isinstance(value, bool):
                    return value
        return None

    def floats(self, *shape: int) -> torch.Tensor:
        """Normal numbers."""
        import torch

        return torch.randn(*shape, generator=self.draw)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Whole numbers from `low` up to `high`, which is not among them."""
        import torch

        return torch.randint(low, high, shape, generator=self.draw)
