"""GLoRA as Hugging Face PEFT stores it: five paths of each module, every one a product of low rank, a vector, a
constant, or zeros that stand for none."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import BIASES, COMMON, RANK, TARGETS, Array, Config, Entry, Format, own_rows
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail

PATHS = {"type": ["string", "null"], "maxLength": 40}


def entry(config: Config, module: str) -> Entry:
    """What the paths are; PEFT takes whatever it does not know for none."""

    def path(key: str, known: tuple[str, ...], default: str) -> str:
        said = config.get(key, default)
        return said if said in known else "none"

    return Entry("glora", (
        ("r", config.get("r", 8)),
        ("weight_path", path("config_A_B", ("lora", "vector", "constant"), "lora")),
        ("prompt_path", path("config_C", ("lora", "vector"), "lora")),
        ("bias_path", path("config_D_E", ("vector", "constant"), "constant")),
    ))  # fmt: skip


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The paths of the weight as matrices [O, ...] and [..., I], those of the bias as vectors; of a fused map, what has
    a value for each output is a site's own.

    Raises:
        PeltError: E433 a path that is none has values.
    """
    found: dict[str, Array] = {}
    for name, array in tensors.items():
        path, _, part = name.partition(" ")
        if part == "none":
            if array.any():
                raise fail("E433", f"'{path}' of {site.name} is none by the config and has values", expected="zeros")
        elif path == "C":
            found["C_down" if part == "Xu" else "C_up" if part == "Xd" else "C"] = (
                array.reshape(-1) if part == "X" else array
            )
        elif part == "X":
            flat = array.reshape(-1)
            own = own_rows(flat, site) if len(flat) > 1 else flat
            found[path] = own[:, None] if path in "AB" else own
        else:
            found[f"{path}_up" if part == "Xd" else f"{path}_down"] = own_rows(array, site) if part == "Xd" else array
    return found


GLORA = Format(
    kind="GLORA",
    tensors={f"glora_{path}.{part}": f"{path} {'none' if part == 'zeros' else part}"
             for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")},
    read={**TARGETS, "bias": BIASES, "r": RANK, "config_A_B": PATHS, "config_C": PATHS, "config_D_E": PATHS},
    inert=COMMON | {"init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
)  # fmt: skip
