"""Which torch modules and arguments sites stand for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peltc.compiler.survey.anatomy import Site

Tensor = torch.Tensor


def key_of(name: str) -> str:
    """A tensor's name as torch takes it for a parameter."""
    return name.replace(".", "/")


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    names = [n for n in inspect.signature(model.forward).parameters if n != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def first_of(given: Mapping[str, Any], *names: str) -> Any:
    """The first of a call's arguments that is there."""
    return next((given[name] for name in names if given.get(name) is not None), None)


def rows_of(site: Site) -> Tensor | None:
    if site.rows is None:
        return None
    return torch.cat([torch.arange(a, b) for a, b in site.rows])


def put_rows(y: Tensor, index: Tensor, part: Tensor) -> Tensor:
    return y.index_copy(-1, index.to(y.device), part)


def leaf_of(site: Site, role: str) -> str:
    """What the torch module that owns a site's parameter calls it."""
    return site.parameters.get(role, role).rpartition(".")[2]


def leaves_of(site: Site, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {leaf_of(site, role): tensor for role, tensor in parameters.items()}


def owner_of(model: Any, parameter: str) -> nn.Module:
    module: nn.Module = model.get_submodule(parameter.rpartition(".")[0])
    return module


def container_of(model: Any, site: Site) -> nn.Module:
    """The module of a whole layer: the last list item on the way to a parameter of the layer."""
    parts = site.anchors["x"].split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit() and isinstance(
        model.get_submodule(".".join(parts[:i])), nn.ModuleList) and not any(
        q.isdigit() for q in parts[:i]))  # fmt: skip
    module: nn.Module = model.get_submodule(".".join(parts[: last + 1]))
    return module
