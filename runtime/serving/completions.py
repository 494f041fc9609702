"""OpenAI's protocol for completions and chats: requests read, answers written, whole or in pieces. Names of fields are
the protocol's; `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos` and `return_token_ids` are called as
other servers of it call what they have beside it.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peltc.runtime.serving.asking import Asked, Manner, manner
from peltc.runtime.serving.fields import Fields
from peltc.runtime.serving.growth import Growing

if TYPE_CHECKING:
    from peltc.runtime.generating.rows import Piece
    from peltc.runtime.generating.texts import Tokens

CALLERS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that say who asks, or what for, and nothing about the answer."""
TEXT = 4 << 20
"""Characters of a prompt at most; what the model reads of them is bounded in tokens."""


class Completion:
    """A request for completions, and its answer.

    Args:
        said: the request.
        base: what the model is called; any other name is a profile's.

    Raises:
        PeltError: E801, E809 what is wrong with it.
    """

    kind, piece, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, said: Fields, base: str):
        model = said.text("model", needed=True)
        self.model, self.profile = str(model), None if model == base else model
        self.created, self.id = int(time.time()), f"{self.prefix}-{secrets.token_hex(12)}"
        self.asked = self._read(said)
        said.done()
        self.offsets: dict[int, int] = {}
        """How many characters of each text were written."""
        self.counts = [0, 0]
        """Tokens of prompts, and of what follows."""

    def _read(self, said: Fields) -> Asked:
        best = said.whole("logprobs", 0, 20)
        found = manner(said, ["max_tokens"], 16, True, best)
        said.neutral("suffix")
        said.neutral("best_of", found.count)
        return self._asked(said, prompts(said), found, said.truth("echo"))

    def _asked(self, said: Fields, prompts: Sequence[Any], found: Manner, echo: bool = False) -> Asked:
        stream, options = said.truth("stream"), said.inner("stream_options")
        usage = options.truth("include_usage")
        options.neutral("include_obfuscation", False)
        options.done()
        if "stream_options" in said and not stream:
            raise said.wrong("stream_options", "is given without 'stream'")
        if echo and found.best is not None:
            raise said.wrong("echo", "is not served with 'logprobs': those of prompts are not computed")
        said.passed(*CALLERS)
        return Asked(prompts, self.profile, found, stream, usage, echo, said.truth("return_token_ids"))

    # answers

    def opened(self, growing: Growing) -> list[dict[str, Any]]:
        """What is written before the first piece."""
        self.counts[0] = sum(map(len, growing.prompts))
        if not self.asked.echo:
            return []
        each = self.asked.manner.count
        return [self._chunk([self._choice(i, growing.before[i // each], None, None)]) for i in range(len(growing.rows))]

    def went_on(self, index: int, piece: Piece, tokens: Tokens) -> list[dict[str, Any]]:
        """What is written of a piece."""
        self.counts[1] += len(piece.tokens)
        choice = self._choice(index, piece.text, self._logprobs(index, piece, tokens), piece.end)
        if self.asked.ids:
            choice["token_ids"] = list(piece.tokens)
        return [self._chunk([choice])]

    def closed(self) -> list[dict[str, Any]]:
        """What is written after the last piece."""
        return [{**self._chunk([]), "usage": self._usage()}] if self.asked.usage else []

    def whole(self, growing: Growing, pieces: Sequence[Sequence[Piece]], tokens: Tokens) -> dict[str, Any]:
        """The answer at once.

        Args:
            pieces: of each text.
        """
        self.counts = [sum(map(len, growing.prompts)), sum(len(p.tokens) for each in pieces for p in each)]
        choices = []
        for i, each in enumerate(pieces):
            prompt = i // self.asked.manner.count
            logprobs = [self._logprobs(i, piece, tokens) for piece in each]
            text = growing.before[prompt] + "".join(piece.text for piece in each)
            choice = self._choice(i, text, _joined([one for one in logprobs if one]), each[-1].end, True)
            if self.asked.ids:
                choice["token_ids"] = [token for piece in each for token in piece.tokens]
                choice["prompt_token_ids"] = growing.prompts[prompt]
            choices.append(choice)
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices,
                "usage": self._usage()}  # fmt: skip

    def _usage(self) -> dict[str, int]:
        read, written = self.counts
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        found = {"id": self.id, "object": self.piece, "created": self.created, "model": self.model, "choices": choices}
        return {**found, "usage": None} if self.asked.usage else found

    def _choice(self, index: int, text: str, logprobs: Any, end: str | None, whole: bool = False) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end}

    def _logprobs(self, index: int, piece: Piece, tokens: Tokens) -> dict[str, Any] | None:
        if not piece.weighed:
            return None
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in piece.weighed:
            name = _named(one.token, tokens)
            found["tokens"].append(name)
            found["token_logprobs"].append(one.logprob)
            found["top_logprobs"].append({_named(token, tokens): value for token, value in one.best})
            found["text_offset"].append(self.offsets.get(index, 0))
            self.offsets[index] = self.offsets.get(index, 0) + len(name)
        return found


class Chat(Completion):
    """A request for a chat's next message, and its answer."""

    kind, piece, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _read(self, said: Fields) -> Asked:
        told, best = said.truth("logprobs"), said.whole("top_logprobs", 0, 20)
        if best is not None and not told:
            raise said.wrong("top_logprobs", "is given without 'logprobs'")
        names = ("max_completion_tokens", "max_tokens")
        found = manner(said, names, None, True, (best or 0) if told else None)
        for name in ("tools", "functions"):
            said.neutral(name, [])
        said.neutral("tool_choice", "none", "auto")
        said.neutral("function_call", "none", "auto")
        said.neutral("parallel_tool_calls", True, False)
        said.neutral("response_format", {"type": "text"})
        said.neutral("modalities", ["text"])
        said.neutral("service_tier", "auto", "default")
        said.neutral("store", False)
        return self._asked(said, [messages(said)], found)

    def opened(self, growing: Growing) -> list[dict[str, Any]]:
        self.counts[0] = sum(map(len, growing.prompts))
        first = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": i, "delta": first, "logprobs": None, "finish_reason": None}])
                for i in range(len(growing.rows))]  # fmt: skip

    def _choice(self, index: int, text: str, logprobs: Any, end: str | None, whole: bool = False) -> dict[str, Any]:
        content: dict[str, Any] = {"content": text} if text or whole else {}
        own = {"message": {"role": "assistant", **content, "refusal": None}} if whole else {"delta": content}
        return {"index": index, **own, "logprobs": logprobs, "finish_reason": end}

    def _logprobs(self, index: int, piece: Piece, tokens: Tokens) -> dict[str, Any] | None:
        if not piece.weighed:
            return None
        return {"content": [{**_entry(one.token, one.logprob, tokens),
                             "top_logprobs": [_entry(token, value, tokens) for token, value in one.best]}
                            for one in piece.weighed]}  # fmt: skip


def prompts(said: Fields) -> list[Any]:
    """The prompts of a request: texts or token ids, one or several.

    Raises:
        PeltError: E801 it has none, or something else.
    """
    value = said.take("prompt")
    if isinstance(value, str):
        return [_bounded(said, value)]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return [_bounded(said, one) for one in value]
        if _ids(value):
            return [value]
        if all(isinstance(one, list) and _ids(one) for one in value):
            return value
    raise said.wrong("prompt", "is none", "a text, token ids, or a list of either")


def messages(said: Fields) -> list[dict[str, str]]:
    """The messages of a chat, each with its text.

    Raises:
        PeltError: E801, E809.
    """
    value = said.take("messages")
    if not isinstance(value, list) or not value:
        raise said.wrong("messages", "is none", "a list of messages")
    found = []
    for i, one in enumerate(value):
        message = Fields(one, f"messages[{i}]")
        role, content = message.text("role", needed=True), message.take("content")
        if isinstance(content, list):
            content = "".join(_part(Fields(part, f"messages[{i}].content[{n}]")) for n, part in enumerate(content))
        if not isinstance(content, str):
            raise message.wrong("content", "is no text", "a text, or a list of parts of type 'text'")
        name = message.text("name")
        message.neutral("refusal")
        message.neutral("tool_calls", [])
        message.done()
        found.append({"role": str(role), "content": _bounded(said, content), **({"name": name} if name else {})})
    return found


def _part(said: Fields) -> str:
    said.neutral("type", "text")
    text = said.text("text", TEXT, needed=True)
    said.done()
    return str(text)


def _bounded(said: Fields, text: str) -> str:
    if len(text) > TEXT:
        raise said.wrong("prompt", f"has {len(text):,} characters", f"at most {TEXT:,}")
    return text


def _ids(value: list[Any]) -> bool:
    return bool(value) and all(type(one) is int and 0 <= one < 1 << 31 for one in value)


def _named(token: int, tokens: Tokens) -> str:
    """A token as a text; its number where there is no tokenizer."""
    return tokens.single(token) if tokens.there else f"token_id:{token}"


def _entry(token: int, logprob: float, tokens: Tokens) -> dict[str, Any]:
    name = _named(token, tokens)
    return {"token": name, "logprob": logprob, "bytes": list(name.encode())}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Logprobs of a text from those of its pieces."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]} if parts else None
