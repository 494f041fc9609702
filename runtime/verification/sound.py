"""Whether a base computes numbers at all: one whose own outputs are not finite cannot be compared with anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.files.checkpoint import Checkpoint, is_float
from peltc.spec.diagnostics import Place, fail


def check_sound(outputs: Mapping[str, Any], base: Base) -> None:
    """Whether what the bare base answers is finite.

    Args:
        outputs: what PyTorch gives without any module, by name, as arrays.
        base: whose they are.

    Raises:
        PeltError: E513 they are not; the first tensor of the checkpoint that is not finite either, where there is one.
    """
    bad = next((name for name, values in outputs.items() if not np.isfinite(values).all()), None)
    if bad is None:
        return
    message = f"the model itself, with no module attached, answers NaN or infinity in '{bad}'"
    if tensor := first_not_finite(base.checkpoint):
        raise fail("E513", f"{message}, since the weight '{tensor}' is not finite",
                   Place(str(base.checkpoint.tensors[tensor].file)), "finite weights",
                   "the checkpoint is broken: restore it from where it came")  # fmt: skip
    hint = "its values may be too large for the type: try `deploy: {precision: float32}`"
    raise fail("E513", f"{message}, computed in {base.precision}; its weights are finite", Place(str(base.folder)),
               "finite outputs", hint if base.precision != "float32" else "")  # fmt: skip


def first_not_finite(checkpoint: Checkpoint) -> str:
    """The first tensor, as they lie in the files, with a value that is NaN or infinite; or empty."""
    ordered = sorted(checkpoint.tensors.items(), key=lambda entry: (entry[1].file, entry[1].offset))
    return next((name for name, t in ordered if is_float(t.dtype) and not np.isfinite(t.array()).all()), "")
