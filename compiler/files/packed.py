"""Checkpoints whose maps are stored in small whole numbers: what GPTQ's and AWQ's tools write, read as it is.

    qweight   int32, numbers of four or eight bits          gptq [in / n, out], n to an integer along the inputs
                                                            awq  [in, out / 8], eight to one, in AWQ's own order
    qzeros    int32 [groups, out / n]                       gptq: one less than they are, unless it is `gptq_v2`
    scales    [groups, out]
    g_idx     int32 [in], the group of each input           gptq; absent where groups follow each other

    W[o, i] = (q[i, o] - zero[g, o]) · scale[g, o],   g the group of i

The config says which it is, or that it is bitsandbytes', which `levels` reads. Sizes are held against each other before
a number is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.blocks import Blocks, packed
from peltc.compiler.files.checkpoint import Checkpoint, StoredTensor, is_float
from peltc.compiler.files.levels import CONFIG, LevelledTensor, levelled, place_of
from peltc.spec.diagnostics import PeltError, Place, fail
from peltc.spec.quantising import BITS, BLOCKS

Array = np.ndarray[Any, Any]
LEVELLED = "bitsandbytes"
FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""How each method's tensors may be laid out, by the names that configs give; the first where they give none."""
WIDTHS = {"gptq": (4, 8), "awq": (4,)}
"""How many bits their numbers may have."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours AWQ puts first, second, ..., from the lowest bits on."""
WORD = 32
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Packing:
    """How a checkpoint's maps are packed.

    Attributes:
        method: what configs call it.
        layout: one of its formats.
        bits: of a number.
        group: how many inputs share a scale; -1 for all of them.
    """

    method: str
    layout: str
    bits: int
    group: int

    @property
    def to(self) -> str:
        """The type of the numbers; as specs call it, if they do."""
        return "nf4" if self.method == LEVELLED else next(name for name, bits in BITS.items() if bits == self.bits)

    @property
    def count(self) -> int:
        """How many numbers an integer holds."""
        return WORD // self.bits


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A weight [out, in] in blocks; its place is that of its numbers, its type that of its scales.

    Attributes:
        name: what its parts' names begin with.
        parts: its tensors, by what their names end with.
        packing: how they are laid out.
    """

    name: str = ""
    parts: Mapping[str, StoredTensor] = field(default_factory=dict)
    packing: Packing | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple({part.file for part in self.parts.values()})

    def array(self) -> Array:
        """What the blocks stand for [out, in], float32."""
        return self.blocks().weight()

    def blocks(self) -> Blocks:
        """The weight as it is stored.

        Raises:
            PeltError: E508 groups that blocks cannot be made of.
        """
        assert self.packing is not None
        how, (n_out, n_in) = self.packing, self.shape
        read = _of_gptq if how.method == "gptq" else _of_awq
        numbers, zeros = read(np.asarray(self.parts["qweight"].array()), np.asarray(self.parts["qzeros"].array()), how)
        scales = np.asarray(self.parts["scales"].array())
        group = n_in if how.group == -1 else how.group
        order = self._order(group, len(scales))
        if order is not None:
            numbers = numbers[order]
        block = _block(group, len(scales))
        blocks = -(-n_in // block)
        of = np.arange(blocks) * block // group  # the group of each block
        whole = np.zeros((n_out, blocks * block), np.uint8)
        whole[:, :n_in] = numbers.T
        held = packed(whole, how.bits).reshape(n_out, blocks, -1)
        middle = (zeros == 1 << (how.bits - 1)).all()
        return Blocks(held, np.ascontiguousarray(scales[of].T), None if middle else packed(zeros[of].T, how.bits),
                      how.bits, n_in, order)  # fmt: skip

    def _order(self, group: int, groups: int) -> Array | None:
        """Which input each column is of, where groups do not follow each other.

        Raises:
            PeltError: E508 groups of other sizes.
        """
        if (held := self.parts.get("g_idx")) is None:
            return None
        index = np.asarray(held.array()).astype(np.int64)
        order = np.argsort(index, kind="stable")
        if not (index[order] == np.arange(len(index)) // group).all() or index.max(initial=0) >= groups:
            raise fail("E508", f"'{self.name}.g_idx' gives groups of other sizes than {group}", Place(str(held.file)),
                       f"{groups} groups of {group} inputs", UNDONE)  # fmt: skip
        return None if (np.diff(order) == 1).all() else order


QUANTISED = (PackedTensor, LevelledTensor)
"""Tensors of a checkpoint that are read as small whole numbers."""
UNDONE = "compile the model that it was quantised from"


def _block(group: int, groups: int) -> int:
    """The size of blocks that groups are made of: as large as ONNX Runtime has kernels for."""
    fitting = [block for block in BLOCKS if (group % block == 0 if groups > 1 else block <= group)]
    return max(fitting, default=BLOCKS[0])


def _of_gptq(qweight: Array, qzeros: Array, how: Packing) -> tuple[Array, Array]:
    """Numbers [in, out] and zero points [groups, out]."""
    numbers = _spread(qweight, how).transpose(0, 2, 1).reshape(-1, qweight.shape[1])
    zeros = _spread(qzeros, how).reshape(len(qzeros), -1)
    return numbers, (zeros + 1 & (1 << how.bits) - 1).astype(np.uint8) if how.layout == "gptq" else zeros


def _of_awq(qweight: Array, qzeros: Array, how: Packing) -> tuple[Array, Array]:
    """Numbers [in, out] and zero points [groups, out]."""
    place = np.argsort(ORDER)
    numbers, zeros = (_spread(each, how)[:, :, place].reshape(len(each), -1) for each in (qweight, qzeros))
    return numbers, zeros


def _spread(words: Array, how: Packing) -> Array:
    """The numbers of integers [a, b], from the lowest bits on [a, b, n]."""
    shifts = np.arange(how.count, dtype=np.uint32) * np.uint32(how.bits)
    return (words.view(np.uint32)[:, :, None] >> shifts & np.uint32((1 << how.bits) - 1)).astype(np.uint8)


def packing_of(config: Mapping[str, Any], folder: Path) -> Packing | None:
    """How a checkpoint's maps are packed, by its config; None where it does not tell of a method that is read.

    Raises:
        PeltError: E508 a layout, a width or groups that are not read.
    """
    settings = config.get(CONFIG)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if isinstance(settings, Mapping) and method == LEVELLED:
        told = settings.get("load_in_4bit"), settings.get("bnb_4bit_quant_type")
        return Packing(method, "nf4", 4, -1) if told == (True, "nf4") else None
    if not isinstance(settings, Mapping) or method not in FORMATS:
        return None
    place = Place(str(folder / "config.json"), key=CONFIG)
    said = next((settings[key] for key in ("checkpoint_format", "format", "version") if settings.get(key)), None)
    layout = FORMATS[method][0] if said is None else str(said).lower()
    bits, group = (
        settings.get("bits", settings.get("w_bit", 4)),
        settings.get("group_size", settings.get("q_group_size", 128)),
    )

    def refused(what: str, expected: str) -> PeltError:
        told = f"{method}, {bits} bits" if isinstance(bits, int) else str(method)
        return fail("E508", f"the checkpoint is quantised ({told}): {what}", place, expected, UNDONE)

    if layout not in FORMATS[method]:
        raise refused(f"the layout '{layout}' is not read", " or ".join(FORMATS[method]))
    if bits not in WIDTHS[method] or isinstance(bits, bool):
        raise refused(f"numbers of {bits} bits are not read", " or ".join(f"{n} bits" for n in WIDTHS[method]))
    if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and (group < 16 or group % 16)):
        raise refused(f"groups of {group} inputs are not read", "a multiple of 16, or -1 for all inputs")
    return Packing(method, layout, bits, group)


def unpack(checkpoint: Checkpoint, packing: Packing) -> Checkpoint:
    """A checkpoint with the weights of packed maps in the place of their parts; nothing is read.

    Raises:
        PeltError: E508 no map is packed, a part is missing, or sizes do not fit.
    """
    if packing.method == LEVELLED:
        return levelled(checkpoint)
    place, tensors = Place(str(checkpoint.folder)), dict(checkpoint.tensors)
    stems = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    if not stems:
        raise fail("E508", f"the checkpoint is quantised ({packing.method}, {packing.bits} bits) by its config, and no"
                   " tensor of it is", place_of(checkpoint), "tensors 'NAME.qweight', 'NAME.qzeros' and 'NAME.scales'",
                   f"remove '{CONFIG}' from the config of a model that is not quantised; else {UNDONE}")  # fmt: skip
    for stem in stems:
        parts = {end: tensors.pop(f"{stem}.{end}") for end in PARTS if f"{stem}.{end}" in tensors}
        if f"{stem}.weight" in tensors:
            raise fail("E508", f"the checkpoint has '{stem}.weight' beside '{stem}.qweight'", place, "one of them")
        tensors[f"{stem}.weight"] = _checked(stem, parts, packing, place)
    return replace(checkpoint, tensors=tensors, packed=(packing.method, packing.layout, packing.bits, packing.group))


def _checked(stem: str, parts: Mapping[str, StoredTensor], how: Packing, place: Place) -> PackedTensor:
    """A packed weight whose parts fit together."""
    kinds = {"qweight": np.int32, "qzeros": np.int32, "g_idx": np.int32}
    for end in ("qweight", "qzeros", "scales"):
        if end not in parts:
            raise fail("E508", f"the checkpoint lacks '{stem}.{end}'", place, "all parts of a packed weight", UNDONE)
    for end, part in parts.items():
        good = is_float(part.dtype) if end == "scales" else part.dtype == kinds[end]
        if not good or len(part.shape) != (1 if end == "g_idx" else 2):
            raise fail("E508", f"'{stem}.{end}' is {part.dtype} {list(part.shape)}", place,
                       "scales of a float type, else int32, of two axes; of g_idx, one", UNDONE)  # fmt: skip
    first, second = parts["qweight"].shape
    n_in, n_out = (first * how.count, second) if how.method == "gptq" else (first, second * how.count)
    groups = -(-n_in // (n_in if how.group == -1 else how.group)) if n_in else 0
    wanted = {"qzeros": (groups, n_out // how.count), "scales": (groups, n_out), "g_idx": (n_in,)}
    for end, shape in wanted.items():
        if end in parts and (parts[end].shape != shape or n_out % how.count or not groups):
            raise fail("E508", f"'{stem}.{end}' has the shape {list(parts[end].shape)}, beside numbers"
                       f" {[first, second]}", place, f"{list(shape)}, for groups of {how.group}", UNDONE)  # fmt: skip
    held = parts["qweight"]
    return PackedTensor(held.file, parts["scales"].dtype, (n_out, n_in), held.offset, held.length, stem, parts, how)
