"""A file of SQLite that a process killed at any moment leaves whole.

SQLite does what is hard: a change is there wholly or not at all, many processes may read while one writes, and room
that was given up is used again. LMDB, the other embedded store of that rank, reads faster, through a memory map. It was
not taken since a changed byte in its tree ends the process that reads it, its file has a size that is chosen beforehand
(and taken at once on Windows) and never shrinks, and it is one more package to ship, where SQLite comes with Python on
every platform.

Three of SQLite's choices matter here. The journal is the one that is undone after a crash and deleted after a commit,
so that at rest there is one file, readable in folders that cannot be written to; a log that is written ahead would lose
its last commits without a word where one of its bytes is damaged. What is acknowledged is on the disk before. And the
file is read, not mapped, for a mapped file that somebody cuts short ends the process.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peltc.spec.diagnostics import PeltError, Place, fail

APPLICATION, VERSION = 0x50454C54, 1
"""What tells our files from other databases: "PELT" in the file's header, and the version of the tables."""
SETTINGS = ("trusted_schema = OFF", "cell_size_check = ON", "journal_mode = DELETE", "synchronous = EXTRA",
            "secure_delete = ON", "cache_spill = OFF")  # fmt: skip
"""Nothing in the file is run; damage is looked for; one file at rest, safe against losing power; what is deleted is
overwritten; readers wait for the end of a transaction alone, whose pages stay in memory till then."""
BUSY, READONLY, IOERR, CORRUPT, FULL, CANTOPEN, NOTADB = 5, 8, 10, 11, 13, 14, 26
"""SQLite's codes of what goes wrong."""


class Database:
    """A connection to a file, which threads take in turn.

    Args:
        path: the file.
        wait: seconds to wait for another process that writes.

    Attributes:
        writes: how many transactions were written through this connection.
    """

    def __init__(self, path: Path, wait: float):
        self.path, self.wait, self.place = path, wait, Place(str(path))
        self.writes = 0
        self._lock, self._process = threading.RLock(), os.getpid()
        self._db: sqlite3.Connection | None = None
        self._parents: sqlite3.Connection | None = None

    @contextmanager
    def open(self, name: str = "") -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time; what SQLite says of an error is said in our words.

        Args:
            name: the record that is looked for, for messages.

        Raises:
            PeltError: E602 the file cannot be read or written; E630 it is none of SQLite's, or damaged; E634 it is
                damaged where the record should be; E635 another process has kept it for long.
        """
        if self._process != os.getpid():  # a forked process, where the locks of the connection would not hold
            self._parents, self._lock, self._db, self._process = self._db, threading.RLock(), None, os.getpid()
        with self._lock:
            try:
                if self._db is None:
                    self._db = self._connected()
                yield self._db
            except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
                raise self._told(error, name) from None

    @contextmanager
    def writing(self, db: sqlite3.Connection) -> Iterator[None]:
        """A transaction: all that is done in it, or nothing. It is on the disk when this context ends."""
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
            self.writes += 1
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Let the file go; it is opened again when it is asked for."""
        with self._lock:
            if self._db is not None and self._process == os.getpid():
                self._db.close()
            self._db = None

    def make(self, db: sqlite3.Connection, tables: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Make tables and rows in a file that is empty; another is left as it is.

        Args:
            rows: statements and their values.
        """
        if not _statements(db):
            with self.writing(db):
                if not _statements(db):  # nobody was faster
                    db.execute(f"PRAGMA application_id = {APPLICATION}")
                    db.execute(f"PRAGMA user_version = {VERSION}")
                    for table in tables:
                        db.execute(table)
                    for statement, values in rows:
                        db.execute(statement, values)

    def check(self, db: sqlite3.Connection, tables: Sequence[str]) -> None:
        """Whether the tables are ours to the letter, so that nothing in the file acts of itself.

        Raises:
            PeltError: E630.
        """
        marks = tuple(db.execute(f"PRAGMA {key}").fetchone()[0] for key in ("application_id", "user_version"))
        if marks != (APPLICATION, VERSION) or _statements(db) != set(tables):
            raise fail(
                "E630", "the file is no store, or of another version", self.place, f"a store of version {VERSION}"
            )

    def damaged(self, what: str) -> PeltError:
        """The finding that the file's structure is not as SQLite wrote it."""
        return fail(
            "E630", f"the store is damaged: {what[:300]}", self.place, hint="`pelt profiles check STORE` says what"
        )

    def _connected(self) -> sqlite3.Connection:
        writable = os.access(self.path if self.path.exists() else self.path.parent, os.W_OK)
        uri = f"{self.path.resolve().as_uri()}?mode={'rwc' if writable else 'ro'}"
        db = sqlite3.connect(uri, uri=True, timeout=self.wait, isolation_level=None, check_same_thread=False)
        try:
            for setting in SETTINGS:
                if writable or not setting.startswith("journal_mode"):
                    db.execute(f"PRAGMA {setting}")
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _told(self, error: Exception, name: str) -> PeltError:
        """What went wrong in SQLite, in our words."""
        code = getattr(error, "sqlite_errorcode", CORRUPT) & 0xFF
        if isinstance(error, OSError) or code in (READONLY, IOERR, FULL, CANTOPEN):
            return fail("E602", f"cannot read or write the store: {error}", self.place)
        if code == BUSY:
            return fail("E635", f"another process has kept the store for {self.wait:g} s", self.place, hint="try again")
        if code == NOTADB:
            return fail("E630", "the file is no store", self.place)
        if code == CORRUPT and name:
            return fail("E634", f"the profile '{name}' is damaged: {error}", self.place, hint="put it again")
        return self.damaged(str(error))


def _statements(db: sqlite3.Connection) -> set[str]:
    """What made the tables that are there."""
    return {str(row[0]) for row in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
