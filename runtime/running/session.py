"""Sessions: an artifact loaded on ONNX Runtime."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peltc.compiler.files.integrity import check_record
from peltc.compiler.files.manifest import MANIFEST, read_manifest
from peltc.runtime.running.bank import profiles_of
from peltc.runtime.running.bound import CHOOSING, Bound
from peltc.runtime.running.cache import BEGUN, begins
from peltc.runtime.running.engine import Engine, check_shared
from peltc.runtime.running.inputs import (
    NO_LIMITS,
    TOKENIZED,
    check,
    checked_options,
    converted,
    shown,
    translating,
)
from peltc.runtime.running.preparing import Preparing
from peltc.runtime.running.profiles import Chosen, Taken
from peltc.runtime.running.values import run
from peltc.spec.diagnostics import fail, wrong_type
from peltc.spec.packages import needing

if TYPE_CHECKING:
    from peltc.runtime.running.residents import Residents
    from peltc.runtime.running.sharing import Weight
    from peltc.runtime.running.store import ProfileStore

Array = np.ndarray[Any, Any]

TEXTS = ("inputs", "input_ids", "decoder_input_ids", "attention_mask")
"""What tells `generate` how many texts there are, the first that is given."""


class Session(Preparing):
    """An artifact, ready to run: `Session("out")(input_ids=..., attention_mask=...)` gives outputs by name.

    Args:
        folder: what `pelt-compile` wrote.
        providers: execution providers in order of preference; without it, CUDA where this machine has it, else the
            CPU. What is asked for by name is there, or the artifact does not open.
        threads: threads of one operator; ONNX Runtime's choice where absent.
        spinning: whether idle threads wait busily, which answers sooner and keeps the cores from others.
        store: a `ProfileStore`, or the path of one, whose profiles are brought into memory when a run asks for them.
        resident: how many of them are in memory at most; the least recently used one goes.
        share_weights: whether the base's weights are in memory once for all sessions of this process that say so, on
            the CPU. Each run takes longer then, for no session packs them in its own way.

    Raises:
        PeltError: E603 no artifact; E604 an execution provider that is not there, or cannot be used on this machine;
            E605 ONNX Runtime cannot open it; E618 it computes in a type that none of them has kernels for; E621 the
            base's file is not the one that was compiled; E624, E630, E631 a store, and the artifact has no profiles, it
            is damaged, or another artifact's.

    Attributes:
        engine: opens the artifact's graphs.
        profile: the name of the profile that is taken where a call names none; None for the start values of the
            modules, with which most methods leave the base as it is.
        copies: once it has generated, why each step copies the cache; empty where the cache grows in place.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        spinning: bool = True,
        store: ProfileStore | str | Path | None = None,
        resident: int = 64,
        share_weights: bool = False,
    ):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        check_record(self.folder / MANIFEST, self.manifest)
        self.engine = Engine(self.folder, providers, threads, spinning, self.computes())
        self.shared = share_weights
        if share_weights:
            check_shared(self.engine, self.manifest)
        self.weights: dict[str, Weight] = {}
        self.kept = profiles_of(self.manifest, self.folder)
        self.residents: Residents | None = None
        if store is not None:
            from peltc.runtime.running.residents import residents_of

            self.residents = residents_of(self.kept, store, resident, self.folder)
        self.profile: Chosen = None
        self.copies = ""
        self.generating = threading.local()
        if "decode" not in self.manifest.get("graphs", ()):
            self.inference  # noqa: B018  # what is wrong with it, now rather than later

    def __repr__(self) -> str:
        name, base = self.manifest["name"], self.manifest["base"]["architecture"]
        return f"<Session of '{name}' on {base}: {', '.join(self.providers)}>"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def computes(self) -> str:
        """The type that its graphs compute in."""
        return str(self.manifest["base"]["precision"])

    def close(self) -> None:
        """Give the memory back; what is called afterwards opens it again."""
        for held in ("inference", "inputs", "outputs", "labels", "generator"):
            self.__dict__.pop(held, None)
        self.weights.clear()

    @property
    def providers(self) -> list[str]:
        """The execution providers of the graph that was opened last; before any is opened, those wanted."""
        return self.engine.providers

    @property
    def profiles(self) -> list[str]:
        """The names of the profiles that were added; a store lists its own."""
        return self.kept.names

    def taken(self, chosen: Chosen, texts: int | None) -> AbstractContextManager[Taken]:
        """What runs take of profiles; see `Profiles.taken` and `Residents.taken`."""
        return (self.residents or self.kept).taken(chosen, texts)

    def add_profile(self, name: str, source: str | Path | Mapping[str, Array]) -> None:
        """Add a profile, or replace the one of that name; nothing is compiled.

        Args:
            source: a file that `pelt link` wrote, or what `peltc.link` gave.

        Raises:
            PeltError: E216 no name; E624 the artifact's modules are fixed; E625 a profile of another artifact.
        """
        self.kept.add(name, source)

    def add_profiles(self, names: Sequence[str], arrays: Mapping[str, Array]) -> None:
        """Add many profiles at once, or replace those of these names: all, or none.

        Args:
            arrays: what `peltc.link` gives, of all profiles, stacked along a first axis: [profiles, ...] by input name.

        Raises:
            PeltError: E216 something else than different names; E624, E625 as `add_profile`.
        """
        self.kept.add_all(names, arrays)

    def remove_profile(self, name: str) -> None:
        """Forget a profile.

        Raises:
            PeltError: E626 there is none of that name.
        """
        self.kept.remove(name)

    def check_profiles(self, chosen: Chosen, texts: int) -> None:
        """Whether there are the profiles that a run would ask for; none is brought into memory.

        Raises:
            PeltError: E216, E626, E632 as a run.
        """
        (self.residents or self.kept).check(chosen, texts)

    def open(self, file: str) -> Any:
        """ONNX Runtime's session of one of the artifact's graphs.

        Raises:
            PeltError: E605 it cannot be opened; E621 the base's file is not the one that was compiled.
        """
        check_record(self.folder / MANIFEST, self.manifest)  # a graph may be opened long after the session
        opened = self.engine.start_file(self.folder / file, self.weights if self.shared else None)
        self.kept.device = self.engine.device
        return opened

    def open_sharing(self, file: str) -> tuple[Any, tuple[str, ...]]:
        """As `open`, of a graph that is made to write into its cache; beside it the outputs that it writes so, none
        where it copies, and `copies` says why."""
        model, grown, self.copies = self.engine.sharing(self.folder / file, BEGUN if begins(self.manifest) else "")
        if not grown:
            return self.open(file), ()
        check_record(self.folder / MANIFEST, self.manifest)
        opened = self.engine.start_model(model, file, self.weights if self.shared else None)
        self.kept.device = self.engine.device
        return opened, grown

    @cached_property
    def inference(self) -> Any:
        """The session of the graph without a cache; it is opened when it is first called."""
        return self.open("model.onnx")

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the model takes, by name."""
        return {i.name: i for i in self.inference.get_inputs() if not (self.kept.record and i.name in CHOOSING)}

    @property
    def limits(self) -> Mapping[str, Any]:
        """What the model's tables allow; nothing is known of it in artifacts of earlier versions."""
        limits: Mapping[str, Any] = self.manifest.get("limits") or NO_LIMITS
        return limits

    @cached_property
    def outputs(self) -> list[str]:
        """The names of what it gives."""
        return [o.name for o in self.inference.get_outputs()]

    @cached_property
    def generator(self) -> Any:
        """The artifact as a model of `transformers` that generates; it has no parameters of its own.

        Raises:
            PeltError: E605 its graphs lack inputs that profiles bring; E611 the artifact was compiled without
                generation; E623 a package that it needs is missing.
        """
        with needing("generation"):
            from peltc.runtime.running.generation import open_generator

        opened: list[Bound] = []

        def bound(file: str) -> Bound:
            opened.append(Bound(self.open(file), self.tensors))
            return opened[-1]

        def sharing(file: str) -> tuple[Bound, tuple[str, ...]]:
            session, grown = self.open_sharing(file)
            opened.append(Bound(session, self.tensors))
            return opened[-1], grown

        with needing("generation"):
            found = open_generator(self.folder, bound, sharing)
        self.kept.check_offered(opened)
        return found

    def tensors(self, rows: int) -> Mapping[str, Any]:
        """ONNX Runtime's values of the profiles that this thread generates with, by input name; outside of `generate`
        those of the session's own."""
        taken: Taken | None = getattr(self.generating, "taken", None)
        if taken is not None:
            return taken(rows)
        with self.taken(self.profile, None) as found:
            return found(rows)

    def generate(self, inputs: Any = None, *, profile: Chosen = None, **options: Any) -> Any:
        """`transformers`' own `generate`: greedy, sampling, beams, streamers, stopping criteria, as for any model.

        Args:
            inputs: token ids [B, S], padded on the left for a decoder alone, as a torch tensor, array or lists; they
                may be given as `input_ids` too.
            profile: the name of the profile to generate with, in an artifact whose modules are exchanged; in one of
                `mode: bank` also a list, with a name or None for each text.
            options: `attention_mask` [B, S], and whatever `generate` takes.

        Returns:
            What `generate` returns: token ids [B, S], those of the prompt included for a decoder alone.

        Raises:
            PeltError: E611 the artifact was compiled without generation; E606, E612 to E617 as when called, the length
                at the token that has no position any more.
        """
        if inputs is not None:
            options["inputs"] = inputs
        given = checked_options(options, self.generator.takes, self.limits)
        texts = next((len(given[name]) for name in TEXTS if given.get(name) is not None), None)
        before = getattr(self.generating, "taken", None)
        with self.taken(profile if profile is not None else self.profile, texts) as self.generating.taken:
            try:
                return self.generator.generate(**given)
            finally:
                self.generating.taken = before

    def __call__(self, *texts: Any, profile: Chosen = None, **inputs: Any) -> dict[str, Array]:
        """Run the model.

        Args:
            texts: none: inputs are given by their names, and texts become inputs by `tokenize`.
            profile: the name of the profile to run with, in an artifact whose modules are exchanged; in one of
                `mode: bank` also a list, with a name or None for each row.
            inputs: arrays [B, S] by input name, torch tensors, or nested lists. A mask that is left out is all ones,
                token types that are left out are all zeros. Whole numbers of any type become the graph's own; floats
                are none, whatever their values. A text that the mask hides throughout changes no other text, and what
                is answered for it itself means nothing.

        Raises:
            PeltError: E216 something that is given without a name; E606 an input that the model does not have, one that
                is missing, or one of the wrong rank; E613 inputs that share an axis and differ in it; E614 values that
                the input's type does not hold; E615 token ids or types that the model's tables do not have; E616 a text
                that is longer than its positions; E617 no text, or an empty one; E612 what ONNX Runtime says besides.
        """
        if texts:
            hint = "session(**inputs)" if isinstance(texts[0], Mapping) else TOKENIZED
            raise wrong_type("what the model reads", texts[0], f"inputs by name: {', '.join(self.inputs)}", hint)
        return self.run(self.feeds(inputs), profile)

    def feeds(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Inputs in the graph's order and types, held against it and against the model's tables, with a mask and token
        types where they are left out; takes and raises what a call does."""
        unknown = [name for name in inputs if name not in self.inputs]
        if unknown:
            raise fail("E606", f"the model takes no input '{unknown[0]}'", expected=", ".join(self.inputs))
        feeds = self._filled({name: converted(name, value, self.inputs[name].type)
                              for name, value in inputs.items() if value is not None})  # fmt: skip
        check(feeds, {name: self.inputs[name].shape for name in feeds}, self.limits)
        return feeds

    def run(self, feeds: Mapping[str, Array], profile: Chosen = None) -> dict[str, Array]:
        """Run the model on what `feeds` made.

        Raises:
            PeltError: E612 what ONNX Runtime says; what is wrong with the choice of profiles.
        """
        with translating(shown(feeds), str(self.folder)):
            results = self.answer(feeds, profile if profile is not None else self.profile)
        return dict(zip(self.outputs, results, strict=True))

    def answer(self, feeds: Mapping[str, Array], chosen: Chosen) -> list[Array]:
        """The outputs, in their order. A profile's tensors stay where they are; ONNX Runtime's own `LoraAdapter` is not
        used, for it is ignored where inputs are bound."""
        rows = len(next(iter(feeds.values())))
        with self.taken(chosen, rows) as taken:
            return run(self.inference, feeds, taken(rows))

    def _filled(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """Every input in the graph's order, a mask and token types too where they are left out."""
        feeds = {}
        for name, spec in self.inputs.items():
            if name in given:
                feeds[name] = given[name]
            elif name in ("attention_mask", "token_type_ids") and "input_ids" in given:
                ones = np.full(given["input_ids"].shape, int(name == "attention_mask"))
                feeds[name] = converted(name, ones, spec.type)
            else:
                raise fail("E606", f"the input '{name}' is missing", expected=", ".join(self.inputs))
        return feeds

    @cached_property
    def labels(self) -> list[str] | None:
        """The names of the classes that the last axis of the model's `logits` has, in their order, as its config calls
        them; None where the model has no classes, or its config has no names for them."""
        file = self.folder / "config.json"
        named = json.loads(file.read_text(encoding="utf-8")).get("id2label") if file.is_file() else None
        if not isinstance(named, dict):
            return None
        sizes = [o.shape[-1] for o in self.inference.get_outputs() if o.shape]
        order = [named.get(str(i)) for i in range(len(named))]
        # The config of a model without a head may still have the names of one that it was trained with.
        return [str(name) for name in order] if len(named) in sizes and None not in order else None

    def labels_of(self, profile: str | None) -> list[str] | None:
        """What the labels of a profile are called, in the order of the last axis of `logits`: those that it does not
        have are far below, at the end. The names of all where profiles have no labels of their own; see `labels`.

        Raises:
            PeltError: E626 there is no profile of that name; E634 it is damaged in its store.
        """
        if profile is None or self.kept.form.labels is None:
            return self.labels
        if profile not in self.kept.held and self.residents is not None:
            return self.residents.labels(profile)
        return self.kept.labels_of(profile)
