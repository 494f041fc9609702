"""A cache that grows in place: keys and values in buffers with room, which each step writes behind what is there.

What `generate` carries from step to step are views of the filled part of the buffers, so that caches are cropped or
copied as any others are. Beams that are chosen anew are copied once, with room for what is to come, and not at all
where each goes on from itself. A view that is not the buffer's whole filled part, or is no view any more, is copied
into a buffer of its own, so that no text ever writes into another's past.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peltc.compiler.files.manifest import GIVEN, GROWN, LENGTH

STEP = 64
"""Buffers have room for a multiple of it."""


@dataclass
class Buffer:
    """Keys or values [B, K, C, Dh] of which so many positions are filled."""

    tensor: Any
    filled: int

    def whole(self, past: Any) -> bool:
        """Whether a past is all that is filled, where it lies."""
        same = past.data_ptr() == self.tensor.data_ptr() and past.stride() == self.tensor.stride()
        return bool(same and past.shape[2] == self.filled)


MARK = "pelt_buffer"
"""The attribute of a view that holds its buffer."""


def buffer_of(past: Any, total: int, room: int) -> Buffer:
    """A buffer that holds a past [B, K, P, Dh] and has room for what is new: the past's own, or a copy.

    Args:
        total: how many positions there will be.
        room: for how many there is to be room at least.
    """
    import torch

    known: Buffer | None = getattr(past, MARK, None)
    length = past.shape[2]
    if known is not None and known.whole(past) and known.tensor.shape[2] >= total:
        return known
    places = -(-max(total, room) // STEP) * STEP
    batch, heads, _, width = past.shape
    tensor = torch.empty(batch, heads, places, width, dtype=past.dtype)
    tensor[:, :, :length] = past
    return Buffer(tensor, length)


def reorder(cache: Any, rows: Any) -> None:
    """Let the rows of a text's cache, beams that are chosen anew, be others of them, in place.

    Keys and values of a cross-attention stay: beams are of one text, whose encoder's states are the same.

    Args:
        cache: of `transformers`, whose keys and values are views of buffers.
        rows: for each row the one that it goes on from [B].
    """
    if rows.tolist() == list(range(len(rows))):
        return
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        layer.keys, layer.values = (_reordered(past, rows) for past in (layer.keys, layer.values))


def _reordered(past: Any, rows: Any) -> Any:
    """Rows of a past, in a buffer with the room of its own."""
    import torch

    known: Buffer | None = getattr(past, MARK, None)
    if known is None or not known.whole(past):
        return past.index_select(0, rows)
    _, heads, room, width = known.tensor.shape
    made = Buffer(torch.empty(len(rows), heads, room, width, dtype=past.dtype), known.filled)
    view = made.tensor[:, :, : made.filled]
    for i, row in enumerate(rows.tolist()):
        view[i] = past[row]
    setattr(view, MARK, made)
    return view


BEGUN = "the graph begins the cache itself, with keys that profiles bring: it adds more than there are new tokens"
"""Why a cache is copied in artifacts with such profiles."""


def begins(manifest: Mapping[str, Any]) -> bool:
    """Whether a graph begins its cache itself, with what profiles bring: it adds more keys than there are tokens."""
    effects = {effect for module in manifest["modules"] for effect in module["effects"]}
    return bool(manifest["profiles"] and effects & {"prepend", "keys", "values"})


class InPlace:
    """Runs a graph that shares its cache; called like a runner of `transformers`.

    Args:
        runner: `transformers`' own of the graph, for its session and what it makes of outputs.
        grown: the outputs that are written into buffers.
        copying: gives the runner of the graph that copies its cache, for what this one cannot do.
        room: for how many positions there is to be room at least.
    """

    def __init__(self, runner: Any, grown: tuple[str, ...], copying: Callable[[], Any], room: Callable[[], int]):
        self.session, self.device, self._unflatten = runner.session, runner.device, runner.unflatten
        self.grown, self._copying, self._room = set(grown), copying, room
        self._inputs = [spec.name for spec in self.session.get_inputs()]
        self._outputs = [spec.name for spec in self.session.get_outputs()]

    def __call__(self, **leaves: Any) -> Any:
        """The model's outputs; the keys and values among them are views of buffers."""
        import torch
        from transformers.exporters.utils import onnx_inputs

        given = onnx_inputs([name for name in self._inputs if name != LENGTH], leaves)
        pasts = {name: given[GIVEN + name.removeprefix(GROWN)] for name in self.grown}
        length, ids = next(iter(pasts.values())).shape[2], given[self._text(given)]
        batch, new = ids.shape
        if batch > 1 and new > 1 and length:
            copying = self._copying()
            copying.session.rows = batch
            return copying(**leaves)
        room = self._room()
        buffers = {name: buffer_of(past, length + new, room) for name, past in pasts.items()}
        given |= {GIVEN + name.removeprefix(GROWN): buffer.tensor for name, buffer in buffers.items()}
        given[LENGTH] = torch.tensor([length])
        binding, held = self.session.io_binding(), []
        for name, value in given.items():
            tensor = value.cpu().contiguous()
            held.append(tensor if tensor.numel() else torch.empty(1, dtype=tensor.dtype))
            binding.bind_input(name, "cpu", 0, binding_type(tensor), list(tensor.shape), held[-1].data_ptr())
        for name in self._outputs:
            if name in buffers:
                tensor = buffers[name].tensor
                kind = binding_type(tensor)
                binding.bind_output(name, "cpu", 0, kind, list(tensor.shape), tensor.data_ptr())
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        found = []
        for name, value in zip(self._outputs, binding.get_outputs(), strict=True):
            if name in buffers:
                buffer = buffers[name]
                buffer.filled = length + new
                view = buffer.tensor[:, :, : buffer.filled]
                setattr(view, MARK, buffer)
                found.append(view)
            else:
                found.append(torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()))
        return self._unflatten(found)

    def _text(self, given: Mapping[str, Any]) -> str:
        """The input that holds the new tokens."""
        known = ("input_ids", "decoder_input_ids")
        return next(name for name in given if name.removeprefix(GIVEN) in known)


def binding_type(tensor: Any) -> int:
    """The number of a tensor's type in ONNX."""
    import onnx_ir as ir

    return int(ir.tensor_adapters.from_torch_dtype(tensor.dtype))
