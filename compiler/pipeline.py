"""The rewrite stage, in order: absorb, insert, prepend, bind, write. Decisions come from the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.anatomy import Anatomy, Site
from peltc.compiler.artifact import digest, write_artifact
from peltc.compiler.base import Base
from peltc.compiler.passes.absorb import Folded, absorb
from peltc.compiler.passes.bind import add_biases, bind
from peltc.compiler.passes.insert import LEVELS, insert
from peltc.compiler.passes.prepend import prepend
from peltc.compiler.plan import Claim, Plan

Array = np.ndarray[Any, Any]


def build(
    plan: Plan,
    base: Base,
    tensors: Mapping[str, Array],
    folder: Path,
    *,
    embeds: Base | None = None,
    weights_from: str = "",
    self_contained: bool = False,
) -> dict[str, Any]:
    """Carry a plan out and write the artifact into a folder.

    Args:
        tensors: the adapter's tensors, float32.
        embeds: the base on embedded tokens, where the plan prepends tokens.
        weights_from: where the tensors come from, for the manifest.
        self_contained: copy the checkpoint's files rather than link them.

    Returns:
        The manifest.
    """
    source = embeds or base
    model = source.load_graph()
    folded = fold(plan, source, tensors)
    staying = [claim for claim in plan.claims if not claim.absorbed]
    sites = {site.name: site for site in source.anatomy}
    insert(model, [c for c in staying if "prepend" not in c.effects], sites, tensors)
    if plan.prepends:
        prepend(model, [c for c in staying if "prepend" in c.effects], tensors)
    named = {f.name: f for f in folded}
    biases = {
        map_site(source.anatomy, f.name.removesuffix(".pelt_bias")).values["full"]: (f.name, f)
        for f in folded
        if f.name.endswith(".pelt_bias")
    }
    if biases:
        add_biases(model, biases)
    bind(model, source, named, base)
    adapter = {name: digest(np.ascontiguousarray(array)) for name, array in tensors.items()}
    return write_artifact(folder, model, source, plan, folded, adapter, weights_from, base.export, self_contained)


def fold(plan: Plan, base: Base, tensors: Mapping[str, Array]) -> list[Folded]:
    """The parameters that take claims in."""
    groups: dict[str, list[Claim]] = {}
    for claim in sorted(plan.claims, key=lambda c: LEVELS[c.site.kind]):
        if claim.absorbed:
            groups.setdefault(claim.absorbed, []).append(claim)

    def read(name: str) -> Array:
        return base.stored(name).array()

    folded = []
    dtype = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[base.precision]].numpy()
    for weight, claims in groups.items():
        targets = [c.site if c.site.kind != "block" else map_site(base.anatomy, weight) for c in claims]
        folded += absorb(claims, targets, read, tensors, dtype)
    return folded


def map_site(anatomy: Anatomy, weight: str) -> Site:
    """The linear site of a weight."""
    found: Site = next(s for s in anatomy if s.kind == "linear" and s.parameters["weight"] == weight)
    return found
