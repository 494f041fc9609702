"""What modules draw at random in training, kept for as long as the same draw is to be used.

A site's draws hold while it runs once: keys and values, say, use the same ones. A layer's hold for all sites of one
attachment in that layer, until one of them runs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site

Drawn = dict[Any, torch.Tensor]


@dataclass
class _Layer:
    """The draws of one attachment in one layer, and of each site that used them its own draws at that time."""

    drawn: Drawn = field(default_factory=dict)
    users: dict[str, Drawn] = field(default_factory=dict)


class Draws:
    """The draws of a forward pass."""

    def __init__(self) -> None:
        self.sites: dict[str, dict[str, Drawn]] = {}
        self.layers: dict[tuple[str, str], _Layer] = {}

    def clear(self) -> None:
        """A pass begins: nothing is drawn yet."""
        self.sites.clear()
        self.layers.clear()

    def enter(self, site: Site) -> None:
        """A site begins to run, so that its draws are made anew."""
        self.sites[site.key] = {}

    def of(self, claim: Claim) -> Mapping[str, Drawn]:
        """What a claim has drawn so far and adds its draws to, by what a draw is for."""
        site = claim.mirrors or claim.site
        own = self.sites.setdefault(site.key, {}).setdefault(claim.attachment, {})
        where = claim.attachment, site.layer_path or site.key
        layer = self.layers.setdefault(where, _Layer())
        if layer.users.get(site.key, own) is not own:  # the site runs again: another pass, or the layer once more
            layer = self.layers[where] = _Layer()
        layer.users[site.key] = own
        return {"site": own, "layer": layer.drawn}
