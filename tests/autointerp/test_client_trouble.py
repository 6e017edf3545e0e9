"""The real ``openai`` package against a server that does wrong what servers do wrong."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from moe_lens.autointerp.cache import ReplyCache
from moe_lens.autointerp.client import Client
from moe_lens.autointerp.replies import Outcome
from moe_lens.errors import BadConfig
from tests.autointerp.asking import GOOD, ask, in_turn, one, question
from tests.autointerp.llm_server import KEY, Answer, Asked, explanation

pytestmark = pytest.mark.usefixtures("api_key")


# --- transport -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "settings"),
    [
        (Answer.error(429, headers={"retry-after": "0.05"}), {}),
        (Answer.error(500), {}),
        (Answer.error(503), {}),
        (Answer(explanation(), cut=40), {}),
        (Answer(explanation(), delay=2), {"timeout": 0.6}),
    ],
    ids=["429", "500", "503", "half-closed", "slow"],
)
def test_transport_trouble_is_survived(serve, trouble: Answer, settings: dict[str, Any]) -> None:
    """At the first call, which has rules of its own, and at a later one."""
    server = serve(in_turn(trouble, GOOD, trouble, GOOD))
    client = Client("m", server.url, cache=None, max_retries=1, concurrency=1, **settings)
    replies = ask(client, question(0), question(1))
    assert [(reply.status, reply.value.label) for reply in replies] == [(Outcome.OK, "closing brackets")] * 2
    assert (len(server.asked), client.calls) == (4, 2)


def test_retry_after_is_honoured(serve) -> None:
    arrivals: list[float] = []

    def behave(asked: Asked) -> Answer:
        arrivals.append(time.monotonic())
        return Answer.error(429, headers={"retry-after": "0.3"}) if asked.number == 0 else GOOD

    one(serve(behave))
    assert arrivals[1] - arrivals[0] >= 0.3


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        (Answer.error(429), "HTTP 429"),
        (Answer.error(500), "HTTP 500"),
        (Answer(explanation(), cut=40), "APIConnectionError"),
        (Answer(explanation(), delay=2), "APITimeoutError"),
        (Answer(raw="<html>busy</html>", headers={"content-type": "text/html"}), "OpenAI-compatible"),
        (Answer(raw="{not json"), "OpenAI-compatible"),
        (Answer.error(404), "HTTP 404"),
        (Answer.error(400, "maximum context length is 4096 tokens"), "HTTP 400"),
    ],
)
def test_a_call_without_a_reply_is_counted_and_asked_again_by_the_next_run(serve, file, trouble, why) -> None:
    broken = True
    server = serve(lambda asked: trouble if broken and asked.last.startswith("item 1") else GOOD)
    settings: dict[str, Any] = {"cache": file, "max_retries": 0, "timeout": 0.6}
    client = Client("m", server.url, **settings)
    replies = ask(client, *map(question, range(3)))
    assert [reply.status for reply in replies] == [Outcome.OK, Outcome.FAILED, Outcome.OK]
    assert why in replies[1].why
    assert (client.counts["ok"], client.counts["failed"]) == (2, 1)
    broken, before = False, len(server.asked)
    client = Client("m", server.url, **settings)
    assert [reply.cached for reply in ask(client, *map(question, range(3)))] == [True, False, True]
    assert (client.counts["cached"], client.counts["ok"], len(server.asked) - before) == (2, 1, 1)


def test_a_server_without_structured_output_is_found_out_once(serve) -> None:
    def behave(asked: Asked) -> Answer:
        return Answer.error(400, "response_format is not supported") if asked.structured else GOOD

    server = serve(behave)
    client = Client("m", server.url, cache=None)
    for _ in range(2):
        assert all(reply.status is Outcome.OK for reply in ask(client, *map(question, range(10))))
    assert [asked.structured for asked in server.asked] == [True] + [False] * 20
    assert all("JSON schema" in asked.last and '"confidence"' in asked.last for asked in server.asked[1:])


def test_one_bad_request_does_not_end_structured_output(serve) -> None:
    """A prompt that is too long is turned down with 400 too."""
    server = serve(lambda asked: Answer.error(400, "too long") if asked.last.startswith("item 1") else GOOD)
    client = Client("m", server.url, cache=None, concurrency=1)
    statuses = [reply.status for reply in ask(client, *map(question, range(3)))]
    assert statuses == [Outcome.OK, Outcome.FAILED, Outcome.OK]
    assert server.asked[-1].structured


def test_a_model_that_takes_no_temperature_is_asked_without(serve) -> None:
    def behave(asked: Asked) -> Answer:
        unsupported = "temperature" in asked.body
        return Answer.error(400, "only the default", param="temperature") if unsupported else GOOD

    server = serve(behave)
    assert one(server)[1].status is Outcome.OK
    assert [asked.structured for asked in server.asked] == [True, True]


# --- what stops a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (Answer.error(401, f"Incorrect API key provided: {KEY}"), "OPENAI_API_KEY"),
        (Answer.error(403, f"{KEY} may not"), "OPENAI_API_KEY"),
        (Answer.error(404, "no such model"), r"correct the model's name or --base-url"),
        (Answer.error(402, "Insufficient balance"), "no credit"),
        (Answer.error(429, "You exceeded your quota", code="insufficient_quota"), "no credit"),
        (Answer.error(400, f"{KEY} unknown model"), r"turned the first request .* \[key\] unknown model"),
        (Answer(raw="<html>hello</html>", headers={"content-type": "text/html"}), "does not speak OpenAI's protocol"),
    ],
)
def test_a_wrong_setting_stops_at_the_first_call_with_one_sentence(serve, file, trouble, sentence) -> None:
    server = serve(in_turn(trouble))
    client = Client("m", server.url, cache=file, max_retries=0)
    with pytest.raises(BadConfig, match=sentence) as caught:
        ask(client, *map(question, range(30)))
    tries = 2 if trouble.status == 400 else 1  # with structured output, and without
    assert (len(server.asked), caught.value.exit_code, "\n" in str(caught.value)) == (tries, 2, False)
    everything = "".join(str(vars(error)) + str(error) for error in chain(caught.value))
    assert KEY not in everything


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("status", [401, 402])
def test_a_key_that_stops_working_stops_the_run_and_keeps_the_replies(serve, file, status: int) -> None:
    server = serve(lambda asked: GOOD if asked.number < 5 else Answer.error(status))
    with pytest.raises(BadConfig):
        ask(Client("m", server.url, cache=file, concurrency=1), *map(question, range(30)))
    assert (len(server.asked), len(ReplyCache(file))) == (6, 5)


def test_a_corrected_key_is_used_by_the_same_client(serve, monkeypatch) -> None:
    server = serve(lambda asked: GOOD if asked.headers["authorization"] == "Bearer right" else Answer.error(401))
    client = Client("m", server.url, cache=None)
    for _ in range(2):
        with pytest.raises(BadConfig):
            ask(client, *map(question, range(5)))
    assert len(server.asked) == 2, "after a refusal, the next first call goes alone again"
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    assert all(reply.status is Outcome.OK for reply in ask(client, *map(question, range(5))))


def test_nobody_listening_is_said_within_seconds() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(BadConfig, match=r"cannot reach .*start the server, or correct --base-url"):
        ask(Client("m", f"http://127.0.0.1:{port}/v1", cache=None), *map(question, range(30)))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://u:p@host/v1", "http://h?k=1"],
)
def test_an_address_that_cannot_be_used_is_refused_before_any_call(url: str) -> None:
    with pytest.raises(BadConfig, match="--base-url"):
        Client("m", url, cache=None)


@pytest.mark.parametrize(
    "settings", [{"model": "openai:"}, {"concurrency": 0}, {"max_calls": -1}, {"timeout": 0}, {"max_retries": -1}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        Client(**({"model": "m", "cache": None} | settings))


@pytest.mark.parametrize("key", [None, "", " \n"])
def test_openai_without_a_key_is_refused_before_any_call(monkeypatch, key: str | None) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    client = Client("m", cache=None)
    assert client.predict([question()]).calls == 1
    for refused in (client.check, lambda: ask(client)):
        with pytest.raises(BadConfig, match="set the environment variable OPENAI_API_KEY"):
            refused()


@pytest.mark.parametrize("key", ["sk-12\N{HORIZONTAL ELLIPSIS}", "sk-12 34", "sk-12\x0034"])
def test_a_key_that_no_header_can_hold_is_refused_without_quoting_it(monkeypatch, key: str) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"OPENAI_API_KEY": key})
    with pytest.raises(BadConfig, match="characters that no API key has") as caught:
        ask(Client("m", "http://127.0.0.1:9/v1", cache=None))
    assert "sk-12" not in str(caught.value)


def test_a_local_server_needs_no_key(serve, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve(in_turn(GOOD))
    assert one(server)[1].status is Outcome.OK
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert ask(Client("m", cache=None))[0].status is Outcome.OK
