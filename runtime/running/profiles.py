"""The profiles of a session: tensors that are exchanged while an artifact runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.labels import LABELS
from peltc.runtime.running.device import HOST, value_on
from peltc.runtime.running.form import Form, Source
from peltc.spec.diagnostics import Place, fail, one_of, wrong_type

Array = np.ndarray[Any, Any]
Blend = Mapping[str, float]
"""Several profiles of a text, each with its weight."""
Chosen = str | Blend | Sequence[str | Blend | None] | None
"""The profile of a run: a name, none, several with weights, or one of these for each row of a batch."""
Shares = tuple[tuple[Hashable, float], ...]
"""The profiles of a text, None for the bare base, and their weights, which sum to 1."""
Taken = Callable[[int], Mapping[str, Any]]
"""ONNX Runtime's values by input name that a run takes of profiles, from the number of its rows."""


class Profiles:
    """Profiles by name, each held against the artifact when it is added.

    Args:
        record: what the artifact's manifest says of profiles; None where its modules are fixed.
        folder: the artifact's.

    Attributes:
        held: what is kept of each profile, by its name, or by a key that is no text for those of a store.
        labels: what the labels of each are called, where they may have others.
        device: the memory that graphs compute in, where profiles lie then.
    """

    def __init__(self, record: Mapping[str, Any] | None, folder: Path):
        self.record, self.place = record, Place(str(folder))
        self.form = Form(record, self.place)
        self.held: dict[Hashable, Any] = {}
        self.labels: dict[Hashable, list[str]] = {}
        self.device = HOST
        self.moved: dict[Hashable, Any] = {}
        """What lies on a device, copied there when a run first asked for it."""

    @property
    def names(self) -> list[str]:
        """The names of the profiles that were added."""
        return [name for name in list(self.held) if isinstance(name, str)]

    def add(self, name: str, source: Source) -> None:
        """Add a profile, or replace the one of that name.

        Args:
            source: a file that `pelt link` wrote, or arrays by input name.

        Raises:
            PeltError: E216 no name; E624 an artifact without profiles; E625 a profile of another artifact, or one that
                cannot be read.
        """
        if not isinstance(name, str) or not name:
            raise wrong_type("a profile's name", name, "a text")
        self.receive(name, self.form.arrays(name, source))

    def add_all(self, names: Sequence[str], arrays: Mapping[str, Array]) -> None:
        """Add profiles, or replace those of these names: all, or none.

        Args:
            arrays: by input name, [profiles, ...].

        Raises:
            PeltError: E216 something else than different names; E624, E625 as `add`.
        """
        wrong = isinstance(names, str) or not all(isinstance(name, str) and name for name in names)
        if wrong or len(set(names)) < len(names):
            raise wrong_type("the names of profiles", names, "a list of different texts")
        if names:
            self.take_all(names, self.form.stacked(names, arrays))

    def remove(self, name: Hashable) -> None:
        """Forget a profile.

        Raises:
            PeltError: E626 there is none of that name.
        """
        self._known(name)
        del self.held[name]
        self._forgotten(name)

    def _forgotten(self, name: Hashable) -> None:
        self.labels.pop(name, None)
        self.moved.pop(name, None)

    def labels_of(self, name: str) -> list[str] | None:
        """What the labels of a profile are called; None where all have the artifact's.

        Raises:
            PeltError: E626 there is none of that name.
        """
        self._known(name)
        return self.labels.get(name)

    def each(self, chosen: Chosen, texts: int | None) -> list[Shares]:
        """What is chosen as a list: one entry alone where the choice is for all texts.

        Args:
            chosen: the name of a profile, or None.
            texts: how many texts the batch has; None where that is not known.

        Raises:
            PeltError: E216 several profiles, where one is taken at a time; another number of profiles than of texts;
                weights that are no numbers.
        """
        if chosen is not None and not isinstance(chosen, str):
            raise wrong_type("the profile of a run", chosen, "one name, in an artifact of `mode: swappable`",
                             "`mode: bank` has another profile for each row")  # fmt: skip
        return [((chosen, 1.0),)]

    def check(self, chosen: Chosen, texts: int | None) -> None:
        """Whether there are the profiles that are chosen; raises as `taken`."""
        each = self.each(chosen, texts)
        self.check_bare(each)
        for name in names_of(each):
            self._known(name)

    @contextmanager
    def taken(self, chosen: Chosen, texts: int | None) -> Iterator[Taken]:
        """What runs take of profiles, as they are now: whatever is added or removed meanwhile changes nothing of it.

        Args:
            chosen: the name of a profile, None for the bare base, several with weights where the artifact blends them,
                or, where each row of a batch picks its own, a list with one of these for each text: all rows of a
                text, as its beams, have its profile.
            texts: how many texts the batch has; None where that is not known.

        Returns:
            ONNX Runtime's values by input name, from a run's number of rows; none where no profile is meant.

        Raises:
            PeltError: E216 as `each`; E626 there is no profile of that name; E627 none is meant, and the modules change
                the base whatever their values.
        """
        with self.lent(self.each(chosen, texts), is_one(chosen)) as taken:
            yield taken

    @contextmanager
    def lent(self, each: Sequence[Shares], alone: bool) -> Iterator[Taken]:
        """What runs take of the profiles of these keys; see `taken`.

        Args:
            alone: whether the one entry is for all texts.
        """
        self.check_bare(each)
        ((key, _),) = each[0]
        found = {} if key is None else self._known(key)
        if key is not None and self.device != HOST:
            if key not in self.moved:
                self.moved[key] = {name: value_on(self.device, value.numpy()) for name, value in found.items()}
            found = self.moved[key]
        yield lambda rows: found

    def joined(self, each: Sequence[Taken]) -> Taken:
        """What one run takes whose rows were each given their profile apart, some time ago.

        Args:
            each: what `taken` gave for each row, all of them alive; of one profile, where one is taken at a time.
        """
        return each[0]

    def check_offered(self, sessions: Iterable[Any]) -> None:
        """Whether graphs have all inputs that profiles bring, of which each takes its own.

        Args:
            sessions: of ONNX Runtime.

        Raises:
            PeltError: E605.
        """
        found = {value.name for session in sessions for value in session.get_overridable_initializers()}
        if lacking := set(self.record["inputs"] if self.record else ()) - found:
            raise fail("E605", f"no graph has the input {min(lacking)}, which profiles bring", self.place,
                       "the graphs as they were compiled", "another tool may have taken out inputs with defaults"
                       )  # fmt: skip

    def reserve(self, profiles: int) -> None:
        """Make room for so many profiles at once, where profiles lie in arrays."""

    def receive(self, name: Hashable, arrays: Mapping[str, Array]) -> None:
        """Keep a profile whose tensors were held against the form, and what its labels are called."""
        self.take(name, {key: array for key, array in arrays.items() if key != LABELS})
        if (labels := self.form.names(arrays)) is not None:
            self.labels[name] = labels

    def take(self, name: Hashable, arrays: Mapping[str, Array]) -> None:
        """Keep the tensors of a profile."""
        self.held[name] = {key: value_on(HOST, np.ascontiguousarray(array)) for key, array in arrays.items()}
        self.moved.pop(name, None)

    def take_all(self, names: Sequence[Hashable], arrays: Mapping[str, Array]) -> None:
        """Keep profiles whose tensors, stacked, were held against the form."""
        for i, name in enumerate(names):
            self.take(name, {key: array[i] for key, array in arrays.items()})

    def check_bare(self, each: Sequence[Shares]) -> None:
        """Whether the bare base may be asked for, where it is.

        Raises:
            PeltError: E627.
        """
        if self.record and (why := self.record["no_bare_base"]) and any(None in dict(shares) for shares in each):
            what = "no profile is named" if all(len(shares) == 1 for shares in each) else "a part of 1 is left"
            raise fail("E627", f"{what}, and this artifact has no bare base: {why}", self.place,
                       "profile=NAME, or weights that sum to 1", "session.add_profile(name, file)")  # fmt: skip

    def _known(self, name: Hashable) -> Any:
        if not isinstance(name, Hashable) or name not in self.held:
            raise fail("E626", f"there is no profile {name!r:.80}", self.place,
                       one_of(sorted(self.names)) if self.names else "a profile that was added",
                       "session.add_profile(name, file)")  # fmt: skip
        return self.held[name]


def is_one(chosen: object) -> bool:
    """Whether a choice of profiles is one for all texts."""
    return chosen is None or isinstance(chosen, (str, Mapping))


def names_of(each: Sequence[Shares]) -> list[Any]:
    """The names that are chosen, each once."""
    return list(dict.fromkeys(name for shares in each for name, _ in shares if name is not None))
