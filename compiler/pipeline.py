"""The rewrite stage, in order: absorb, rewrite, bind, offer, write. Decisions come from the plan."""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from safetensors.numpy import save

from peltc.compiler.artifact import DataFile, digest, write_artifact
from peltc.compiler.base.base import Base
from peltc.compiler.base.limits import Limits, values_below
from peltc.compiler.files.manifest import CACHE
from peltc.compiler.graphs.wide import hold
from peltc.compiler.linking.heads import check_heads
from peltc.compiler.linking.profiles import brought, check_exchange, keep, lacking, record, without
from peltc.compiler.linking.uneven import Uneven, before, evened, uneven
from peltc.compiler.linking.zeros import leaves_the_base, zeroed
from peltc.compiler.lowering.kernels import check_kernels, place
from peltc.compiler.lowering.lower import Lowering, lower
from peltc.compiler.lowering.quantise import Pack, Quantiser
from peltc.compiler.passes.absent import absent_of
from peltc.compiler.passes.absorb import NEW_BIAS, Folded, Read, absorb
from peltc.compiler.passes.as_wide import put_as_wide
from peltc.compiler.passes.bind import add_bias, bind, elsewhere
from peltc.compiler.passes.blend import Blend
from peltc.compiler.passes.offer import offer
from peltc.compiler.passes.packing import masks_of
from peltc.compiler.passes.rewrite import rewritten
from peltc.compiler.passes.rows import Rows
from peltc.compiler.passes.stand_in import ids_of
from peltc.compiler.passes.uneven import shown_in
from peltc.compiler.plan.checks import not_generated
from peltc.compiler.plan.claims import LEVELS, Claim, Plan
from peltc.compiler.plan.provided import SOME
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail
from peltc.spec.modes import CPU, CUDA, SWAPPABLE

Array = np.ndarray[Any, Any]
WHOLE = ".whole.data"
"""Where folded weights are before they are quantised."""
EMPTY = np.zeros(0, np.float32)


