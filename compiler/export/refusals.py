"""Models that cannot be compiled, told before anything is exported, each for what it is.

Decided by what the config says, by the names of the tensors, and by the signature of the class's `forward`; no list of
models is kept.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peltc.spec.diagnostics import PeltError, Place, fail, nearest, one_of

TOKENS = "input_ids"
SENSES = {"image": "images", "video": "videos", "audio": "sound", "time": "time series"}
"""What classes of `transformers` declare to read, in plain words."""
MAIN = re.compile("pixel_values|input_features|input_values")
"""How `transformers` calls the main inputs of what reads images, videos and sound."""
ALSO = re.compile("pixel|image|video|vision|visual|audio|speech")
"""What else may be such an input, of a class that declares to read more than text."""


# quantised checkpoints


def check_stored(config: Mapping[str, Any], folder: Path) -> None:
    """Whether a checkpoint's config says that its weights are numbers as they are.

    Raises:
        PeltError: E508 they are quantised, and by which method.
    """
    for key, part in [("", config), *((f"{k}.", v) for k, v in config.items() if isinstance(v, Mapping))]:
        for name in ("quantization_config", "compression_config"):
            if part.get(name):
                raise quantised(part[name], "the checkpoint", Place(str(folder / "config.json"), key=f"{key}{name}"))


def check_packed(names: Iterable[str], folder: Path) -> None:
    """Whether the names of a checkpoint's tensors are those of weights as they are. The tools of GPTQ and AWQ wrote
    their settings beside the config, so that the config need not tell.

    Args:
        names: of the tensors.

    Raises:
        PeltError: E508 some are quantised.
    """
    packed = next((name for name in names if name.endswith(".qweight")), None)
    if packed is not None:
        raise fail("E508", f"the checkpoint is quantised: '{packed}' holds packed whole numbers, as GPTQ and AWQ store"
                   " them", Place(str(folder)), PLAIN, _undoing("", None))  # fmt: skip


def check_live(model: Any) -> None:
    """Whether a torch model's parameters are numbers as they are.

    Raises:
        PeltError: E508 they are quantised.
    """
    import torch

    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    what = f"the torch model {type(model).__name__}"
    if settings:
        raise quantised(settings.to_dict() if hasattr(settings, "to_dict") else settings, what)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.Tensor) and (not parameter.is_floating_point() or parameter.itemsize < 2):
            stored = str(parameter.dtype).removeprefix("torch.")
            raise fail("E508", f"{what} is quantised: '{name}' is stored as {stored}", expected=PLAIN)


PLAIN = "weights in float32, float16 or bfloat16"


def quantised(settings: Any, what: str, place: Place | None = None) -> PeltError:
    """The error for quantised weights; says how to undo it where `transformers` can."""
    settings = settings if isinstance(settings, Mapping) else {}
    named = settings.get("quant_method")
    method = str(getattr(named, "value", named) or "an unnamed method")
    bits = next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), settings.get("bits"))
    told = f"{method}, {bits} bits" if isinstance(bits, int) else method
    return fail("E508", f"{what} is quantised ({told}), which is not compiled", place, PLAIN, _undoing(method, bits))


def _undoing(method: str, bits: Any) -> str:
    """How `transformers` undoes a quantisation, where it can."""
    with contextlib.suppress(Exception):
        from transformers.quantizers import auto
        from transformers.quantizers.base import HfQuantizer

        name = method if method in auto.AUTO_QUANTIZER_MAPPING else f"{method}_{bits}bit"
        settings: Any = None
        quantizer: Any = None
        settings, quantizer = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name], auto.AUTO_QUANTIZER_MAPPING[name]
        if getattr(quantizer, "_dequantize", None) is not getattr(HfQuantizer, "_dequantize", None):
            return "load it by transformers, call `model.dequantize()`, and compile what `save_pretrained` writes"
        if "dequantize" in inspect.signature(settings).parameters:
            return (
                f"load it by transformers with `quantization_config={settings.__name__}(dequantize=True)`, and compile"
                " what `save_pretrained` writes"
            )
    return "compile the model that it was quantised from"


# classes


def model_class(architecture: str, config: Mapping[str, Any], folder: Path, chosen: bool = False) -> Any:
    """The class of `transformers` by an architecture's name.

    Args:
        config: the model's.
        chosen: the user named the architecture, and not the config.

    Raises:
        PeltError: E502 `transformers` has no such class or type of model, E511 nor could it, for the model brings code
            of its own; E512 the class is no model, or another type's.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    kind = str(config["model_type"])
    known, cls = kind in CONFIG_MAPPING, None
    with contextlib.suppress(Exception):  # classes come into being when asked for, and so do their errors
        cls = getattr(transformers, architecture, None)
    if (own := own_code(config, folder)) and not (known and isinstance(cls, type)):
        lacking = f"architecture '{architecture}'" if known else f"model type '{kind}'"
        raise fail("E511", f"transformers has no {lacking}, and the model's own code ({own}) is not run",
                   Place(str(folder / "config.json")), "a model that transformers has",
                   "load it as its authors say, and give the live module: "
                   "peltc.compile(spec, module, out, example_inputs={name: example, ...})")  # fmt: skip
    if not known:
        raise fail("E502", f"transformers has no model type '{kind}'",
                   Place(str(folder / "config.json"), key="model_type"), "a model that transformers has",
                   nearest(kind, CONFIG_MAPPING.keys()) or "a newer transformers may have it")  # fmt: skip
    if not isinstance(cls, type):
        names = [n for n in dir(transformers) if n.endswith(("Model", "LM", "Classification", "Generation"))]
        raise fail("E502", f"transformers has no architecture '{architecture}'", _place(folder, chosen),
                   one_of(classes_of(kind), 12), nearest(architecture, names))  # fmt: skip
    if not is_model(cls):
        raise fail("E512", f"{architecture} is no model class", _place(folder, chosen), one_of(classes_of(kind), 12))
    if chosen and not _related(cls, kind):
        raise unfit(cls, kind, folder, chosen)
    return cls


