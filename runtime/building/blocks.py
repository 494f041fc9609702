"""ONNX Runtime's own quantiser, on one weight: round to nearest, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np

from peltc.compiler.files.blocks import Blocks
from peltc.spec.quantising import Quantise

Array = np.ndarray[Any, Any]


def blocks_of(weight: Array, how: Quantise) -> Blocks:
    """A weight [in, out] in blocks, as ONNX Runtime's quantiser makes them."""
    from onnxruntime.capi import _pybind_state as library

    n_in, n_out = weight.shape
    blocks = -(-n_in // how.block)
    whole = np.ascontiguousarray(np.pad(weight, ((0, blocks * how.block - n_in), (0, 0))))
    numbers = np.zeros((n_out, blocks, how.block * how.bits // 8), np.uint8)
    scales = np.zeros((n_out, blocks), np.float32)
    zeros = np.zeros((n_out, -(-blocks * how.bits // 8)), np.uint8)
    make = library.quantize_matmul_4bits if how.bits == 4 else library.quantize_matmul_8bits
    make(numbers, whole, scales, zeros, how.block, n_out, n_in, not how.zeros)
    return Blocks(numbers, scales, zeros if how.zeros else None, how.bits, n_in)
