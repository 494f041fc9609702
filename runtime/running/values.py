"""Arrays as values of ONNX Runtime and back, in bfloat16 too: numpy has that type from `ml_dtypes`, and ONNX Runtime
takes and gives no array of it.

What goes in is bits with the type beside them; what comes out is read where ONNX Runtime has it. Nothing is rounded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from peltc.runtime.running.device import HOST

Array = np.ndarray[Any, Any]

NARROW = "tensor(bfloat16)"
"""What ONNX Runtime calls the type."""
NARROW_TYPE = 16
"""ONNX's number of it."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def value_of(array: Array) -> Any:
    """An array as a value of ONNX Runtime in this machine's own memory."""
    import onnxruntime as ort

    if array.dtype != BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(array)
    bits = np.ascontiguousarray(array).view(np.uint16)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, NARROW_TYPE)


def array_of(value: Any) -> Array:
    """A value of ONNX Runtime as an array of its type, in memory of its own where that is bfloat16."""
    found: Array
    if value.data_type() != NARROW:
        found = value.numpy()
        return found
    shape = value.shape()
    if not all(shape):
        return np.zeros(shape, BFLOAT16)
    if value.device_name() != HOST:
        value = _here(value, shape)
    bits = (ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
    found = np.ctypeslib.as_array(bits).copy().view(BFLOAT16).reshape(shape)
    return found


def _here(value: Any, shape: list[int]) -> Any:
    """A value of a device in this machine's own memory."""
    import onnxruntime as ort

    copy = ort.OrtValue.ortvalue_from_shape_and_type(shape, NARROW_TYPE, HOST)
    ort.copy_tensors([value], [copy])
    return copy


def run(session: Any, feeds: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[Any]:
    """The outputs of a session of ONNX Runtime, as arrays.

    Args:
        feeds: arrays by input.
        tensors: ONNX Runtime's values of other inputs.
    """
    if not tensors and all(value.type != NARROW for value in (*session.get_inputs(), *session.get_outputs())):
        return list(session.run(None, dict(feeds)))
    values = {name: value_of(array) for name, array in feeds.items()}
    return [array_of(value) for value in session.run_with_ort_values(None, {**values, **tensors})]
