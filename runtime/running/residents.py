"""The profiles of a store that are in a session's memory: brought in when a run asks for them, and the least recently
used one goes when there is no more room."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peltc.runtime.running.profiles import Chosen, Profiles, Taken, is_one, names_of
from peltc.runtime.running.store import ProfileStore
from peltc.spec.diagnostics import fail, wrong_type

Array = np.ndarray[Any, Any]
Key = tuple[str, bytes]
"""A profile's name and digest: one that was put again is another."""


@dataclass
class Entry:
    """A profile in memory.

    Attributes:
        runs: how many runs read it; it stays as long as there are any.
        state: the store's when the profile was last known to be the one that lies in it.
    """

    runs: int
    state: tuple[int, int]


class Residents:
    """What a session has in memory of a store.

    A run has all of its profiles or does not begin: they are read and held against their checksums first, and room is
    taken for all of them at once, so that runs which wait for each other's room cannot wait for ever. A profile that
    was put again or deleted, by whatever process, is the new one, or none, for all runs that begin afterwards.

    Args:
        profiles: the session's, which may have others beside, that were added to it; these come first and stay.
        store: where the profiles lie.
        most: how many of them are in memory at most.

    Raises:
        PeltError: E216 no number of profiles; E624 an artifact without profiles; E631 a store of another artifact.
    """

    def __init__(self, profiles: Profiles, store: ProfileStore, most: int):
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise wrong_type("how many profiles are resident", most, "a whole number of at least 1")
        _ = profiles.form.inputs
        assert profiles.record is not None
        own, other = profiles.form, store.form
        if (store.fingerprint, other.inputs, other.masks) != (profiles.record["fingerprint"], own.inputs, own.masks):
            raise fail("E631", "the store belongs to another artifact", store.place, f"profiles of {profiles.place}")
        self.profiles, self.store, self.most = profiles, store, most
        self.entries: dict[Key, Entry] = {}
        """The least recently used ones first."""
        self.digests: dict[str, bytes] = {}
        """Which of its versions a name stood for last, of those in memory."""
        self.changed = threading.Condition()
        self.counts = {"hits": 0, "misses": 0, "evictions": 0}
        if store.artifact is None:  # which links adapters
            store.artifact = profiles.place.path
        profiles.reserve(most)

    def stats(self) -> dict[str, int]:
        """How many profiles are in memory (`resident`), how many runs asked for found (`hits`) or had to bring in
        (`misses`), and how many went for lack of room or were outdated (`evictions`)."""
        with self.changed:
            return {"resident": len(self.entries), **self.counts}

    def check(self, chosen: Chosen, texts: int | None) -> None:
        """Whether there are the profiles that are chosen, in memory or in the store; raises as `taken`, but E634."""
        each = self.profiles.each(chosen, texts)
        self.profiles.check_bare(each)
        for name in names_of(each):
            if name not in self.profiles.held:
                self.store.records.digest(name)

    def labels(self, name: str) -> list[str] | None:
        """What the labels of a profile are called; None where all have the artifact's.

        Raises:
            PeltError: E626 there is no such profile; E634 it is damaged.
        """
        return self.profiles.form.names(self.store.read(name)[1])

    @contextmanager
    def taken(self, chosen: Chosen, texts: int | None) -> Iterator[Taken]:
        """What runs take of profiles; see `Profiles.taken`.

        Raises:
            PeltError: as there; E626 there is no such profile in the store either; E634 it is damaged; E636 more
                profiles than may be in memory.
        """
        each = self.profiles.each(chosen, texts)
        names = [name for name in names_of(each) if name not in self.profiles.held]
        with self._present(names) as keys:
            found = [tuple((keys.get(name, name), weight) for name, weight in shares) for shares in each]  # type: ignore[call-overload]
            with self.profiles.lent(found, is_one(chosen)) as taken:
                yield taken

    @contextmanager
    def _present(self, names: Sequence[str]) -> Iterator[dict[str, Key]]:
        """Keep profiles in memory, all of them, as long as this context lasts."""
        if len(names) > self.most:
            raise fail("E636", f"a run asks for {len(names)} profiles at once", self.store.place,
                       f"at most {self.most}, which may be in memory", "Session(..., resident=N)")  # fmt: skip
        read: dict[Key, dict[str, Array]] = {}
        while True:
            with self.changed:
                keys = self._current(names)
                missing = [key for key in keys.values() if key not in self.entries]
                unread = [key for key in missing if key not in read]
                if not unread and self._make_room(missing, keys):
                    for key in missing:
                        self._bring(key, read[key])
                    for key in keys.values():
                        self.entries[key].runs += 1
                        self.entries[key] = self.entries.pop(key)  # to the end: the most recently used
                    self.counts["hits"] += len(keys) - len(missing)
                    break
                if not unread:
                    self.changed.wait()
                    continue
            for name, _ in unread:
                digest, arrays = self.store.read(name)
                read[name, digest] = arrays
        try:
            yield keys
        finally:
            with self.changed:
                for key in keys.values():
                    self.entries[key].runs -= 1
                self.changed.notify_all()

    def _current(self, names: Sequence[str]) -> dict[str, Key]:
        """The names with the digests that they have now; the store is asked where something was written since."""
        state = self.store.records.state()
        keys = {}
        for name in names:
            key = (name, self.digests.get(name, b""))
            entry = self.entries.get(key)
            if entry is None or entry.state != state:
                key = (name, self.store.records.digest(name))
                if key in self.entries:
                    self.entries[key].state = state
            keys[name] = key
        return keys

    def _make_room(self, missing: Sequence[Key], keys: dict[str, Key]) -> bool:
        """Let go of as many profiles as others need room; of none where runs have too many of them."""
        over = len(self.entries) + len(missing) - self.most
        idle = [key for key, entry in self.entries.items() if not entry.runs and key not in keys.values()]
        outdated = [key for key in idle if key[0] in keys]  # versions that these names no longer stand for
        going = list(dict.fromkeys([*outdated, *idle]))
        if over > len(going):
            return False
        for key in going[: max(over, len(outdated))]:
            self.profiles.remove(key)
            del self.entries[key]
            if self.digests.get(key[0]) == key[1]:
                del self.digests[key[0]]
            self.counts["evictions"] += 1
        return True

    def _bring(self, key: Key, arrays: dict[str, Array]) -> None:
        self.profiles.receive(key, arrays)
        self.entries[key] = Entry(0, (-1, -1))  # so that the store is asked once more
        self.digests[key[0]] = key[1]
        self.counts["misses"] += 1


def residents_of(profiles: Profiles, store: ProfileStore | str | Path, most: int, folder: Path) -> Residents:
    """What a session has in memory of a store, which may be given by its path.

    Args:
        folder: of the session's artifact.

    Raises:
        PeltError: as `Residents`; E630 the file is no store; E631 there is none.
    """
    held = store if isinstance(store, ProfileStore) else ProfileStore(store, folder, create=False)
    return Residents(profiles, held, most)
