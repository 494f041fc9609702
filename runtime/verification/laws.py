"""Laws that a model with modules obeys as the model alone does. No reference is needed to see one broken.

    later tokens     what a causal model says of a token does not move when later tokens change
    padding          what stands where the mask is zero does not matter
    other texts      the texts of a batch do not read each other
    the cache        a token at a time, with a cache, is what the whole text at once is

Where PyTorch's modules and the graph's share a fault, comparing the two shows nothing. Only modules that reach beyond
their own token can break a law. Where the formulas of a spec let positions read each other on purpose, the laws of
positions do not hold for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.plan.claims import Plan
from peltc.runtime.verification.answers import Answers, apart, generate_into, reference, relative
from peltc.runtime.verification.samples import GENERATED, example
from peltc.spec.diagnostics import Place, fail

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]

LATE = 3
"""How many tokens at the end change."""

CACHED = "a token at a time, with a cache, is not what the whole text at once is"
"""What is wrong where a cache changes what is generated."""

WITHOUT_DIGITS = 10
"""By how many tolerances results may move where there is no memory to tell rounding from a fault in float64."""


@dataclass(frozen=True)
class Law:
    """What must not move.

    Attributes:
        broken: what is wrong where it does.
        other: inputs of the same shapes as `first_inputs`, which differ from these in what must not matter.
        kept: the tokens whose outputs are compared [B, S], by the input that holds them; of the others none are.
        texts: the texts whose outputs are compared [B].
    """

    broken: str
    other: Inputs
    kept: Mapping[str, Array]
    texts: Array

    def moved(self, model: Any, first: Mapping[str, Array]) -> float:
        """By how much a model's outputs move, the largest, as a share of the largest value.

        Args:
            first: what the model gives for `first_inputs`.
        """
        second, found = reference(model, self.other), 0.0
        for name, values in first.items():
            if values.ndim > 2:
                shown = next((k for k in self.kept.values() if k.shape == values.shape[:2]), None)
            else:
                shown = self.texts if values.shape[:1] == self.texts.shape else None
            if shown is not None and shown.any() and values.dtype.kind == "f":
                found = max(found, relative(*apart(second[name][shown], values[shown])))
        return found


def check_laws(
    model: Any, load: Callable[[], Any], plan: Plan, base: Base, answered: Answers, place: Place, tolerance: float
) -> None:
    """Hold a torch model with a plan's modules, in float32, against the laws that these modules can break. Where
    something moves by more than the tolerance, it is measured again in float64, with the modules and without them, so
    that neither rounding nor the model's own behaviour counts as a fault of the modules.

    Args:
        load: makes another such model.
        answered: what the model gives, generated texts among it.
        tolerance: what may move, as a share of the largest value.

    Raises:
        PeltError: E706 a law is broken.
    """
    laws = [] if base.inputs else list(_laws(plan, base))
    moved = _moved(model, laws, base)
    laws = [law for law in laws if not moved[law.broken] <= tolerance]
    cached = answered.texts is None or _cached(model, base, answered) <= tolerance
    if cached and not laws:
        return

    def measured(exact: Any) -> dict[str, float]:
        return _moved(exact, laws, base) | ({} if cached else {CACHED: _cached(exact, base, None)})

    from peltc.runtime.verification.exact import affordable, double

    wide = affordable(base)
    most = tolerance if wide else WITHOUT_DIGITS * tolerance
    again = load().double() if wide else load().float()
    with double() if wide else nullcontext():
        found = measured(again)
        if all(share <= most for share in found.values()):
            return
        again.detach_adapter()
        bare = measured(again)
    for law, share in found.items():
        if not share <= most and bare[law] <= most:
            raise fail("E706", f"with its modules, {law}: it moves by {share:.2e} of the largest value, and without"
                       " them it does not", place, f"at most {most:.1e}",
                       "`--no-verify` where the spec's own formulas ask for it; else please report this: spec,"
                       " model and versions")  # fmt: skip


def first_inputs(base: Base) -> dict[str, Array]:
    """The inputs that laws change: two texts, the last of which has padding."""
    return example(base, 2, 9, 3, 5)


def _moved(model: Any, laws: Sequence[Law], base: Base) -> dict[str, float]:
    """By how much a model's outputs move, by what is wrong where they do."""
    first = reference(model, first_inputs(base)) if laws else {}
    return {law.broken: law.moved(model, first) for law in laws}


