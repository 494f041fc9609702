"""The adapter's tensors: from a safetensors file, or their start values."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from peltc.compiler.adapter.mismatch import mismatches, names
from peltc.compiler.adapter.places import misplaced
from peltc.compiler.adapter.profile import is_profile, unpack
from peltc.compiler.files.checkpoint import read_header
from peltc.compiler.interpreters.numeric import start_value
from peltc.compiler.plan.claims import Claim, Plan, Tensor
from peltc.compiler.survey.anatomy import Site, places_of
from peltc.spec.diagnostics import PeltError, Place, fail
from peltc.spec.foreign import refuse
from peltc.spec.formula.interpreter import Deferred, EvaluationError
from peltc.spec.interpreters.check import site_shapes
from peltc.spec.interpreters.shapes import ShapeInterpreter
from peltc.spec.method import START, initialiser

Array = np.ndarray[Any, Any]
Read = Callable[[str], Array]
Source = Callable[[Container[str]], Mapping[str, Array]]
"""The tensors that no weights file holds, but those of the names that are given."""


def load_tensors(plan: Plan, file: Path, source: Source | None = None) -> dict[str, Array]:
    """The tensors that a plan asks for, float32; a profile's masks are unpacked.

    Args:
        source: gives what `sourced` does of the plan, where many files are read by one.

    Raises:
        PeltError: E401 no safetensors file; E402 missing, E403 left-over, E404 misshapen tensors, all of them; E407
            a profile of another bank; E410 another library's adapter.
    """
    refuse(file, "weights")
    place, source = Place(str(file)), source or partial(sourced, plan)
    stored = read_header(file)
    if is_profile(file):
        apart = source(())
        return sound(plan, unpack(plan, file, apart), place, apart)
    apart = source(stored)
    check(plan, {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()}, place)
    own = {name: np.array(stored[name].array(), np.float32) for name in stored}
    return sound(plan, own, place, apart)


def overridden(plan: Plan, given: Iterable[str]) -> frozenset[str]:
    """Of tensors by name, those that stand in place of what the spec's own sources hold."""
    return frozenset(name for name in given if name in plan.tensors and plan.tensors[name].source)


def sourced(plan: Plan, given: Container[str] = ()) -> dict[str, Array]:
    """The tensors that are no part of a weights file: those of other files that the spec names, and start values.

    Args:
        given: names that are not asked for.

    Raises:
        PeltError: as `load_tensors`, about those files.
    """
    found: dict[str, Array] = {}
    files: dict[str, list[Tensor]] = {}
    for tensor in plan.tensors.values():
        if tensor.source and tensor.source != START and tensor.name not in given:
            files.setdefault(tensor.source, []).append(tensor)
    for name, wanted in files.items():
        file = inside(plan.spec.folder, name, plan.spec.path, "bank.file")
        refuse(file, "weights")
        stored = read_header(file)
        there = {t.name: (stored[t.name].shape, stored[t.name].dtype) for t in wanted if t.name in stored}
        check_these(wanted, there, Place(str(file)))
        found |= finite({t.name: np.array(stored[t.name].array(), np.float32) for t in wanted}, Place(str(file)))
    for claim in plan.claims:
        for tensor in claim.tensors.values():
            if tensor.source == START and tensor.name not in found and tensor.name not in given:
                found[tensor.name] = _start(plan, claim, tensor, _unread)
    return found


def _unread(name: str) -> Array:
    raise KeyError(f"a start value that the seed decides cannot read '{name}'")


def check_arrays(plan: Plan, arrays: Mapping[str, Array], source: Source | None = None) -> dict[str, Array]:
    """Arrays by tensor name, held against a plan; float32.

    Args:
        source: gives what `sourced` does of the plan, where many adapters are read by one.

    Raises:
        PeltError: E402, E403, E404; E410 another library's tensors.
    """
    refuse(arrays, "weights", Place("<arrays>"))
    check(plan, {name: (np.shape(array), np.asarray(array).dtype) for name, array in arrays.items()}, Place("<arrays>"))
    apart = (source or partial(sourced, plan))(arrays)
    own = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    return sound(plan, own, Place("<arrays>"), apart)


def sound(
    plan: Plan, given: dict[str, Array], place: Place, apart: Mapping[str, Array] = MappingProxyType({})
) -> dict[str, Array]:
    """All tensors of a plan: those that are given, all of whose values are numbers, and places of a matrix where they
    should be, and the others.

    Args:
        apart: the others, which were found sound before.

    Raises:
        PeltError: E404.
    """
    finite(given, place)
    tensors = {name: given[name] if name in given else apart[name] for name in plan.tensors}
    if bad := misplaced(plan, tensors):
        raise fail("E404", f"the tensor {names(bad[:1])} holds what are not different places of its matrix", place,
                   "a row and a column each, counted from 0, and none twice")  # fmt: skip
    return tensors


