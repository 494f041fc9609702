"""ONNX Runtime on the execution providers that are wanted: how the graphs of an artifact are opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peltc.compiler.files.talk import logged
from peltc.runtime.running.device import CPU, DEVICES, HOST, LIBRARIES, providers_of
from peltc.runtime.running.inputs import essence
from peltc.spec.diagnostics import Place, fail, one_of

FILES = "session.model_external_initializers_file_folder_path"
"""The option of ONNX Runtime that says where a graph from memory has its weights."""
NO_PREPACKING = "session.disable_prepacking"
"""The option that lets kernels read weights as they are: prepacked, each session has a copy."""


FAULTY = ["NchwcTransformer"]
"""What ONNX Runtime is kept from in half precision on the CPU: this step, which lays out convolutions, ends the process
on some graphs in float16 that have none (microsoft/onnxruntime#28392; seen with 1.31.1 on a graph with a cache)."""
LACKING = {"bfloat16": CPU}
"""Types that a provider has few kernels for, of what it is given, and with which it opens no model."""


def check_computed(precision: str, providers: Sequence[str], place: Place) -> None:
    """Whether execution providers compute a type.

    Raises:
        PeltError: E618 they do not.
    """
    if set(providers) <= set(LACKING.get(precision, ())):
        raise fail("E618", f"the artifact computes in {precision}, for which {', '.join(providers)} has no kernels",
                   place, "a provider that has them: CUDAExecutionProvider, on a machine with a GPU",
                   "`pelt verify OUT --provider CUDAExecutionProvider` there; for the CPU, compile with"
                   " `deploy: {precision: float32}` or float16")  # fmt: skip


class Engine:
    """Opens graphs of one artifact.

    Args:
        folder: the artifact's.
        providers: execution providers in order of preference; see `Session`.
        threads: threads of one operator; ONNX Runtime's choice where absent.
        spinning: whether idle threads wait busily.
        precision: the type that the graphs compute in.

    Raises:
        PeltError: E604 an execution provider that is not there; E618 a type that those wanted have no kernels for.

    Attributes:
        providers: those of the graph that was opened last; before any is opened, those wanted.
        settings: entries of ONNX Runtime's session config.
        optimised: whether ONNX Runtime may change the graph.
        half: whether graphs are in half precision.
    """

    def __init__(
        self,
        folder: Path,
        providers: Sequence[str] | None,
        threads: int | None,
        spinning: bool,
        precision: str = "float32",
    ):
        self.folder, self.threads = folder, threads
        self.asked = providers is not None
        self.wanted = self.providers = providers_of(providers)
        check_computed(precision, self.wanted, Place(str(folder)))
        self.settings = {} if spinning else {"session.intra_op.allow_spinning": "0"}
        self.optimised, self.half = True, precision != "float32"

    def start(self, model: str | bytes, weights: Mapping[str, Any] | None = None) -> Any:
        """ONNX Runtime's session of a graph, from a file or from memory, on the providers that are wanted.

        Args:
            weights: values of initializers by name, `ort.OrtValue`, which must stay for as long as the session does.

        Raises:
            PeltError: E604 a provider that was asked for and cannot be used here; E605 the graph cannot be opened.
        """
        import onnxruntime as ort

        place = Place(str(self.folder))
        try:  # ONNX Runtime would go on with other providers, when it opens the graph and when it runs it
            opened = ort.InferenceSession(model, self._options(weights), providers=self.wanted, enable_fallback=0,
                                          disabled_optimizers=FAULTY if self.half else None)  # fmt: skip
        except Exception as error:
            if self._opens_on_cpu(model, weights):  # so it is not the graph that is at fault
                message = f"the artifact cannot be opened on {', '.join(self.wanted)}: {essence(error)}"
                raise fail("E604", message, place, one_of(CPU), LIBRARIES) from None
            reason = str(error).splitlines()[0][:300]  # with the code by which verification knows what has no kernel
            raise fail("E605", f"ONNX Runtime cannot open the artifact: {reason}", place) from None
        real: list[str] = opened.get_providers()
        if missing := [name for name in self.wanted if name not in real]:
            message = f"{missing[0]} cannot be used on this machine, though this ONNX Runtime was built with it"
            if self.asked:
                raise fail("E604", message, place, one_of(real), LIBRARIES)
            logged(f"warning: {message}; the artifact runs on {', '.join(real)}. {LIBRARIES[0].upper()}{LIBRARIES[1:]}")
        self.providers = real
        return opened

    def start_file(self, file: Path, held: dict[str, Any] | None = None) -> Any:
        """The session of a graph of the artifact.

        Args:
            held: takes the weights that it shares with others, which must stay for as long as the session does; None
                where it shares none.

        Raises:
            PeltError: as `start`.
        """
        if held is None:
            return self.start(str(file))
        import onnx_ir as ir

        return self.start_model(ir.load(file), file.name, held)

    def start_model(self, model: Any, name: str, held: dict[str, Any] | None = None) -> Any:
        """As `start_file`, of a graph in memory.

        Args:
            name: of the file that it was read from.
        """
        import onnx_ir as ir

        if held is None:
            return self.start(ir.to_proto(model).SerializeToString())
        from peltc.runtime.running.sharing import shared

        content, weights = shared(model, self.folder)
        held |= {f"{name} {initializer}": weight for initializer, weight in weights.items()}
        self.settings[NO_PREPACKING] = "1"
        return self.start(content, {initializer: weight.value for initializer, weight in weights.items()})

    def sharing(self, file: Path, why_not: str = "") -> tuple[Any, tuple[str, ...], str]:
        """A graph whose cache is one buffer for past and present, the outputs that it writes into buffers, and an empty
        word; elsewhere no such outputs, and why: on another provider than the CPU, or where the graph does not allow
        it.

        Args:
            why_not: what else speaks against it.
        """
        if why_not or self.wanted != CPU:
            return None, (), why_not or f"{self.wanted[0]} keeps keys and values on its device"
        import onnx_ir as ir

        from peltc.compiler.lowering.shared_cache import Unshared, share_cache

        model = ir.load(file)
        try:
            return model, share_cache(model), ""
        except Unshared as why:
            return None, (), str(why)

    @property
    def device(self) -> str:
        """The memory that the graph which was opened last computes in."""
        return DEVICES.get(self.providers[0], HOST)

    def _options(self, weights: Mapping[str, Any] | None) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if not self.optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(FILES, str(self.folder.absolute()))
        for name, value in self.settings.items():
            options.add_session_config_entry(name, value)
        for name, value in (weights or {}).items():
            options.add_initializer(name, value)
        return options

    def _opens_on_cpu(self, model: str | bytes, weights: Mapping[str, Any] | None) -> bool:
        """Whether a graph that cannot be opened on the providers that are wanted opens on the CPU."""
        import onnxruntime as ort

        if set(self.wanted) <= set(CPU):
            return False
        try:
            ort.InferenceSession(model, self._options(weights), providers=CPU, enable_fallback=0,
                                 disabled_optimizers=FAULTY if self.half else None)  # fmt: skip
        except Exception:
            return False
        return True


def check_shared(engine: Engine, manifest: Mapping[str, Any]) -> None:
    """Whether sessions of an artifact can share the base's weights.

    Raises:
        PeltError: E604 on another provider than the CPU, or in half precision, where each has a copy of its own.
    """
    place, precision = Place(str(engine.folder)), manifest["base"]["precision"]
    if engine.wanted != CPU:
        raise fail("E604", f"weights are shared on the CPU alone, not on {engine.wanted[0]}", place, f"providers={CPU}")
    if precision != "float32":
        raise fail("E604", f"weights cannot be shared in {precision}, which the CPU computes in float32, in copies of"
                   " each session's own", place, "an artifact compiled with `precision: float32`",
                   "leave out `share_weights`")  # fmt: skip
