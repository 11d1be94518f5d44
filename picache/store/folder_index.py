"""What is in a folder of chunk files, so that a bound costs the same however many there are.

An index in SQLite, shared by every process that uses the folder, holds each file's bytes and last
use, and the bytes that writers have reserved for what they are writing. It is never trusted over
the files: a chunk is read by its name, whether the index knows it or not; a file's own time says
when it was last used; and each shard's time says whether it is as the index saw it last, or must
be listed again. A missing or damaged index is made anew in this way. Nothing waits for it to reach
the disk: a crash of the machine may cost the index, and no chunk.
"""

import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from picache.chunk import Header
from picache.errors import StoreFull
from picache.store.chunk_name import file_name, key_of
from picache.store.files import LocalFiles
from picache.store.in_use import InUse
from picache.store.remote_calls import TierResting
from picache.store.tiers import bound_of, seconds_of
from picache.store.writers import STALE_SECONDS, TEMPORARY, abandoned, reserved_bytes

NAME = "index.sqlite3"
WAIT_SECONDS = 5.0  # for other processes, each of which takes milliseconds
REST_SECONDS = 30.0  # before one that was stopped in a transaction is waited for again
_VERSION = 1
_TABLES = f"""
    CREATE TABLE files (
        key TEXT PRIMARY KEY, nbytes INTEGER, seconds REAL, priority REAL, used INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX by_use ON files (used, key);
    CREATE INDEX by_cost ON files (priority, used, key);
    CREATE TABLE shards (name TEXT PRIMARY KEY, changed INTEGER) WITHOUT ROWID;
    CREATE TABLE writing (temporary TEXT PRIMARY KEY, key TEXT, nbytes INTEGER, since REAL)
        WITHOUT ROWID;
    CREATE TABLE totals (chunks INTEGER, nbytes INTEGER, floor REAL);
    INSERT INTO totals VALUES (0, 0, 0.0);
    CREATE TRIGGER added AFTER INSERT ON files BEGIN
        UPDATE totals SET chunks = chunks + 1, nbytes = nbytes + new.nbytes; END;
    CREATE TRIGGER removed AFTER DELETE ON files BEGIN
        UPDATE totals SET chunks = chunks - 1, nbytes = nbytes - old.nbytes; END;
    CREATE TRIGGER changed AFTER UPDATE OF nbytes ON files BEGIN
        UPDATE totals SET nbytes = nbytes + new.nbytes - old.nbytes; END;
    PRAGMA user_version = {_VERSION};
"""
_PUT = """
    INSERT INTO files VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET
        nbytes = excluded.nbytes, seconds = excluded.seconds, priority = excluded.priority,
        used = excluded.used
"""  # unlike REPLACE, this fires the triggers
_DAMAGED = {
    sqlite3.SQLITE_ERROR,  # other tables than ours
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_IOERR_SHORT_READ,
}
_MOST_REFUSALS = 8  # files that cannot be deleted before the folder is taken for one that forbids

T = TypeVar("T")


class Totals(NamedTuple):
    """Chunks in a folder, and bytes of their files and of temporary ones."""

    chunks: int
    nbytes: int


class _Row(NamedTuple):
    key: str
    nbytes: int
    seconds: float
    priority: float
    used: int


