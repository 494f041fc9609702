"""Verification: an artifact against PyTorch, in two steps that no machine decides.

    the function     the graph on its own bytes, computed in float32, against PyTorch in float32 on the same weights
    the arithmetic   in the deployed type, the errors that ONNX Runtime and PyTorch make, both against that float32

A model that is deployed in float32 needs the first alone. In half precision two results that both are rounded differ by
more than a wrong module may change, and by how much depends on the machine's kernels; each step apart does not.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.files.manifest import read_manifest
from peltc.compiler.plan.claims import Plan
from peltc.compiler.survey.anatomy import Anatomy
from peltc.runtime.running.session import Session
from peltc.runtime.verification import answers
from peltc.runtime.verification.answers import Answers
from peltc.runtime.verification.laws import check_laws
from peltc.runtime.verification.quantised import Exact, ExactExposed, ExactWidened, cost, deployed, held_blocks
from peltc.runtime.verification.rewritten import Exposed, Widened
from peltc.runtime.verification.samples import cases
from peltc.runtime.verification.samples import example as example
from peltc.runtime.verification.sound import check_sound
from peltc.spec.diagnostics import PeltError, Place, fail

Array = np.ndarray[Any, Any]

TOLERANCE = {"float32": 1e-5}
"""Of the function, by the type in which it is compared: the largest |difference| as a share of the largest |reference|.
Where PyTorch's own error against float64 is more than half of it, or the difference of the bare base's own export,
twice that counts."""

WRONG = 10
"""By how many tolerances the bare base's export may differ for rounding; more is another function."""

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half an epsilon, which is what one rounding changes of a number at most, by half-precision type."""

NUDGED = 2
"""How many times PyTorch's error is measured on numbers that are rounded once more."""

LARGE = 1 << 28
"""Bytes of a model whose memory is wanted back at once."""

CPU = ("CPUExecutionProvider",)
STEPS = ("function", "arithmetic")


def load_model(base: Base) -> Any:
    """The base as a torch model with its weights, in the type of the computation; over a live module's own memory."""
    import torch
    import transformers

    from peltc.compiler.export.torch_model import held, parse_config, quiet, replica

    if base.module is not None:
        return replica(base.module, base.precision)

    cls, config = getattr(transformers, base.architecture), parse_config(base.config)
    dtype = getattr(torch, base.precision)
    packed = base.anatomy.packed is not None  # which transformers itself reads with other packages alone
    with quiet():
        if packed:
            model = cls._from_config(config, dtype=dtype)
        else:
            model = cls.from_pretrained(base.folder, config=config, dtype=dtype, ignore_mismatched_sizes=True)
    for name, tensor in held(model).items():
        if name in base.parameters and (packed or base.lacks(name)):  # as in the graph, whatever it starts with
            array = base.array(name).astype(np.float32)
            tensor.data.copy_(torch.from_numpy(array))
    return model.eval()


def floor(precision: str, anatomy: Anatomy) -> float:
    """The error of outputs that no arithmetic of a half type can be asked to stay below.

    What a model computes runs along its residual stream, which is rounded to the type wherever it is written: by the
    embedding, by the sum after each block, by the last norm, and by the head. Each rounding changes the stream by up to
    half an epsilon of itself, independently of the others and in either direction, so that they add like the steps of a
    random walk: with their number's square root. What happens within blocks comes on top, and is not counted.
    """
    blocks = sum(1 for site in anatomy if site.kind == "block" and site.role != "layer")
    return UNIT[precision] * math.sqrt(blocks + 3)


