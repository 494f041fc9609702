"""ONNX Runtime's sessions with a profile's tensors bound beside the inputs of each run."""

from __future__ import annotations

import threading
from typing import Any

from peltc.compiler.files.manifest import PROFILE, PROFILE_WEIGHTS
from peltc.runtime.running.profiles import Taken

CHOOSING = (PROFILE, PROFILE_WEIGHTS)
"""The inputs that say which profiles each row has."""


class Bound:
    """A session of ONNX Runtime that binds a profile's tensors beside the inputs of each run.

    Args:
        session: of ONNX Runtime.
        chosen: gives the profile's values by input name, from the number of rows.
    """

    def __init__(self, session: Any, chosen: Taken):
        self._session, self._chosen, self._own = session, chosen, threading.local()

    @property
    def rows(self) -> int:
        """How many rows the batch of this thread's next run has."""
        return getattr(self._own, "rows", 1)

    @rows.setter
    def rows(self, rows: int) -> None:
        self._own.rows = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_inputs(self) -> list[Any]:
        """The graph's inputs, but which profile each row has."""
        return [i for i in self._session.get_inputs() if i.name not in CHOOSING]

    def io_binding(self) -> Any:
        """A binding with the profile's tensors in it. Graphs of one artifact need not all have the same inputs."""
        binding, known = self._session.io_binding(), {i.name for i in self._session.get_overridable_initializers()}
        for name, value in self._chosen(self.rows).items():
            if name in known or name in CHOOSING:
                binding.bind_ortvalue_input(name, value)
        return binding
