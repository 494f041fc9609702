"""Sessions of an artifact's graphs in another form, over the artifact's own bytes; nothing is written."""

from __future__ import annotations

from typing import Any

from peltc.runtime.running.session import Session


class Rewritten(Session):
    """An artifact whose graphs are changed before they are opened."""

    def rewrite(self, model: Any) -> None:
        """Change a graph in place."""
        raise NotImplementedError

    def open(self, file: str) -> Any:
        import onnx_ir as ir

        model = ir.load(self.folder / file)
        self.rewrite(model)
        return self.engine.start(ir.to_proto(model).SerializeToString())

    def open_sharing(self, file: str) -> tuple[Any, tuple[str, ...]]:
        return self.open(file), ()


class Widened(Rewritten):
    """An artifact in half precision that computes in float32.

    ONNX Runtime leaves the graph as it is: weights are cast and turned when they are needed, one at a time, so that
    none is in memory in float32 for longer.
    """

    def computes(self) -> str:
        return "float32"

    def rewrite(self, model: Any) -> None:
        from peltc.compiler.graphs.wide import widen

        widen(model)
        self.engine.optimised = False


class Exposed(Rewritten):
    """An artifact in half precision that computes as it does, and takes and gives float32: numpy has no bfloat16."""

    def rewrite(self, model: Any) -> None:
        from peltc.compiler.graphs.wide import expose

        expose(model)
