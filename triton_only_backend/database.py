"""The user's database of measured kernel configurations: SQLite, shared by several processes.

One row a measured candidate, written as soon as it is measured, so that a search can be stopped at
any time and goes on where it stopped. The best of a problem is the least time among its rows. A row
holds for one GPU, one version of Triton and one state of the kernels' sources.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from triton_only_backend.errors import TritonOnlyError

if TYPE_CHECKING:
    from collections.abc import Iterator

# In the file's header ("TOnl"): tells this database from any other that SQLite may have written.
APPLICATION_ID = 0x544F6E6C
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE trials (
    gpu TEXT NOT NULL, arch TEXT NOT NULL, triton TEXT NOT NULL, source TEXT NOT NULL,
    kind TEXT NOT NULL, problem TEXT NOT NULL, config TEXT NOT NULL,
    outcome TEXT NOT NULL, us REAL,
    PRIMARY KEY (gpu, arch, triton, source, kind, problem, config)
) WITHOUT ROWID
"""
# What `outcome` says of a candidate that may win; else it names what went wrong.
MEASURED = "measured"
# Seconds for which a process waits for another that writes.
PATIENCE = 30.0


class DatabaseError(TritonOnlyError, ValueError):
    """A tuning database that cannot be read or written. It is left as it is."""


@dataclass(frozen=True)
class Place:
    """Where a measurement holds.

    Attributes:
        gpu: the vendor's name, e.g. "NVIDIA H200".
        arch: "sm90", "gfx942", …
        triton: Triton's version.
        source: hash of the sources of the kernels of this kind.
    """

    gpu: str
    arch: str
    triton: str
    source: str


@dataclass(frozen=True)
class Trial:
    """One candidate of one problem, both as JSON text.

    Attributes:
        outcome: `MEASURED`, or why the candidate cannot win.
        us: microseconds, for a measured one.
    """

    kind: str
    problem: str
    config: str
    outcome: str
    us: float | None = None


def default_path() -> Path:
    """`tuning.db` in the user's cache directory."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "triton_only_backend" / "tuning.db"


class Database:
    """An open database. Made by `reading` or `writing`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    def trials(self) -> Iterator[tuple[Place, Trial]]:
        """Every row, in the order of the key."""
        names = ", ".join(f.name for f in (*fields(Place), *fields(Trial)))
        with _errors(self.path):
            rows = self._connection.execute(f"SELECT {names} FROM trials").fetchall()
        split = len(fields(Place))
        return ((Place(*row[:split]), Trial(*row[split:])) for row in rows)

    def trials_of(self, place: Place, kind: str, problem: str) -> list[Trial]:
        """The rows of one problem."""
        names = ", ".join(f.name for f in fields(Trial))
        query = (
            f"SELECT {names} FROM trials "
            "WHERE (gpu, arch, triton, source, kind, problem) = (?, ?, ?, ?, ?, ?)"
        )
        with _errors(self.path):
            rows = self._connection.execute(query, (*astuple(place), kind, problem)).fetchall()
        return [Trial(*row) for row in rows]

    def add(self, place: Place, trial: Trial) -> None:
        """Writes a row, in place of an older one of the same candidate."""
        values = (*astuple(place), *astuple(trial))
        names = ", ".join(f.name for f in (*fields(Place), *fields(Trial)))
        marks = ", ".join("?" * len(values))
        with _errors(self.path), self._connection:
            self._connection.execute(
                f"INSERT OR REPLACE INTO trials ({names}) VALUES ({marks})", values
            )

    def remove(self, place: Place, trial: Trial) -> None:
        """Deletes the row of a candidate."""
        key = (*astuple(place), trial.kind, trial.problem, trial.config)
        with _errors(self.path), self._connection:
            self._connection.execute(
                "DELETE FROM trials WHERE (gpu, arch, triton, source, kind, problem, config) "
                "= (?, ?, ?, ?, ?, ?, ?)",
                key,
            )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Database]:
    """Opens a database that is there, and changes nothing.

    Raises:
        DatabaseError: it cannot be read, or is not one of this package and version.
    """
    with _errors(path), contextlib.closing(_connect(f"{path.resolve().as_uri()}?mode=ro")) as found:
        _check(path, found)
        yield Database(path, found)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Database]:
    """Opens a database to add to, and makes it if there is none.

    Raises:
        DatabaseError: it cannot be written, or is not one of this package and version.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(_message(path, str(error))) from error
    with _errors(path), contextlib.closing(_connect(path.resolve().as_uri())) as connection:
        # One transaction: of two processes that come first, one makes the table.
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,) and (
                _pragmas(connection) == (0, 0)
            ):
                connection.execute(SCHEMA)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        _check(path, connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        yield Database(path, connection)


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=PATIENCE)


def _pragmas(connection: sqlite3.Connection) -> tuple[int, int]:
    names = ("application_id", "user_version")
    application, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    return application, version


def _check(path: Path, connection: sqlite3.Connection) -> None:
    application, version = _pragmas(connection)
    if application != APPLICATION_ID:
        raise DatabaseError(_message(path, "it was not written by triton_only"))
    if version != SCHEMA_VERSION:
        raise DatabaseError(
            _message(path, f"it has format {version}, this version reads {SCHEMA_VERSION}")
        )


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise DatabaseError(_message(path, str(error))) from error


def _message(path: Path, cause: str) -> str:
    return (
        f"triton_only: the tuning database {path} cannot be used: {cause}; it is left as it is; "
        "name another (TRITON_ONLY_DATABASE, option 'database', --database) or remove it"
    )
