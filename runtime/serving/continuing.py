"""The extension of the Open Inference Protocol by which texts go on, as KServe and Triton have it: `generate` and
`generate_stream`. Names of fields are the protocol's.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/generate_rest.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peltc.runtime.serving.asking import Asked, manner
from peltc.runtime.serving.fields import Fields
from peltc.runtime.serving.growth import Growing
from peltc.runtime.serving.inference import PROFILE

if TYPE_CHECKING:
    from peltc.runtime.generating.rows import Piece
    from peltc.runtime.generating.texts import Tokens

TEXT = 4 << 20
"""Characters of a prompt at most."""
NEW = 20
"""How many tokens a text gets where nothing is said, as in `generate` of `transformers`."""


class Continuation:
    """A request for the continuation of a text, and its answer. What its parameters leave open is as the model's own
    generation config says.

    Args:
        said: the request.
        model: what the model is called.
        stream: whether pieces are wanted.

    Raises:
        PeltError: E801, E809 what is wrong with it.
    """

    def __init__(self, said: Fields, model: str, stream: bool):
        self.model = model
        text, inner = said.text("text_input", TEXT, needed=True), said.inner("parameters")
        found = manner(inner, ("max_tokens", "max_new_tokens"), NEW, False)
        if found.count != 1:
            raise inner.wrong("n", f"is {found.count}", "1")
        profile = inner.text(PROFILE) or None
        self.asked = Asked([text], profile, found, stream, id=said.text("id") or "")
        inner.done()
        said.done()

    def opened(self, growing: Growing) -> list[dict[str, Any]]:
        """What is written before the first piece."""
        return []

    def went_on(self, index: int, piece: Piece, tokens: Tokens) -> list[dict[str, Any]]:
        """What is written of a piece."""
        return [self._answer(piece.text, piece.end)]

    def closed(self) -> list[dict[str, Any]]:
        """What is written after the last piece."""
        return []

    def whole(self, growing: Growing, pieces: Sequence[Sequence[Piece]], tokens: Tokens) -> dict[str, Any]:
        """The answer at once."""
        return self._answer("".join(piece.text for piece in pieces[0]), pieces[0][-1].end)

    def _answer(self, text: str, end: str | None) -> dict[str, Any]:
        known = {"id": self.asked.id} if self.asked.id else {}
        details = {"details": {"finish_reason": end}} if end else {}
        return {**known, "model_name": self.model, "text_output": text, **details}
