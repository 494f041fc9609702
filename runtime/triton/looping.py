"""What the loop of generation is told about an artifact: which inputs its graphs have, what caches begin with, when a
text ends, and how tokens are chosen where a request does not say."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.manifest import CACHE, GIVEN, GROWN
from peltc.compiler.files.talk import Talk
from peltc.runtime.triton.configs import Port, TritonTuning
from peltc.runtime.triton.graphs import Graph
from peltc.spec.diagnostics import Place, fail

FLOATS = {"FP16": "float16", "FP32": "float32", "FP64": "float64"}
"""Types of caches that numpy has too."""
DONE = {
    "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id", "bos_token_id", "max_new_tokens",
    "max_length", "decoder_start_token_id", "use_cache", "transformers_version", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "cache_implementation",
}  # fmt: skip
"""What a generation config may say that the loop does, or that changes no token."""
IDLE = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0,
        "num_return_sequences": 1, "diversity_penalty": 0.0, "encoder_repetition_penalty": 1.0}  # fmt: skip
"""What says nothing, by key."""
NEW = 20
"""Tokens where neither a request nor the model says how many, as in `transformers`."""
ASKED = (
    Port("input_ids", "INT64", (-1,)),
    Port("profile_name", "BYTES", (1,), True),
    Port("max_new_tokens", "INT64", (1,), True),
    Port("temperature", "FP32", (1,), True),
    Port("top_k", "INT64", (1,), True),
    Port("top_p", "FP32", (1,), True),
    Port("seed", "INT64", (1,), True),
    Port("stream", "BOOL", (1,), True),
)
ANSWERED = (Port("tokens", "INT64", (-1,)),)


def files_of(
    folder: Path,
    graphs: Mapping[str, Graph],
    models: Mapping[str, str],
    limits: Mapping[str, Any],
    profiles: Mapping[str, Any],
    tuning: TritonTuning,
    talk: Talk,
) -> dict[str, bytes]:
    """The files that the loop reads, by name.

    Args:
        folder: the artifact's.
        graphs: by name.
        models: what the server calls each.
        limits: what the model's tables allow.
        profiles: what the loop is told of profiles: `rows`, `bare`, `row`.

    Raises:
        PeltError: E811 a graph that the loop cannot run, or a model that does not say how a text begins.
    """
    place, graph, encoder = Place(str(folder)), graphs["decode"], graphs.get("encoder")
    _check(place, graph, encoder)
    ids = "input_ids" if encoder is None else "decoder_input_ids"
    given = {tensor.name: tensor for tensor in graph.inputs}
    grown = {tensor.name for tensor in graph.outputs}
    caches = {name: tensor for name, tensor in given.items() if name.startswith(GIVEN)}
    made = [] if encoder is None else [tensor.name for tensor in encoder.outputs if tensor.name in given]
    taken = [name for name in given if name not in caches and name not in made and name != graph.row]
    unknown = [name for name in taken if name not in (ids, "attention_mask", "position_ids")]
    if unknown:
        raise fail("E811", f"the loop does not know what the graph's input '{unknown[0]}' is", place,
                   f"{ids}, attention_mask, position_ids, and caches")  # fmt: skip
    cache = {}
    for name, tensor in caches.items():
        if tensor.type not in FLOATS or (end := GROWN + name.removeprefix(GIVEN)) not in grown:
            raise fail("E811", f"the cache {name} is {tensor.type}, which numpy, and so the loop, does not have", place,
                       "an artifact compiled with `precision: float32` or `float16`")  # fmt: skip
        shape = [1, *(axis if isinstance(axis, int) else 0 for axis in tensor.axes[1:])]
        cache[name] = {"grown": end, "shape": shape, "dtype": FLOATS[tensor.type]}
    said = _said(folder)
    start = said.get("decoder_start_token_id", said.get("bos_token_id"))
    if encoder is not None and not isinstance(start, int):
        raise fail("E811", "the model does not say which token its texts begin with", place,
                   "`decoder_start_token_id` in generation_config.json or config.json")  # fmt: skip
    for key in sorted(_undone(folder)):
        talk(f"warning: the loop on Triton does not do what generation_config.json says of '{key}'")
    most = {axis: limit["most"] for axis, limit in limits["lengths"].items()}
    positions = most.get("sequence" if encoder is None else "target")
    end_ids = said.get("eos_token_id")
    about = {
        "decode": models["decode"],
        "encoder": None if encoder is None else {
            "model": models["encoder"], "outputs": made,
            "inputs": [tensor.name for tensor in encoder.inputs if tensor.name != encoder.row]},
        "ids": ids, "inputs": taken, "cache": cache, "outputs": ["logits", *(one["grown"] for one in cache.values())],
        "start": start, "end": end_ids if isinstance(end_ids, list) else [] if end_ids is None else [end_ids],
        "vocabulary": limits["values"].get("input_ids", 1 << 31),
        "longest": min(most.get("sequence", tuning.tokens), tuning.tokens) if encoder is not None else None,
        "positions": min(positions or tuning.tokens, tuning.tokens), "queue": tuning.queue,
        "defaults": _defaults(said), **profiles,
    }  # fmt: skip
    files = {"loop.json": json_of(about)}
    if (folder / CACHE).is_file():
        from safetensors.numpy import load_file

        files["starts.npz"] = _archive({name: start for name, start in load_file(folder / CACHE).items()})
    return files


def _check(place: Place, graph: Graph, encoder: Graph | None) -> None:
    for one in (graph, encoder):
        if one is not None and not one.batched:
            odd = next(t for t in (*one.inputs, *one.outputs) if t.name != one.row and t.axes[:1] != ("batch",))
            raise fail("E811", f"the first axis of '{odd.name}' is not that of the texts, so that the loop cannot run"
                       " the graph", place, "a graph that `pelt-compile --generation` has made")  # fmt: skip


def _said(folder: Path) -> dict[str, Any]:
    """What the model's configs say of generation, the generation config first."""
    return {**_read(folder / "config.json"), **_read(folder / "generation_config.json")}


def _read(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: value for key, value in found.items() if value is not None}


def _undone(folder: Path) -> set[str]:
    """What the generation config says that the loop does not do."""
    return {key for key, value in _read(folder / "generation_config.json").items()
            if key not in DONE and not key.startswith("_") and value not in (False, IDLE.get(key), [], {})}  # fmt: skip


def _defaults(said: Mapping[str, Any]) -> dict[str, Any]:
    """What is taken where a request says nothing; a seed below 0 is another one each time."""
    drawn = bool(said.get("do_sample", False))
    return {
        "max_new_tokens": said.get("max_new_tokens", NEW),
        "temperature": float(said.get("temperature", 1.0)) if drawn else 0.0,
        "top_k": said.get("top_k", 0), "top_p": float(said.get("top_p", 1.0)), "seed": -1, "stream": True,
    }  # fmt: skip


def json_of(content: Any) -> bytes:
    """What a file of JSON has."""
    return (json.dumps(content, indent=1) + "\n").encode()


def _archive(arrays: Mapping[str, Any]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()
