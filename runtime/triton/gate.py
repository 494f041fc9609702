"""The gate before a graph on Triton: it holds the texts of a request against the model's tables, fills in a mask and
token types that are left out, and finds the row of each text's profile by its name.

This file is copied into the repository, as `model.py` of a model of its own, and runs in the server, where peltc is not
installed: numpy is all that it needs. What is wrong with a request is refused here, before the server joins it with
those of others, all of which would fail with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAME = "profile_name"


class TritonPythonModel:
    """The model, as the server's backend for Python calls it.

    Attributes:
        inputs: of each input the names of its axes, and what fills it where it may be left out.
        values: how many rows the table has that an input is looked up in.
        lengths: of an axis, how many tokens have a position (`most`), and whether padding needs one too (`padding`).
        rows: the number of each profile by its name; None where the model has none.
        bare: why the bare base cannot be asked for; nothing where it can.
        row: what the rows are called.
        batched: whether the axis of the texts is the server's.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the export wrote down beside this file."""
        import triton_python_backend_utils as utils

        self.utils: Any = utils
        file = Path(args["model_repository"]) / args["model_version"] / "gate.json"
        about = json.loads(file.read_text(encoding="utf-8"))
        self.inputs: dict[str, Any] = about["inputs"]
        self.values, self.lengths = about["values"], about["lengths"]
        self.rows, self.bare, self.row = about["rows"], about["bare"], about["row"]
        self.batched = json.loads(args["model_config"])["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, each by itself."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        given = {name: self.utils.get_input_tensor_by_name(request, name) for name in (*self.inputs, NAME)}
        arrays = {name: tensor.as_numpy() for name, tensor in given.items() if tensor is not None}
        try:
            passed = self.passed(arrays)
        except ValueError as error:
            return self.utils.InferenceResponse(
                [], error=self.utils.TritonError(str(error), self.utils.TritonError.INVALID_ARG)
            )
        return self.utils.InferenceResponse([self.utils.Tensor(name, array) for name, array in passed.items()])

    def passed(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the graph is given, from what a request has.

        Raises:
            ValueError: with the code and the words that the library has for it.
        """
        found = {}
        for name, about in self.inputs.items():
            if name in given:
                found[name] = given[name]
            elif about["fill"] is not None:
                found[name] = np.full_like(given["input_ids"], about["fill"])
        self._check(found)
        if self.rows is not None:
            names = given.get(NAME)
            if names is None:
                texts = len(next(iter(found.values())))
                names = np.full((texts, 1) if self.batched else (texts,), b"", object)
            found[self.row] = np.array([self._number(name) for name in names.reshape(-1)], np.int64).reshape(
                names.shape
            )
        return found

    def _number(self, name: bytes) -> int:
        said = name.decode("utf-8", "replace")
        if not said:
            if self.bare:
                raise ValueError(f"E627 no profile is named, and this model has no bare base: {self.bare}")
            return -1
        if said not in self.rows:
            raise ValueError(f"E626 there is no profile {said!r:.80}")
        return int(self.rows[said])

    def _check(self, found: dict[str, Any]) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for name, array in found.items():
            if not array.size:
                raise ValueError(f"E617 the input '{name}' is empty: its shape is {list(array.shape)}")
            for axis, size in zip(self.inputs[name]["axes"], array.shape, strict=True):
                other, first = sizes.setdefault(axis, (size, name))
                if size != other:
                    raise ValueError(f"E613 '{first}' and '{name}' differ in the axis '{axis}': {other} and {size}")
        for name, rows in self.values.items():
            outside = (found[name] < 0) | (found[name] >= rows)
            if outside.any():
                raise ValueError(f"E615 the input '{name}' holds {found[name][outside][0]}, and the model's table has"
                                 f" {rows} rows, from 0 to {rows - 1}")  # fmt: skip
        for axis, limit in self.lengths.items():
            length, name = sizes.get(axis, (0, ""))
            masks = [
                array for key, array in found.items() if key.endswith("mask") and self.inputs[key]["axes"][1] == axis
            ]
            if masks and not limit["padding"]:
                length = min(length, max(int((mask != 0).sum(-1).max()) for mask in masks))
            if length > limit["most"]:
                raise ValueError(f"E616 a text of {length} tokens in the input '{name}' is too long: the model has"
                                 f" positions for {limit['most']}")  # fmt: skip