class FolderIndex:
    """The bound of a local folder, for every process and thread that writes there through one.

    Args:
        files: of the folder.
        budget: most bytes of files and temporary files; `math.inf` for no bound.
        eviction: "lru" or "cost"; see `Tier`.
        in_use: says what must not be deleted.

    Raises:
        OSError, sqlite3.Error: by any method, when folder or index cannot be read or written; what
            the method was asked for is then left out.
    """

    def __init__(self, files: LocalFiles, budget: float, eviction: str, in_use: InUse) -> None:
        self.budget = bound_of("disk", budget, eviction)
        self._files, self._in_use, self._by_cost = files, in_use, eviction == "cost"
        self._path = files.root / NAME
        self._looked = False
        self._resting_until = 0.0
        self._turn = threading.Lock()  # threads need not wait in SQLite, which sleeps

    # What others ask

    def open(self) -> list[str]:
        """Delete what was left long ago, and what is over the bound; the keys deleted."""

        def work(db: sqlite3.Connection) -> list[str]:
            self._adopt(db, "")
            self._sweep(db, only_stale=True)
            return self._make_room(db, 0, "")

        return self._run(work)

    def totals(self) -> Totals:
        """Chunks and bytes there now, as far as the index knows."""

        def work(db: sqlite3.Connection) -> Totals:
            self._look_once(db)
            return self._totals(db)

        return self._run(work)

    def holds(self, key: str) -> bool:
        """Whether the file is there now."""
        return self._files.exists(file_name(key))

    def trim(self) -> list[str]:
        """Delete what is the cheapest to lose until the rest fits; the keys deleted."""
        if math.isinf(self.budget):
            return []
        return self._run(lambda db: self._make_room(db, 0, ""))

    def reserve(self, key: str, nbytes: int, temporary: str, gone: list[str]) -> None:
        """Take room for a file before it is written, deleting others if need be.

        Args:
            key: of the chunk.
            nbytes: of the file.
            temporary: the name it is written to.
            gone: takes up the keys deleted, whatever happens next.

        Raises:
            StoreFull: when there is no way to make room; nothing is deleted for it.
        """

        def work(db: sqlite3.Connection) -> list[str]:
            if not math.isinf(self.budget):
                self._look_once(db)
            left = self._make_room(db, nbytes, key)
            db.execute(
                "INSERT INTO writing VALUES (?, ?, ?, ?)", (temporary, key, nbytes, time.time())
            )
            return left

        gone += self._run(work)

    def publish(self, key: str, nbytes: int, header: Header, temporary: str) -> None:
        """Give a written file its name, and the reserved room to it."""
        name = file_name(key)

        def work(db: sqlite3.Connection) -> None:
            if (self._files.root / temporary).exists():  # not in a transaction begun again
                self._changing(db, name, lambda: self._files.publish(temporary, name))
            else:
                self._list(db, name.partition("/")[0])
            seconds = seconds_of(nbytes, header)
            used = (self._files.root / name).stat().st_mtime_ns
            row = _Row(key, nbytes, seconds, self._priority(db, seconds, nbytes), used)
            db.execute(_PUT, row)
            db.execute("DELETE FROM writing WHERE temporary = ?", (temporary,))

        self._run(work)

    def release(self, key: str, temporary: str) -> None:
        """Delete a file that was not written to its end, and give its room back."""
        self._run(lambda db: self._give_up(db, key, temporary))

    def missed(self, key: str) -> None:
        """A file was looked for in vain: if the index has it, its shard's time will tell."""

    def forget(self, key: str) -> None:
        """A file was deleted."""
        name = file_name(key)

        def work(db: sqlite3.Connection) -> None:
            if not (self._files.root / name).exists():
                db.execute("DELETE FROM files WHERE key = ?", (key,))

        self._run(work)

    def missing(self, keys: Iterable[str]) -> int:
        """How many of these the index does not know."""
        asked = list(keys)
        one = "SELECT count(*) FROM files WHERE key = ?"
        return self._run(lambda db: sum(not db.execute(one, (key,)).fetchone()[0] for key in asked))

    def clear(self) -> None:
        """Delete every file, and what ended writers left.

        Raises:
            OSError: when a file could not be deleted; where the folder forbids it, nothing is.
        """

        def work(db: sqlite3.Connection) -> None:
            shards = list(self._shards())
            self._files.probe([self._files.root, *(self._files.root / name for name in shards)])
            for shard in shards:
                self._list(db, shard)
            failed: OSError | None = None
            for row in self._cheapest_first(db):
                try:
                    self._delete(db, row)
                except OSError as error:  # the rest can go all the same
                    failed = error
            self._sweep(db)
            if failed is not None:
                raise failed

        self._run(work)

    # Transactions

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in one transaction that no other process or thread writes beside.

        A connection lasts one transaction: it is never carried into a forked process, and an index
        that was deleted or replaced meanwhile is noticed.
        """
        with self._turn:
            if time.monotonic() < self._resting_until:
                raise TierResting(
                    f"its index was locked for {WAIT_SECONDS:g} seconds, and is not asked for "
                    f"{REST_SECONDS:g}"
                )
            try:
                return self._once(work)
            except sqlite3.DatabaseError as error:
                code = getattr(error, "sqlite_errorcode", 0)
                if code == sqlite3.SQLITE_BUSY:
                    self._resting_until = time.monotonic() + REST_SECONDS
                if code not in _DAMAGED and code & 0xFF not in _DAMAGED:
                    raise
                Path(f"{self._path}-journal").unlink(missing_ok=True)  # or it is rolled back into
                self._path.unlink(missing_ok=True)  # the new one
                return self._once(work)

    def _once(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = sqlite3.connect(self._path, timeout=WAIT_SECONDS, isolation_level=None)
        with closing(connection) as db:
            db.execute("PRAGMA synchronous = OFF")
            db.execute("PRAGMA page_size = 1024")
            db.execute("BEGIN IMMEDIATE")
            try:
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version != _VERSION:  # none, as yet, or another's, which the statements refuse
                    for statement in _TABLES.split(";\n"):
                        db.execute(statement)
                    self._look(db)
                done = work(db)
            except sqlite3.Error:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise
            except BaseException:
                db.execute("COMMIT")  # what was done to files is written down beside it
                raise
            db.execute("COMMIT")
            return done

    # Inside a transaction

    def _totals(self, db: sqlite3.Connection) -> Totals:
        chunks, nbytes = db.execute("SELECT chunks, nbytes FROM totals").fetchone()
        (writing,) = db.execute("SELECT coalesce(sum(nbytes), 0) FROM writing").fetchone()
        return Totals(chunks, nbytes + writing)

    def _priority(self, db: sqlite3.Connection, seconds: float, nbytes: int) -> float:
        (floor,) = db.execute("SELECT floor FROM totals").fetchone()
        return floor + seconds / max(nbytes, 1)

    def _shards(self) -> dict[str, int]:
        """The shards there are, and the time of each one's last change."""
        with os.scandir(self._files.root) as entries:
            return {
                entry.name: entry.stat(follow_symlinks=False).st_mtime_ns
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            }

    def _changed(self, shard: str) -> int | None:
        """The time of a shard's last change, None where there is no such shard."""
        try:
            return os.stat(self._files.root / shard).st_mtime_ns
        except FileNotFoundError:
            return None

    def _look_once(self, db: sqlite3.Connection) -> None:
        """See what happened to the folder without the index before this store was opened."""
        if not self._looked:
            self._look(db)

    def _look(self, db: sqlite3.Connection) -> None:
        """List again the shards that changed behind the index's back, and the temporary files."""
        known = dict(db.execute("SELECT name, changed FROM shards WHERE changed IS NOT NULL"))
        there = self._shards()
        for shard in {shard for shard, _ in known.items() ^ there.items()}:
            self._list(db, shard)
        self._adopt(db, "")
        self._looked = True

    def _adopt(self, db: sqlite3.Connection, shard: str) -> None:
        """Count temporary files that the index does not know."""
        folder = self._files.root / shard
        for name in filter(TEMPORARY.match, os.listdir(folder)):
            with suppress(FileNotFoundError):  # written to its end meanwhile
                stat = os.lstat(folder / name)
                nbytes = max(stat.st_size, reserved_bytes(name))
                temporary = f"{shard}/{name}" if shard else name
                db.execute(
                    "INSERT OR IGNORE INTO writing VALUES (?, '', ?, ?)",
                    (temporary, nbytes, stat.st_mtime),
                )

    def _list(self, db: sqlite3.Connection, shard: str) -> None:
        """Make the index say of a shard what is there."""
        changed = self._changed(shard)  # before: what comes in meanwhile changes it again
        rows = db.execute(
            "SELECT key, nbytes FROM files WHERE key BETWEEN ? AND ?", (shard, f"{shard}\x7f")
        )
        known = {key: nbytes for key, nbytes in rows if file_name(key).startswith(f"{shard}/")}
        found: dict[str, os.stat_result] = {}
        if changed is not None:
            self._adopt(db, shard)
            with os.scandir(self._files.root / shard) as entries:
                for entry in entries:
                    key = key_of(f"{shard}/{entry.name}")
                    if key is not None and entry.is_file(follow_symlinks=False):
                        with suppress(FileNotFoundError):
                            found[key] = entry.stat(follow_symlinks=False)
        for key in known.keys() - found.keys():
            db.execute("DELETE FROM files WHERE key = ?", (key,))
        for key, stat in found.items():
            if known.get(key) != stat.st_size:
                seconds = seconds_of(stat.st_size, None)
                priority = self._priority(db, seconds, stat.st_size)
                row = _Row(key, stat.st_size, seconds, priority, stat.st_mtime_ns)
                db.execute(_PUT, row)
        db.execute("INSERT OR REPLACE INTO shards VALUES (?, ?)", (shard, changed))

    def _changing(self, db: sqlite3.Connection, name: str, change: Callable[[], None]) -> None:
        """Change a shard, after a look at it if somebody else did before."""
        shard = name.partition("/")[0]
        row = db.execute("SELECT changed FROM shards WHERE name = ?", (shard,)).fetchone()
        if self._changed(shard) != (None if row is None else row[0]):
            self._list(db, shard)
        change()
        db.execute("INSERT OR REPLACE INTO shards VALUES (?, ?)", (shard, self._changed(shard)))

    def _delete(self, db: sqlite3.Connection, row: _Row) -> None:
        name = file_name(row.key)
        self._changing(db, name, lambda: self._files.remove(name))
        db.execute("DELETE FROM files WHERE key = ?", (row.key,))

    def _give_up(self, db: sqlite3.Connection, key: str, temporary: str) -> None:
        """Delete a temporary file; one that has its name already is counted under that."""
        try:
            (self._files.root / temporary).unlink()
        except FileNotFoundError:
            if key:
                self._list(db, file_name(key).partition("/")[0])
        db.execute("DELETE FROM writing WHERE temporary = ?", (temporary,))

    def _sweep(self, db: sqlite3.Connection, only_stale: bool = False) -> None:
        """Delete what writers left that have ended: all of it, or what is long silent."""
        for temporary, key, since in db.execute(
            "SELECT temporary, key, since FROM writing"
        ).fetchall():
            with suppress(FileNotFoundError):
                since = (self._files.root / temporary).lstat().st_mtime
            silent = time.time() - since
            if abandoned(temporary, silent) and not (only_stale and silent <= STALE_SECONDS):
                self._give_up(db, key, temporary)

    def _cheapest_first(self, db: sqlite3.Connection) -> Iterator[_Row]:
        """Files from the cheapest to lose on; deleting or using one meanwhile is allowed."""
        order = "priority, used, key" if self._by_cost else "used, key"
        holes = "?, ?, ?" if self._by_cost else "?, ?"
        last: tuple[object, ...] = (-1.0, -(2**62), "") if self._by_cost else (-(2**62), "")
        while True:
            page = [
                _Row(*row)
                for row in db.execute(
                    f"SELECT * FROM files WHERE ({order}) > ({holes}) ORDER BY {order} LIMIT 64",
                    last,
                )
            ]
            yield from page
            if len(page) < 64:
                return
            end = page[-1]
            last = (end.priority, end.used, end.key) if self._by_cost else (end.used, end.key)

    def _make_room(self, db: sqlite3.Connection, nbytes: int, key: str) -> list[str]:
        """Delete files until `nbytes` more fit; the keys deleted. The old file of `key` goes first.

        With no bytes to come: until the rest fits, or nothing is left that may go.

        Raises:
            StoreFull: when bytes are to come and there is no way; nothing is deleted then.
            OSError: when the files that should go cannot be deleted.
        """
        if self._excess(db, nbytes) <= 0:
            return []
        self._sweep(db)
        if nbytes:
            one = "SELECT coalesce(sum(nbytes), 0) FROM files WHERE key = ?"
            staying = sum(db.execute(one, (k,)).fetchone()[0] for k in self._in_use.held())
            (writing,) = db.execute("SELECT coalesce(sum(nbytes), 0) FROM writing").fetchone()
            if staying + writing + nbytes > self.budget:
                raise StoreFull(
                    f"its {nbytes:,} bytes do not fit disk_bytes={self.budget:,}, of which "
                    f"{staying:,} are of chunks pinned or in use and {writing:,} of files being "
                    "written"
                )
        gone: list[str] = []
        refused: list[OSError] = []
        if key and self._excess(db, nbytes) > 0 and not self._in_use(key):
            row = db.execute("SELECT * FROM files WHERE key = ?", (key,)).fetchone()
            if row is not None:
                self._delete(db, _Row(*row))
        for look_at_uses in (True, False):  # again over those whose last use was learned of
            for row in self._cheapest_first(db):
                if self._excess(db, nbytes) <= 0 or len(refused) >= _MOST_REFUSALS:
                    break
                if self._in_use(row.key) or (look_at_uses and self._used_since(db, row)):
                    continue
                try:
                    self._delete(db, row)
                except OSError as error:  # another may be deleted all the same
                    refused.append(error)
                    continue
                db.execute("UPDATE totals SET floor = max(floor, ?)", (row.priority,))
                gone.append(row.key)
        if refused and self._excess(db, nbytes) > 0:
            raise refused[0]
        return gone

    def _excess(self, db: sqlite3.Connection, nbytes: int) -> float:
        return self._totals(db).nbytes + nbytes - self.budget

    def _used_since(self, db: sqlite3.Connection, row: _Row) -> bool:
        """Whether the file's own time says that it was used after the index last looked.

        The index learns of uses here, when it matters: a hit need not write to it.
        """
        try:
            used = (self._files.root / file_name(row.key)).lstat().st_mtime_ns
        except FileNotFoundError:
            return False
        if used <= row.used:
            return False
        priority = self._priority(db, row.seconds, row.nbytes)
        db.execute(
            "UPDATE files SET used = ?, priority = ? WHERE key = ?", (used, priority, row.key)
        )
        return True
