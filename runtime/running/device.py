"""Execution providers: what ONNX Runtime computes on, here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peltc.spec.diagnostics import fail, wrong_type
from peltc.spec.packages import needing

CPU = ["CPUExecutionProvider"]
HOST = "cpu"
"""What ONNX Runtime calls this machine's own memory."""
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
"""The memory that a provider computes in, where it is not this machine's own, as ONNX Runtime calls it."""
LIBRARIES = "the GPU build needs the GPU, its driver, and the libraries of CUDA and cuDNN that fit it"


def providers_of(wanted: Sequence[str] | None = None) -> list[str]:
    """Execution providers in order of preference: CUDA where this build and the machine have it, the CPU always.

    Raises:
        PeltError: E216 no list of names; E604 a provider that this ONNX Runtime does not have.
    """
    with needing("a session"):
        import onnxruntime as ort

    available = ort.get_available_providers()
    if isinstance(wanted, str):
        raise wrong_type("what to run on", wanted, "a list of execution providers", f'providers=["{wanted}"]')
    if wanted is not None:
        for name in wanted:
            if name not in available:
                raise fail("E604", f"this ONNX Runtime has no {name}", expected=f"one of: {', '.join(available)}")
        return list(wanted)
    return [p for p in ("CUDAExecutionProvider",) if p in available and _has_gpu()] + CPU


def value_on(device: str, array: np.ndarray[Any, Any]) -> Any:
    """An array as a value of ONNX Runtime: itself in this machine's own memory, where what is written to it is seen,
    and a copy on a device."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def _has_gpu() -> bool:
    """Whether a CUDA device answers: the GPU build runs on machines without one, and says so on every session."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