def _laws(plan: Plan, base: Base) -> Iterator[Law]:
    """The laws that a plan's modules can break, and must not."""
    if not any({"keys", "values", "prepend"} & set(c.effects) or "mask" in c.reads or c.mixed for c in plan.claims):
        return
    mixing = [claim for claim in plan.claims if claim.mixed]
    one, random = first_inputs(base), np.random.default_rng(6)
    target = "decoder_input_ids" if "decoder_input_ids" in one else "input_ids"
    mask = one.get("attention_mask", np.ones_like(one["input_ids"])) > 0
    seen = {"input_ids": mask, target: mask if target == "input_ids" else np.ones(one[target].shape, bool)}
    all_texts, no_texts = np.ones(len(mask), bool), np.zeros(len(mask), bool)

    if not mixing and any(site.stack == "decoder" for site in base.anatomy):
        later = one[target].copy()
        later[:, -LATE:] = random.permutation(later[:, :-LATE].ravel())[: later[:, -LATE:].size].reshape(-1, LATE)
        earlier = seen[target].copy()
        earlier[:, -LATE:] = False
        yield Law("what it says of a token depends on later ones", {**one, target: later}, {target: earlier}, no_texts)
    if not mask.all() and all("mask" in claim.reads for claim in mixing):
        padded = np.where(mask, one["input_ids"], one["input_ids"][::-1])
        yield Law("what it says of a text depends on its padding", {**one, "input_ids": padded}, seen, all_texts)
    alone = {name: array[-1:].repeat(len(array), 0) for name, array in one.items()}
    last = np.arange(len(mask)) == len(mask) - 1
    yield Law("what it says of a text depends on the other texts of the batch", alone,
              {name: shown & last[:, None] for name, shown in seen.items()}, last)  # fmt: skip


def kept(model: Any, begun: Inputs) -> AbstractContextManager[None]:
    """A context in which a model's modules have what they keep of a text that is begun, where they keep anything."""
    keeping = getattr(getattr(model, "pelt", None), "keeping", None)
    if keeping is None or not keeping.keeps:
        return nullcontext()
    reference(model, begun)
    found: AbstractContextManager[None] = keeping.prompted()
    return found


def _cached(model: Any, base: Base, answered: Answers | None) -> float:
    """By how much the logits that a model generates with, a token at a time, differ from those of the whole text, whose
    modules then have what they keep from its prompt.

    Args:
        answered: what it generates, where that is known.
    """
    if answered is None:
        answered = Answers()
        generate_into(answered, model.generate, base)
    assert answered.texts is not None
    batch, length, padding, tokens = GENERATED
    inputs = {n: a for n, a in example(base, batch, length, padding, 7).items() if n != "token_type_ids"}
    whole = inputs["attention_mask"].all(1)  # a model may count the positions of padded texts in another way
    begun = dict(inputs)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"], first = answered.texts, 1
        begun["decoder_input_ids"] = answered.texts[:, :first]
    else:
        more = np.ones((batch, tokens), np.int64)
        inputs["attention_mask"] = np.concatenate([inputs["attention_mask"], more], 1)
        inputs["input_ids"], first = answered.texts, length
    steps = np.stack(answered.logits, 1)
    with kept(model, begun):
        logits = reference(model, inputs)["logits"][:, first - 1 : first - 1 + steps.shape[1]]
    return relative(*apart(steps[whole], logits[whole]))
