"""Modules that read a text as a whole, in a torch model that is given a cache: it then reads new tokens alone.

A mean over these is no mean over the text. So what modules make of a whole text is kept from the prompt, where the spec
asks for it, and goes with the cache; where it does not, a model with such modules refuses the cache.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch

from peltc.compiler.plan.checks import needs_text
from peltc.compiler.plan.claims import Claim, Plan
from peltc.runtime.kept import carried, carry, check_generate
from peltc.runtime.training.places import first_of
from peltc.spec.diagnostics import fail
from peltc.spec.formula.syntax import Expr

KEEPS = "of which the modules keep what they make of the whole of it"
Tensor = torch.Tensor
Key = tuple[str, str, str, int, int]
"""An attachment, a site, a definition there, which of its summaries, and the how manieth time in a forward pass."""
CACHES = ("past_key_values", "cache_params", "mems", "state", "past_buckets_states")
"""What models of `transformers` call what they are given of the text that they have read before."""


class Keeping:
    """What the modules of a plan make of a whole text in a forward pass, and what they have kept of its prompt.

    Attributes:
        begun: whether the pass goes on from a cache.
        values: what is kept, [B, ...] by key.
    """

    def __init__(self, plan: Plan):
        self.plan, self.keeps = plan, bool(plan.held)
        self.places = {(claim.attachment, claim.site.key, effect): {expr: i for i, expr in enumerate(found)}
                       for claim in plan.held for effect, found in claim.summaries.items()}  # fmt: skip
        self.begun, self.generating = False, 0
        self.values: dict[Key, Tensor] = {}
        self.counts: Counter[tuple[Any, ...]] = Counter()
        self.cache: Any = None
        self.fixed: dict[Key, Tensor] | None = None

    @cached_property
    def refusal(self) -> tuple[str, str] | None:
        """Why the modules cannot read new tokens alone, and what to do; None where they can."""
        found = (needs_text(claim, self.plan.spec.gates) for claim in self.plan.claims)
        return next((each for each in found if each), None)

    @cached_property
    def concerned(self) -> bool:
        """Whether a cache makes a difference to the modules."""
        return any(claim.mixed and claim.grows for claim in self.plan.claims)

    def open(self, given: Mapping[str, Any]) -> None:
        """See what a model is called with.

        Raises:
            PeltError: E208 a cache, and modules that read the whole text; E209 a cache without what modules keep.
        """
        self.cache = first_of(given, *CACHES)
        self.begun = holds_text(self.cache)
        if self.begun and self.refusal:
            message, hint = self.refusal
            hints = (hint, "`use_cache=False` reads the whole text for each token")
            raise fail("E208", f"{message} where the model is given a cache", expected="the whole text, and no cache",
                       hint="; ".join(filter(None, hints)))  # fmt: skip
        if not self.keeps:
            return
        self.counts.clear()
        self.values = {} if self.fixed is None else self.fixed
        if self.begun:
            self.values = carried(self.cache)
            if not self.values:
                raise fail("E209", f"the cache carries nothing of its prompt, {KEEPS}",
                           expected="a cache that the model has filled with these modules attached")  # fmt: skip

    def close(self, output: Any) -> None:
        """Let the cache that a model gives carry what the modules have made of the prompt.

        Raises:
            PeltError: E209 there is none while tokens are generated.
        """
        if not self.keeps or self.fixed is not None:
            return
        cache = output.get(CACHES[0]) if isinstance(output, dict) else None
        if cache is None and isinstance(output, tuple):
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        cache = self.cache if cache is None and hasattr(self.cache, "get_seq_length") else cache
        if cache is not None:
            carry(cache, self.values)
            self.values = {key: value.detach() for key, value in self.values.items()}  # what made them can go
        elif self.generating:
            raise fail("E209", "the model gives no cache, which would carry what the modules keep of the prompt",
                       expected="a model that generates with a cache of keys and values")  # fmt: skip

    def of(self, claim: Claim, effect: str) -> Mapping[Expr, Callable[[Callable[[], Any]], Any]] | None:
        """What stands in the place of a claim's summaries of the text; see `Interpreter.held`."""
        if not self.keeps:
            return None
        where = claim.attachment, claim.site.key, effect
        return {expr: partial(self.keep, (*where, i)) for expr, i in self.places.get(where, {}).items()}

    def keep(self, place: tuple[str, str, str, int], compute: Callable[[], Any]) -> Any:
        """A summary as the prompt gives it. What layers share runs several times in a pass, and has one for each."""
        key = (*place, self.counts[place])
        self.counts[place] += 1
        if self.begun or self.fixed is not None:
            return self.values[key]
        self.values[key] = compute()
        return self.values[key]

    @contextmanager
    def prompted(self) -> Iterator[None]:
        """Keep what the last pass has made of its text, as a prompt, in all passes while the context lasts."""
        self.fixed = dict(self.values)
        try:
            yield
        finally:
            self.fixed = None

    def guard(self, model: Any) -> Callable[[], None]:
        """Let a model's `generate` read prompts as a whole; returns how to undo it."""
        own, before = model.generate, vars(model).get("generate")

        @functools.wraps(own)
        def generate(*args: Any, **options: Any) -> Any:
            check_generate(model, options, "E209")
            self.generating += 1
            try:
                return own(*args, **options)
            finally:
                self.generating -= 1

        def undo() -> None:
            if before is None:
                del model.generate
            else:
                model.generate = before

        model.generate = generate
        return undo


def holds_text(cache: Any) -> bool:
    """Whether there is any text in a cache; of those that cannot tell there is."""
    if cache is None:
        return False
    try:
        return int(cache.get_seq_length()) > 0
    except (AttributeError, ValueError):  # of states alone, which have no length
        told = getattr(cache, "has_previous_state", None)
        return bool(told()) if callable(told) else True
