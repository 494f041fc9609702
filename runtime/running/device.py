"""Execution providers: what ONNX Runtime computes on, here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peltc.spec.diagnostics import fail, wrong_type
from peltc.spec.packages import needing

CPU = ["CPUExecutionProvider"]
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


def _has_gpu() -> bool:
    """Whether a CUDA device answers: the GPU build runs on machines without one, and says so on every session."""
    return any(Path("/dev").glob("nvidia[0-9]*"))
