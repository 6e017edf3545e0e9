"""Requests and clients of the tests that talk to ``llm_server``."""

from __future__ import annotations

from typing import Any

from moe_lens.autointerp.client import Client, Reply, Request
from moe_lens.autointerp.replies import ReplySchema
from tests.autointerp.llm_server import Answer, Behave, LLMServer, explanation

EXPLAIN = ReplySchema.explanation()
GOOD = Answer(explanation())


def question(number: int = 0, schema: ReplySchema = EXPLAIN) -> Request:
    return Request([{"role": "system", "content": "you label"}, {"role": "user", "content": f"item {number}"}], schema)


def ask(client: Client, *requests: Request) -> list[Reply]:
    return client.ask_all(requests or [question()], progress=False)


def one(server: LLMServer, schema: ReplySchema = EXPLAIN, **settings: Any) -> tuple[Client, Reply]:
    client = Client("m", server.url, **({"cache": None, "max_retries": 1} | settings))
    return client, ask(client, question(schema=schema))[0]


def in_turn(*script: Answer) -> Behave:
    """The answers one after another, the last one for ever."""
    return lambda asked: script[min(asked.number, len(script) - 1)]
