"""The type that a model computes in: what is asked for, or that of its weights where it is computed as such."""

from __future__ import annotations

from peltc.spec.modes import ANY, CUDA


def computed(stored: str, precision: str, provider: str = ANY) -> str:
    """The float type of a computation. CUDA alone computes bfloat16 as such: where any provider may run a graph, a
    model stored so is computed in float32.

    Args:
        stored: the type of the weights; empty where they are of several.
        precision: `checkpoint`, or the type that is asked for.
        provider: `cuda`, `cpu` or `any`, what the graphs are for.
    """
    if precision != "checkpoint":
        return precision
    own = ("float32", "float16", "bfloat16") if provider == CUDA else ("float32", "float16")
    return stored if stored in own else "float32"
