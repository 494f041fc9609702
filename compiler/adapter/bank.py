"""Banks of trained modules: adapters of one spec, stacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.profile import is_profile
from peltc.compiler.adapter.provenance import differences, read_provenance
from peltc.compiler.files.checkpoint import is_float, read_header
from peltc.spec.combinators.bank import BANK_SUFFIX
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail
from peltc.spec.foreign import refuse

Array = np.ndarray[Any, Any]


def stack_bank(files: list[Path]) -> dict[str, Array]:
    """A bank's tensors from adapters of one spec: `<name>_bank` [N, ...] for each tensor.

    Raises:
        PeltError: E401 no safetensors file, E404 adapters whose tensors differ in name or shape, E408 adapters that
            were trained with different mathematics, E409 one whose provenance is malformed, E410 another library's
            adapter.
    """
    for file in files:
        refuse(file, "weights")
    headers = [read_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        if is_profile(file) or not all(is_float(tensor.dtype) for tensor in header.values()):
            raise fail("E404", "the file holds no adapter", Place(str(file)), "what `save_adapter` wrote")
    first = {name: tensor.shape for name, tensor in headers[0].items()}
    for file, header in zip(files, headers, strict=True):
        if (own := {name: tensor.shape for name, tensor in header.items()}) != first:
            odd = sorted(set(own.items()) ^ set(first.items()))[0][0]
            raise fail("E404", f"the tensor '{odd}' differs from that of {files[0].name}", Place(str(file)),
                       "adapters of one spec on one model")  # fmt: skip
    check_alike(files)
    return {
        name + BANK_SUFFIX: np.stack([np.asarray(header[name].array(), np.float32) for header in headers])
        for name in first
    }


def check_alike(files: list[Path]) -> None:
    """Whether adapters compute one thing, as far as they say what.

    Raises:
        PeltError: E408 those that do not, E409 malformed provenance.
    """
    said = [(file, known) for file in files if (known := read_provenance(file)) is not None]
    findings = []
    for file, known in said[1:]:
        first, like = said[0]
        if known.digest == like.digest:
            continue
        place, expected = Place(str(file)), "adapters of one spec"
        one, other = known.mathematics, like.mathematics
        apart = list(differences(one, other)) if one is not None and other is not None else []
        for d in apart:
            message = f"the adapter was trained with {d.trained}, and '{first.name}' with {d.here}"
            findings.append(Diagnostic("E408", message, place, expected))
        if not apart:
            message = f"the adapter was trained with other mathematics than '{first.name}'"
            findings.append(Diagnostic("E408", message, place, expected))
    if findings:
        raise PeltError(findings)


def silent_files(files: list[Path]) -> list[Path]:
    """The adapters that say nothing of how they were trained."""
    return [file for file in files if read_provenance(file) is None]