def finite(tensors: dict[str, Array], place: Place) -> dict[str, Array]:
    """The tensors, all of whose values are numbers."""
    bad = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if bad:
        what = f"the tensor {names(bad)} holds" if len(bad) == 1 else f"{len(bad)} tensors hold"
        raise fail("E404", f"{what} values that are no numbers{'' if len(bad) == 1 else f': {names(bad)}'}", place,
                   "finite values")  # fmt: skip
    return tensors


def check(plan: Plan, given: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], place: Place) -> None:
    """Hold names, shapes and types of tensors against a plan. Those of other sources may be there, and need not."""
    wanted = [t for t in plan.tensors.values() if not t.source or t.name in given]
    left = [name for name in given if name not in plan.tensors]
    check_these(wanted, given, place, left)


def check_these(
    wanted: Iterable[Tensor],
    given: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
    place: Place,
    left: Iterable[str] = (),
) -> None:
    """Hold names, shapes and types against what is wanted.

    Raises:
        PeltError: E402 missing, E403 left over, E404 misshapen; one finding each.
    """
    findings = mismatches({tensor.name: tensor.shape for tensor in wanted}, given, list(left), place)
    if findings:
        raise PeltError(findings)


def start_tensors(plan: Plan, read: Read) -> dict[str, Array]:
    """Every tensor's start value, float32.

    Args:
        read: base parameters by name, [O, I] or as stored; formulas of start values may read them.

    Raises:
        PeltError: E405 a start value that cannot be computed.
    """
    values = sourced(plan)
    for claim in plan.claims:
        for tensor in claim.tensors.values():
            if tensor.name not in values:
                values[tensor.name] = _start(plan, claim, tensor, read)
    return values


def _start(plan: Plan, claim: Claim, tensor: Tensor, read: Read) -> Array:
    """A tensor's start value; each of a stack of experts draws and reads its own."""
    if not tensor.experts:
        return _started(plan, claim, tensor, tensor.name, read, ...)
    return np.stack([_started(plan, claim, tensor, f"{tensor.name}.{i}", read, i) for i in range(tensor.experts)])


def _started(plan: Plan, claim: Claim, tensor: Tensor, name: str, read: Read, part: Any) -> Array:
    """The start value of a tensor, or of a part of it.

    Args:
        name: what random values are drawn by.
        part: which part of the base's weight and bias it reads, as in `parameters_of`.
    """
    site = claim.site
    scope = {**claim.constants, **parameters_of(site, read, part)}
    try:
        if initialiser(tensor.init) is None:  # sizes first: a formula may ask for more than there is memory
            values, _ = site_shapes(site.kind, site.sizes, site.name)
            ShapeInterpreter().evaluate(
                tensor.init, {**claim.constants, **{n: values[n] for n in ("W", "b") if n in values}}
            )
        return start_value(name, tensor.inner, tensor.init, scope, plan.spec.seed)
    except (EvaluationError, ValueError, KeyError) as error:
        entry = next((entry for entry in plan.spec.attach if entry.name == claim.attachment), None)
        place = claim.method.place if entry is None else entry.formulas
        raise fail("E405", f"the start value of '{tensor.name}' cannot be computed: {error}", place) from None


def parameters_of(site: Site, read: Read, part: Any = ...) -> dict[str, Deferred]:
    """A site's own weight W [O, I] and bias b [O] in float32, read when a formula asks for them.

    Args:
        read: base parameters by name, as stored.
        part: of experts, the number of the one that is meant.
    """
    rows = slice(None) if site.rows is None else places_of(site.rows)

    def weight() -> Array:
        array = np.asarray(read(site.parameters["weight"])[part], np.float32)
        return np.asarray((array.T if site.transposed else array)[rows])

    def bias() -> Array:
        return np.asarray(np.asarray(read(site.parameters["bias"])[part], np.float32)[rows])

    return {"W": Deferred(weight), "b": Deferred(bias)}


def inside(folder: Path, name: str, spec: str, key: str = "weights") -> Path:
    """A file that a spec names under a key, which must lie in or under the spec's folder.

    Raises:
        PeltError: E406 the path leads out.
    """
    file = Path() if "\0" in name else (folder / name).resolve()
    if "\0" in name or not file.is_relative_to(folder.resolve()):
        raise fail("E406", f"the file {name!r} lies outside the spec's folder", Place(spec, key=key),
                   "a path inside it", "give the file by --weights" if key == "weights" else "")  # fmt: skip
    return file
