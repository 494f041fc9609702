"""The base: a model's ONNX graph without its weights, and where each weight lies.

    MODEL (folder or hub id) ── config, headers ──► fingerprint ──► cache hit: read graph and anatomy (no torch)
                                                         └────────► miss: export on parameters without memory, survey

    torch module, example inputs ── export over its own memory, survey ──► the same, in a folder of the caller's

A cached base is a folder `<cache>/bases/<key>/` with `graph.onnx` (parameters are graph inputs there), `base.json`
and `anatomy.json`. Where the checkpoint's tensors are not the model's own (renamed, merged, pickled), they are
written once into `<cache>/weights/<key>/` and referenced from there. The base of a torch module that `transformers`
does not have is never cached: its code may change, so that only the exported graph itself could be the key.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peltc.compiler.export.exported import OPSET
from peltc.compiler.export.refusals import (
    check_packed,
    check_stored,
)
from peltc.compiler.files.cache import cache_folder, tidy_cache
from peltc.compiler.files.levels import CONFIG
from peltc.compiler.files.packed import QUANTISED, UNDONE, Packing, packing_of, unpack
from peltc.compiler.senses.examples import Reading
from peltc.compiler.survey.anatomy import Anatomy, Packed
from peltc.spec.diagnostics import Place, fail
from peltc.spec.specification import AS_IT_SAYS, ModelChoice

if TYPE_CHECKING:
    pass
from peltc.compiler.base.base import Base, ParameterInfo
from peltc.compiler.base.building import build_base
from peltc.compiler.base.conversion import materialise, safe_checkpoint
from peltc.compiler.base.key import VOLATILE, key_of
from peltc.compiler.base.precision import computed
from peltc.compiler.base.source import chosen_config, find_model, read_config
from peltc.compiler.files.talk import Talk, logged


def open_base(
    model: str | Path,
    *,
    architecture: str | None = None,
    choice: ModelChoice = AS_IT_SAYS,
    precision: str = "checkpoint",
    provider: str = "any",
    variant: str = "ids",
    text_only: bool = False,
    talk: Talk = logged,
) -> Base:
    """The base of a model, from the cache or built now.

    The checkpoint need not hold every parameter of the architecture: `Base.lacks` tells which are for modules to bring.

    Args:
        model: a model folder or a hub id.
        architecture: a class of `transformers`; that of the choice, or the config's own, where absent.
        choice: what the model is, where its config does not say it.
        precision: `checkpoint` keeps the stored type (bfloat16 is computed in float32, unless it is for CUDA alone), or
            a float type's name.
        provider: `cuda`, `cpu` or `any`, what the graphs are for.
        variant: `ids`, `embeds` for a graph that reads embedded tokens, `decode` or `encoder` for those that generation
            takes. These share the parameters of `ids`, which alone says where all of them lie.
        text_only: compile a model that reads more than text through its text alone.
        talk: told what takes time.

    Raises:
        PeltError: E5xx what is wrong with the model, or why it cannot be exported.
    """
    folder = find_model(model)
    config = read_config(folder)
    raw, packing = config, packing_of(config, folder)
    if packing is None:
        check_stored(config, folder)
    else:  # what is left describes the model that it was made from
        config = {key: value for key, value in config.items() if key != CONFIG}
    named = config.get("architectures") or []
    own = str(named[0]) if isinstance(named, list) and named else None
    wanted = architecture or choice.architecture or None
    architecture, chosen = wanted or own, wanted not in (None, own)
    if architecture is None:
        raise fail(
            "E502",
            "the model's config names no architecture, so its task is not known",
            Place(str(folder / "config.json")),
            "a key 'architectures'",
            "give the class of transformers by --architecture",
        )
    config = chosen_config(config, architecture, choice)
    tidy_cache()
    checkpoint, converted = safe_checkpoint(folder, talk)
    if packing is not None:
        checkpoint = unpack(checkpoint, packing)
    check_packed(checkpoint.tensors, folder)
    stored = str(checkpoint.float_dtype)
    computes = computed(stored, precision, provider)
    stable = {k: v for k, v in config.items() if k not in VOLATILE}
    facts = (OPSET, architecture, stable, computes, variant, checkpoint.header_digest)
    key = key_of(*facts, *(["text only"] if text_only else []))[:24]
    home = cache_folder() / "bases" / key
    if not (home / "base.json").is_file():
        build_base(folder, config, architecture, chosen, computes, variant, checkpoint, home, text_only, talk)
    record = json.loads((home / "base.json").read_text(encoding="utf-8"))
    if record["materialise"] and variant in ("ids", "embeds"):
        checkpoint, converted = materialise(folder, architecture, checkpoint, record["materialise"], talk)
    read = json.dumps(record["reading"], sort_keys=True) if record["reading"] else ""
    identity = architecture + json.dumps(stable, sort_keys=True) + read
    base = read_base(
        home,
        folder=folder,
        architecture=architecture,
        config=config,
        precision=computes,
        variant=variant,
        fingerprint=hashlib.sha256((identity + checkpoint.fingerprint).encode()).hexdigest(),
        checkpoint=checkpoint,
        converted=converted,
        changed=config != raw,
        text_only=bool(record["beyond"]),
    )
    return base if packing is None else with_packed(base, packing)


def read_base(home: Path, **known: Any) -> Base:
    """The base whose graph, anatomy and record lie in a folder; the rest is `known`."""
    record = json.loads((home / "base.json").read_text(encoding="utf-8"))
    reading = Reading.from_json(record["reading"]) if record["reading"] else None
    limits = record["limits"]
    if reading is not None and reading.tokens:
        limits = {**limits, "tokens": {str(reading.tokens[sense]): reading.counts[sense] for sense in reading.tokens}}
    return Base(
        parameters={
            n: ParameterInfo(tuple(p["shape"]), p["stored"], p.get("wide", False))
            for n, p in record["parameters"].items()
        },
        anatomy=Anatomy.from_json(json.loads((home / "anatomy.json").read_text(encoding="utf-8"))),
        export=record["export"],
        limits=limits,
        reading=reading,
        graph_file=home / "graph.onnx",
        **known,
    )


def with_packed(base: Base, packing: Packing) -> Base:
    """A base that knows which of its weights the checkpoint stores in blocks of small whole numbers.

    Raises:
        PeltError: E508 one of them is no weight of a map as blocks are.
    """
    tensors = base.checkpoint.tensors
    held = {name for name, info in base.parameters.items() if isinstance(tensors.get(info.stored), QUANTISED)}
    maps = {s.parameters["weight"] for s in base.anatomy if s.kind == "linear" and not s.transposed}
    if odd := sorted(held - maps):
        told = f"the checkpoint is quantised ({packing.method}, {packing.bits} bits)"
        raise fail("E508", f"{told}: '{odd[0]}' is no weight of a linear map [out, in]", Place(str(base.folder)),
                   "packed weights of linear maps", UNDONE)  # fmt: skip
    packed = Packed(packing.method, packing.to, packing.group, frozenset(held))
    return replace(base, anatomy=replace(base.anatomy, packed=packed))