def build(
    plan: Plan,
    base: Base,
    tensors: Mapping[str, Array],
    folder: Path,
    *,
    embeds: Base | None = None,
    stages: Mapping[str, Base] = MappingProxyType({}),
    weights_from: str = "",
    self_contained: bool = False,
    pack: Pack | None = None,
) -> dict[str, Any]:
    """Carry a plan out and write the artifact into a folder.

    Args:
        tensors: the adapter's tensors, float32.
        embeds: the base on embedded tokens, where the plan prepends tokens.
        stages: the bases of the graphs that generation takes, by name; they share every weight with the first.
        weights_from: where the tensors come from, for the manifest.
        self_contained: copy the checkpoint's files rather than link them.
        pack: the quantiser, where the plan quantises weights.

    Returns:
        The manifest.
    """
    source = embeds or base
    assert plan.quantised is None or pack is not None
    data = DataFile(folder / "model.onnx.data")
    quantiser = (
        None
        if plan.quantised is None or pack is None
        else Quantiser(plan.quantised, data, pack, source.precision, base.blocks)
    )
    whole = data if quantiser is None else DataFile(folder / WHOLE)
    taken, stored = [], {}
    for entry in folds(plan, source, tensors):  # as they come: only a few folded tensors are in memory
        stored[entry.name] = whole.add(entry.name, entry.array)
        taken.append(replace(entry, array=EMPTY))
    for claim in plan.claims:
        if claim.mirrors is not None and claim.absorbed:
            leader = next(entry for entry in taken if entry.name == claim.mirrors.parameters["weight"])
            if claim.absorbed not in stored:
                taken.append(replace(leader, name=claim.absorbed))
            stored[claim.absorbed] = stored[leader.name]
    bases = {"model": source, **stages}
    sites = {"model": {site.key: site for site in source.anatomy}}
    sites |= {name: stage.anatomy.named_as(base.anatomy) for name, stage in stages.items()}
    check_stages(plan, {name: sites[name] for name in stages})
    fixed, offered, masks = tensors, dict[str, Array](), dict[str, tuple[int, int]]()
    check_exchange(plan)
    check_heads(plan, base)
    if plan.exchange:
        rows = uneven(plan, bases, sites)
        if plan.spec.blend and any(map(before, plan.claims)):
            rows = Uneven("a text may have several profiles, each of which brings as many keys before it")
        plan = evened(plan) if rows.none else plan
        fixed, offered = without(plan, tensors, base.array), {}
    graphs, starts = {}, dict[str, Array]()
    for name, one in bases.items():
        model, begun = rewritten(one, plan, sites[name], fixed, base)
        if plan.exchange:
            offered |= brought(plan, fixed, model, partial(rewritten, one, plan, sites[name], base=base))
            masks |= masks_of(model)
        graphs[name], starts = model, starts | begun
        values = dict(stored)
        for entry in taken:
            if entry.name.endswith(NEW_BIAS):
                tensor = values.pop(entry.name)
                if site := map_site(sites[name].values(), entry.name.removesuffix(NEW_BIAS)):
                    add_bias(model, site.values["full"], tensor, entry.claims)
        bind(model, source, values, base, data.convert if quantiser is None else None)
        if name in stages:  # ONNX Runtime runs what nobody reads too, with lengths that are not right any more
            RemoveUnusedNodesPass()(model)
        hold(model.graph)
    profiles = None
    if plan.exchange:
        places = set().union(*map(shown_in, graphs.values()))
        profiles = record(plan, base, fixed, offered, masks, places, rows, absent_of(graphs["model"]))
        if profiles["no_bare_base"] and all(leaves_the_base(model.graph, offered) for model in graphs.values()):
            profiles["no_bare_base"], offered = None, zeroed(graphs.values(), offered)
        if not profiles["no_bare_base"]:  # no token and no key stands before the text of a row without a profile
            offered |= zeroed(graphs.values(), {name: offered[name] for name in places})
        profiles["no_bare_base"] = lacking(base, plan) or profiles["no_bare_base"]
        called = dict(zip(offered, profiles["inputs"], strict=True))
        for model in graphs.values():
            if plan.exchange == SWAPPABLE:
                offer(model.graph, called)
            else:
                (Blend if plan.spec.blend else Rows)(model.graph, called).run()
        keep(base, embeds, {called[name]: array for name, array in offered.items()}, folder)
    if quantiser is not None:
        quantiser.run([model.graph for model in graphs.values()])
    lowered = {name: lower(model, sites[name].values()) for name, model in graphs.items()}
    for model in graphs.values():
        put_as_wide(model.graph)
    placed = {name: place(model) for name, model in graphs.items()} if plan.spec.provider != CPU else {}
    if plan.spec.provider == CUDA:
        check_kernels(placed)
    if quantiser is not None:  # what the graphs do not read is not in the artifact
        for model in graphs.values():
            data.bring(model)
        whole.file.unlink()
    adapter = {name: digest(np.ascontiguousarray(array)) for name, array in tensors.items()}
    if starts:
        (folder / CACHE).write_bytes(save({name: np.ascontiguousarray(array) for name, array in starts.items()}))
    records = {"model": base.export} | {name: stage.export for name, stage in stages.items()}
    limits = artifact_limits(graphs["model"], base, plan, embeds)
    manifest = write_artifact(folder, graphs, data, source, plan, taken, adapter, weights_from, records,
                              self_contained, limits)  # fmt: skip
    manifest["bytes_converted"] = data.converted
    manifest["profiles"] = profiles
    manifest["quantised"] = None if quantiser is None else quantiser.record()
    manifest["lowering"] = {name: found.record() for name, found in lowered.items()}
    manifest["kernels"] = {name: found.record(plan.spec.provider) for name, found in placed.items()}
    return manifest


def lowerings(plan: Plan, base: Base, stages: Mapping[str, Base] = MappingProxyType({})) -> dict[str, Lowering]:
    """What would become of an artifact's graphs, by name, though nothing is written and no weight is read but those
    that modules change while they run. What profiles bring counts as fixed.

    Args:
        stages: as for `build`.
    """
    some = {name: np.full(tensor.shape, SOME, np.float32) for name, tensor in plan.tensors.items()}
    found = {}
    for name, one in {"model": base, **stages}.items():
        sites = {site.key: site for site in base.anatomy} if one is base else one.anatomy.named_as(base.anatomy)
        model, _ = rewritten(one, plan, sites, some, base)
        bind(model, base, {}, base, None if plan.quantised else elsewhere)
        found[name] = lower(model, sites.values())
    return found


