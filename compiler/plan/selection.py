"""Which sites an attachment means, in which layers, and with which options at each."""

from __future__ import annotations

import re
from typing import Any

from peltc.compiler.plan.findings import Findings, at
from peltc.compiler.survey.anatomy import HEADLESS, Anatomy, Site
from peltc.spec.aliases import ours
from peltc.spec.diagnostics import nearest, one_of
from peltc.spec.specification import Attachment

HEAD = frozenset({"head"})


class Selection:
    """The sites of a model, as attachments choose among them.

    Args:
        anatomy: the sites.
        findings: where to say what is wrong with a choice.
    """

    def __init__(self, anatomy: Anatomy, findings: Findings):
        self.anatomy, self.findings, self.find = anatomy, findings, findings.find
        self.order = {site.path: position for position, site in enumerate(anatomy.sites)}

    def sites(self, entry: Attachment) -> list[Site]:
        """The sites that an attachment means.

        Every selector must match, and match sites of the method's kind."""
        chosen: dict[int, Site] = {}
        kind = entry.method.site
        listed = list(self.anatomy)
        for selector in entry.at:
            if entry.by_parameter:
                hits = [s for s in listed if s.takes(kind) and s.matches_parameter(selector)]
                known = sorted({s.parameters["weight"] for s in listed if s.takes(kind) and "weight" in s.parameters})
            else:
                hits = [s for s in listed if s.matches(selector) and s.takes(kind)]
                known = sorted({s.role for s in listed if s.takes(kind) and s.path})
            if not hits:
                others = sorted({s.kind for s in listed if s.matches(selector)})
                what = "parameter" if entry.by_parameter else "site"
                message = f"no {what} '{selector}' in this model"
                if others:
                    message = f"'{selector}' is a site of kind {others[0]}, and '{entry.method.name}' needs kind {kind}"
                self.find("E203", message, at(entry), one_of(known), self.meant(selector, kind, known))
            chosen |= {id(s): s for s in hits}
        sites = [s for s in listed if id(s) in chosen]
        wanted = self.layers(entry, sites)
        if wanted is not None:
            sites = [s for s in sites if s.layer in wanted.get(s.stack, ())]
            if not sites and not self.findings:
                self.find("E203", "the selector matches nothing in these layers", at(entry, "layers"),
                          "layers that the model has")  # fmt: skip
        if entry.expect is not None and len(sites) != entry.expect and sites:
            self.find("E204", f"the selector matches {len(sites)} sites", at(entry, "expect"), f"{entry.expect} sites")
        return sites

    def meant(self, selector: str, kind: str, known: list[str]) -> str:
        """The hint for a selector that matches nothing: a site whose parameters are called so, or the nearest name."""
        own = [site.role for site in self.anatomy if site.takes(kind) and site.path
               for parameter in site.parameters.values() if parameter.split(".")[-2:-1] == [selector]]  # fmt: skip
        if roles := list(dict.fromkeys(own)):
            here = f"'{roles[0]}'" if len(roles) == 1 else f"`at: [{', '.join(roles)}]`"
            return f"'{selector}' is the model's own name of what is {here} here"
        if not self.anatomy.has_head and ours(selector, HEAD):
            return HEADLESS
        return nearest(selector, known)

    def layers(self, entry: Attachment, sites: list[Site]) -> dict[str, set[int]] | None:
        """The chosen layers by stack; None for all sites, those outside layers included."""
        if entry.layers == "all":
            return None
        depth = {
            s.stack: 1 + max(t.layer for t in self.anatomy if t.stack == s.stack and t.layer is not None)
            for s in sites
            if s.layer is not None
        }
        words = entry.layers if isinstance(entry.layers, tuple) else (entry.layers,)
        wanted: dict[str, set[int]] = {}
        for stack, n in depth.items():
            numbers: set[int] = set()
            for word in words:
                if isinstance(word, str) and (few := re.match(r"(first|last) (\d+)$", word)):
                    k = int(few.group(2))
                    numbers |= set(range(min(k, n)) if few.group(1) == "first" else range(max(n - k, 0), n))
                elif isinstance(word, str) and "-" in word:
                    a, b = map(int, word.split("-"))
                    numbers |= set(range(a, min(b, n) + 1))  # one beyond the last is enough to say that it is not there
                else:
                    numbers.add(int(word))
            if over := sorted(i for i in numbers if i >= n):
                self.find(
                    "E203",
                    f"the {stack or 'model'} has no layer {over[0]}",
                    at(entry, "layers"),
                    f"layers 0 to {n - 1}",
                )
            wanted[stack] = numbers
        return wanted

    @staticmethod
    def in_order(entry: Attachment, sites: list[Site]) -> list[tuple[str, int | None]]:
        """The layers of sites in the order in which a list of options gives their values: the stacks as the model has
        them, and within each the layers as the attachment's `layers` lists them."""
        words = entry.layers if isinstance(entry.layers, tuple) else (entry.layers,)
        ranges = [(int(a), int(b or a)) for a, _, b in (str(word).partition("-") for word in words) if a.isdigit()]

        def place(layer: int) -> int:
            return next((i for i, (first, last) in enumerate(ranges) if first <= layer <= last), len(ranges))

        stacks = list(dict.fromkeys(site.stack for site in sites))
        found = {(site.stack, site.layer) for site in sites if site.layer is not None}
        return sorted(found, key=lambda p: (stacks.index(p[0]), place(p[1] or 0), p[1] or 0))

    def options(self, entry: Attachment, site: Site, layers: list[tuple[str, int | None]]) -> dict[str, Any] | None:
        """An attachment's options at a site: lists give one value per selected layer."""
        result = {}
        for name, value in entry.options.items():
            if isinstance(value, list):
                if len(value) != len(layers):
                    self.find("E205", f"'{name}' lists {len(value)} values for {len(layers)} layers", at(entry, name),
                              f"one value, or {len(layers)}")  # fmt: skip
                    return None
                if site.layer is None:
                    self.find("E205", f"'{name}' gives one value per layer, and '{site.name}' lies in none",
                              at(entry, name), "one value", "attach to it separately")  # fmt: skip
                    return None
                value = value[layers.index((site.stack, site.layer))]
            result[name] = value
        return result

    def leaders(self, entry: Attachment, sites: list[Site]) -> list[Site]:
        """Of sites that share their parameters the first: layers that are one module cannot be told apart in it, so a
        change of one is a change of all."""
        found: dict[str, Site] = {}
        paths = {site.path for site in sites}
        for site in sites:
            if others := set(site.shared) - paths:
                self.find(
                    "E214",
                    f"'{site.path}' and '{min(others)}' are one set of parameters, and only one of them is meant",
                    at(entry, "layers" if entry.layers != "all" else ""),
                    "all of the sites that share parameters",
                )
                return []
            found.setdefault(min((site.path, *site.shared), key=self.order.__getitem__), site)
        return list(found.values())
