"""What makes inputs of an artifact from texts, images and sound, by the tokenizer and the processor in its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peltc.runtime.running.processing import prepared
from peltc.runtime.running.tokens import tokenized

Array = np.ndarray[Any, Any]


class Preparing(ABC):
    """An artifact with a folder, a manifest and inputs.

    Attributes:
        folder: the artifact's.
        manifest: what it is made of.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """What the model takes, by name."""

    def tokenize(self, text: str | Sequence[str], max_length: int | None = None) -> dict[str, Array]:
        """Inputs from text, by the tokenizer in the artifact, padded on the left where a decoder generates.

        Nothing is cut unless it is asked for, whatever the tokenizer's file says: a text that is too long for the model
        is refused when the model is called (E616).

        Args:
            max_length: the most tokens of a text, those included that the tokenizer puts around it; the rest is cut
                off at the side where the tokenizer's file says so, at the end otherwise.

        Raises:
            PeltError: E216 a length that is none; E607 the artifact has no tokenizer; E617 no text, or one without
                tokens; E623 the package `tokenizers` is missing.
        """
        graphs = self.manifest.get("graphs", ())
        # A decoder goes on from its texts' ends, which must stand together: others are padded as their tokenizer says.
        left = "decode" in graphs and "encoder" not in graphs
        found = tokenized(
            self.folder / "tokenizer.json", [text] if isinstance(text, str) else list(text), max_length, left
        )
        return {name: array for name, array in found.items() if name in self.inputs}

    def prepare(
        self,
        text: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        sound: Any = None,
        rate: int | None = None,
    ) -> dict[str, Array]:
        """Inputs from text, images and sound, by the processor that the checkpoint came with: resized, normalised, cut
        into frames, and with the tokens in the text that stand for what is seen or heard. Masks that the processor does
        not make are of ones.

        Args:
            text: a text, or one for each row.
            image: a file, an array [H, W, C] or an image of pillow; or a list of them, one for each row.
            sound: a file, or samples [T] of one channel; or a list of them.
            rate: the samples a second of sound that is no file.

        Raises:
            PeltError: E607 the artifact has no processor; E641 a file that cannot be read, sound of another rate than
                the model was trained on, or what the processor does not take; E623 a package that files need is
                missing.
        """
        shapes = {name: value.shape for name, value in self.inputs.items()}
        return prepared(self.folder, shapes, text, image, sound, rate)