def _place(folder: Path, chosen: bool) -> Place:
    if chosen:
        return Place(str(folder), key="--architecture")
    return Place(str(folder / "config.json"), key="architectures")


def own_code(config: Mapping[str, Any], folder: Path) -> str:
    """What tells that a model folder brings code of its own, or empty."""
    if config.get("auto_map"):
        return "auto_map"
    return next((file.name for file in sorted(folder.glob("*.py"))), "")


def is_model(cls: type) -> bool:
    """Whether a class is a model of `transformers` that computes something."""
    import torch
    from transformers import PreTrainedModel

    return issubclass(cls, PreTrainedModel) and cls.forward is not torch.nn.Module.forward


def classes_of(kind: str) -> list[str]:
    """The model classes that `transformers` has for a model type."""
    import transformers
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for name, table in vars(modeling_auto).items():
        if name.startswith("MODEL") and name.endswith("_NAMES") and isinstance(table, Mapping) and kind in table:
            found.update([table[kind]] if isinstance(table[kind], str) else table[kind])
    return sorted(name for name in found if hasattr(transformers, name))


def _related(cls: Any, kind: str) -> bool:
    """Whether a class may be built from a config of some type: it, or a part of it, is of the class's own type."""
    from transformers import CONFIG_MAPPING

    own, given = getattr(cls, "config_class", None), CONFIG_MAPPING[kind]
    if cls.__name__ in classes_of(kind) or own is None:
        return True
    return any(issubclass(given, own) or issubclass(own, part) for part in (given, *given.sub_configs.values()))


def unfit(cls: Any, kind: str, folder: Path, chosen: bool = False) -> PeltError:
    """The error for a class that is not for a config of some type."""
    return fail("E512", f"{cls.__name__} is no class for the model type '{kind}'", _place(folder, chosen),
                one_of(classes_of(kind), 12))  # fmt: skip


# what a model reads


def inputs_of(cls: Any) -> list[str]:
    """The names of what a class's `forward` takes; none where its signature does not say."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(cls.forward).parameters.values() if p.kind in kinds][1:]


def declared(cls: Any) -> list[str]:
    """What a class declares to read besides text, in plain words."""
    found = getattr(cls, "input_modalities", ())
    return [SENSES[m] for m in ((found,) if isinstance(found, str) else found) if m in SENSES]


def check_reads(cls: Any, place: Place | None = None) -> None:
    """Whether a class reads token ids.

    Raises:
        PeltError: E509 it does not, and what it reads.
    """
    names = inputs_of(cls)
    if not names or TOKENS in names:
        return
    main = getattr(cls, "main_input_name", "")
    main = main if isinstance(main, str) and main in names else names[0]
    senses = f" ({' and '.join(words)})" if (words := declared(cls)) else ""
    raise fail("E509", f"{cls.__name__} reads '{main}'{senses}, and no token ids", place,
               f"a model that reads text: one whose forward takes '{TOKENS}'")  # fmt: skip


def beyond_text(cls: Any) -> list[str]:
    """The inputs of a class that reads token ids through which it reads more than text."""
    names = inputs_of(cls)
    if TOKENS not in names:
        return []
    main = [name for name in names if MAIN.search(name)]
    return main or [name for name in names if ALSO.search(name) and declared(cls)]


def reads_more(cls: Any) -> bool:
    """Whether a class reads images, sound or series: beside token ids, or in place of them."""
    return bool(beyond_text(cls)) or bool((names := inputs_of(cls)) and TOKENS not in names)


def check_variant(cls: Any, variant: str, text_only: bool, place: Place | None = None) -> None:
    """Whether the graphs that read text alone can be had of a class.

    Args:
        variant: of the graph, as for `open_base`.

    Raises:
        PeltError: E509 it reads no text; E510 it reads more, and its text alone was not asked for.
    """
    if text_only or variant != "ids":
        check_reads(cls, place)
    if variant != "ids" and not text_only and (beyond := beyond_text(cls)):
        what = "tokens before the sequence" if variant == "embeds" else "generation"
        inputs = " and ".join(f"'{name}'" for name in beyond[:3])
        raise fail("E510", f"{cls.__name__} reads {inputs} beside token ids, and {what} are compiled of text alone",
                   place, "a model that reads text alone, or another spec",
                   "`--text-only` (in Python: text_only=True) takes its text alone, if it runs on that")  # fmt: skip


@contextlib.contextmanager
def through_text(architecture: str, beyond: list[str]) -> Iterator[None]:
    """An export that was asked to do without some inputs; where it fails, they are what is missing.

    Raises:
        PeltError: E510 in place of the exporter's E505; nothing else is changed.
    """
    try:
        yield
    except PeltError as error:
        first = error.diagnostics[0]
        if not beyond or first.code != "E505":
            raise
        inputs = " and ".join(f"'{name}'" for name in beyond[:3])
        raise fail("E510", f"{architecture} cannot be exported through its text alone, without {inputs}: "
                   f"{first.message}", first.place, "a model that reads text alone") from error  # fmt: skip
