"""An OpenAI-compatible server on loopback that says, and does, whatever a test wants.

    with LLMServer(lambda asked: Answer('{"label": null, ...}')) as server:
        Client("any", server.url, cache=None)

The function sees every request (``Asked``) and returns an ``Answer``; ``server.asked`` keeps them all.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "sk-secret-0123456789abcdef"


@dataclass(frozen=True)
class Asked:
    """One HTTP request. `number` counts from 0 in the order of arrival."""

    number: int
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def last(self) -> str:
        """Text of the last message."""
        return self.body["messages"][-1]["content"]

    @property
    def texts(self) -> list[str]:
        """What is to be embedded."""
        return self.body["input"]

    @property
    def structured(self) -> bool:
        return "response_format" in self.body


@dataclass(frozen=True)
class Answer:
    """A completion, or with `raw` any body at all. `cut`: the connection closes after that many bytes of the body."""

    content: str | None = ""
    status: int = 200
    refusal: str | None = None
    finish_reason: str = "stop"
    tokens: tuple[int, int] = (100, 10)
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    raw: str | None = None

    @classmethod
    def error(cls, status: int, message: str = "no", headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        """An error as OpenAI words it; clients that may repeat the call do so after 10 ms."""
        body = {"error": {"message": message, "type": "error", "param": None, "code": None} | fields}
        return cls(status=status, raw=json.dumps(body), headers=headers or {"retry-after-ms": "10"})

    @property
    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw.encode()
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        completion = {
            "id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "loopback",
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}],
            "usage": {
                "prompt_tokens": self.tokens[0], "completion_tokens": self.tokens[1],
                "total_tokens": sum(self.tokens),
            },
        }  # fmt: skip
        return json.dumps(completion).encode()


Behave = Callable[[Asked], Answer]


class LLMServer:
    """Serves while entered. ``most_at_once`` is the largest number of requests that were being answered together."""

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.asked: list[Asked] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Answer:
        with self._lock:
            asked = Asked(len(self.asked), path, headers, body)
            self.asked.append(asked)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            answer = self.behave(asked)
            time.sleep(answer.delay)
            return answer
        finally:
            with self._lock:
                self._now -= 1


class _Server(ThreadingHTTPServer):
    owner: LLMServer
    request_queue_size = 128  # the default of 5 drops connections of clients that open sixteen together
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets: the second would wait 40 ms for a receipt

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        answer = self.server.owner.answer(self.path, dict(self.headers), json.loads(self.rfile.read(length) or b"{}"))
        body = answer.body
        try:
            self.send_response(answer.status)
            for name, value in ({"content-type": "application/json"} | dict(answer.headers)).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if answer.cut is None else body[: answer.cut])
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
            self.close_connection = True
        if answer.cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def vectors(found: Sequence[Sequence[float]], tokens: int = 0) -> Answer:
    """A reply of embeddings, in the reverse of their order: only the index counts."""
    data = [{"object": "embedding", "index": i, "embedding": list(one)} for i, one in enumerate(found)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Answer(raw=json.dumps({"object": "list", "model": "loopback", "data": data[::-1], "usage": usage}))


def facets(*labels: str) -> str:
    """A labeller's reply in facets mode."""
    return json.dumps({"facets": [{"label": label, "evidence": ["R1"], "confidence": 2} for label in labels]})


def answers(scores: Mapping[int, int | None]) -> str:
    """A judge's reply."""
    return json.dumps({"answers": [{"id": number, "score": score} for number, score in scores.items()]})


def explanation(label: str | None = "closing brackets", confidence: int = 3) -> str:
    """A labeller's reply."""
    return json.dumps({"label": label, "evidence": ["1", "2"], "confidence": confidence})
