"""Weights in blocks of small whole numbers: how bytes hold them, and the numbers that they stand for.

    W[o, i] = (q[o, i] - zero[o, b]) · scale[o, b],   b the block of i

Each output's inputs are divided into blocks; the numbers q of a block share a scale, and a zero point where there are
any, in place of the middle of the range. Two numbers of four bits are in a byte, the lower half first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight [out, in] in blocks.

    Attributes:
        numbers: [out, blocks, bytes].
        scales: [out, blocks], of any float type.
        zeros: [out, bytes]; None where the middle of the range is everybody's.
        bits: of a number, 4 or 8.
        n_in: how many inputs there are; the last block may have more.
        order: which input each column is of [in]; None where they are in order.
    """

    numbers: Array
    scales: Array
    zeros: Array | None
    bits: int
    n_in: int
    order: Array | None = None

    @property
    def block(self) -> int:
        """How many inputs share a scale."""
        return int(self.numbers.shape[2]) * 8 // self.bits

    @property
    def rows(self) -> Array:
        """The numbers [out, bytes] of the inputs that there are; a view where all blocks are full."""
        return self.numbers.reshape(len(self.numbers), -1)[:, : -(-self.n_in * self.bits // 8)]

    def weight(self) -> Array:
        """What they stand for [out, in], float32; a number times a scale of half precision is exact there."""
        n_out, blocks, _ = self.numbers.shape
        numbers = unpacked(self.numbers, self.bits).reshape(n_out, blocks, -1).astype(np.float32)
        middle = np.float32(1 << (self.bits - 1))
        zeros = middle if self.zeros is None else unpacked(self.zeros, self.bits)[:, :blocks, None].astype(np.float32)
        scales = self.scales.astype(np.float32).reshape(n_out, blocks, 1)
        return self._in_order(((numbers - zeros) * scales).reshape(n_out, -1)[:, : self.n_in])

    def steps(self) -> Array:
        """How far two neighbours are apart at each place [out, in], float32."""
        return self._in_order(np.repeat(np.abs(self.scales.astype(np.float32)), self.block, axis=1)[:, : self.n_in])

    def error(self, weight: Array) -> float:
        """How far they are from a weight [out, in], as a share of that, both by their norms."""
        off = self.weight() - weight
        return float(np.linalg.norm(off)) / max(float(np.linalg.norm(weight)), TINY)

    def _in_order(self, columns: Array) -> Array:
        """Columns at the inputs that they are of."""
        if self.order is None:
            return columns
        result = np.empty_like(columns)
        result[:, self.order] = columns
        return result


def unpacked(numbers: Array, bits: int) -> Array:
    """Numbers by themselves: of four bits, two are in a byte, the lower half first."""
    if bits == 8:
        return numbers
    return np.stack([numbers & 15, numbers >> 4], -1).reshape(*numbers.shape[:-1], -1)


def packed(numbers: Array, bits: int) -> Array:
    """The opposite: an odd last number has a zero beside it."""
    if bits == 8:
        return np.ascontiguousarray(numbers, np.uint8)
    even = np.concatenate([numbers, np.zeros((*numbers.shape[:-1], numbers.shape[-1] % 2), np.uint8)], -1)
    pairs = even.astype(np.uint8).reshape(*even.shape[:-1], -1, 2)
    return np.ascontiguousarray(pairs[..., 0] | pairs[..., 1] << 4)
