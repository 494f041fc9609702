"""Generation on Triton: the loop around a graph with a cache. A request has one text, and is answered token by token.

This file is copied into the repository, as `model.py` of a model of its own, and runs in the server, where peltc is not
installed: numpy is all that it needs. Each step is a request to the graph's own model in the same server, so that
texts of other requests that have grown as long are read in the same run.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np

NAME = "profile_name"
Array = Any


def pick(logits: Array, temperature: float, top_k: int, top_p: float, draw: Any) -> int:
    """The next token: the likeliest one, or one that is drawn.

    Args:
        logits: [V].
        temperature: by which they are divided before one is drawn; 0 for the likeliest one.
        top_k: how many of the likeliest are drawn from; 0 for all.
        top_p: the share of the likelihood that those have which are drawn from, the likeliest first.
    """
    if not temperature:
        return int(logits.argmax())
    likely = shares(logits.astype(np.float64) / temperature, top_k, top_p)
    return int(draw.choice(len(likely), p=likely))


def shares(logits: Array, top_k: int, top_p: float) -> Array:
    """How likely each token is [V], of those that are drawn from."""
    if 0 < top_k < len(logits):
        logits = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    found = np.exp(logits - logits.max())
    found /= found.sum()
    if top_p < 1:
        order = np.argsort(-found, kind="stable")
        before = np.cumsum(found[order]) - found[order]  # of those that are likelier
        found[order[before >= top_p]] = 0
        found /= found.sum()
    return found


class TritonPythonModel:
    """The model, as the server's backend for Python calls it; `about` is what the export wrote beside this file."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the export wrote down."""
        import triton_python_backend_utils as utils

        self.utils: Any = utils
        folder = Path(args["model_repository"]) / args["model_version"]
        self.about: dict[str, Any] = json.loads((folder / "loop.json").read_text(encoding="utf-8"))
        file = folder / "starts.npz"
        self.starts: dict[str, Array] = dict(np.load(file, allow_pickle=False)) if file.is_file() else {}
        self.running = 0

    async def execute(self, requests: list[Any]) -> None:
        """Answer requests at once; while one waits for a step of its own, others take theirs."""
        await asyncio.gather(*(self._answer(request) for request in requests))

    async def _answer(self, request: Any) -> None:
        sender = request.get_response_sender()
        self.running += 1
        try:
            if self.running > self.about["queue"]:
                raise ValueError(f"E803 {self.about['queue']} texts are generated already; try again later")
            asked = self._asked(request)
            tokens = []
            async for token in self._tokens(asked):
                if sender.is_cancelled():
                    break
                tokens.append(token)
                if asked["stream"]:
                    sender.send(self._response([token]))
            if not asked["stream"] and tokens:
                sender.send(self._response(tokens))
        except ValueError as error:
            wrong = self.utils.TritonError(str(error), self.utils.TritonError.INVALID_ARG)
            sender.send(self.utils.InferenceResponse([], error=wrong))
        finally:
            self.running -= 1
            sender.send(flags=self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, tokens: list[int]) -> Any:
        return self.utils.InferenceResponse([self.utils.Tensor("tokens", np.array(tokens, np.int64))])

    def _asked(self, request: Any) -> dict[str, Any]:
        """What a request asks for, held against the model.

        Raises:
            ValueError: with the code and the words that the library has for it.
        """
        about, found = self.about, dict(self.about["defaults"])
        for name in (*found, "input_ids", NAME):
            tensor = self.utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                array = tensor.as_numpy().reshape(-1)
                if name != "input_ids" and len(array) != 1:
                    raise ValueError(f"E606 the input '{name}' has {len(array)} values, and one is meant")
                found[name] = array if name == "input_ids" else array[0]
        ids = found["input_ids"]
        if not len(ids):
            raise ValueError("E617 the input 'input_ids' is empty")
        outside = (ids < 0) | (ids >= about["vocabulary"])
        if outside.any():
            raise ValueError(f"E615 the input 'input_ids' holds {ids[outside][0]}, and the model's table has"
                             f" {about['vocabulary']} rows")  # fmt: skip
        if found["max_new_tokens"] < 1:
            raise ValueError(f"E606 'max_new_tokens' is {found['max_new_tokens']}, and is at least 1")
        if not (found["temperature"] >= 0 and found["top_k"] >= 0 and 0 < found["top_p"] <= 1):
            raise ValueError("E606 'temperature' and 'top_k' are at least 0, and 'top_p' is above 0 and at most 1")
        read, grown = (0, len(ids)) if about["encoder"] is None else (len(ids), 1)
        for length, most in ((read, about["longest"]), (grown + found["max_new_tokens"] - 1, about["positions"])):
            if most is not None and length > most:
                raise ValueError(f"E616 the text comes to {length} tokens, and the model has positions for {most}")
        found["row"] = self._row(found.pop(NAME, b"").decode("utf-8", "replace"))
        return found

    def _row(self, name: str) -> int:
        rows, bare = self.about["rows"], self.about["bare"]
        if not name:
            if bare:
                raise ValueError(f"E627 no profile is named, and this model has no bare base: {bare}")
            return -1
        if name not in (rows or {}):
            raise ValueError(f"E626 there is no profile {name!r:.80}")
        return int(rows[name])

    async def _tokens(self, asked: dict[str, Any]) -> Any:
        """Tokens as they come, the one that ends the text included."""
        about = self.about
        row = {about["row"]: np.array([[asked["row"]]], np.int64)} if about["row"] else {}
        ids = asked["input_ids"].astype(np.int64)[None]
        source: dict[str, Any] = {}
        seen = np.ones_like(ids)
        if about["encoder"] is not None:
            given = {"input_ids": ids, "attention_mask": seen}
            encoder = about["encoder"]
            read = {name: given[name] for name in encoder["inputs"]}
            source = await self._run(encoder["model"], {**read, **row}, encoder["outputs"])
            ids = np.array([[about["start"]]], np.int64)
        cache: dict[str, Any] = {name: self._empty(name, one) for name, one in about["cache"].items()}
        draw, past = np.random.default_rng(None if asked["seed"] < 0 else int(asked["seed"])), 0
        for _ in range(int(asked["max_new_tokens"])):
            length = past + ids.shape[1]
            mask = seen if about["encoder"] is not None else np.ones((1, length), np.int64)
            given = {about["ids"]: ids, "attention_mask": mask, "position_ids": np.arange(past, length)[None]}
            given = {name: given[name] for name in about["inputs"]}
            made = await self._run(about["decode"], {**given, **row, **cache, **source}, about["outputs"])
            logits = made["logits"].as_numpy()[0, -1]
            if np.isnan(logits).any():
                raise ValueError("E626 the profile is not in the server's graph yet, or its answer is no number")
            token = pick(logits, asked["temperature"], int(asked["top_k"]), asked["top_p"], draw)
            yield token
            if token in about["end"]:
                return
            cache = {name: made[one["grown"]] for name, one in about["cache"].items()}
            ids, past = np.array([[token]], np.int64), length

    def _empty(self, name: str, about: dict[str, Any]) -> Array:
        """What a cache is before the first token."""
        start = self.starts.get(name)
        return np.zeros(about["shape"], about["dtype"]) if start is None else start.astype(about["dtype"])

    async def _run(self, model: str, given: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Outputs of a model of this server, by name.

        Args:
            given: arrays, or tensors of an earlier answer, which are not copied.

        Raises:
            ValueError: what the server says.
        """
        tensors = [
            self.utils.Tensor(name, value) if isinstance(value, np.ndarray)
            else self.utils.Tensor.from_dlpack(name, value.to_dlpack())
            for name, value in given.items()
        ]  # fmt: skip
        memory = self.utils.PreferredMemory(self.utils.TRITONSERVER_MEMORY_CPU, 0)
        request = self.utils.InferenceRequest(model_name=model, requested_output_names=outputs, inputs=tensors,
                                              preferred_memory=memory)  # fmt: skip
        answer = await request.async_exec()
        if answer.has_error():
            raise ValueError(answer.error().message())
        return {tensor.name(): tensor for tensor in answer.output_tensors()}
