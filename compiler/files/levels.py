"""Weights whose numbers of four bits stand for uneven levels, as bitsandbytes stores them: NF4.

W[k] = level[q[k]] · scale[b],   b the block of k, over all of a weight's rows

weight                            uint8, two numbers in a byte, the upper half first
weight.absmax                     the scales; or uint8, where these have levels of their own:
weight.nested_quant_map           those levels [256], of which each stands for level · nested_absmax[c] + offset
weight.nested_absmax
weight.quant_state.bitsandbytes__nf4    JSON in bytes: sizes, and the offset
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from peltc.compiler.files.checkpoint import Checkpoint, StoredTensor
from peltc.spec.diagnostics import PeltError, Place, fail
from peltc.spec.quantising import BLOCKS

Array = np.ndarray[Any, Any]
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
"""The levels that ONNX Runtime has in its kernels."""
CONFIG = "quantization_config"
STATE = ".quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MAX_STATE = 1 << 16
UNDONE = "load it by transformers, call `model.dequantize()`, and compile what `save_pretrained` writes"


@dataclass(frozen=True, eq=False)
class Levels:
    """A weight [out, in] in levels.

    Attributes:
        numbers: [bytes], of all rows, one after the other.
        scales: [blocks], float32.
        block: how many numbers share a scale.
        shape: of the weight.
    """

    numbers: Array
    scales: Array
    block: int
    shape: tuple[int, int]
    order: None = None

    def weight(self) -> Array:
        """What they stand for [out, in], float32."""
        numbers = np.stack([self.numbers >> 4, self.numbers & 15], -1).reshape(-1)
        return NF4[numbers].reshape(self.shape) * self.steps()

    def steps(self) -> Array:
        """The scale at each place [out, in], float32."""
        count = self.shape[0] * self.shape[1]
        return np.repeat(self.scales, self.block)[:count].reshape(self.shape)


@dataclass(frozen=True)
class LevelledTensor(StoredTensor):
    """A weight [out, in] in levels; its place is that of its numbers, its type that of what they stand for.

    Attributes:
        name: the weight's.
        parts: what belongs to its numbers, by what the names end with.
        state: its sizes.
    """

    name: str = ""
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Any, ...]:
        return tuple({self.file, *(part.file for part in self.parts.values())})

    def array(self) -> Array:
        """What the levels stand for [out, in], float32."""
        return self.blocks().weight()

    def blocks(self) -> Levels:
        """The weight as it is stored."""
        held = replace(self, dtype=np.dtype(np.uint8), shape=(self.length,))
        numbers = np.asarray(StoredTensor.array(held))
        scales = np.asarray(self.parts["absmax"].array())
        if scales.dtype == np.uint8:
            levels, second = (np.asarray(self.parts[f"nested_{end}"].array()) for end in ("quant_map", "absmax"))
            spread = np.repeat(second, self.state["nested_blocksize"])[: len(scales)]
            scales = levels[scales] * spread + np.float32(self.state["nested_offset"])
        n_out, n_in = self.shape
        return Levels(numbers, np.ascontiguousarray(scales), self.state["blocksize"], (n_out, n_in))


def levelled(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with weights in levels in the place of their parts; of each, its sizes are read.

    Raises:
        PeltError: E508 no weight is so, a part is missing, or sizes do not fit.
    """
    place, tensors = Place(str(checkpoint.folder)), dict(checkpoint.tensors)
    names = [name.removesuffix(STATE) for name in tensors if name.endswith(STATE)]
    if not names:
        raise fail("E508", "the checkpoint is quantised (bitsandbytes, 4 bits) by its config, and no tensor of it is in"
                   " NF4", place_of(checkpoint), f"tensors 'NAME{STATE}' beside 'NAME'", UNDONE)  # fmt: skip
    for name in names:
        state = _state(tensors.pop(name + STATE), name, place)
        parts = {end: tensors.pop(f"{name}.{end}") for end in PARTS if f"{name}.{end}" in tensors}
        tensors[name] = _checked(name, tensors.get(name), parts, state, place)
    return replace(checkpoint, tensors=tensors, packed=("bitsandbytes", "nf4", 4))


def place_of(checkpoint: Checkpoint) -> Place:
    """Where a config tells that its checkpoint is quantised."""
    return Place(str(checkpoint.folder / "config.json"), key=CONFIG)


def _state(tensor: StoredTensor, name: str, place: Place) -> dict[str, Any]:
    """What a weight says of itself."""
    try:
        if tensor.dtype != np.uint8 or tensor.length > MAX_STATE:
            raise ValueError
        found = json.loads(bytes(np.asarray(tensor.array())))
        wanted = {key: found[key] for key in ("blocksize", "shape", "quant_type")}
        nested = {key: found[key] for key in ("nested_blocksize", "nested_offset") if key in found}
        sizes = [wanted["blocksize"], *wanted["shape"], *([found["nested_blocksize"]] if nested else [])]
        if not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes) or len(wanted["shape"]) != 2:
            raise ValueError
        return wanted | (
            {"nested_blocksize": sizes[-1], "nested_offset": float(found["nested_offset"])} if nested else {}
        )
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise fail("E508", f"'{name}{STATE}' does not say of what sizes the weight is", place,
                   "JSON with 'shape', 'blocksize' and 'quant_type'", UNDONE) from None  # fmt: skip


def _checked(
    name: str, held: StoredTensor | None, parts: Mapping[str, StoredTensor], state: Mapping[str, Any], place: Place
) -> LevelledTensor:
    """A weight whose parts fit together."""
    (n_out, n_in), block = state["shape"], state["blocksize"]
    blocks = -(-n_out * n_in // block)

    def wrong(what: str, expected: str) -> PeltError:
        return fail("E508", what, place, expected, UNDONE)

    if state["quant_type"] != "nf4" or block not in BLOCKS:
        raise wrong(f"'{name}' has blocks of {block} in '{state['quant_type']}'", f"nf4, in blocks of {BLOCKS}")
    if held is None or held.dtype != np.uint8 or held.length != -(-n_out * n_in // 2) or n_out * n_in % 2:
        raise wrong(f"'{name}' does not hold the {n_out} x {n_in} numbers that it says", "uint8, two numbers in each")
    wanted: dict[str, tuple[Any, int]] = {"absmax": (np.float32, blocks), "quant_map": (np.float32, 16)}
    if "nested_offset" in state:
        second = -(-blocks // state["nested_blocksize"])
        wanted |= {
            "absmax": (np.uint8, blocks),
            "nested_absmax": (np.float32, second),
            "nested_quant_map": (np.float32, 256),
        }
    for end, (dtype, size) in wanted.items():
        part = parts.get(end)
        if part is None or part.dtype != dtype or part.shape != (size,):
            found = "is missing" if part is None else f"is {part.dtype} {list(part.shape)}"
            raise wrong(f"'{name}.{end}' {found}", f"{np.dtype(dtype)} [{size}]")
    if not np.array_equal(np.asarray(parts["quant_map"].array()), NF4):
        raise wrong(f"'{name}.quant_map' has other levels than NF4", "the levels that ONNX Runtime has")
    return LevelledTensor(held.file, np.dtype(np.float32), (n_out, n_in), held.offset, held.length, name, parts, state)
