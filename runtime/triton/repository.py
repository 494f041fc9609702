"""The model repository: an artifact as models of the Triton Inference Server, written whole or not at all.

    NAME             what clients call: the gate, then the graph; the graph alone where there is nothing to hold
    NAME_gate        holds requests against the model's tables, and finds profiles by name
    NAME_model       the graph without a cache
    NAME_generate    the loop of generation
    NAME_decode      the graph with a cache, which the loop runs; beside it NAME_encoder

Each model has one version, a folder with its number, in which all files that it reads lie: the base's are
the artifact's own, linked, so that the disk has them once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file

from peltc.compiler.artifact import link, staged, tidy
from peltc.compiler.files.integrity import check_record
from peltc.compiler.files.manifest import LINK, MANIFEST, PROFILES, STARTS, read_manifest
from peltc.compiler.files.talk import Talk, logged
from peltc.runtime.running.form import SUFFIX, Form, Source
from peltc.runtime.running.inputs import NO_LIMITS
from peltc.runtime.running.store import ProfileStore
from peltc.runtime.triton import configs, gate, loop
from peltc.runtime.triton.configs import Port, TritonTuning
from peltc.runtime.triton.earlier import RECORD, WHAT, Earlier
from peltc.runtime.triton.graphs import Graph, Tensor, fixed, opened, row_of
from peltc.runtime.triton.looping import ANSWERED, ASKED, files_of, json_of
from peltc.runtime.triton.rows import DATA, Numbers, Stacked, write_rows
from peltc.spec.diagnostics import Place, fail, wrong_type
from peltc.spec.modes import BANK

Array = np.ndarray[Any, Any]
Profiles = ProfileStore | str | Path | Mapping[str, Source]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What artifacts are called, which folders are called after."""
GRAPHS = ("model", "decode", "encoder")
CHECKED = "checked."
"""What precedes the names of what has passed the gate."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        models: their names.
        version: of all of them.
        stamp: what the numbers of profiles are told by; None where the artifact has none.
        profiles: how many there are.
        how: how each file of the base came there: `hard link` or `copy`.
    """

    models: tuple[str, ...]
    version: int
    stamp: str | None
    profiles: int
    how: Mapping[str, str]


def export_triton(
    out: str | Path,
    repository: str | Path,
    profiles: Profiles | None = None,
    *,
    tuning: TritonTuning | None = None,
    copy: bool = False,
    renumber: bool = False,
    talk: Talk = logged,
) -> Export:
    """Write an artifact as a model repository of the Triton Inference Server.

    Args:
        out: the artifact's folder.
        repository: the folder to write, in place of an earlier export there.
        profiles: a `ProfileStore` or its path, or profiles by name as `Session.add_profile` takes them; the artifact's
            own where absent.
        tuning: how the server runs the models.
        copy: whether the base's files are copied rather than linked.
        renumber: whether profiles get new numbers, without the rows of those that are gone.

    Raises:
        PeltError: E601 `repository` is something else than an export, or holds more than was written; E602 it cannot be
            written; E603, E621 no artifact, or its base has changed; E624 to E626, E630 to E635 what is wrong with
            profiles; E811 what Triton does not do.
    """
    folder, place, tuned = Path(out), Path(repository), tuning or TritonTuning()
    manifest = read_manifest(folder)
    check_record(folder / MANIFEST, manifest)
    record, name = manifest.get("profiles"), str(manifest.get("name"))
    if not NAME.fullmatch(name) or not {"model"} <= {*manifest.get("graphs", ())} <= {*GRAPHS}:
        raise fail("E603", f"the manifest has a name or graphs that no artifact has: {name!r:.60}", Place(str(folder)),
                   "what pelt-compile wrote")  # fmt: skip
    if record and record["mode"] != BANK:
        raise fail("E811", "the profiles of this artifact are brought one at a time, with each request's tensors",
                   Place(str(folder)), "an artifact compiled with `mode: bank`")  # fmt: skip
    if record and record.get("blend"):
        raise fail("E811", "a text of this artifact may have several profiles with weights, and a request names one",
                   Place(str(folder)), "an artifact compiled without `blend`")  # fmt: skip
    if profiles is not None:
        _ = Form(record, Place(str(folder))).inputs  # which an artifact without profiles does not have
    tidy(place.resolve())
    with (
        _opened(profiles, folder, record["fingerprint"] if record else "") as source,
        staged(place, RECORD, WHAT) as new,
    ):
        earlier = Earlier.read(place, talk)
        writer = Writer(folder, new, manifest, earlier.version + 1, tuned, copy, talk)
        numbers = writer.profiles(source, earlier, renumber) if record else None
        writer.models()
        writer.finish(numbers)
    count = len(numbers.rows) if numbers else 0
    return Export(tuple(writer.written), writer.version, numbers.stamp if numbers else None, count, writer.how)


