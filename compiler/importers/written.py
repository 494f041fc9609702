"""The folder of a spec that a program wrote, with its tensors beside: written over one of the same kind, never over a
spec of somebody's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.manifest import write_whole
from peltc.spec.diagnostics import Place, fail

SPEC, TENSORS = "spec.yaml", "adapter.safetensors"


def check_free(out: Path, origin: str) -> None:
    """Whether a folder is free for a spec.

    Args:
        origin: what the first line of specs of the same kind begins with.

    Raises:
        PeltError: E601 it holds another spec.
    """
    written = out / SPEC
    if written.exists() and not written.read_text("utf-8", "replace").startswith(f"# {origin}"):
        what = origin.split()[0].lower()
        raise fail("E601", f"the folder holds a spec that was not {what}", Place(str(written)),
                   f"a folder without one, or with one that was {what}, which is replaced")  # fmt: skip


def write_spec(
    out: Path,
    origin: str,
    text: Callable[[str], str],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write a spec and its tensors.

    Args:
        text: the spec's YAML, by the name of the file of its tensors.

    Raises:
        PeltError: as `check_free`.
    """
    from safetensors.numpy import save

    check_free(out, origin)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / TENSORS, save(dict(tensors), dict(metadata)))
    write_whole(out / SPEC, text(TENSORS).encode())
