"""The graph of a model in a folder, by what it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peltc.compiler.export.exported import GRAPHS, Exported
from peltc.compiler.export.refusals import unfit
from peltc.compiler.export.torch_model import keep_wide, parse_config, quiet, unbacked
from peltc.compiler.export.whole import export_model, export_read
from peltc.spec.diagnostics import Place, fail, first_line


def export_graph(
    folder: Path, config: Mapping[str, Any], cls: Any, precision: str, variant: str, text_only: bool = False
) -> Exported:
    """Export a model's graph; no weight is read.

    Args:
        cls: a model class of `transformers`.
        text_only: of a model that reads more than text, export what its text goes through.

    Raises:
        PeltError: E502 the config does not describe such a model, E512 nor should it, for the class is another type's;
            E505 what the exporter cannot export; E514 how the model is given its inputs is not known.
    """
    import torch
    from accelerate import init_empty_weights

    def build() -> Any:
        parsed: Any = None
        try:
            parsed = parse_config(config)
            with init_empty_weights(include_buffers=False):
                return unbacked(keep_wide(cls._from_config(parsed, dtype=getattr(torch, precision)).eval()))
        except Exception as error:
            if parsed is not None and not isinstance(parsed, cls.config_class or object):
                raise unfit(cls, parsed.model_type, folder) from None
            raise fail(
                "E502",
                f"the config does not describe a {cls.__name__}: {type(error).__name__}: {first_line(error)}",
                Place(str(folder / "config.json")),
            ) from error

    with quiet():
        if variant in GRAPHS:
            from peltc.compiler.export.cached import export_stage

            return export_stage(build(), variant)
        if variant == "ids" and not text_only:
            return export_read(build)
        return export_model(build(), variant)
