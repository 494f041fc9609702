"""Where the `adapters` library's modules are among the sites of a model, and where its configs want them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.base.base import Base
from peltc.compiler.importers.adapters.folder import AdapterFolder, Part
from peltc.compiler.importers.quirks import Quirk, Quirks
from peltc.compiler.importers.readings import Reading, readings
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Place, fail

OUTSIDE = {"attention_adapters": "attention.block", "cross_attention_adapters": "cross_attention.block",
           "output_adapters": "feed_forward.block"}  # fmt: skip
"""Modules of the library's own that a layer has, and the sub-layer that they stand after. Elsewhere the adapters are in
the module that ends the sub-layer."""
BLOCKS = {"attention.block": "mh_adapter", "cross_attention.block": "cross_adapter",
          "feed_forward.block": "output_adapter"}  # fmt: skip
"""The keys of a bottleneck's config, by what they put one after."""
PREFIXES = ("self_prefix", "encoder_prefix", "cross_prefix")
LAYERED = ("adapters", "loras", "prefix_gates", "refts")
"""Kinds of parts that lie in modules of layers."""


class Places:
    """The sites of a model as the library's names and numbers mean them, for one adapter and its quirks."""

    def __init__(self, folder: AdapterFolder, base: Base, quirks: Quirks):
        self.base, self.folder, self.quirks = base, folder, quirks
        self.stacks = [s for s in dict.fromkeys(site.stack for site in base.anatomy if site.layer is not None) if s]
        depth = {
            stack: 1 + max(site.layer or 0 for site in base.anatomy if site.stack == stack) for stack in self.stacks
        }
        self.offsets = {s: sum(depth[other] for other in self.stacks[:i]) for i, s in enumerate(self.stacks)}
        self.read = self._reading()

    def _reading(self) -> Reading:
        """How the adapter's names become the model's.

        Raises:
            PeltError: E432 none finds all modules.
        """
        parts = self.folder.of(*LAYERED)
        for read in readings([part.module for part in parts], self.base.parameters):
            if all(self._found(part, read) for part in parts):
                return read
        missing = [part.module for part in parts if not self._found(part, str)]
        raise fail("E432", f"{len(missing)} of the adapter's {len(parts)} modules are not in the"
                           f" {self.base.architecture}: {names(missing)}", Place(str(self.folder.path)),
                   "an adapter of this model", self._hint())  # fmt: skip

    def _hint(self) -> str:
        if self.folder.interface is not None:
            return "where a norm ends a sub-layer, the library's bottlenecks stand before it, and none here do"
        return f"it says that it is for '{self.folder.base[:120]}'" if self.folder.base else ""

    def fixes(self, quirk: Quirk, cannot: str = "") -> bool:
        """Note that the adapter has a quirk; whether its fixed form is asked for, which it may not have.

        Raises:
            PeltError: E437.
        """
        return self.quirks.fixes(quirk, self.folder.place, cannot)

    def sites(self, part: Part) -> list[Site]:
        """The sites that a part of a layer is at; of a fused map, all."""
        return self._found(part, self.read)

    def _found(self, part: Part, read: Reading) -> list[Site]:
        module = read(part.module)
        if part.kind == "loras":
            return [s for s in self.base.anatomy if s.kind == "linear" and s.parameters["weight"] == f"{module}.weight"]
        if part.kind == "prefix_gates":
            inner = module.removesuffix("prefix_tuning")
            return [s for s in self.base.anatomy if s.kind == "attention" and s.parameters["query"].startswith(inner)]
        layer, _, last = module.rpartition(".")
        if part.kind == "refts":
            own = {s.layer_path for s in self.base.anatomy if s.layer is not None
                   and any(name.startswith(f"{layer}.") for name in s.parameters.values())}  # fmt: skip
            return [s for s in self.base.anatomy if s.kind == "block" and s.path in own]
        role = OUTSIDE.get(last, "")
        start = f"{layer if role else module}."
        return [s for s in self.base.anatomy if s.role in BLOCKS and s.kind == "block"
                and (not role or s.role == role) and s.values.get("linear", "").startswith(start)][:1]  # fmt: skip

    def number(self, site: Site) -> int:
        """The library's number of a site's layer: a decoder's layers go on where the encoder's end."""
        return self.offsets.get(site.stack, 0) + (site.layer or 0)

    def left_out(self, config: Mapping[str, Any], site: Site) -> bool:
        """Whether a config leaves a site's layer out."""
        return self.number(site) in (config.get("leave_out") or ())

    def attentions(self, location: str) -> list[Site]:
        """The attentions that a prefix of a location stands in, in the order of their layers."""
        found = [site for site in self.base.anatomy if site.kind == "attention" and site.path]
        if location == "cross_prefix":
            return [site for site in found if site.role == "cross_attention"]
        own = [site for site in found if site.role == "attention"]
        both = {"encoder", "decoder"} <= set(self.stacks)
        if location == "encoder_prefix":
            return [site for site in own if site.stack == "encoder"]
        return [site for site in own if site.stack == "decoder"] if both else own

    def check(self, wanted: Iterable[Site], found: Iterable[Site]) -> None:
        """Whether the file has parts at each site that the config means, and at no other: the library leaves the former
        at their start values and drops the latter, with no more than a line of its log.

        Raises:
            PeltError: E432.
        """
        means, has = ({site.name for site in sites} for sites in (wanted, found))
        for which, what in ((means - has, "has no tensors at"), (has - means, "has, and its config does not mean,")):
            if which:
                raise fail("E432", f"the adapter {what} {len(which)} sites: {names(sorted(which))}", self.folder.place,
                           "a config that means the modules in the file")  # fmt: skip
