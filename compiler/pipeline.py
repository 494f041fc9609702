"""The rewrite stage, in order: absorb, insert, prepend, stack, bind, write. Decisions come from the plan."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.anatomy import Anatomy, Site
from peltc.compiler.artifact import DataFile, digest, write_artifact
from peltc.compiler.base import Base
from peltc.compiler.passes.absorb import NEW_BIAS, Folded, absorb
from peltc.compiler.passes.bind import add_bias, bind
from peltc.compiler.passes.insert import insert
from peltc.compiler.passes.prepend import prepend
from peltc.compiler.passes.stack import stack
from peltc.compiler.plan import LEVELS, Claim, Plan

Array = np.ndarray[Any, Any]
EMPTY = np.zeros(0, np.float32)


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
    data = DataFile(folder / "model.onnx.data")
    folded, stored = [], {}
    for entry in folds(plan, source, tensors):  # as they come: only a few folded tensors are in memory
        stored[entry.name] = data.add(entry.name, entry.array)
        folded.append(replace(entry, array=EMPTY))
    staying = [claim for claim in plan.claims if not claim.absorbed]
    sites = {site.name: site for site in source.anatomy}
    insert(model, [c for c in staying if "prepend" not in c.effects], sites, tensors)
    if plan.prepends:
        prepend(model, [c for c in staying if "prepend" in c.effects], tensors, sites, base)
    stack(model)
    for entry in folded:
        if entry.name.endswith(NEW_BIAS):
            written = map_site(source.anatomy, entry.name.removesuffix(NEW_BIAS)).values["full"]
            add_bias(model, written, stored.pop(entry.name), entry.claims)
    bind(model, source, stored, base)
    adapter = {name: digest(np.ascontiguousarray(array)) for name, array in tensors.items()}
    return write_artifact(folder, model, data, source, plan, folded, adapter, weights_from, base.export, self_contained)


def fold(plan: Plan, base: Base, tensors: Mapping[str, Array]) -> list[Folded]:
    """The parameters that take claims in, all of them."""
    return list(folds(plan, base, tensors))


def folds(plan: Plan, base: Base, tensors: Mapping[str, Array]) -> Iterator[Folded]:
    """The parameters that take claims in, one after the other."""
    groups: dict[str, list[Claim]] = {}
    for claim in sorted(plan.claims, key=lambda c: LEVELS[c.site.kind]):
        if claim.absorbed and not claim.follows:
            groups.setdefault(claim.absorbed, []).append(claim)

    def read(name: str) -> Array:
        return base.stored(name).array()

    dtype = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[base.precision]].numpy()

    def one(weight: str) -> list[Folded]:
        claims = groups[weight]
        targets = [c.site if c.site.kind != "block" else map_site(base.anatomy, weight) for c in claims]
        return absorb(claims, targets, read, tensors, dtype)

    # A few at a time: numpy works outside of Python's lock, and memory holds no more than these few.
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[list[Folded]]] = deque()
        for weight in groups:
            waiting.append(pool.submit(one, weight))
            if len(waiting) > workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def map_site(anatomy: Anatomy, weight: str) -> Site:
    """The linear site of a weight."""
    found: Site = next(s for s in anatomy if s.kind == "linear" and s.parameters["weight"] == weight)
    return found
