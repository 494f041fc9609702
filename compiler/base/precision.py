"""The type that a model computes in: what is asked for, or that of its weights where it is computed as such."""

from __future__ import annotations

CUDA = "cuda"
"""The provider that computes bfloat16 as such; where any may run a graph, a model stored so is computed in float32."""


def computed(stored: str, precision: str, provider: str = "any") -> str:
    """The float type of a computation.

    Args:
        stored: the type of the weights; empty where they are of several.
        precision: `checkpoint`, or the type that is asked for.
        provider: `cuda`, `cpu` or `any`, what the graphs are for.
    """
    if precision != "checkpoint":
        return precision
    own = ("float32", "float16", "bfloat16") if provider == CUDA else ("float32", "float16")
    return stored if stored in own else "float32"
