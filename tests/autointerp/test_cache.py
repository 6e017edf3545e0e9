"""The cache keeps every reply once, for every task and process, and nothing but replies."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_lens.autointerp.cache import ReplyCache, Stored, request_key
from moe_lens.autointerp.replies import Outcome
from moe_lens.errors import BadOutput, WriteFailed

REPLY = Stored(Outcome.INVALID, "text\n\N{SNOWMAN}", 12, 3)


@pytest.fixture
def cache(tmp_path: Path) -> ReplyCache:
    return ReplyCache(tmp_path / "new folder" / "replies.sqlite")


def test_what_was_put_is_got_by_another_connection(cache: ReplyCache) -> None:
    cache.put("key", REPLY)
    other = ReplyCache(cache.path)
    assert (other.get("key"), other.get("another"), len(other)) == (REPLY, None, 1)


def test_the_first_reply_of_a_request_stays(cache: ReplyCache) -> None:
    cache.put("key", REPLY)
    cache.put("key", REPLY._replace(text="later"))
    assert cache.get("key") == REPLY


def test_looking_creates_no_file(cache: ReplyCache) -> None:
    assert (cache.get("key"), len(cache)) == (None, 0)
    assert not cache.path.parent.exists()


def test_a_closed_cache_opens_again(cache: ReplyCache) -> None:
    cache.put("key", REPLY)
    cache.close()
    assert cache.get("key") == REPLY


def test_readers_do_not_wait_for_writers(cache: ReplyCache) -> None:
    cache.put("key", REPLY)
    assert sqlite3.connect(cache.path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_threads_share_one_cache(cache: ReplyCache) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: cache.put(str(n % 50), REPLY), range(400)))
    assert len(cache) == 50


def test_processes_share_one_file(cache: ReplyCache) -> None:
    """They all open the new file at the same moment, half of their keys are common."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from moe_lens.autointerp.cache import ReplyCache, Stored; from moe_lens.autointerp.replies import Outcome\n"
        "print(flush=True); sys.stdin.readline(); cache = ReplyCache(Path(sys.argv[1]))\n"
        "for n in range(100):\n"
        "    cache.put(f'{sys.argv[2] if n % 2 else 0}:{n}', Stored(Outcome.OK, 'text', n, n))\n"
    )
    many = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(cache.path), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (1, 2, 3)
    ]  # fmt: skip
    for process in many:
        assert process.stdout
        process.stdout.readline()
    assert [process.communicate("go\n")[1] for process in many] == [""] * 3
    assert len(cache) == 50 + 3 * 50


@pytest.mark.parametrize("changed", ["model", "messages", "parameters", "schema", "attempt"])
def test_requests_that_differ_anywhere_have_different_keys(changed: str) -> None:
    request = {"model": "m", "messages": [{"role": "user"}], "parameters": {"a": 1, "b": 2}, "schema": {}, "attempt": 0}
    assert request_key(**request) != request_key(**request | {changed: "other"})
    assert request_key(**request) == request_key(**request | {"parameters": {"b": 2, "a": 1}})


def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.sqlite"
    file.write_text("these are my notes, not a database\n" * 40)
    with pytest.raises(BadOutput, match="not a cache of replies"):
        ReplyCache(file).get("key")
    assert file.read_text().startswith("these are my notes")


def test_a_cache_of_another_version_is_refused(cache: ReplyCache) -> None:
    cache.put("key", REPLY)
    cache.close()
    with sqlite3.connect(cache.path) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(BadOutput, match="another version"):
        cache.get("key")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed, match=r"replies\.sqlite"):
        ReplyCache(tmp_path / "file" / "replies.sqlite").put("key", REPLY)


def test_a_full_disk_is_one_sentence_and_loses_nothing(cache: ReplyCache) -> None:
    cache.put("key", REPLY)
    assert cache._connection
    pages = cache._connection.execute("PRAGMA page_count").fetchone()[0]
    cache._connection.execute(f"PRAGMA max_page_count = {pages}")  # what sqlite says of a full disk
    with pytest.raises(WriteFailed, match="full"):
        cache.put("large", REPLY._replace(text="x" * 100_000))
    assert cache.get("key") == REPLY