class Writer:
    """Writes the models of one artifact, one after the other.

    Args:
        folder: the artifact's.
        new: the repository's, which is empty.
    """

    def __init__(
        self, folder: Path, new: Path, manifest: Mapping[str, Any], version: int, tuning: TritonTuning, copy: bool,
        talk: Talk,
    ):  # fmt: skip
        self.folder, self.new, self.manifest, self.version = folder, new, manifest, version
        self.tuning, self.copy, self.talk = tuning, copy, talk
        self.name = str(manifest["name"])
        self.limits: Mapping[str, Any] = manifest.get("limits") or NO_LIMITS
        self.stacked: Stacked | None = None
        self.told: dict[str, Any] = {"rows": None, "bare": None, "row": None}
        self.written: list[str] = []
        self.how: dict[str, str] = {}

    def profiles(self, given: ProfileStore | Mapping[str, Source] | None, earlier: Earlier, renumber: bool) -> Numbers:
        """Write the file of all profiles; it is moved into the models' folders later."""
        record = self.manifest["profiles"]
        form = Form(record, Place(str(self.folder)))
        names, read = _reading(given, self.folder, form)
        numbers = earlier.numbers.following(names, record["fingerprint"], renumber)
        found = load_file(self.folder / LINK / STARTS)
        starts = {name: found[name] for name in record["inputs"]}
        before = (earlier.data(), earlier.numbers) if numbers.gone else None
        self.stacked = write_rows(self.new / DATA, numbers, starts, read, before)
        self.told = {"rows": dict(numbers.rows), "bare": record["no_bare_base"]}
        return numbers

    def models(self) -> None:
        """Write all models."""
        self.told["row"] = row_of(self.stacked) if self.stacked else None
        called = {name: f"{self.name}_{name}" for name in self.manifest["graphs"]}
        graphs = {name: self._graph(name, model) for name, model in called.items()}
        for name, graph in graphs.items():
            labels = self._labels(graph) if name == "model" else {}
            tuned = self.tuning if name == "model" else replace(self.tuning, delay=0)  # each step of a text would wait
            config = configs.of_graph(called[name], graph, tuned, labels)
            self._configure(config, labels)
            if name == "model":
                self._front(config.name, graph, labels)
        if "decode" in graphs:
            files = files_of(self.folder, graphs, called, self.limits, self.told, self.tuning, self.talk)
            self._python(configs.of_python(f"{self.name}_generate", ASKED, ANSWERED, streams=True), files, loop)

    def finish(self, numbers: Numbers | None) -> None:
        """Write down what was written."""
        if self.stacked is not None:
            self.stacked.file.unlink()  # it has its names in the models' folders
        record = {"artifact": self.manifest["base"]["fingerprint"], "version": self.version, "models": self.written,
                  "profiles": numbers.to_json() if numbers else None,
                  "configs": {name: Earlier.digest(self.new / name) for name in self.written}}  # fmt: skip
        (self.new / RECORD).write_bytes(json_of(record))

    def _graph(self, name: str, model: str) -> Graph:
        """Write a graph, with the files that it reads, into its model's folder."""
        graph, files = fixed(self.folder / f"{name}.onnx", self.stacked)
        folder = self._folder(model)
        for file in files:
            if file == DATA:
                link(self.new / DATA, folder / DATA, False)
            elif file in self.how:  # another graph's model has it already
                link(next(self.new.glob(f"*/{self.version}/{file}")), folder / file, False)
            else:
                self.how[file] = link(self.folder / file, folder / file, self.copy)["how"]
        ir.save(graph, folder / "model.onnx")
        place = Place(str(self.folder / f"{name}.onnx"))
        return opened(folder / "model.onnx", self.stacked, place, self.manifest["base"]["precision"])

    def _folder(self, model: str) -> Path:
        """The folder of a model's version."""
        self.written.append(model)
        folder = self.new / model / str(self.version)
        folder.mkdir(parents=True)
        return folder

    def _python(self, config: Any, files: Mapping[str, bytes], module: Any) -> None:
        """A model of Python, with the file that computes it and those that it reads."""
        folder = self._folder(config.name)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "model.py").write_bytes(Path(module.__file__).read_bytes())
        self._configure(config)

    def _configure(self, config: Any, labels: Mapping[str, Iterable[str]] = MappingProxyType({})) -> None:
        """A model's config, and the files of labels that it names."""
        folder = self.new / config.name
        (folder / "config.pbtxt").write_text(configs.text(config), encoding="utf-8")
        for output, names in labels.items():
            (folder / configs.labels_file(output)).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")

    def _front(self, model: str, graph: Graph, labels: Mapping[str, Iterable[str]]) -> None:
        """What clients call: the gate and the graph behind it."""
        batched, held, row = graph.batched, self._held(graph), graph.row
        rows = self.tuning.rows if batched else 0

        def port(tensor: Tensor, optional: bool = False) -> Port:
            return Port(tensor.name, tensor.type, tuple(tensor.dims(batched)) or (1,), optional)

        texts = [tensor for tensor in graph.inputs if tensor.name != row]
        given = [port(tensor, held.get(tensor.name, {}).get("fill") is not None) for tensor in texts]
        each = (1,) if batched else (-1,)
        who = [Port(gate.NAME, "BYTES", each, bool(held))] if row else []
        asked = [*(one for one in given if one.name in held), *who]
        passed = [
            *(port(tensor) for tensor in texts if tensor.name in held),
            *([Port(row, "INT64", each)] if row else ()),
        ]
        values = {name: rows for name, rows in self.limits["values"].items() if name in held}
        about = {"inputs": held, "values": values, "lengths": self.limits["lengths"], **self.told, "row": row,
                 "rows": self.told["rows"] if row else None}  # fmt: skip
        checked = {one.name: CHECKED + one.name for one in passed}
        steps = [(model, {tensor.name: checked.get(tensor.name, tensor.name) for tensor in graph.inputs},
                  {tensor.name: tensor.name for tensor in graph.outputs})]  # fmt: skip
        if passed:
            config = configs.of_python(f"{self.name}_gate", asked, passed, rows)
            self._python(config, {"gate.json": json_of(about)}, gate)
            steps.insert(0, (config.name, {one.name: one.name for one in asked}, checked))
        self._folder(self.name)
        outputs = [port(tensor) for tensor in graph.outputs]
        self._configure(configs.of_ensemble(self.name, [*given, *who], outputs, rows, labels, steps), labels)

    def _held(self, graph: Graph) -> dict[str, Any]:
        """The inputs that pass the gate, texts and masks: what the model's tables bound, and what may be left out."""
        names = {tensor.name for tensor in graph.inputs}
        fills = {"attention_mask": 1, "token_type_ids": 0} if "input_ids" in names else {}
        bounded = {*self.limits["values"]}
        found = {}
        for tensor in graph.inputs:
            whole = tensor.type.startswith("INT") and len(tensor.axes) == 2 and tensor.name != graph.row
            if whole and (tensor.name in bounded or tensor.name in fills or tensor.axes[1] in self.limits["lengths"]):
                found[tensor.name] = {"axes": [str(axis) for axis in tensor.axes], "fill": fills.get(tensor.name)}
        return found if bounded | {*fills} | {*self.limits["lengths"]} else {}

    def _labels(self, graph: Graph) -> dict[str, list[str]]:
        """The names of the classes, by the outputs that are scores of them."""
        file = self.folder / "config.json"
        named = json.loads(file.read_text(encoding="utf-8")).get("id2label") if file.is_file() else None
        labels = [str(named.get(str(i), "")) for i in range(len(named))] if isinstance(named, dict) else []
        if any(not name or "\n" in name for name in labels):
            return {}
        return {t.name: labels for t in graph.outputs if len(t.axes) == 2 and t.axes[1] == len(labels)}


