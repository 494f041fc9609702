"""Answers: what PyTorch and ONNX Runtime give for the same inputs, and how far apart they are.

One measure everywhere: the largest difference in an output, as a share of the largest value that the reference has
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.files.manifest import PROFILES
from peltc.runtime.running.form import SUFFIX
from peltc.runtime.running.session import Session
from peltc.runtime.verification.samples import GENERATED, cases, example
from peltc.spec.diagnostics import PeltError, Place, fail

Array = np.ndarray[Any, Any]
MEASURE = "largest difference in an output over its largest value"
LOGITS = "generated logits"


@dataclass(frozen=True)
class Case:
    """One size of inputs.

    Attributes:
        mask: the mask of the tokens, where the model takes one.
        outputs: by name.
    """

    batch: int
    length: int
    padding: int
    mask: Array | None
    outputs: Mapping[str, Array]


@dataclass
class Answers:
    """What a model gives on every size of inputs, and while it generates greedily.

    Attributes:
        logits: of each token that is generated [B, V].
        texts: the tokens, those of the prompt included [B, S]; None where nothing is generated.
        whole: whether all that the model answers is an output of the artifact.
    """

    cases: list[Case] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    texts: Array | None = None
    whole: bool = False


def reference(model: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What the torch model answers, by output name."""
    import torch

    from peltc.compiler.export.inputs import outputs_of

    precision = next((p.dtype for p in model.parameters()), torch.float32)
    with torch.no_grad():
        feeds = {name: torch.from_numpy(array) for name, array in inputs.items()}
        feeds = {name: value.to(precision) if value.is_floating_point() else value for name, value in feeds.items()}
        extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        try:
            output = model(**feeds, **extra)
        except TypeError:
            if not extra:
                raise
            output = model(**feeds)
    wide = {name: value.float() if value.dtype == torch.bfloat16 else value
            for name, value in outputs_of(output, inputs).items()}  # fmt: skip
    return {name: value.numpy() for name, value in wide.items()}


def of_torch(model: Any, base: Base, generation: bool = False) -> Answers:
    """What a torch model answers.

    Raises:
        PeltError: E702 inputs that the module does not take.
    """

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            return reference(model, inputs)
        except PeltError:
            raise
        except Exception as error:
            if not base.inputs:
                raise
            text = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            sizes = sorted({array.shape[:2] for array in inputs.values()})
            raise fail("E702", "the module does not take inputs drawn like its examples, of the sizes"
                       f" {', '.join(map(str, map(list, sizes)))}: {type(error).__name__}: {text}",
                       expected="example inputs with the smallest and the largest values that may come",
                       ) from error  # fmt: skip

    return _answers(run, model.generate if generation else None, base)


def of_session(session: Session, base: Base, generation: bool = False) -> Answers:
    """What an artifact answers; with the profile that it was compiled with, where profiles bring its tensors."""
    if session.manifest.get("profiles"):
        name = session.manifest["name"]
        session.add_profile(name, session.folder / PROFILES / f"{name}{SUFFIX}")
        session.profile = name
    return of_bare(session, base, generation)


def of_bare(session: Session, base: Base, generation: bool = False) -> Answers:
    """What an artifact answers as it is."""
    return _answers(lambda inputs: session(**dict[str, Any](inputs)), session.generate if generation else None, base)


def _answers(
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]], generate: Callable[..., Any] | None, base: Base
) -> Answers:
    found = Answers(whole=bool(base.inputs))
    for batch, length, padding, inputs in cases(base):
        found.cases.append(Case(batch, length, padding, inputs.get("attention_mask"), run(inputs)))
    if generate is not None:
        generate_into(found, generate, base)
    return found


def generate_into(found: Answers, generate: Callable[..., Any], base: Base) -> None:
    """Generate greedily after a prompt with padding, and note the texts and logits."""
    import torch

    batch, length, padding, tokens = GENERATED
    inputs = {name: torch.from_numpy(array) for name, array in example(base, batch, length, padding, 7).items()
              if name in ("input_ids", "attention_mask")}  # fmt: skip
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    if base.config.get("is_encoder_decoder"):
        starts = (base.config.get(f"{name}_token_id") for name in ("decoder_start", "bos", "pad"))
        options["decoder_start_token_id"] = next((s for s in starts if s is not None), 0)
    result = generate(**inputs, **options)
    found.logits = [step.double().numpy() for step in result.logits]
    found.texts = result.sequences.numpy()


def differences(found: Answers, expected: Answers, place: str, hidden: bool = True) -> list[dict[str, Any]]:
    """The largest difference and the largest reference of every output on every size of inputs, and of the logits of
    generated tokens up to the first that differs.

    Args:
        expected: the reference.
        place: for messages.
        hidden: compare what is computed for padding too, which nobody reads.

    Raises:
        PeltError: E702 outputs of other names or shapes.
    """
    figures = []
    for case, wanted in zip(found.cases, expected.cases, strict=True):
        if expected.whole and (lost := sorted(set(wanted.outputs) - set(case.outputs))):
            raise fail("E702", f"the artifact gives no output '{lost[0]}'", Place(place))
        for name, array in case.outputs.items():
            if name not in wanted.outputs:
                raise fail("E702", f"PyTorch gives no output '{name}'", Place(place))
            reference = wanted.outputs[name]
            if array.shape != reference.shape:
                raise fail("E702", f"'{name}' has the shape {list(array.shape)}, PyTorch's {list(reference.shape)}",
                           Place(place))  # fmt: skip
            shown = None
            if not hidden and case.mask is not None and array.shape[:2] == case.mask.shape:
                shown = case.mask.astype(bool)
            sizes = case.batch, case.length, case.padding
            figures.append(_figure(*sizes, name, array, reference, shown))
    if expected.texts is None or found.texts is None:
        return figures
    batch, length, padding, tokens = GENERATED
    for step, (ours, theirs) in enumerate(zip(found.logits, expected.logits, strict=True)):
        figures.append(_figure(batch, length + step, padding, LOGITS, ours, theirs))
        read = step - tokens + 1 or None
        if (found.texts[:, :read] != expected.texts[:, :read]).any():
            break  # from here on the two read different texts
    return figures


def _figure(
    batch: int, length: int, padding: int, name: str, found: Array, expected: Array, shown: Array | None = None
) -> dict[str, Any]:
    difference, reference = apart(found, expected, shown)
    return {
        "batch": batch,
        "length": length,
        "padding": padding,
        "output": name,
        "difference": difference,
        "reference": reference,
    }


def apart(found: Array, expected: Array, shown: Array | None = None) -> tuple[float, float]:
    """The largest difference, infinite where one is no number, and the largest value of the reference.

    Args:
        shown: where differences count; everywhere if absent.
    """
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    difference = difference if shown is None else difference[shown]
    largest = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    return largest, float(np.abs(expected).max())


def relative(difference: float, reference: float) -> float:
    """A difference as a share of the largest value."""
    return difference / max(reference, 1e-30)


def share(figure: Mapping[str, Any]) -> float:
    """A figure's difference as a share of its largest value."""
    return relative(float(figure["difference"]), float(figure["reference"]))


def worst(figures: list[dict[str, Any]]) -> float:
    """The largest relative difference."""
    return max(share(figure) for figure in figures)


def by_output(figures: list[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference in each output."""
    found: dict[str, float] = {}
    for figure in figures:
        found[figure["output"]] = max(found.get(figure["output"], 0.0), share(figure))
    return found
