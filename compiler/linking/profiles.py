"""What a profile is: the constants of a graph that an adapter's own tensors decide, and what they belong to."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from peltc.compiler.adapter.mathematics import whole_digest
from peltc.compiler.adapter.weights import start_tensors
from peltc.compiler.base.base import Base
from peltc.compiler.files.manifest import LINK, STARTS
from peltc.compiler.linking.bare import disturbance
from peltc.compiler.linking.uneven import Uneven, before
from peltc.compiler.passes.absent import ABSENT, absent, heads_of
from peltc.compiler.passes.offer import STAMP, constants, decided
from peltc.compiler.passes.packing import masks_of
from peltc.compiler.passes.uneven import shown_in
from peltc.compiler.plan.claims import Claim, Plan
from peltc.spec.diagnostics import Place, fail
from peltc.spec.modes import BANK, EXCHANGED

Array = np.ndarray[Any, Any]
KEPT = ("graph.onnx", "anatomy.json", "base.json")
EMBEDS = "embeds"
"""The folder, in that of what linking reads, of the base on embedded tokens."""
DIGITS = 8
"""Of the fingerprint, in the names of inputs."""
Write = Callable[..., tuple[ir.Model, Any]]
"""The graph with a plan's modules in it, by the adapter's `tensors`."""


def changing(plan: Plan) -> list[Claim]:
    """The claims whose tensors profiles bring."""
    return [claim for claim in plan.claims if claim.mode in EXCHANGED]


def exchanged(plan: Plan) -> set[str]:
    """The names of the tensors that profiles bring: all that are trained, of such claims."""
    return {tensor.name for claim in changing(plan) for tensor in claim.tensors.values() if not tensor.frozen}


def check_exchange(plan: Plan) -> None:
    """Whether profiles can bring what a plan lets them bring.

    Raises:
        PeltError: E207 two modes of profiles, tokens before the sequence of which profiles bring some alone, or several
            profiles for a text in another mode than `bank`; E208 what a text has once, where it has several profiles.
    """
    if len({claim.mode for claim in changing(plan)}) > 1:
        raise fail("E207", "profiles are brought one at a time and by rows", Place(plan.spec.path),
                   f"one of the modes {' and '.join(EXCHANGED)} for all attachments that profiles bring")  # fmt: skip
    beginning = [claim for claim in plan.claims if "prepend" in claim.effects]
    if len({claim.mode in EXCHANGED for claim in beginning}) > 1:
        names = " and ".join(f"'{claim.attachment}'" for claim in beginning)
        raise fail("E207", f"profiles bring some of the tokens of {names}, and others are fixed",
                   Place(plan.spec.path), "one mode for all that put tokens before the sequence")  # fmt: skip
    if not plan.spec.blend:
        return
    place = plan.spec.places.get("deploy", Place(plan.spec.path))
    if plan.exchange != BANK:
        raise fail("E207", "a text has several profiles, where profiles are brought one at a time", place,
                   "mode: bank, or no `blend`")  # fmt: skip
    if plan.held:
        raise fail("E208", f"what '{plan.held[0].attachment}' makes of a whole text is kept once for each text, and"
                           " a text has several profiles", place, "deploy.blend or deploy.gates")  # fmt: skip
    for claim in filter(before, plan.claims):
        if "prepend" in claim.effects or plan.spec.generation:
            raise fail("E208", f"what '{claim.attachment}' puts before a text is there once, and a text has several"
                               " profiles", place, "another method, or no `blend`")  # fmt: skip


def without(plan: Plan, tensors: Mapping[str, Array], read: Callable[[str], Array]) -> dict[str, Array]:
    """An adapter's tensors, with start values for those that profiles bring.

    Args:
        read: base parameters by name.
    """
    mine, starts = exchanged(plan), start_tensors(plan, read)
    return {name: starts[name] if name in mine else array for name, array in tensors.items()}


def brought(plan: Plan, tensors: Mapping[str, Array], model: ir.Model, write: Write) -> dict[str, Array]:
    """The constants of a graph that profiles bring, as they are in it.

    Args:
        tensors: the adapter's tensors that it was written with.
        model: the graph.
        write: writes it with others.
    """
    draw = np.random.default_rng(0)
    other = {name: draw.normal(0, 0.1, plan.tensors[name].shape).astype(np.float32) for name in sorted(exchanged(plan))}
    other |= {name: opposite(tensors[name]) for name in other if plan.tensors[name].part == "mask"}
    if heads_of(plan):
        other[ABSENT] = absent(0, heads_of(plan)[0].site.sizes["out"])
    mine = constants(model)
    changed = decided(mine, constants(write(tensors={**tensors, **other})[0]))
    found = changed.keys() | masks_of(model).keys() | shown_in(model)
    return {name: array for name, array in mine.items() if name in found}


def opposite(logits: Array) -> Array:
    """Logits [..., N] in the opposite order, so that the k largest are others, unless all are chosen: two draws could
    choose the same."""
    found = np.empty_like(logits)
    order = np.argsort(-logits, axis=-1, kind="stable")
    np.put_along_axis(found, order, np.arange(logits.shape[-1], dtype=logits.dtype), axis=-1)
    return found


def record(
    plan: Plan,
    base: Base,
    tensors: Mapping[str, Array],
    inputs: Mapping[str, Array],
    masks: Mapping[str, tuple[int, int]],
    places: Container[str],
    rows: Uneven,
    hiding: str | None = None,
) -> dict[str, Any]:
    """What the manifest says of profiles.

    Args:
        tensors: the adapter's tensors, at start values where profiles bring them.
        inputs: the constants that profiles bring, by name.
        masks: those of them that are masks' bits: of how many modules, and how many take part.
        places: those of them that say which places before the text a profile fills.
        rows: whether a row may have fewer tokens or keys before its text than others.
        hiding: the one that hides labels which a profile does not have.
    """
    shapes = sorted((name, array.shape) for name, array in inputs.items())
    known = hashlib.sha256(json.dumps([base.fingerprint, whole_digest(plan), shapes]).encode()).hexdigest()
    called = {name: f"{name}{STAMP}{known[:DIGITS]}" for name in inputs}
    return {
        "mode": plan.exchange,
        "blend": plan.spec.blend,
        "fingerprint": known,
        "inputs": {called[name]: list(array.shape) for name, array in inputs.items()},
        "masks": {called[name]: list(sizes) for name, sizes in masks.items() if name in called},
        "labels": None if hiding is None else {"input": called[hiding], "names": label_names(base, plan)},
        "places": [called[name] for name in inputs if name in places],
        "no_bare_base": rows.none or disturbance(changing(plan), tensors, base.array, hidden=True) or None,
        "one_length": rows.fewer or None,
    }


def lacking(base: Base, plan: Plan) -> str:
    """Why there is no base without a profile: the checkpoint lacks what profiles bring; empty where it has all."""
    read = {
        name: claim for claim in changing(plan) for name in claim.site.parameters.values() if name in base.parameters
    }
    missing = next((name for name in read if base.lacks(name)), "")
    return f"the checkpoint lacks '{missing}', which profiles bring" if missing else ""


def label_names(base: Base, plan: Plan) -> list[str]:
    """What the labels of a head are called that has room for the most of them."""
    count, named = heads_of(plan)[0].site.sizes["out"], base.config.get("id2label") or {}
    return [str(named.get(str(i), named.get(i, f"LABEL_{i}"))) for i in range(count)]


def keep(base: Base, embeds: Base | None, starts: Mapping[str, Array], folder: Path) -> None:
    """Put what linking reads into an artifact's folder, and what stands where no profile brings anything.

    Args:
        embeds: the base on embedded tokens, where tokens are put before the sequence.
        starts: the inputs' default values by name.
    """
    (folder / LINK / EMBEDS).mkdir(parents=True) if embeds is not None else (folder / LINK).mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in starts.items()}, folder / LINK / STARTS)
    for one, place in ((base, folder / LINK), *([(embeds, folder / LINK / EMBEDS)] if embeds is not None else [])):
        for name in KEPT:
            shutil.copyfile(one.graph_file.with_name(name), place / name)