def verify_folder(
    folder: Path,
    plan: Plan,
    base: Base,
    tensors: Mapping[str, Array],
    location: str = "",
    *,
    step: str | None = None,
    providers: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Hold an artifact against PyTorch. PyTorch and ONNX Runtime are never in memory together.

    Args:
        location: what messages call the folder.
        step: `function` or `arithmetic`, for one of them alone; in float32 they are the same.
        providers: execution providers of the arithmetic; the CPU's where absent.

    Returns:
        The figures for the manifest.

    Raises:
        PeltError: E701 the function differs; E702 outputs of other names or shapes; E703 the export of the bare model
            does; E704 the arithmetic is worse than the type's; E705 stored weights are not what PyTorch makes of them;
            E706 with its modules, the model breaks a law that it keeps without them.
    """
    from peltc.runtime.verification.stored import check_stored, put_in, stored_parameters

    place, manifest, half = Place(location or str(folder)), read_manifest(folder), base.precision in UNIT
    with_function = not half or step != "arithmetic"
    with_arithmetic = half and step != "function"
    generation = "decode" in manifest.get("graphs", ())
    record, blocks = manifest.get("quantised"), None
    if record:
        blocks = held_blocks(folder, record, load_model(base).float(), plan, base, tensors, place)
        as_it_was = answers.of_torch(attached(load_model(base).float(), plan, tensors), base)
    quantised = {} if blocks is None else dict(blocks.parameters)
    model, stored = load_model(base), None
    folded = [entry for entry in manifest["folded"] if entry["parameter"] not in quantised]
    if half or record:
        held = stored_parameters(folder, folded)
        if with_function:
            stored = check_stored(held, plan, base, model, tensors, place, quantised)
        put_in(model, held | quantised)
        plan = replace(plan, claims=tuple(claim for claim in plan.claims if not claim.absorbed))

    def again() -> Any:
        model = load_model(base)
        if half or record:
            put_in(model, stored_parameters(folder, folded))
        if quantised:  # their numbers are not those of a half type
            put_in(model.float(), quantised)
        return attached(model, plan, tensors)

    model = attached(model, plan, tensors)
    own = answers.of_torch(model, base, generation) if with_arithmetic else None
    if half:
        put_in(model.float(), quantised)
    expected = answers.of_torch(model, base, generation)
    if with_function:
        check_laws(model, again, plan, base, expected, place, TOLERANCE["float32"])
    large = sum(parameter.nbytes for parameter in model.parameters()) > LARGE
    del model
    if large:  # a model refers to itself
        gc.collect()
    found: dict[str, Any] = dict.fromkeys(("tolerance", "worst", "base_error", "rounding", "providers", "shapes"))
    if with_function:
        found = function(folder, base, expected, place, again)
    errors = arithmetic(folder, base, expected, own, place, providers or CPU) if own is not None else None
    lost = None if blocks is None else cost(deployed(folder, base, providers or CPU), as_it_was, blocks, place)
    return {
        "measure": answers.MEASURE,
        "against": "PyTorch with the modules attached",
        **found,
        "stored": stored,
        "arithmetic": errors,
        "quantised": lost,
    }


def attached(model: Any, plan: Plan, tensors: Mapping[str, Array]) -> Any:
    """A torch model with a plan's modules."""
    from peltc.runtime.training.attach import attach_plan

    return attach_plan(model, plan, {name: tensors[name] for name in plan.tensors}).eval()


def function(folder: Path, base: Base, expected: Answers, place: Place, load: Callable[[], Any]) -> dict[str, Any]:
    """The first step: hold what the artifact computes in float32 against PyTorch. Large values and sharp softmaxes let
    rounding grow beyond the tolerance; in that case both ONNX Runtime and PyTorch are compared with PyTorch in float64,
    and ONNX Runtime's error may not be much larger than PyTorch's.

    Args:
        load: makes the torch model with its modules.

    Raises:
        PeltError: E701, E702, E703.
    """
    generation, tolerance, own, rounding = expected.texts is not None, TOLERANCE["float32"], None, None
    answered = answers.of_session(wide_session(folder, base), base, generation)
    figures = answers.differences(answered, expected, place.path)
    if not answers.worst(figures) <= tolerance:  # tokens that see nothing are computed in more than one way
        figures = answers.differences(answered, expected, place.path, hidden=False)
    found = answers.worst(figures)
    if not found <= tolerance:
        check_sound(answers.reference(load_model(base), next(cases(base))[3]), base)
        rounding = measure_rounding(answered, base, expected, place, load)
        most = max(rounding or [], key=_share_of_limit, default=None)
        if most is not None and _share_of_limit(most) <= 1:
            tolerance, found = most["limit"], most["onnxruntime"]
        else:
            own = base_error(base)
            if own > WRONG * tolerance:
                raise fail("E703", f"the exporter's graph of the bare model differs from PyTorch by {own:.2e} of the"
                           " largest value: it computes something else", place,
                           f"at most {WRONG * tolerance:.1e} in float32",
                           "a newer transformers may export this model rightly")  # fmt: skip
            tolerance = max(tolerance, 2 * own)
    if not found <= tolerance:
        at = max(figures, key=answers.share)
        raise fail(
            "E701",
            f"the compiled model computes something else than PyTorch: in float32 they differ by {found:.2e} of the"
            f" largest value, in '{at['output']}' at batch {at['batch']}, length {at['length']}",
            place,
            f"at most {tolerance:.1e}" + (f", or twice what PyTorch itself is off from float64, {most['limit']:.1e};"
                                          f" ONNX Runtime is {most['onnxruntime']:.1e} off" if most else ""),
            "please report this: spec, model and versions",
        )  # fmt: skip
    return {"tolerance": tolerance, "worst": found, "base_error": own, "rounding": rounding, "providers": list(CPU),
            "shapes": figures}  # fmt: skip


def measure_rounding(
    answered: Answers, base: Base, expected: Answers, place: Place, load: Callable[[], Any]
) -> list[dict[str, Any]] | None:
    """The errors of ONNX Runtime and of PyTorch in float32, by output, both against PyTorch in float64; None where the
    memory does not suffice. PyTorch's error is the largest of a few runs, since a single one may be small by chance."""
    from peltc.runtime.verification.exact import of_exact, of_nudged

    generation = expected.texts is not None
    exact = of_exact(load, base, generation)
    if exact is None:
        return None
    several = [expected, *(of_nudged(load, base, generation, seed) for seed in range(NUDGED))]
    return _outputs(answered, several, exact, place, TOLERANCE["float32"], hidden=False)


def wide_session(folder: Path, base: Base) -> Session:
    """An artifact that computes in float32, whatever its type, by quantised weights too."""
    if read_manifest(folder).get("quantised"):
        return (ExactWidened if base.precision in UNIT else Exact)(folder, CPU, spinning=False)
    return (Widened if base.precision in UNIT else Session)(folder, CPU, spinning=False)


def base_error(base: Base) -> float:
    """The difference between the bare base's own export and PyTorch, both in float32."""
    import tempfile

    from peltc.compiler.pipeline import build
    from peltc.spec.specification import Spec

    expected = answers.of_torch(load_model(base).float(), base)
    with tempfile.TemporaryDirectory() as folder:
        build(Plan(Spec("base", ()), base.fingerprint, ()), base, {}, Path(folder))
        found = answers.of_session(wide_session(Path(folder), base), base)
        return answers.worst(answers.differences(found, expected, folder))


def arithmetic(
    folder: Path, base: Base, expected: Answers, own: Answers, place: Place, providers: Sequence[str]
) -> dict[str, Any]:
    """The second step: what rounding does in the deployed type.

    Args:
        expected: PyTorch's answers in float32.
        own: PyTorch's answers in the deployed type.

    Raises:
        PeltError: E704 ONNX Runtime is off by more than the floor, and by more than twice what PyTorch is.
    """
    least = floor(base.precision, base.anatomy)
    record = {"precision": base.precision, "status": "proven", "reason": None, "floor": least,
              "providers": list(providers), "outputs": []}  # fmt: skip
    try:
        kind = Exposed if base.precision == "bfloat16" else Session
        if read_manifest(folder).get("quantised"):  # rounded inputs are no part of the type's arithmetic
            kind = ExactExposed if base.precision == "bfloat16" else Exact
        answered = answers.of_session(kind(folder, providers, spinning=False), base, expected.texts is not None)
    except PeltError as error:
        code, reason = error.diagnostics[0].code, error.diagnostics[0].message
        if code != "E618" and (code != "E605" or "NOT_IMPLEMENTED" not in reason):
            raise
        return {**record, "status": "open", "reason": reason, "outputs": _outputs(None, [own], expected, place, least)}
    outputs: list[dict[str, Any]] = []
    for hidden in (True, False):
        outputs = _outputs(answered, [own], expected, place, least, hidden)
        wrong = [o for o in outputs if not _share_of_limit(o) <= 1]
        if not wrong:
            return {**record, "outputs": outputs}
    at = max(wrong, key=_share_of_limit)
    if not math.isfinite(at["onnxruntime"]):
        raise fail("E704", f"the arithmetic in {base.precision}: '{at['output']}' has values that are not finite, and"
                   " has none in float32", place, f"values that {base.precision} holds",
                   "`deploy: {precision: float32}`: the type's range is too small for this model")  # fmt: skip
    raise fail(
        "E704",
        f"the arithmetic in {base.precision}: ONNX Runtime ({', '.join(providers)}) is {at['onnxruntime']:.2e} of the"
        f" largest value off in '{at['output']}', PyTorch in the same type {at['pytorch']:.2e}, both against float32;"
        " the function is right",
        place,
        f"at most {at['limit']:.2e}: twice PyTorch's error, or {least:.2e} for the type and depth",
        "`deploy: {precision: float32}` has more digits; another execution provider may keep more of them",
    )


def _share_of_limit(output: Mapping[str, Any]) -> float:
    return float(output["onnxruntime"] / output["limit"])


def _outputs(
    found: Answers | None, own: Sequence[Answers], expected: Answers, place: Place, least: float, hidden: bool = True
) -> list[dict[str, Any]]:
    """The errors of both by output, and what is allowed: twice PyTorch's, or the floor.

    Args:
        own: PyTorch's answers, of which the worst counts.
    """
    theirs = answers.by_output([f for one in own for f in answers.differences(one, expected, place.path, hidden)])
    ours = {} if found is None else answers.by_output(answers.differences(found, expected, place.path, hidden))
    return [
        {
            "output": name,
            "onnxruntime": ours.get(name),
            "pytorch": error if math.isfinite(error) else None,
            "limit": max(2 * error, least) if math.isfinite(error) else least,
        }
        for name, error in theirs.items()
        if found is None or name in ours
    ]
