"""The profiles of a session: tensors that are exchanged while an artifact runs, one set at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peltc.spec.diagnostics import Place, fail, one_of, wrong_type

Array = np.ndarray[Any, Any]
SUFFIX = ".onnx_adapter"
VERSION = 1
ROOM = 1 << 20
"""How many bytes a profile's file may have beside its tensors."""


def number_of(fingerprint: str) -> int:
    """A fingerprint as the number that a profile's file has room for; 31 bits, for ONNX Runtime keeps signed ones."""
    return int(fingerprint[:8], 16) & 0x7FFFFFFF


def write_profile(file: Path, tensors: Mapping[str, Array], fingerprint: str) -> None:
    """Write a profile in ONNX Runtime's own format, which its `LoraAdapter` reads too, whatever the method.

    Args:
        fingerprint: of what the profile belongs to.
    """
    import onnxruntime as ort

    from peltc.compiler.files.manifest import write_whole

    form = ort.AdapterFormat()
    form.set_adapter_version(VERSION)
    form.set_model_version(number_of(fingerprint))
    form.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.part")
    form.export_adapter(str(new))
    write_whole(file, new.read_bytes())
    new.unlink()


class Profiles:
    """Profiles by name, each held against the artifact when it is added.

    Args:
        record: what the artifact's manifest says of profiles; None where its modules are fixed.
        place: the artifact, for messages.
    """

    def __init__(self, record: Mapping[str, Any] | None, place: str):
        self.record, self.place = record, place
        self.held: dict[str, dict[str, Any]] = {}

    def add(self, name: str, source: str | Path | Mapping[str, Array]) -> None:
        """Add a profile, or replace the one of that name.

        Args:
            source: a file that `pelt link` wrote, or arrays by input name.

        Raises:
            PeltError: E216 no name; E624 an artifact without profiles; E625 a profile of another artifact, or one that
                cannot be read.
        """
        import onnxruntime as ort

        if not isinstance(name, str) or not name:
            raise wrong_type("a profile's name", name, "a text")
        inputs = self._inputs()
        arrays = dict(source) if isinstance(source, Mapping) else self._read(Path(source))
        if set(arrays) != set(inputs):
            raise self._foreign(name, "has other tensors than")
        for key, array in arrays.items():
            if list(array.shape) != inputs[key] or array.dtype != np.float32:
                raise self._foreign(name, f"has {key} as {array.dtype} {list(array.shape)}, which is {inputs[key]} in")
            if not np.isfinite(array).all():
                raise self._foreign(name, f"has values in {key} that are no numbers, for")
        self.held[name] = {key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}

    def remove(self, name: str) -> None:
        """Forget a profile.

        Raises:
            PeltError: E626 there is none of that name.
        """
        self.feeds(name)
        del self.held[name]

    def feeds(self, name: str) -> dict[str, Any]:
        """ONNX Runtime's values by input name.

        Raises:
            PeltError: E626 there is no profile of that name.
        """
        if name not in self.held:
            raise fail("E626", f"there is no profile {name!r:.80}", Place(self.place),
                       one_of(sorted(self.held)) if self.held else "a profile that was added",
                       "session.add_profile(name, file)")  # fmt: skip
        return self.held[name]

    def _inputs(self) -> dict[str, list[int]]:
        if not self.record:
            raise fail("E624", "the modules of this artifact are fixed in it", Place(self.place),
                       "an artifact compiled with `mode: swappable`")  # fmt: skip
        return dict(self.record["inputs"])

    def _read(self, file: Path) -> dict[str, Array]:
        import onnxruntime as ort

        assert self.record is not None
        most = ROOM + sum(4 * int(np.prod(shape)) for shape in self.record["inputs"].values())
        try:
            if file.stat().st_size > most:
                raise self._foreign(file.name, f"has {file.stat().st_size:,} bytes, more than any of")
            form = ort.AdapterFormat.read_adapter(str(file))
        except OSError as error:
            raise fail("E625", f"cannot read the profile: {error.strerror}", Place(str(file))) from None
        except RuntimeError:
            raise fail("E625", "the file is no profile", Place(str(file)), "what `pelt link` wrote") from None
        if form.get_model_version() != number_of(self.record["fingerprint"]):
            raise self._foreign(file.name, "was made for another artifact than")
        return {name: np.array(value.numpy()) for name, value in form.get_parameters().items()}  # the file is let go

    def _foreign(self, name: str, what: str) -> Exception:
        return fail("E625", f"the profile {name!r:.80} {what} this artifact", Place(self.place),
                    "a profile that was linked for it", "pelt link OUT --weights FILE -o PROFILE")  # fmt: skip


class Bound:
    """A session of ONNX Runtime that binds a profile's tensors beside the inputs of each run.

    Args:
        session: of ONNX Runtime.
        chosen: gives the profile's values by input name.
    """

    def __init__(self, session: Any, chosen: Callable[[], Mapping[str, Any]]):
        self._session, self._chosen = session, chosen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def io_binding(self) -> Any:
        """A binding with the profile's tensors in it. Graphs of one artifact need not all have the same inputs."""
        binding, known = self._session.io_binding(), {i.name for i in self._session.get_overridable_initializers()}
        for name, value in self._chosen().items():
            if name in known:
                binding.bind_ortvalue_input(name, value)
        return binding
