"""`bank:` mixes a frozen bank of modules by masks, which are all that a profile trains.

down = Σᵢ mᵢ downᵢ      up = Σᵢ m'ᵢ upᵢ      m = top_k(z) / k  or  softmax(z)        (X-PEFT)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peltc.spec.combinators.combinator import (
    Combinator,
    Settings,
    add,
    formula,
    groups,
    norms,
    number,
    option,
    refused,
    starts_at_zero,
)  # fmt: skip
from peltc.spec.diagnostics import Place
from peltc.spec.formula.syntax import Number
from peltc.spec.method import START, Method, Parameter, initialiser

LETTERS = "abcdefghijklm"
MASK = "mask_"
BANK_SUFFIX = "_bank"


def rewrite(method: Method, settings: Settings, place: Place) -> Method:
    """The method whose parameters are sums over a bank."""
    size, k = settings["size"], settings["k"]
    if settings["mask"] == "hard" and k > size:
        raise refused("bank", method, f"a mask cannot choose {k} of {size} modules", place)
    own = norms(method)
    mixed = [p for p in method.parameters if not p.frozen and p.name not in own]
    lead = groups(method)
    parameters: list[Parameter] = []
    let = []
    if not settings["file"]:
        check_random(method, mixed, lead, place)
    for group in dict.fromkeys(lead[p.name] for p in mixed):
        init = formula(f"normal({settings['spread']})")
        conditions = {p.condition for p in mixed if lead[p.name] == group}
        condition = conditions.pop() if len(conditions) == 1 else None
        parameters.append(Parameter(f"{MASK}{group}", (number(size),), init, condition=condition, part="mask"))
        if settings["mask"] == "soft":
            weights = f"softmax({MASK}{group})"
        else:
            weights = f"top_k_mask({MASK}{group}, {k})" + (f" / {k}" if settings["normalise"] == "mean" else "")
        let.append((f"weights_{group}", formula(weights)))
    for p in mixed:
        axes = LETTERS[: len(p.shape)]
        alone = not any(len(q.shape) > 1 for q in mixed if lead[q.name] == lead[p.name])
        drawn = starts_at_zero(p) and (len(p.shape) > 1 or alone)  # a map's bias may be zero, a module may not
        init = formula(f"normal({settings['std']})") if drawn else p.init
        parameters.append(
            replace(p, name=p.name + BANK_SUFFIX, shape=(number(size), *p.shape), init=init, frozen=True,
                    source=settings["file"] or START, part="bank")
        )  # fmt: skip
        text = f"einsum('n,n{axes}->{axes}', weights_{lead[p.name]}, {p.name}{BANK_SUFFIX})"
        let.append((p.name, formula(text)))
    return add(method, tuple(parameters), tuple(let), place, frozenset(p.name for p in mixed))


def check_random(method: Method, mixed: list[Parameter], lead: Mapping[str, str], place: Place) -> None:
    """Refuse a random bank whose modules would be equal, or would need the model's weights.

    Raises:
        PeltError: E211.
    """
    hint = "give a `file` with trained modules"
    for p in mixed:
        named = initialiser(p.init)
        if named is None and not isinstance(p.init, Number):
            reason = f"'{p.name}' starts at {p.init.text!r}, which a random bank cannot know"
            raise refused("bank", method, reason, place, hint)
        constant = isinstance(p.init, Number) or (named is not None and named[0] == "ones")
        if constant and not starts_at_zero(p) and lead[p.name] == p.name and list(lead.values()).count(p.name) == 1:
            reason = f"'{p.name}' starts at {p.init.text}, and so would all modules of a random bank"
            raise refused("bank", method, reason, place, hint)


BANK = Combinator(
    "bank",
    "masks over a frozen bank of modules",
    "arXiv:2401.16137, section 3",
    (
        option("size", "number of modules in the bank", 100, type="integer", minimum=1, maximum=65536),
        option("mask", "hard: k ones, the rest zeros; soft: a softmax", "hard", enum=["hard", "soft"]),
        option("k", "number of ones in a hard mask", 50, type="integer", minimum=1),
        option("normalise", "a hard mask's factor: mean, 1 / k; sum, 1", "mean", enum=["mean", "sum"]),
        option("file", "a safetensors file with the bank; empty: a random bank, which the spec's seed decides", "",
               type="string", pattern="^[^\u0000-\u001f]*$"),
        option("std", "in a random bank, of the matrices whose start value is zero otherwise", 0.02, type="number",
               exclusiveMinimum=0),
        option("spread", "standard deviation of the masks' start values", 0.01, type="number", exclusiveMinimum=0),
    ),
    rewrite,
    notes="A map's weight and bias are mixed by one mask. Weights are mixed, never outputs. Among equal logits the"
    " lowest index wins. In training a hard mask passes gradients straight through. The gain and bias of a norm inside"
    " are not mixed: each profile trains its own.",
    excludes=dict.fromkeys(("generate", "prototype"), "both say where the parameters come from"),
)  # fmt: skip