def _reading(
    given: ProfileStore | Mapping[str, Source] | None, folder: Path, form: Form
) -> tuple[list[str], Callable[[str], Mapping[str, Array]]]:  # fmt: skip
    """The names of profiles, and how each is read."""
    if isinstance(given, ProfileStore):
        return [record.name for record in given.list()], lambda name: given.read(name)[1]
    if given is None:
        given = {file.name.removesuffix(SUFFIX): file for file in sorted((folder / PROFILES).glob(f"*{SUFFIX}"))}
    assert isinstance(given, Mapping)
    found = given
    return sorted(found), lambda name: form.arrays(name, found[name])


@contextmanager
def _opened(
    given: Profiles | None, folder: Path, fingerprint: str
) -> Iterator[ProfileStore | Mapping[str, Source] | None]:
    """Profiles, a store that is given by its path open as long as this context lasts.

    Raises:
        PeltError: E216 something else than profiles; E630, E631 a store that is none, or another artifact's.
    """
    if given is None or isinstance(given, Mapping):
        yield given
        return
    if not isinstance(given, (ProfileStore, str, Path)):
        raise wrong_type("profiles", given, "a store, its path, or profiles by name")
    with nullcontext(given) if isinstance(given, ProfileStore) else ProfileStore(given, folder, create=False) as store:
        if store.fingerprint != fingerprint:
            raise fail("E631", "the store belongs to another artifact", store.place, f"profiles of {folder}")
        yield store
