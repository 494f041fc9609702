"""Combinators: what wraps any method of a spec by rewriting its formulas, in the order of their effect."""

from peltc.spec.combinators.bank import BANK
from peltc.spec.combinators.combinator import Combinator, Settings
from peltc.spec.combinators.experts import EXPERTS
from peltc.spec.combinators.gate import GATE
from peltc.spec.combinators.generate import GENERATE
from peltc.spec.combinators.prototype import PROTOTYPE

COMBINATORS: dict[str, Combinator] = {c.name: c for c in (EXPERTS, BANK, PROTOTYPE, GENERATE, GATE)}

__all__ = ["COMBINATORS", "Combinator", "Settings"]
