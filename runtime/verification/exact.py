"""What rounding does to a model: PyTorch in float64, which is the reference, and PyTorch in float32 on weights that are
rounded once more, which is how far it moves results at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peltc.compiler.base.base import Base
from peltc.runtime.verification import answers
from peltc.runtime.verification.answers import Answers


class _Double(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def double() -> AbstractContextManager[Any]:
    """Computes in float64 what models ask for in float32 by name, as for norms, softmax and rotary positions."""
    return _Double()  # type: ignore[no-untyped-call]


def affordable(base: Base) -> bool:
    """Whether the machine has memory for a base in float64, and for as much again while it is made."""
    import psutil

    return bool(2 * 8 * base.size <= psutil.virtual_memory().available)


def of_exact(load: Callable[[], Any], base: Base, generation: bool) -> Answers | None:
    """What a torch model answers in float64; None where the machine has no memory for it.

    Args:
        load: makes the model.
    """
    if not affordable(base):
        return None
    model = load().double()
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")  # torch multiplies no groups of float64
    with double():
        return answers.of_torch(model, base, generation)


def of_nudged(load: Callable[[], Any], base: Base, generation: bool, seed: int) -> Answers:
    """What a torch model answers in float32 when each number that it computes is moved by up to one unit in the last
    place. That is how far its answers could differ if it computed in another order.

    Args:
        load: makes the model.
        seed: of the differences.
    """
    model, random = load().float(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + (2 * torch.rand(parameter.shape, generator=random) - 1) * 2.0**-23)
    return answers.of_torch(model, base, generation)
