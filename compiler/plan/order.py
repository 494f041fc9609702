"""The order of what meets at a site: which claims commute, and which orders a spec must say.

At a site, whatever the order in the file, what the site reads is defined first, then its parameters, then its output.

    earlier   later     must be said?
    delta     delta     no, unless one reads `y`, which the other changes
    bias      delta     no where the bias is a sum with `b`: both add to the output
    weight    delta     yes where the weight is made anew of `W` (DoRA): the sum could have been meant as well
    output    output    yes

A claim names what it follows by `after:`, directly or through what that follows itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations

from peltc.compiler.plan.claims import Claim
from peltc.spec.diagnostics import Diagnostic, Place
from peltc.spec.formula.syntax import Call, Expr, Name
from peltc.spec.specification import Attachment

STAGE = {"input": 0, "weight": 1, "bias": 1, "delta": 2, "output": 2}
"""When definitions take effect, whatever their order in the file."""
SUMS = {"weight": "W", "bias": "b"}
"""Definitions that add to the output where they are a sum with this name."""


def order_findings(attach: Iterable[Attachment], claims: Iterable[Claim]) -> Iterator[Diagnostic]:
    """E206 for each claim that stands after one which takes effect later, or does not say what it follows."""
    entries = {entry.name: entry for entry in attach}
    before = follows(entries.values())
    at: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        at.setdefault((claim.site.name, claim.site.kind), []).append(claim)
    for (site, _), group in at.items():
        unsaid: dict[str, list[str]] = {}
        for earlier, later in combinations(group, 2):
            if not (earlier.effects and later.effects) or commute(earlier, later):
                continue
            if min(map(_stage, later.effects)) < max(map(_stage, earlier.effects)):
                yield _reversed(entries[later.attachment], earlier.attachment, site)
            elif earlier.attachment not in before[later.attachment]:
                unsaid.setdefault(later.attachment, []).append(earlier.attachment)
        for name, missing in unsaid.items():
            yield _unsaid(entries[name], missing, before, site)


def follows(attach: Iterable[Attachment]) -> dict[str, set[str]]:
    """By attachment, all that it takes effect after, directly or through others. Each names earlier ones only."""
    found: dict[str, set[str]] = {}
    for entry in attach:
        found[entry.name] = set(entry.after).union(*(found.get(name, ()) for name in entry.after))
    return found


def commute(one: Claim, other: Claim) -> bool:
    """Whether two claims at a site have the same result in either order: both only add to the output, and neither
    reads what the other changes."""
    facts = [_additions(claim) for claim in (one, other)]
    if facts[0] is None or facts[1] is None:
        return False
    (writes, reads), (others, read) = facts[0], facts[1]
    return not writes & read and not others & reads


def _additions(claim: Claim) -> tuple[set[str], set[str]] | None:
    """Of a claim that only adds to the output: what it changes, and what it reads beside its own sums."""
    writes, parts = {"y"}, list[Expr]()
    for name, expr in claim.effects.items():
        if name == "delta":
            parts.append(expr)
            continue
        own = Name(SUMS.get(name, ""))
        terms = list(_terms(expr))
        if terms.count(own) != 1:
            return None
        parts += [term for term in terms if term != own]
        writes.add(own.id)
    return writes, claim.read_by(parts)


def _terms(expr: Expr) -> Iterator[Expr]:
    """The terms of a sum."""
    if isinstance(expr, Call) and expr.function == "add":
        for part in expr.args:
            yield from _terms(part)
    else:
        yield expr


def _stage(effect: str) -> int:
    return STAGE.get(effect, 0)


def _reversed(later: Attachment, earlier: str, site: str) -> Diagnostic:
    return Diagnostic(
        "E206",
        f"'{later.name}' stands after '{earlier}' at {site}, and takes effect before it",
        _selector(later),
        "the order of effect: input, weight and bias, then delta and output",
        f"put '{later.name}' before '{earlier}'",
    )


def _unsaid(later: Attachment, missing: list[str], before: Mapping[str, set[str]], site: str) -> Diagnostic:
    """What a claim follows without saying so; of names that follow each other, the last is enough to say."""
    wanted = dict.fromkeys([*later.after, *missing])
    last = [name for name in wanted if not any(name in before[other] for other in wanted)]
    names = " and ".join(f"'{name}'" for name in missing)
    said = last[0] if len(last) == 1 else f"[{', '.join(last)}]"
    return Diagnostic(
        "E206",
        f"{names} and '{later.name}' meet at {site}, and the result depends on their order",
        _selector(later),
        "an order",
        f"say `after: {said}` in '{later.name}' if that is meant"
        + (", the recipe's attachments written out" if later.recipe else ""),
    )


def _selector(entry: Attachment) -> Place:
    return entry.at_key("parameter" if entry.by_parameter else "at")
