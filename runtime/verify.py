"""Verification: the artifact on ONNX Runtime against PyTorch with the modules attached, elementwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.base import Base
from peltc.compiler.plan import Plan
from peltc.runtime.session import Session
from peltc.runtime.sound import check_sound
from peltc.spec.diagnostics import PeltError, Place, fail

Array = np.ndarray[Any, Any]

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest |difference| as a share of the largest |reference|, by the type of the computation. Where the bare base's
own export differs from PyTorch by more than half of it, twice that difference counts."""

WRONG = 10
"""By how many tolerances the bare base's export may differ for rounding; more is another function."""

SHAPES = ((1, 7, 0), (3, 12, 5), (2, 19, 3))
"""Batch, length, and how many positions of the last sequence are padding."""

PARTS = ((1, 0.5, 0.0), (3, 0.8, 0.3), (2, 1.0, 0.2))
"""The same for a module with example inputs: batch, and shares of the examples' lengths."""


GENERATED = (3, 9, 4, 6)
"""Batch, length, padding of a prompt, and how many tokens follow it."""


def example(base: Base, batch: int, length: int, padding: int, seed: int) -> dict[str, Array]:
    """Random inputs: token ids that are no special tokens, a mask with padding, inputs of the decoder where it has
    some. Decoder-only models are padded on the left, as they are when they generate."""
    random = np.random.default_rng(seed)
    vocab = int(base.config.get("vocab_size", 100))
    low = min(10, vocab // 2)
    ids = random.integers(low, vocab, (batch, length))
    mask = np.ones((batch, length), np.int64)
    left = any(site.stack == "decoder" for site in base.anatomy) and not base.config.get("is_encoder_decoder")
    if padding:
        gone = slice(None, padding) if left else slice(length - padding, None)
        mask[-1, gone] = 0
        ids[-1, gone] = base.config.get("pad_token_id") or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in base.export["kwargs"]:
        inputs["token_type_ids"] = (np.arange(length)[None] >= length // 2).astype(np.int64).repeat(batch, 0)
    if "decoder_input_ids" in base.export["kwargs"]:
        inputs["decoder_input_ids"] = random.integers(low, vocab, (batch, max(2, length - 3)))
    return {name: array for name, array in inputs.items() if name in base.export["kwargs"]}


def drawn(base: Base, batch: int, part: float, padding: float, seed: int) -> dict[str, Array]:
    """Random inputs like the examples of a torch module that `transformers` does not have: no axis is longer than in
    the examples, which a table of positions may not be either. What is 0 or 1 is a mask, and ends in zeros.

    Args:
        part: the share of the examples' lengths.
        padding: the share of the last sequence that masks leave out.
    """
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for name, like in (base.inputs or {}).items():
        rest = like["shape"][len(like["axes"]) :]
        shape = (batch, *(max(2, round(size * part)) for size in like["shape"][1 : len(like["axes"])]), *rest)
        low, high = like["low"], like["high"]
        array: Array
        if like["dtype"].startswith(("float", "bfloat")):
            array = random.uniform(low, high, shape) if low < high else random.normal(low, 1, shape)
        elif high == 1:
            array = np.ones(shape, np.int64)
            if len(shape) > 1 and padding:
                array[-1, shape[1] - max(1, int(shape[1] * padding)) :] = 0
        else:
            array = random.integers(low, high + 1, shape)
        found[name] = array.astype({"bfloat16": "float32"}.get(like["dtype"], like["dtype"]))
    return found


def cases(base: Base) -> Iterator[tuple[int, int, int, dict[str, Array]]]:
    """What is compared: batch, length, padding, and inputs of this size."""
    if not base.inputs:
        for seed, (batch, length, padding) in enumerate(SHAPES):
            yield batch, length, padding, example(base, batch, length, padding, seed)
        return
    for seed, (batch, part, masked) in enumerate(PARTS):
        inputs = drawn(base, batch, part, masked, seed)
        lengths = [array.shape[1] for array in inputs.values() if array.ndim > 1]
        length = lengths[0] if lengths else 0
        yield batch, length, int(length * masked), inputs


def load_model(base: Base) -> Any:
    """The base as a torch model with its weights, in the type of the computation; over a live module's own memory."""
    import torch
    import transformers

    from peltc.compiler.export import parse_config, quiet, replica

    if base.module is not None:
        return replica(base.module, base.precision)

    with quiet():
        model = getattr(transformers, base.architecture).from_pretrained(
            base.folder, config=parse_config(base.config), dtype=getattr(torch, base.precision),
            ignore_mismatched_sizes=True)  # fmt: skip
    for name, parameter in model.named_parameters():
        if name in base.parameters and base.lacks(name):  # as in the graph, whatever the class starts it with
            array = base.array(name).astype(np.float32)
            parameter.data.copy_(torch.from_numpy(array))
    return model.eval()


def reference(model: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What the torch model answers, by output name."""
    import torch

    from peltc.compiler.export import outputs_of

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


def compare(session: Session, model: Any, base: Base, hidden: bool = True) -> list[dict[str, Any]]:
    """Outputs of both on every shape: the largest difference and the largest reference, per output.

    Args:
        hidden: compare what is computed for padding too, which nobody reads.

    Raises:
        PeltError: E702 outputs of other names or shapes, or inputs that the module does not take.
    """
    figures = []
    for batch, length, padding, inputs in cases(base):
        try:
            expected = reference(model, inputs)
        except PeltError:
            raise
        except Exception as error:
            if not base.inputs:
                raise
            raise fail(
                "E702",
                f"the module does not take inputs drawn like its examples, of batch {batch} and length {length}:"
                f" {type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}",
                expected="example inputs with the smallest and the largest values that may come",
            ) from error
        found = session(**inputs)
        if base.inputs and (lost := sorted(set(expected) - set(found))):
            raise fail("E702", f"the artifact gives no output '{lost[0]}'", Place(str(session.folder)))
        for name, array in found.items():
            if name not in expected:
                raise fail("E702", f"PyTorch gives no output '{name}'", Place(str(session.folder)))
            if array.shape != expected[name].shape:
                raise fail(
                    "E702", f"'{name}' has the shape {list(array.shape)}, PyTorch's {list(expected[name].shape)}"
                )
            difference = np.abs(array.astype(np.float64) - expected[name].astype(np.float64))
            mask = inputs.get("attention_mask")
            if not hidden and mask is not None and array.shape[:2] == mask.shape:
                difference = difference[mask.astype(bool)]
            figures.append(
                {
                    "batch": batch,
                    "length": length,
                    "padding": padding,
                    "output": name,
                    "difference": float(difference.max()) if np.isfinite(difference).all() else float("inf"),
                    "reference": float(np.abs(expected[name]).max()),
                }
            )
    return figures


def compare_generation(session: Session, model: Any, base: Base) -> list[dict[str, Any]]:
    """The logits of both while they generate greedily, a prompt with padding, up to the first token that differs."""
    import torch

    batch, length, padding, tokens = GENERATED
    inputs = {name: torch.from_numpy(array) for name, array in example(base, batch, length, padding, 7).items()
              if name in ("input_ids", "attention_mask")}  # fmt: skip
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    if base.config.get("is_encoder_decoder"):
        starts = (base.config.get(f"{name}_token_id") for name in ("decoder_start", "bos", "pad"))
        options["decoder_start_token_id"] = next((s for s in starts if s is not None), 0)
    expected = model.generate(**inputs, **options)
    found = session.generate(**inputs, **options)
    figures = []
    for step, (theirs, ours) in enumerate(zip(expected.logits, found.logits, strict=True)):
        reference, logits = theirs.double().numpy(), ours.double().numpy()
        difference = np.abs(logits - reference)
        figures.append(
            {
                "batch": batch,
                "length": length + step,
                "padding": padding,
                "output": "generated logits",
                "difference": float(difference.max()) if np.isfinite(difference).all() else float("inf"),
                "reference": float(np.abs(reference).max()),
            }
        )
        if (
            expected.sequences[:, : step - tokens + 1 or None] != found.sequences[:, : step - tokens + 1 or None]
        ).any():
            break  # from here on the two read different texts
    return figures


def worst(figures: list[dict[str, Any]]) -> float:
    """The largest relative difference."""
    return max(float(f["difference"]) / max(float(f["reference"]), 1e-30) for f in figures)


def verify_folder(
    folder: Path, plan: Plan, base: Base, tensors: Mapping[str, Array], location: str = ""
) -> dict[str, Any]:
    """Hold an artifact against PyTorch.

    Returns:
        The figures for the manifest.

    Raises:
        PeltError: E701 the outputs differ by more than the tolerance.
    """
    from peltc.runtime.attach import attach_plan

    session = Session(folder, ["CPUExecutionProvider"], spinning=False)
    model = load_model(base)
    tolerance = TOLERANCE[base.precision]
    attached = attach_plan(model, plan, tensors).eval()
    figures = compare(session, attached, base)
    if "decode" in session.manifest.get("graphs", ()):
        figures += compare_generation(session, attached, base)
    found, own = worst(figures), None
    if not found <= tolerance:  # tokens that see nothing are computed in more than one way
        figures = [f for f in figures if f["output"] == "generated logits"] + compare(session, attached, base, False)
        found = worst(figures)
    if not found <= tolerance:
        attached.detach_adapter()
        check_sound(reference(model, next(cases(base))[3]), base)
        own = base_error(base, model)
        if own > WRONG * tolerance:
            raise fail("E703", f"the exporter's graph of the bare model differs from PyTorch by {own:.2e} of the"
                       " largest value: it computes something else", Place(location or str(folder)),
                       f"at most {WRONG * tolerance:.1e} in {base.precision}",
                       "a newer transformers may export this model rightly")  # fmt: skip
        tolerance = max(tolerance, 2 * own)
    if not found <= tolerance:
        at = max(figures, key=lambda f: f["difference"] / max(f["reference"], 1e-30))
        raise fail(
            "E701",
            f"the compiled model differs from PyTorch by {found:.2e} of the largest value, in '{at['output']}' at"
            f" batch {at['batch']}, length {at['length']}",
            Place(location or str(folder)),
            f"at most {tolerance:.1e} in {base.precision}",
            "please report this: spec, model and versions",
        )
    return {
        "tolerance": tolerance,
        "worst": found,
        "base_error": own,
        "against": "PyTorch with the modules attached",
        "providers": ["CPUExecutionProvider"],
        "shapes": figures,
    }


def base_error(base: Base, model: Any) -> float:
    """The difference between the bare base's own export and PyTorch."""
    import tempfile

    from peltc.compiler.pipeline import build
    from peltc.spec.specification import Spec

    with tempfile.TemporaryDirectory() as folder:
        build(Plan(Spec("base", ()), base.fingerprint, ()), base, {}, Path(folder))
        return worst(compare(Session(folder, ["CPUExecutionProvider"], spinning=False), model, base))
