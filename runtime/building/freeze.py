"""Frozen gates: numbers measured on calibration texts in place of gates that read the input.

    g(x)  →  ḡ = mean over texts of g(x)

What a gate scales folds then like anything that is constant: LoRA into weights, an adapter's scale into its second
map, a prefix's into its keys and values. It is lossy, and the report says how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peltc.compiler.adapter.weights import inside
from peltc.compiler.base.base import Base
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.plan.planner import make_plan
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.verification.answers import reference
from peltc.runtime.verification.verify import load_model
from peltc.spec.diagnostics import Place, fail
from peltc.spec.document import dump, parse
from peltc.spec.formula.syntax import Name
from peltc.spec.specification import Spec, build_spec

Array = np.ndarray[Any, Any]
MAX_TEXTS, MAX_BYTES = 4096, 1 << 24
POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Frozen:
    """A plan whose gates are numbers.

    Attributes:
        report: for the manifest: `texts`; `gates`, of each the mean and the standard deviation over texts;
            `difference`, the largest in any output on the calibration texts, as a share of the largest value.
    """

    plan: Plan
    tensors: dict[str, Array]
    report: dict[str, Any]


def freeze(
    plan: Plan, base: Base, tensors: Mapping[str, Array], texts: list[str], mode: str | None = None
) -> Frozen:  # fmt: skip
    """Measure a plan's gates on texts, each by itself without padding, and put their means in their place.

    Args:
        mode: emission mode in place of the spec's.

    Raises:
        PeltError: E212 the plan has no gates that read the input, or the model cannot run the texts.
    """
    gated = {c.attachment for c in plan.claims if is_gated(c)}
    if not gated:
        raise fail("E212", "no gate reads the input, so there is none to freeze", Place(plan.spec.path),
                   "an attachment with `gate:`", "leave out deploy.freeze_gates")  # fmt: skip
    if base.config.get("is_encoder_decoder"):
        raise fail("E212", "gates of encoder-decoder models cannot be measured on texts alone", Place(plan.spec.path),
                   "an encoder, or a decoder", "leave out deploy.freeze_gates")  # fmt: skip
    batches = list(encoded(base, texts))
    model = attach_plan(load_model(base), plan, tensors).eval()
    measured: dict[str, list[float]] = {}
    before = []
    with watching(model.pelt, measured):
        before = [reference(model, batch) for batch in batches]
    model.detach_adapter()
    frozen = make_plan(constant(plan.spec, gated), base.anatomy, base.fingerprint, mode)
    values = {name: tensors[name] for name in frozen.tensors if name in tensors}
    values |= {f"{name}.gate": np.full(1, np.mean(found), np.float32) for name, found in measured.items()}
    after = [reference(attach_plan(model, frozen, values).eval(), batches[0])]
    after += [reference(model, batch) for batch in batches[1:]]
    worst = max(
        float(np.abs(a[name] - b[name]).max() / max(np.abs(b[name]).max(), 1e-30))
        for a, b in zip(after, before, strict=True)
        for name in b
    )
    gates = {name: {"mean": float(np.mean(v)), "deviation": float(np.std(v))} for name, v in measured.items()}
    return Frozen(frozen, values, {"texts": len(texts), "difference": worst, "gates": gates})


def freeze_for(plan: Plan, base: Base, tensors: Mapping[str, Array], mode: str | None = None) -> Frozen:
    """What `deploy: {freeze_gates: FILE}` asks for.

    Raises:
        PeltError: as `freeze`; E406 the file lies outside the spec's folder; E212 it cannot be read.
    """
    file = inside(plan.spec.folder, plan.spec.freeze_gates, plan.spec.path, "deploy.freeze_gates")
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise fail("E212", f"the calibration texts have {size:,} bytes", Place(str(file)), f"at most {MAX_BYTES:,}")
        content = file.read_bytes()
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise fail("E212", f"cannot read the calibration texts: {error}", Place(str(file)), "texts, one per line"
                   ) from None  # fmt: skip
    texts = [line for line in lines if line]
    if not texts or len(texts) > MAX_TEXTS:
        raise fail("E212", f"there are {len(texts):,} calibration texts", Place(str(file)), f"1 to {MAX_TEXTS:,}")
    return freeze(plan, base, tensors, texts, mode)


def is_gated(claim: Claim) -> bool:
    """Whether a claim has a gate that reads the input."""
    return any(t.part == "gate" for t in claim.tensors.values()) and "gate" in dict(claim.method.let)


def constant(spec: Spec, gated: set[str]) -> Spec:
    """The spec with numbers for gates; recipes are expanded, and what was asked for beside it stays."""
    tree = dict(parse(spec.text).tree)
    entries = [attachment.entry() for attachment in spec.attach]
    for entry in entries:
        if entry["name"] in gated:
            entry["gate"] = {**entry["gate"], "constant": True}
    deploy = {key: value for key, value in (tree.get("deploy") or {}).items() if key != "freeze_gates"}
    text = dump({**tree, "attach": entries, "deploy": deploy})
    made = build_spec(parse(text, spec.path or "<frozen>"), text)
    return replace(made, provider=spec.provider, quantise=spec.quantise, generation=spec.generation)


class watching:
    """While it lasts, every gate that an attached model computes is recorded, per sequence."""

    def __init__(self, attached: Any, measured: dict[str, list[float]]):
        self.attached, self.measured = attached, measured

    def __enter__(self) -> None:
        scope = self.attached.scope

        def watched(claim: Claim, interpreter: Any, **values: Any) -> dict[str, Any]:
            found: dict[str, Any] = scope(claim, interpreter, **values)
            if is_gated(claim):
                gate = interpreter.evaluate(Name("gate"), found)
                self.measured.setdefault(f"{claim.attachment}.{claim.site.name}", []).extend(gate.flatten().tolist())
            return found

        self.attached.scope = watched

    def __exit__(self, *error: object) -> None:
        del self.attached.scope


def encoded(base: Base, texts: list[str]) -> Iterable[dict[str, Array]]:
    """Texts as the model reads them, one at a time: padding would count in gates that average over it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder)
    except Exception as error:
        raise fail("E212", f"the model folder has no tokenizer for the calibration texts: {str(error)[:200]}",
                   Place(str(base.folder)), "a tokenizer beside the checkpoint") from None  # fmt: skip
    limits = [base.config.get(key) for key in POSITIONS]
    # Some models count positions from after the padding token's number.
    longest = min([n - 2 for n in limits if isinstance(n, int)] + [int(min(tokenizer.model_max_length, 512))])
    for text in texts:
        found = tokenizer([text], truncation=True, max_length=max(longest, 1), return_tensors="np")
        inputs = {name: array for name, array in found.items() if name in base.export["kwargs"]}
        if not inputs["input_ids"].size:
            raise fail("E212", f"the calibration text {text[:60]!r} has no tokens", expected="texts with words")
        yield inputs
