"""A base: a model's ONNX graph without its weights, and where each weight lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peltc.compiler.files.blocks import Blocks
from peltc.compiler.files.checkpoint import Checkpoint, StoredTensor
from peltc.compiler.files.levels import Levels
from peltc.compiler.files.packed import QUANTISED
from peltc.compiler.senses.examples import Reading
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.diagnostics import PeltError, Place, fail, nearest

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter of the model: its shape, and the name of the tensor in the checkpoint that holds it. The name is
    empty where no tensor does; the tensor may have fewer rows than the parameter. `wide` says that the model keeps it
    in float32, though it computes in half precision otherwise."""

    shape: tuple[int, ...]
    stored: str
    wide: bool = False


@dataclass(frozen=True)
class Base:
    """What the compiler knows of a model.

    Attributes:
        folder: the model's folder (config, tokenizer).
        architecture: the class of `transformers`; with its module's path where it is another.
        config: the model's config, as JSON, with what was chosen in place of what the folder says; empty where it has
            none.
        precision: the type in which the graph computes, `float32`.
        variant: `ids` where the graph reads token ids, `embeds` where it reads embedded tokens.
        fingerprint: identifies architecture, config and weights.
        parameters: every parameter of the graph by its fully qualified name.
        checkpoint: where the weights lie.
        anatomy: the sites.
        export: what `transformers` recorded about the export.
        limits: what the graph can be given: see `limits.graph_limits`.
        graph_file: the graph; its parameters are inputs.
        converted: whether the weights had to be written out, and why.
        module: the live torch module, where the base is of one that `transformers` does not have.
        inputs: what the examples were like from which it was exported, by input name; see `describe_inputs`.
        reading: how the model is given its inputs, where it is of `transformers` and reads more than text.
        changed: whether the config says something else than that in the folder.
        text_only: whether the model reads more than text, and its text alone was asked for.
    """

    folder: Path
    architecture: str
    config: Mapping[str, Any]
    precision: str
    variant: str
    fingerprint: str
    parameters: Mapping[str, ParameterInfo]
    checkpoint: Checkpoint
    anatomy: Anatomy
    export: Mapping[str, Any]
    limits: Mapping[str, Any]
    graph_file: Path
    converted: str = ""
    module: Any = None
    inputs: Mapping[str, Mapping[str, Any]] | None = None
    reading: Reading | None = None
    changed: bool = False
    text_only: bool = False

    @property
    def size(self) -> int:
        """How many values the parameters have."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters.values())

    def stored(self, name: str) -> StoredTensor:
        """Where a parameter's values lie; see `lacks`.

        Raises:
            PeltError: E504 the checkpoint has no such tensor.
        """
        found = self.checkpoint.tensors.get(self.parameters[name].stored)
        if found is None:
            raise missing_weights([name], self.checkpoint, self.folder)
        return found

    def lacks(self, name: str) -> range:
        """The rows of a parameter that the checkpoint does not hold: none, the last ones, or all of them."""
        parameter = self.parameters[name]
        stored = self.checkpoint.tensors.get(parameter.stored)
        rows = parameter.shape[0] if parameter.shape else 1
        return range(0 if stored is None else stored.shape[0] if stored.shape else 1, rows)

    def whole(self, name: str) -> Array:
        """A parameter's values, all of which the checkpoint holds.

        Raises:
            PeltError: E504 it does not.
        """
        if self.lacks(name):
            raise missing_weights([name], self.checkpoint, self.folder)
        return self.stored(name).array()

    def blocks(self, name: str) -> Blocks | Levels | None:
        """A parameter in small whole numbers, where the checkpoint stores it so."""
        stored = self.checkpoint.tensors.get(self.parameters[name].stored) if name in self.parameters else None
        return stored.blocks() if isinstance(stored, QUANTISED) else None

    def array(self, name: str, fill: float = 0.0) -> Array:
        """A parameter's values, mapped from the file; a copy with `fill` in the rows that the checkpoint lacks."""
        parameter, lacking = self.parameters[name], self.lacks(name)
        if not lacking:
            return self.stored(name).array()
        if not lacking.start:
            return np.full(parameter.shape, fill, np.float32)
        held = self.stored(name).array()
        return np.concatenate([held, np.full((len(lacking), *parameter.shape[1:]), fill, held.dtype)])

    def type_of(self, name: str) -> np.dtype[Any]:
        """The type that the graph has a parameter in."""
        import onnx_ir as ir

        wide = self.parameters[name].wide or self.precision == "float32"
        return ir.DataType.FLOAT.numpy() if wide else ir.DataType[self.precision.upper()].numpy()

    def load_graph(self) -> ir.Model:
        """A fresh copy of the graph, to rewrite. Its parameters are graph inputs."""
        import onnx_ir as ir

        from peltc.compiler.graphs.wide import unhold

        model = ir.load(self.graph_file)
        unhold(model.graph)
        return model


def missing_weights(
    missing: list[str], checkpoint: Checkpoint, folder: Path, sites: Sequence[str] = ("head",)
) -> PeltError:
    """The error for parameters that a checkpoint lacks.

    Args:
        sites: where modules could bring them.
    """
    shown = ", ".join(missing[:6]) + (f", ... ({len(missing)} in all)" if len(missing) > 6 else "")
    where = ", ".join(f"'{site}'" for site in sites[:4])
    others = [name for name in checkpoint.tensors if name != missing[0]]
    return fail(
        "E504",
        f"the checkpoint lacks weights that the architecture needs: {shown}",
        Place(str(folder)),
        "a checkpoint of this architecture" + (f", or modules that bring these weights: `method: replace` at {where}"
                                               if where else ""),
        nearest(missing[0], others)
        or (f"attach `method: replace` at {where} and train it, or " if where else "")
        + "name the class that was trained by --architecture",
    )  # fmt: skip
