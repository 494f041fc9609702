"""What the files of an attached model say beside its tensors, read off the live model: how it was trained, on what, and
what of it no file holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

from peltc.compiler.adapter.identity import ELEMENTS, BaseRecord, Read, Sample, pick, public_name
from peltc.compiler.adapter.mathematics import spread
from peltc.compiler.base.live import is_known
from peltc.compiler.files.checkpoint import MODULES
from peltc.compiler.plan.claims import Plan, walk_resolved
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.spec.formula.syntax import Name
from peltc.spec.method import ROLES, shipped

THAWED = 16
MAX_LABELS = 4096
SHOWN = 4


def describe_base(model: Any) -> BaseRecord:
    """A live model's class and name."""
    cls = type(model)
    architecture = cls.__name__ if is_known(model) else f"{cls.__module__}.{cls.__qualname__}"
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return BaseRecord(architecture, public_name(name) if isinstance(name, str) else "")


def record_base(model: Any, plan: Plan) -> BaseRecord:
    """The base under a plan's modules, with samples of what it holds now."""
    read, gone = live_samples(model), replaced(model, plan)
    trained = dict(lost(model, plan))
    kept = [name for name, p in own_parameters(model) if name not in gone and name not in trained and readable(p)]
    known = describe_base(model)
    return BaseRecord(known.architecture, known.name, _sampled(pick(kept), read), _sampled(pick(trained, THAWED), read),
                      labels_of(model, plan))  # fmt: skip


def _sampled(names: list[str], read: Read) -> dict[str, Sample]:
    found = {name: read(name) for name in names}
    return {name: sample for name, sample in found.items() if sample is not None}


def own_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a model, those of attached modules apart."""
    return ((name, p) for name, p in model.named_parameters() if not name.startswith(MODULES))


def readable(parameter: torch.Tensor) -> bool:
    """Whether a parameter's values are here: not where another process or nobody holds them."""
    return parameter.is_floating_point() and parameter.numel() > 0 and not parameter.is_meta


def live_samples(model: Any) -> Read:
    """Reads parameters of a live model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def read(name: str) -> Sample | None:
        parameter = parameters.get(name)
        if parameter is None or not readable(parameter):
            return None
        places = np.unravel_index(spread(parameter.numel(), ELEMENTS), tuple(parameter.shape) or (1,))
        whole = parameter.detach().reshape(1) if parameter.dim() == 0 else parameter.detach()
        values = whole[tuple(torch.from_numpy(np.array(axis)).to(whole.device) for axis in places)].cpu()
        if values.dtype == torch.bfloat16:
            return Sample.of(parameter.numel(), values.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return Sample.of(parameter.numel(), values.numpy())

    return read


def replaced(model: Any, plan: Plan) -> set[str]:
    """The base's parameters that have no say under a plan: modules put others in their place everywhere."""
    found = set()
    for claim in plan.claims:
        if claim.site.rows is None:
            for role, short in ROLES.items():
                if role in claim.effects and short not in claim.reads:
                    found.add(claim.site.parameters.get(role, ""))
    uses: dict[int, int] = {}
    every = list(model.named_parameters(remove_duplicate=False))
    for _, parameter in every:
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return found & {name for name, parameter in every if uses[id(parameter)] == 1}


def lost(model: Any, plan: Plan) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that are trained and that no adapter file holds."""
    gone = replaced(model, plan)
    return ((name, p) for name, p in own_parameters(model) if p.requires_grad and name not in gone)


def warn_of_lost(model: Any, plan: Plan, anatomy: Anatomy | None, level: int) -> None:
    """Name, in one warning, what is trained and will not be in the file.

    Args:
        level: how far up the caller is whose line the warning shows.
    """
    names = [name for name, _ in lost(model, plan)]
    if not names:
        return
    methods = whole_methods()
    sites = {name: site for site in anatomy or () if site.kind in methods for name in site.parameters.values()}
    mends = dict.fromkeys(_mend(sites[name], methods) for name in names if name in sites)
    advice = [f"attach {mend}" for mend in list(mends)[:SHOWN]]
    advice.append("save the model itself as well (`model.save_pretrained`) and compile on that")
    shown = ", ".join(f"'{name}'" for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    many = f"{len(names)} parameters of the base are" if len(names) > 1 else "a parameter of the base is"
    warnings.warn(f"{many} trained, and the file does not hold {'them' if len(names) > 1 else 'it'}: {shown};"
                  f" {', or '.join(advice)}", stacklevel=level + 1)  # fmt: skip


def whole_methods() -> dict[str, str]:
    """By kind of site, the shipped method that trains the site's own weight: it starts there and takes its place."""
    found: dict[str, str] = {}
    for name, method in shipped().items():
        own = {p.name for p in method.parameters if p.init == Name("W")}
        weight = method.effect("weight")
        if weight is not None and own & {n.id for n in walk_resolved(weight, method.defaults) if isinstance(n, Name)}:
            found.setdefault(method.site, name)
    return found


def _mend(site: Site, methods: Mapping[str, str]) -> str:
    """The attachment that trains a site's own parameters."""
    where = f"at: {site.path}" if site.path else f"parameter: {site.parameters['weight']}"
    return f"`method: {methods[site.kind]}, {where}` before training"


def labels_of(model: Any, plan: Plan) -> tuple[str, ...]:
    """What a head that the modules bring calls its classes; empty where they bring none, or it has no names."""
    named = getattr(getattr(model, "config", None), "id2label", None)
    heads = [claim.site for claim in plan.claims if claim.site.role == "head" and "weight" in claim.effects]
    if not isinstance(named, dict) or not heads or not 0 < len(named) <= MAX_LABELS:
        return ()
    if heads[0].sizes.get("out") != len(named) or set(named) != set(range(len(named))):
        return ()
    return tuple(str(named[i]) for i in range(len(named)))


def digest_tensor(digest: str) -> torch.Tensor:
    """A digest as it travels with a model's state: 32 bytes."""
    return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
