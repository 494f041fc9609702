"""Tokens of texts and texts of tokens, one after another: characters that several tokens make, and strings at which a
text ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from peltc.spec.diagnostics import Place, fail
from peltc.spec.packages import needing

FILE = "tokenizer.json"
AROUND = 6
"""How many tokens before a new one are read with it: whether a word begins with a space is told by what it follows."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of a character make that are not all there yet."""


class Tokens:
    """The tokenizer in an artifact.

    Args:
        folder: the artifact's.

    Attributes:
        there: whether it has one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.there = (folder / FILE).is_file()

    @cached_property
    def tokenizer(self) -> Any:
        """That of the package `tokenizers`.

        Raises:
            PeltError: E607 the artifact has none; E623 the package is missing.
        """
        if not self.there:
            raise fail("E607", "the artifact has no tokenizer.json", Place(str(self.folder)),
                       "prompts of token ids, and `return_token_ids`",
                       "put the model's tokenizer beside it and compile again")  # fmt: skip
        with needing("generation of text"):
            from tokenizers import Tokenizer

        found = Tokenizer.from_file(str(self.folder / FILE))
        found.no_padding()
        found.no_truncation()
        return found

    @cached_property
    def templates(self) -> Any:
        """The tokenizer of `transformers`, which knows the chat template; None where there is none."""
        with needing("chat completions"):
            from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(self.folder) if self.there else None
        return found if found is not None and found.chat_template else None

    def ids(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer puts around it.

        Raises:
            PeltError: E607, E623.
        """
        return list(self.tokenizer.encode(text).ids)

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of messages, up to where the answer begins, by the checkpoint's own template.

        Raises:
            PeltError: E810 there is no template, or it refuses the messages; E607, E623.
        """
        if self.templates is None:
            raise fail("E810", "the model's tokenizer has no chat template", Place(str(self.folder)),
                       "a checkpoint with a chat_template", "/v1/completions takes a prompt as it is")  # fmt: skip
        try:
            text = self.templates.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template's own words, for it is a program
            raise fail("E810", f"the model's chat template refuses the messages: {str(error)[:200]}") from None
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids)))

    def single(self, token: int) -> str:
        """A token by itself, special ones too."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


class Reader:
    """Makes text of one token after another.

    Args:
        tokens: the tokenizer.
        before: the ids that they follow.
        stops: strings at which the text ends, without them.
    """

    def __init__(self, tokens: Tokens, before: Sequence[int], stops: Sequence[str] = ()):
        self.tokens, self.stops = tokens, stops
        self.ids = [*before[-AROUND:]]
        self.begin, self.end = 0, len(self.ids)
        self.waiting = ""
        """What may be the beginning of a stop string."""

    def read(self, token: int, last: bool) -> tuple[str, bool]:
        """What a token adds to the text.

        Args:
            last: whether no other follows.

        Returns:
            Text, and whether a stop string has ended it.
        """
        self.ids.append(token)
        known = self.tokens.text(self.ids[self.begin : self.end])
        whole = self.tokens.text(self.ids[self.begin :])
        if last or (len(whole) > len(known) and not whole.endswith(UNFINISHED)):
            self.waiting += whole[len(known) :]
            self.begin, self.end = self.end, len(self.ids)
        found = [at for stop in self.stops if (at := self.waiting.find(stop)) >= 0]
        if found:
            return self.waiting[: min(found)], True
        keep = 0 if last else max((_begun(self.waiting, stop) for stop in self.stops), default=0)
        said, self.waiting = self.waiting[: len(self.waiting) - keep], self.waiting[len(self.waiting) - keep :]
        return said, False


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
