"""Records: bytes by name, checksummed, within what each tenant may have, in one file.

SQLite has no checksums of its own. Each record has one, over its name, its content, and what the store belongs to.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from peltc.runtime.running.database import Database
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail, wrong_type

NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})/([A-Za-z0-9][A-Za-z0-9._-]{0,63})")
NAMES = "`tenant/name`, each of 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first"
TABLES = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE tenant (tenant TEXT PRIMARY KEY, records INTEGER NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE record (number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, size INTEGER NOT NULL,"
    " digest BLOB NOT NULL, content BLOB NOT NULL, UNIQUE (tenant, name))",
)
PAGE = 1000
"""How many names are listed at a time; others may write between two such parts."""


@dataclass(frozen=True)
class StoreLimits:
    """What a store takes, so that no tenant's uploads fill the disk of the others.

    Attributes:
        size: bytes of one record, at most 10^9.
        records: of one tenant, a number.
        total: bytes of all records of one tenant.
    """

    size: int = 256 << 20
    records: int = 10_000
    total: int = 16 << 30


@dataclass(frozen=True)
class Record:
    """What a listing says of a record.

    Attributes:
        name: `tenant/name`.
        size: of its content, in bytes.
    """

    name: str
    size: int


def parts(name: object) -> tuple[str, str]:
    """The tenant and the name within it.

    Raises:
        PeltError: E632 a name of another form.
    """
    found = NAME.fullmatch(name) if isinstance(name, str) else None
    if not found:
        raise fail("E632", f"{name!r:.100} is no name in a store", expected=NAMES)
    return found[1], found[2]


class Records:
    """The records in a file, which several threads and processes may use at once.

    Args:
        path: the file; it is made where there is none and `about` says what it belongs to.
        about: what a store belongs to, by key; None for what the file says. Part of each record's checksum.
        limits: for what is put.
        wait: seconds to wait for another process that writes.
        create: whether a file that is not there is made.

    Raises:
        PeltError: E602 the file cannot be written; E630 it is none of ours, or damaged; E631 it belongs to something
            else, or there is none.
    """

    def __init__(
        self,
        path: str | Path,
        about: Mapping[str, str] | None,
        limits: StoreLimits | None = None,
        wait: float = 30.0,
        create: bool = True,
    ):
        self.path, self.limits, self.place = Path(path), limits or StoreLimits(), Place(str(path))
        self._database = Database(self.path, wait)
        try:
            there = self.path.stat()
        except (OSError, ValueError):
            there = None
        if there is None and (about is None or not create):
            raise fail("E631", "there is no store", self.place)
        if there is not None and not stat.S_ISREG(there.st_mode):
            raise fail("E630", "a store is a file", self.place)
        with self._open() as db:
            if about is not None:
                self._database.make(db, TABLES, [("INSERT INTO about VALUES (?, ?)", pair) for pair in about.items()])
            self._database.check(db, TABLES)
            self.about = {str(key): str(value) for key, value in db.execute("SELECT key, value FROM about")}
        if about is not None and self.about != dict(about):
            raise fail("E631", "the store belongs to another artifact", self.place)
        self._belongs = "\n".join(f"{key}={value}" for key, value in sorted(self.about.items())).encode()

    def close(self) -> None:
        """Let the file go; what is called afterwards opens it again."""
        self._database.close()

    # writing

    def put(self, items: Iterable[tuple[str, bytes]]) -> None:
        """Write records, all of them or none, in place of those of the same names. They are on the disk on return.

        Args:
            items: names and contents; what is written at once is in memory once.

        Raises:
            PeltError: E602 no room or no permission; E632 a name of another form; E633 more than the limits allow;
                E635 another process writes all the time.
        """
        with self._open() as db, self._writing(db):
            for name, content in items:
                tenant, own = parts(name)
                if not isinstance(content, bytes):
                    raise wrong_type("a record", content, "bytes")
                self.check_size(name, len(content))
                self._drop(db, tenant, own)
                values = (tenant, own, len(content), self._digest(name, content), content)
                db.execute("INSERT INTO record (tenant, name, size, digest, content) VALUES (?, ?, ?, ?, ?)", values)
                self._count(db, name, tenant, 1, len(content))

    def delete(self, *names: str) -> None:
        """Delete records, all of them or none; their bytes are overwritten.

        Raises:
            PeltError: E626 there is none of a name; E602, E635 as `put`.
        """
        split = [parts(name) for name in names]
        with self._open() as db, self._writing(db):
            for name, (tenant, own) in zip(names, split, strict=True):
                if not self._drop(db, tenant, own):
                    raise self.absent(name)

    def compact(self) -> tuple[int, int]:
        """Write the file anew without the room that was given up; needs as much room again while it lasts.

        Returns:
            Bytes of the file before and after.
        """
        with self._open() as db:
            before = self.path.stat().st_size
            db.execute("VACUUM")
            self._database.writes += 1
            return before, self.path.stat().st_size

    # reading

    def get(self, name: str) -> bytes:
        """A record's content, as it was put.

        Raises:
            PeltError: E626 there is none of that name; E634 it is damaged; E635 another process writes all the time.
        """
        return self.read(name)[1]

    def read(self, name: str) -> tuple[bytes, bytes]:
        """A record's digest and content; raises as `get`."""
        tenant, own = parts(name)
        with self._open(name) as db:
            found = db.execute("SELECT digest, content FROM record WHERE tenant = ? AND name = ?", (tenant, own))
            row = found.fetchone()
        if row is None:
            raise self.absent(name)
        digest, content = row
        if not isinstance(content, bytes) or digest != self._digest(name, content):
            raise fail(
                "E634", f"the profile '{name}' is damaged: its checksum is another", self.place, hint="put it again"
            )
        return digest, content

    def digest(self, name: str) -> bytes:
        """A record's digest alone, by which a changed one is known. It is not held against the content.

        Raises:
            PeltError: E626, E635 as `get`.
        """
        with self._open(name) as db:
            found = db.execute("SELECT digest FROM record WHERE tenant = ? AND name = ?", parts(name)).fetchone()
        if found is None:
            raise self.absent(name)
        return bytes(found[0])

    def state(self) -> tuple[int, int]:
        """A value that is another one whenever something was written, by whatever process."""
        with self._open() as db:
            return db.execute("PRAGMA data_version").fetchone()[0], self._database.writes

    def list(self, tenant: str | None = None) -> Iterator[Record]:
        """All records by name, or those of one tenant. What is written meanwhile may be there or not."""
        if tenant is not None:
            parts(f"{tenant}/x")
        last, until = (tenant or "", ""), "" if tenant is None else "AND tenant = ?"
        query = (
            f"SELECT tenant, name, size FROM record WHERE (tenant, name) > (?, ?) {until} ORDER BY 1, 2 LIMIT {PAGE}"
        )
        while True:
            with self._open() as db:
                rows = db.execute(query, last if tenant is None else (*last, tenant)).fetchall()
            yield from (Record(f"{t}/{n}", size) for t, n, size in rows)
            if len(rows) < PAGE:
                return
            last = rows[-1][:2]

    def stats(self, tenant: str | None = None) -> dict[str, int]:
        """Numbers of the whole store, or of one tenant.

        Returns:
            `profiles` and their `bytes`; of the whole store also `tenants`, the `file`'s bytes, and how many of them
            `compact` would give back (`free`).
        """
        with self._open() as db:
            if tenant is not None:
                parts(f"{tenant}/x")
                row = db.execute("SELECT records, bytes FROM tenant WHERE tenant = ?", (tenant,)).fetchone()
                return dict(zip(("profiles", "bytes"), row or (0, 0), strict=True))
            row = db.execute("SELECT total(records), total(bytes), total(records > 0) FROM tenant").fetchone()
            pages, free, size = (db.execute(f"PRAGMA {what}").fetchone()[0]
                                 for what in ("page_count", "freelist_count", "page_size"))  # fmt: skip
        keys = ("profiles", "bytes", "tenants", "file", "free")
        return {key: int(value) for key, value in zip(keys, (*row, pages * size, free * size), strict=True)}

    def check(self) -> list[Diagnostic]:
        """Read everything and hold it against its checksums; what is found, empty where all is well."""
        findings: list[Diagnostic] = []
        try:
            with self._open() as db:
                rows = [str(row[0]) for row in db.execute("PRAGMA integrity_check(20)")]
                counted = db.execute("SELECT tenant, count(*), sum(size) FROM record GROUP BY tenant ORDER BY tenant")
                held = db.execute("SELECT tenant, records, bytes FROM tenant WHERE records > 0 ORDER BY tenant")
                if counted.fetchall() != held.fetchall():
                    rows.append("the numbers of some tenant are not those of its profiles")
            findings += [self._database.damaged(row).diagnostics[0] for row in rows if row != "ok"]
            for record in self.list():
                try:
                    self.get(record.name)
                except PeltError as error:
                    findings += error.diagnostics
        except PeltError as error:
            findings += error.diagnostics
        return list(dict.fromkeys(findings))

    def absent(self, name: str) -> PeltError:
        """The finding for a name that is not there."""
        return fail(
            "E626", f"there is no profile {name!r:.140}", self.place, hint="`pelt profiles list STORE` lists them"
        )

    def _drop(self, db: sqlite3.Connection, tenant: str, own: str) -> bool:
        found = db.execute("SELECT number, size FROM record WHERE tenant = ? AND name = ?", (tenant, own)).fetchone()
        if found is None:
            return False
        db.execute("DELETE FROM record WHERE number = ?", found[:1])
        self._count(db, f"{tenant}/{own}", tenant, -1, -found[1])
        return True

    def _count(self, db: sqlite3.Connection, name: str, tenant: str, records: int, size: int) -> None:
        """Add to what a tenant has, unless that were too much."""
        db.execute("INSERT INTO tenant VALUES (?, ?, ?) ON CONFLICT (tenant) DO UPDATE SET records = records +"
                   " excluded.records, bytes = bytes + excluded.bytes", (tenant, records, size))  # fmt: skip
        if records < 0:
            return
        number, total = db.execute("SELECT records, bytes FROM tenant WHERE tenant = ?", (tenant,)).fetchone()
        for found, most, what in ((number, self.limits.records, "profiles"), (total, self.limits.total, "bytes")):
            if found > most:
                raise fail("E633", f"with '{name}', '{tenant}' would have {found:,} {what}", self.place,
                           f"at most {most:,}")  # fmt: skip

    def check_size(self, name: str, size: int) -> None:
        if size > (most := min(self.limits.size, 10**9)):
            raise fail("E633", f"the profile '{name}' has {size:,} bytes", self.place, f"at most {most:,}")

    def _digest(self, name: str, content: bytes) -> bytes:
        digest = hashlib.sha256()
        for part in (self._belongs, name.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
        digest.update(content)
        return digest.digest()

    def _open(self, name: str = "") -> AbstractContextManager[sqlite3.Connection]:
        return self._database.open(name)

    def _writing(self, db: sqlite3.Connection) -> AbstractContextManager[None]:
        return self._database.writing(db)
