"""A base for as long as a compilation takes: a model folder's, or a live module's in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peltc.compiler.artifact import (
    MODEL,
)  # fmt: skip
from peltc.compiler.base.base import Base
from peltc.compiler.base.live import is_known, module_base
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.source import find_model, read_config
from peltc.compiler.export.refusals import check_live
from peltc.compiler.export.torch_model import quiet
from peltc.compiler.files.checkpoint import MODULES
from peltc.compiler.files.staging import staging
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.plan.choice import Told, check_choice, choice_of
from peltc.runtime.building.trained import Live
from peltc.spec.diagnostics import fail
from peltc.spec.foreign import refuse
from peltc.spec.specification import Spec


@contextmanager
def opened(
    model: str | Path | Any,
    out: Path,
    spec: Spec,
    known: Told,
    inputs: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    talk: Talk = logged,
    text_only: bool = False,
) -> Iterator[tuple[Callable[[str], Base], Live | None]]:
    """Open a model for as long as the context lasts: a function that gives its base by variant, and the modules that
    are attached to it. A torch model is written into a folder beside the artifact, whose files the artifact can link.

    Args:
        known: what the modules' tensors tell of the model.

    Raises:
        PeltError: E506 example inputs for a model that has a folder; E410 another library's adapter; E508 a quantised
            torch model.
    """
    if isinstance(model, (str, Path)):
        if inputs:
            raise fail("E506", "example inputs are given for a model folder", expected="a torch module with them",
                       hint="the class of transformers says what it reads")  # fmt: skip
        found = find_model(model)
        choice = choice_of(spec, known, read_config(found))
        yield lambda variant: open_base(found, architecture=architecture, choice=choice, precision=spec.precision,
                                        provider=spec.provider, variant=variant, text_only=text_only,
                                        talk=talk), None  # fmt: skip
        return
    refuse(model, "the model")
    check_live(model)
    attached = getattr(model, "pelt", None)
    tensors = Live(attached.tensors(), attached.mathematics) if attached is not None else None
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with staging(out.absolute().parent, MODEL) as folder:
        if is_known(model) and not inputs:
            state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(MODULES)}
            with quiet():  # its progress is nothing that anybody asked for
                model.save_pretrained(folder, state_dict=state)
            check_choice(spec, type(model).__name__, model.config.to_dict())
            yield lambda variant: open_base(folder, architecture=architecture, choice=spec.model,
                                            precision=spec.precision, provider=spec.provider, variant=variant,
                                            text_only=text_only, talk=talk), tensors  # fmt: skip
            return
        from peltc.runtime.training.attach import bare

        module = bare(model)
        yield lambda variant: module_base(module, inputs, folder, precision=spec.precision, provider=spec.provider,
                                          variant=variant, text_only=text_only, talk=talk), tensors  # fmt: skip
