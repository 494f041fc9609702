"""Models that the `adapters` library reaches by hooks alone: the folder of an adapter says in `adapter_interface.json`
which of a layer's modules they hang on.

Only bottlenecks depend on it. They stand behind the last map of a sub-layer; what the library takes for the residual
stream is what one of the named modules reads, and a norm that it applies itself is the last layer's, in all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peltc.compiler.importers.formats import Config
from peltc.compiler.importers.stored import read_json
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Place, fail

INTERFACE, LIBRARY = "adapter_interface.json", "the adapters library"


@dataclass(frozen=True)
class Hooks:
    """What a sub-layer's hooks hang on, by the keys of the interface.

    Attributes:
        last: the last map, by the keys of the modules around it and of itself.
        norm: the norm that the library applies to what an adapter reads.
        stream: the module whose input is taken for the residual stream.
    """

    last: tuple[str, ...]
    norm: str
    stream: str


HOOKS = {
    "attention.block": Hooks(("layer_self_attn", "attn_o_proj"), "layer_ln_1", "layer_pre_self_attn"),
    "feed_forward.block": Hooks(("layer_output_proj",), "layer_ln_2", "layer_pre_ffn"),
}
"""The sub-layers that have some."""


def read_interface(path: Path) -> Mapping[str, Any] | None:
    """What the interface in a folder says; None where there is none.

    Raises:
        PeltError: E430 it cannot be read.
    """
    file = path / INTERFACE
    if not file.is_file():
        return None
    found = read_json(file, LIBRARY).get("interface")
    if not isinstance(found, Mapping):
        raise fail("E430", "the interface names no modules", Place(str(file)), "a key 'interface'")
    return found


def check_hooks(interface: Mapping[str, Any], site: Site, layer: str, config: Config, path: Path) -> None:
    """Whether a bottleneck that hangs on hooks is what it would be in a model that the library knows.

    Args:
        layer: the name of the layer's module in the model.
        path: the adapter's folder.

    Raises:
        PeltError: E431 it is something else.
    """
    place, hooks = Place(str(path / INTERFACE)), HOOKS.get(site.role)

    def named(*keys: str) -> str:
        """The weight of the module that some keys name, one in another."""
        return ".".join([layer, *(str(interface.get(key)) for key in keys), "weight"])

    if hooks is None or site.anchors.get("y") != named(*hooks.last):
        raise fail("E431", f"the library's adapter is not behind the last map of {site.name}, and no method here stands"
                           " elsewhere", place, "a model whose sub-layers end in a map")  # fmt: skip
    if config.get("original_ln_before") and interface.get(hooks.norm):
        raise fail("E431", f"at {site.name} the library reads the norm of the last layer in all layers", place,
                   f"an interface without '{hooks.norm}', or `original_ln_before: false`")  # fmt: skip
    reads = config.get("original_ln_before") or config.get("is_parallel")
    if reads and site.anchors.get("r") != named(hooks.stream):
        raise fail("E431", f"at {site.name} the library takes something else for the residual stream", place,
                   f"'{hooks.stream}' the module that reads the stream, or `original_ln_before: false`")  # fmt: skip
