"""A model run on tensors without memory, as a trial that leaves no trace."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def run_empty(function: Any, inputs: Mapping[str, Any]) -> Any:
    """Call something of a model on tensors without memory, or on real ones where it looks at their values."""
    import torch
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )
    from torch.utils._pytree import tree_map_only

    try:
        with torch.no_grad(), silenced():
            try:
                with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                    return function(**tree_map_only(torch.Tensor, fake.from_tensor, dict(inputs)))
            except (DataDependentOutputException, DynamicOutputShapeException):
                return function(**tree_map_only(torch.Tensor, torch.clone, dict(inputs)))
    finally:
        forget(getattr(function, "__self__", function))


@contextmanager
def silenced() -> Iterator[None]:
    """Keep to itself what torch logs of an operation that has no memory-less form, besides raising it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


def forget(model: Any) -> None:
    """Empty the caches of the functions that a model's modules are written with: `functools.lru_cache` would keep
    tensors without memory beyond the run that made them, and hand them to the next."""
    import sys

    kinds = {type(module) for module in model.modules()}
    sources = [vars(sys.modules[name]) for name in {kind.__module__ for kind in kinds} if name in sys.modules]
    for members in (*sources, *map(vars, kinds)):
        for member in list(members.values()):
            within = [cell.cell_contents for cell in getattr(member, "__closure__", None) or () if _filled(cell)]
            for function in (member, *within):
                if callable(clear := getattr(function, "cache_clear", None)):
                    clear()


def _filled(cell: Any) -> bool:
    """Whether a function's closure has a value in a cell."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
