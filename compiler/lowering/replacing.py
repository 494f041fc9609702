"""A value in the place of another: everything reads it, under the other's name."""

from __future__ import annotations

import onnx_ir as ir


def put_in_place(new: ir.Value, old: ir.Value) -> None:
    """Let a value be what another was: its shape, its type, its name, and what reads it, outputs of the graph included.
    What it was is left to whoever removes what nobody reads."""
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, f"{old.name}.pieces"
