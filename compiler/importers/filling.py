"""A plan's tensors from an adapter's: those of each module go to the sites that it is; what does not fit is named."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.adapter.weights import finite
from peltc.compiler.importers.folder import Folder
from peltc.compiler.importers.formats import Array, Format, own_rows
from peltc.compiler.importers.ties import Modules
from peltc.compiler.plan.claims import Plan
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Place, fail
from peltc.spec.formula.syntax import names as variables
from peltc.spec.method import Method


def filled(
    plan: Plan,
    known: Format,
    sites: Mapping[str, list[Site]],
    modules: Modules,
    whole: Modules,
    shared: Mapping[str, str],
    folder: Folder,
) -> dict[str, Array]:
    """The plan's tensors, from the modules that its sites are.

    Args:
        shared: tensors of the file that all modules share, by what they are.

    Raises:
        PeltError: E433 a module that the plan does not have, or tensors that do not fit it; E404 values that are no
            numbers.
    """
    owner = {site.key: name for name, found in sites.items() for site in found}
    parts = {**modules, **whole}
    common = {parameter: read_array(folder, name) for parameter, name in shared.items()}
    tensors: dict[str, Array] = {}
    for claim in plan.claims:
        if claim.mirrors is not None and claim.site.key not in owner:
            continue  # what is tied follows the table, whose tensors it has
        name = owner.pop(claim.site.key, None)
        if name is None:
            raise fail("E433", f"the spec that was made of it means {claim.site.name}, which it does not have",
                       Place(str(folder.path)), hint="please report this")  # fmt: skip
        stored = {parameter: read_array(folder, tensor) for parameter, tensor in parts[name].items()}
        if name in whole:
            found = replaced(claim.site, stored)
        else:
            found = dict(known.parameters({**common, **stored}, claim.site))
        for parameter, tensor in claim.tensors.items():
            value = found.pop(parameter, None)
            if value is not None and parameter in common:
                value = leading(value, tensor.shape, claim.method, parameter)
            if value is None or value.shape != tensor.shape:
                what = "is missing" if value is None else f"has the shape {list(value.shape)}"
                raise fail("E433", f"'{parameter}' of '{name}' {what}", Place(str(folder.path)),
                           f"the shape {list(tensor.shape)}")  # fmt: skip
            tensors[tensor.name] = np.ascontiguousarray(value)
        if found:
            raise fail("E433", f"'{next(iter(found))}' of '{name}' has no counterpart at {claim.site.name}",
                       Place(str(folder.path)))  # fmt: skip
    if owner:
        raise fail("E433", f"the spec that was made of it leaves out {names(sorted(owner))}",
                   Place(str(folder.path)), hint="please report this")  # fmt: skip
    return finite(tensors, Place(str(folder.path)))


def read_array(folder: Folder, name: str) -> Array:
    """A tensor's values, float32."""
    return np.asarray(folder.tensors[name].array(), np.float32)


def leading(value: Array, shape: tuple[int, ...], method: Method, parameter: str) -> Array:
    """Of a tensor that all modules of the model share, the part that an attachment reads: along an axis that is as long
    as its largest site needs, the first entries."""
    axes = next(one.shape for one in method.parameters if one.name == parameter)
    if value.ndim != len(shape):
        return value
    cut = [slice(size if {"max_in", "max_out"} & variables(axis) else None) for axis, size in
           zip(axes, shape, strict=True)]  # fmt: skip
    return value[tuple(cut)]


def replaced(site: Site, stored: Mapping[str, Array]) -> dict[str, Array]:
    """A map's own weight [O, I] and bias [O]; of a fused map, a site's own rows."""
    turned = {n: array.T if n == "weight" and site.transposed else array for n, array in stored.items()}
    return {name: own_rows(array, site) for name, array in turned.items()}
