"""Modules attached to a `transformers` model, which stays an ordinary one: `Trainer`, `generate`, checkpoints work.

A site is reached through the torch module that owns its parameters: a linear map, a norm or a block by a hook on that
module, an attention core through `transformers`' attention interface, an embedding by the model's own inputs.

Any other torch module is reached by the same hooks, where a site's parameters have a torch module of their own that
computes the site and nothing else, which is tried; attention cores and embeddings are not reached there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.weights import check_arrays, inside, overridden, start_tensors
from peltc.compiler.base.live import is_known, survey_model
from peltc.compiler.export.torch_model import replica
from peltc.compiler.files.checkpoint import read_header
from peltc.compiler.plan.choice import check_choice
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.planner import make_plan
from peltc.runtime.training.attached import Attached, read_adapter
from peltc.runtime.training.origin import warn_of_origin
from peltc.spec.diagnostics import fail, wrong_type
from peltc.spec.foreign import refuse
from peltc.spec.specification import Spec, load_spec


def attach(
    model: Any,
    spec: Spec | str | Path | Mapping[str, Any],
    weights: str | Path | Mapping[str, np.ndarray[Any, Any]] | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
) -> Any:
    """Attach a spec's modules to a model, in place.

    Everything but the spec's own parameters is frozen. The model gains

    - `save_adapter(path)`, which writes a file that the compiler reads, and `load_adapter(path)`, which reads one;
    - `save_profile(path)`, which packs masks over a bank to bits;
    - `disable_adapter()`, within which the model is as it was: `with model.disable_adapter(): ...`;
    - `merge_adapter()`, which writes the modules into the weights and takes them off, where all of them fold;
    - `detach_adapter()`, which takes the modules off for good;
    - `print_trainable_parameters()`, which says how many values are trained.

    Args:
        model: a model of `transformers`, or any other torch module.
        spec: a spec, its file, or its content.
        weights: a safetensors file, a profile's too, or arrays by tensor name; the spec's own where absent, else
            start values.
        example_inputs: example inputs by name for a module that `transformers` does not have; see `peltc.compile`.

    Returns:
        The same model.

    Raises:
        PeltError: whatever keeps the spec from fitting the model, as when compiling; E216 what is no torch model; E408
            weights that were trained with other mathematics than the spec's. Weights of another base, or that say
            nothing of how they were trained, are warned of; and so is a head that the model's own folder lacks and that
            no module takes the place of, for its values are random.
    """
    if not hasattr(model, "named_parameters"):
        raise wrong_type("the model to attach to", model, "a torch model: of transformers, or another torch.nn.Module",
                         "load it first: AutoModel.from_pretrained(...), or the class of its task")  # fmt: skip
    if not isinstance(spec, Spec):
        spec = load_spec(spec)
    if is_known(model):
        check_choice(spec, type(model).__name__, model.config.to_dict())
    source = weights
    if source is None and spec.weights:
        source = inside(spec.folder, spec.weights, spec.path)
    refuse(source, "weights")  # before anything takes time
    anatomy, fingerprint = survey_model(model, example_inputs)
    plan = make_plan(spec, anatomy, fingerprint)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def read(name: str) -> np.ndarray[Any, Any]:
        return np.asarray(parameters[name].detach().float().cpu().numpy())

    sentences: list[str] = []
    if isinstance(source, Mapping):
        values = check_arrays(plan, source)
    elif source is None:
        values = start_tensors(plan, read)
    else:
        values, sentences = read_adapter(model, plan, Path(source))
    named = source if isinstance(source, Mapping) else () if source is None else read_header(Path(source))
    attach_plan(model, plan, values, overridden(plan, named))
    model.pelt.anatomy = anatomy
    if is_known(model):
        warn_of_origin(model, plan, anatomy, source is not None, 2)
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=2)
    return model


def attach_plan(
    model: Any, plan: Plan, values: Mapping[str, np.ndarray[Any, Any]], given: frozenset[str] = frozenset()
) -> Any:
    """Attach a plan's modules with tensors, of which those `given` stand in place of the spec's own sources; see
    `attach`."""
    if hasattr(model, "pelt"):
        raise fail("E209", "the model has modules attached already", hint="call model.detach_adapter() first")
    attached = Attached(plan, values, next(model.parameters()).device, given)
    try:
        attached.install(model)
    except BaseException:
        attached.uninstall()
        raise
    attached.freeze(model)
    model.pelt = attached.train(model.training)
    for name, method in attached.offers().items():
        setattr(model, name, partial(method, model))
    return model


def bare(model: Any) -> Any:
    """A torch model without the modules that are attached to it: a copy over the same parameters where there are any,
    or the model itself."""
    attached = getattr(model, "pelt", None)
    if attached is None:
        return model
    twin = replica(model, drop=attached)
    if attached.keeping.keeps:
        vars(twin).pop("generate", None)  # the guard's, which is the model's own
    for module in twin.modules():
        vars(module).pop("_pelt_change", None)
    return twin