def check_stages(plan: Plan, sites: Mapping[str, Mapping[str, Site]]) -> None:
    """Whether the graphs that generation takes can have a plan's modules.

    Raises:
        PeltError: E208 a module that needs the whole sequence at once, or a site that no graph has.
    """
    for claim in plan.claims if sites else ():
        where = f"'{claim.attachment}' at {claim.site.name}"
        if found := not_generated(claim, plan.spec.gates):
            raise fail("E208", found[0], hint=found[1])
        if not any(claim.site.key in named for named in sites.values()):
            raise fail("E208", f"{where} has no place in the graphs that generation takes",
                       hint="compile without `generation`, and please report this: model and versions")  # fmt: skip


def fold(plan: Plan, base: Base, tensors: Mapping[str, Array]) -> list[Folded]:
    """The parameters that take claims in, all of them."""
    return list(folds(plan, base, tensors))


def folds(plan: Plan, base: Base, tensors: Mapping[str, Array]) -> Iterator[Folded]:
    """The parameters that take claims in, one after the other."""
    return folded(plan, base.anatomy, base.array, tensors, base.type_of)


def folded(
    plan: Plan,
    anatomy: Iterable[Site],
    read: Read,
    tensors: Mapping[str, Array],
    type_of: Callable[[str], np.dtype[Any]],
) -> Iterator[Folded]:
    """The parameters of a model that take claims in, one after the other, as they are stored then.

    Args:
        anatomy: the model's sites.
        read: the model's parameters by name.
        tensors: the adapter's tensors by name, float32.
        type_of: the type to store a parameter in, by name.
    """
    groups: dict[str, list[Claim]] = {}
    for claim in sorted(plan.claims, key=lambda c: LEVELS[c.site.kind]):
        if claim.absorbed and not claim.follows:
            groups.setdefault(claim.absorbed, []).append(claim)

    def one(weight: str) -> list[Folded]:
        claims = groups[weight]
        found = map_site(anatomy, weight)
        targets = [c.site if c.site.kind != "block" or found is None else found for c in claims]
        return absorb(claims, targets, read, tensors, type_of(weight))

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


def map_site(sites: Iterable[Site], weight: str) -> Site | None:
    """The linear site of a weight."""
    return next((s for s in sites if s.kind == "linear" and s.parameters["weight"] == weight), None)


def artifact_limits(model: ir.Model, base: Base, plan: Plan, embeds: Base | None = None) -> Limits:
    """The limits of a finished graph: its own tables, and the lengths of the base that it was made from, less the
    tokens that the plan puts before the sequence where these take positions.

    Args:
        embeds: the base on embedded tokens, where the plan prepends tokens.
    """
    lengths: Mapping[str, Any] = copy.deepcopy(dict(base.limits["lengths"]))
    claims = [claim for claim in plan.claims if "prepend" in claim.effects]
    if embeds is not None and claims and claims[0].site.role != "embedding":
        tokens = sum(int(str(claim.shape("prepend").dims[0])) for claim in claims)
        lengths = {axis: {**limit, "most": limit["most"] - tokens} for axis, limit in embeds.limits["lengths"].items()}
    values = values_below(model.graph)
    for claim in [claim for claim in plan.claims if claim.takes][:1]:
        axis = ids_of(claim, [v.name or "" for v in model.graph.inputs])[1]
        if axis in lengths:
            lengths = {**lengths, axis: {**lengths[axis], "most": lengths[axis]["most"] - claim.takes}}
        values = {**base.limits["values"], **values}  # ids are joined before they are looked up
    tokens_of = {"tokens": base.limits["tokens"]} if base.limits.get("tokens") else {}
    return {"values": values, "lengths": lengths, **tokens_of}
