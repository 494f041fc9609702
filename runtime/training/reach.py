"""Whether a site can be reached in a torch module that `transformers` does not have: it is tried."""

from __future__ import annotations

import torch
from torch import nn

from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site
from peltc.runtime.training.evaluation import Tensor
from peltc.runtime.training.places import leaf_of, owner_of
from peltc.spec.diagnostics import fail


def check_reach(model: nn.Module, claims: list[Claim]) -> None:
    """Check that hooks reach a site in a torch module that `transformers` does not have. Such a module may own several
    maps as bare parameters, so that its own input and output are not those of any one map.

    Raises:
        PeltError: E209 they do not, and why.
    """
    site = claims[0].site
    kind = type(model).__name__
    if site.kind == "attention":
        raise fail("E209", f"the attention of {kind} cannot be reached at {site.name}",
                   expected="a model of transformers: attention cores are reached through its attention interface",
                   hint="linear maps, norms and blocks of any torch module are reached")  # fmt: skip
    if site.kind == "embedding":
        raise fail("E209", f"{kind} cannot be given tokens before its sequence, at {site.name}",
                   expected="a model of transformers that takes 'inputs_embeds'")  # fmt: skip
    if site.kind == "experts":
        return  # no hook has to see their maps: the module that owns the weights reads others
    roles = {role for claim in claims for role in ("x", "r", "h") if role in claim.reads}
    anchors = {site.anchors.get(role, "") for role in roles}
    if site.kind == "block":
        anchors.add(site.anchors.get("y", ""))
        if site.role == "layer" and not _lists(model, site):
            raise fail("E209", f"{site.name} cannot be reached in torch: the layers of {kind} are in no nn.ModuleList")
    else:
        anchors.add(site.parameters["weight"])
    for name in sorted(anchors - {""}):
        owner = owner_of(model, name)
        own = [n for n, _ in owner.named_parameters()]
        mine = {leaf_of(site, role) for role in site.parameters} if name == site.parameters.get("weight") else set(own)
        if len(own) > 2 or any("." in n for n in own) or {*own} != mine:
            raise fail("E209", f"{site.name} cannot be reached in torch: {type(owner).__name__}, which owns '{name}',"
                               f" has more parameters: {', '.join(own[:6])}",
                       expected="a torch module of its own for each map and norm, such as nn.Linear")  # fmt: skip
    if site.kind == "linear" and not is_map(owner_of(model, site.parameters["weight"]), site):
        owner = owner_of(model, site.parameters["weight"])
        raise fail("E209", f"{site.name} cannot be reached in torch: {type(owner).__name__}, which owns"
                           f" '{site.parameters['weight']}', computes something else than this map",
                   expected="a torch module of its own for each linear map, such as nn.Linear")  # fmt: skip


def is_map(module: nn.Module, site: Site) -> bool:
    """Whether a torch module computes x Wᵀ + b, tried on random numbers; it may want its tokens in one row."""
    weight = getattr(module, leaf_of(site, "weight")).detach()
    turned = weight.T if site.transposed else weight
    bias = getattr(module, leaf_of(site, "bias")).detach() if "bias" in site.parameters else None
    random = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, turned.shape[1]), generator=random).to(turned)
    near = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    for given in (x, x.flatten(0, 1)):
        try:
            with torch.no_grad():
                found, expected = module.forward(given), nn.functional.linear(given, turned, bias)
            error, size = (found - expected).abs().max(), expected.abs().max()
            if found.shape == expected.shape and error <= near * size:
                return True
        except Exception:  # whatever it wants, it is no linear map
            continue
    return False


def looks_up(module: nn.Module, site: Site) -> bool:
    """Whether a torch module gives the rows that ids pick, as they are, tried on a few."""
    weight = getattr(module, leaf_of(site, "weight")).detach()
    ids = torch.arange(min(len(weight), 5), device=weight.device)[None]
    try:
        with torch.no_grad():
            found = module.forward(ids)
    except Exception:  # whatever it wants, it is no plain lookup
        return False
    return isinstance(found, Tensor) and torch.equal(found, weight[ids])


def _lists(model: nn.Module, site: Site) -> bool:
    """Whether a layer is an item of a list."""
    parts = site.anchors.get("x", "").split(".")
    paths = [".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit()]
    return any(isinstance(model.get_submodule(path), nn.ModuleList) for path in paths)
