"""Replies on disk, so that no paid call is made twice: one sqlite file, safe for many tasks and processes.

A row is a hash, an outcome, the reply's text and two token counts. Requests, addresses, headers and keys are not
stored. A row is there as soon as the reply is: a process may be killed at any moment and loses only what was still
on its way. (A power cut may lose the last moments too, since the file is not flushed to the disk at every row.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_lens.autointerp.replies import Outcome
from moe_lens.errors import BadOutput, WriteFailed

VERSION = 1
_BUSY_SECONDS = 30
_TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, outcome TEXT NOT NULL, text TEXT NOT NULL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL
) WITHOUT ROWID"""


class Stored(NamedTuple):
    """One reply as the server gave it: its text and what it cost. Invalid and refused ones are kept as well."""

    outcome: Outcome
    text: str
    tokens_in: int
    tokens_out: int


def request_key(**request: Any) -> str:
    """sha256 of a request, written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """Replies by request key in the sqlite file `path`, which is opened at the first use.

    Raises (every method):
        BadOutput: the file is something else, or was written by another version of moe-lens.
        WriteFailed: the disk is full, or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def get(self, key: str) -> Stored | None:
        """The reply of a request, None if there is none yet. Creates no file."""
        if self._connection is None and not self.path.exists():
            return None
        with self._open() as connection:
            query = "SELECT outcome, text, tokens_in, tokens_out FROM replies WHERE key = ?"
            row = connection.execute(query, (key,)).fetchone()
        return Stored(Outcome(row[0]), *row[1:]) if row else None

    def put(self, key: str, reply: Stored) -> None:
        """Keep a reply. The first one of a key stays, whichever process wrote it."""
        self.put_all({key: reply})

    def put_all(self, replies: Mapping[str, Stored]) -> None:
        """Keep several replies, all of them or, if the process is killed, none."""
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            rows = [(key, *reply) for key, reply in replies.items()]
            connection.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", rows)
            connection.execute("COMMIT")

    def __len__(self) -> int:
        if self._connection is None and not self.path.exists():
            return 0
        with self._open() as connection:
            return connection.execute("SELECT count(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection = self._connection or self._connect()
                yield self._connection
            except (sqlite3.Error, OSError) as error:
                raise _failure(self.path, error) from error

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # autocommit; any thread may use it, since notebooks run requests in a thread of their own
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise BadOutput(
                f"{self.path} was written by another version of moe-lens (format {version}, here {VERSION}): "
                "give another output folder (-o), or delete the file and pay for its replies again"
            )
        connection.execute("PRAGMA journal_mode = WAL")  # network file systems answer with another mode, which will do
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(_TABLE)
        if version != VERSION:
            connection.execute(f"PRAGMA user_version = {VERSION}")


def _failure(path: Path, error: Exception) -> BadOutput | WriteFailed:
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        return BadOutput(f"{path} is not a cache of replies: give another output folder (-o), or move the file away")
    fix = "free some space or make the folder writable and run again; replies stored so far are kept"
    return WriteFailed(f"could not use {path}: {error}; {fix}")
