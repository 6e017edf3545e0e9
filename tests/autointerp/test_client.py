"""Replies, money, keys and speed: the real ``openai`` package against a loopback server."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from moe_lens.autointerp.cache import ReplyCache
from moe_lens.autointerp.client import Client, Reply, Request
from moe_lens.autointerp.replies import Outcome, ReplySchema
from moe_lens.errors import BadConfig
from tests.autointerp.asking import EXPLAIN, GOOD, ask, in_turn, one, question
from tests.autointerp.llm_server import KEY, Answer, Asked, answers, explanation

TWO = ReplySchema.answers([1, 2])
pytestmark = pytest.mark.usefixtures("api_key")


# --- replies ---------------------------------------------------------------------------------------------------


def test_replies_come_in_the_order_of_the_requests(serve) -> None:
    server = serve(lambda asked: Answer(explanation(asked.last), delay=0.05 if asked.last.endswith("0") else 0))
    client = Client("openai:m", server.url, cache=None)
    replies = ask(client, *map(question, range(20)))
    assert [reply.value.label for reply in replies] == [f"item {number}" for number in range(20)]
    assert (client.counts["ok"], sum(client.counts.values())) == (20, 20)
    assert (client.calls, client.tokens_in, client.tokens_out) == (20, 2000, 200)
    assert {asked.body["model"] for asked in server.asked} == {"m"}
    assert {asked.path for asked in server.asked} == {"/v1/chat/completions"}


def test_the_schema_travels_as_structured_output(serve) -> None:
    server = serve(in_turn(GOOD))
    one(server)
    form = server.asked[0].body["response_format"]
    assert form["type"] == "json_schema"
    assert set(form["json_schema"]["schema"]["properties"]) == {"label", "evidence", "confidence"}
    assert server.asked[0].body["temperature"] == 0.0


def test_no_more_requests_are_open_than_the_concurrency_allows(serve) -> None:
    server = serve(lambda asked: Answer(explanation(), delay=0.02))
    ask(Client("m", server.url, cache=None, concurrency=3), *map(question, range(15)))
    assert server.most_at_once == 3


def test_an_abstaining_labeller_has_answered(serve) -> None:
    _, reply = one(serve(in_turn(Answer(explanation(None)))))
    assert (reply.status, reply.value.label) == (Outcome.OK, None)


@pytest.mark.parametrize(
    ("bad", "schema", "status"),
    [
        (Answer("I think it is brackets."), EXPLAIN, Outcome.INVALID),
        (Answer(explanation()[:-5], finish_reason="length"), EXPLAIN, Outcome.INVALID),
        (Answer(explanation()), TWO, Outcome.INVALID),
        (Answer(answers({1: 4})), TWO, Outcome.TOO_FEW_ANSWERS),
        (Answer(answers({1: 4, 2: 0, 3: 1})), TWO, Outcome.TOO_MANY_ANSWERS),
        (Answer(""), EXPLAIN, Outcome.EMPTY),
        (Answer(None), EXPLAIN, Outcome.EMPTY),
        (Answer(raw='{"choices": []}'), EXPLAIN, Outcome.EMPTY),
        (Answer("half \ud800 pair"), EXPLAIN, Outcome.INVALID),
    ],
)
def test_an_unusable_reply_is_asked_for_once_more_then_abstains(serve, file, bad, schema, status) -> None:
    server = serve(in_turn(bad))
    client, reply = one(server, schema, cache=file)
    assert (reply.status, reply.value) == (status, None)
    assert reply.why
    assert client.counts == {outcome.value: int(outcome is status) for outcome in Outcome}
    assert (len(server.asked), client.calls) == (2, 2)
    assert reply.tokens_in == client.tokens_in
    again, reply = one(server, schema, cache=file)
    assert len(server.asked) == 2, "an unusable reply is paid for once"
    assert (reply.status, reply.cached, again.counts[status]) == (status, True, 1)


def test_the_second_question_says_what_was_wrong(serve, file) -> None:
    good = Answer(answers({1: 4, 2: 0}), tokens=(7, 5))
    server = serve(in_turn(Answer(answers({1: 4})), good))
    _, reply = one(server, TWO, cache=file)
    assert (reply.status, reply.value.scores) == (Outcome.OK, {1: 4, 2: 0})
    assert (reply.tokens_in, reply.tokens_out) == (107, 15)
    first, second = (asked.body["messages"] for asked in server.asked)
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": answers({1: 4})}
    assert "1 answers for the 2 items 1, 2" in second[3]["content"]


def test_after_an_empty_reply_the_same_question_is_asked(serve, file) -> None:
    """Empty turns of the assistant break chat templates; and the cache must not take the first reply for the second."""
    server = serve(in_turn(Answer(""), GOOD))
    _, reply = one(server, cache=file)
    assert reply.status is Outcome.OK
    assert server.asked[0].body["messages"] == server.asked[1].body["messages"]


@pytest.mark.parametrize(
    "refusal",
    [
        Answer(None, refusal="I cannot help with that"),
        Answer("", finish_reason="content_filter"),
        Answer.error(400, "filtered", code="content_filter"),
    ],
)
def test_a_refusal_is_not_asked_again_and_not_paid_twice(serve, file, refusal) -> None:
    server = serve(in_turn(refusal))
    assert one(server, cache=file)[1].status is Outcome.REFUSED
    client, reply = one(server, cache=file)
    assert (reply.status, reply.value, reply.cached, client.counts["refused"]) == (Outcome.REFUSED, None, True, 1)
    assert len(server.asked) == 1


# --- money -----------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(serve, file) -> None:
    server = serve(in_turn(GOOD))
    first = ask(Client("m", server.url, cache=file), *map(question, range(10)))
    client = Client("openai:m", server.url, cache=file)
    second = ask(client, *map(question, range(10)))
    assert [reply.value for reply in second] == [reply.value for reply in first]
    assert (len(server.asked), client.calls, client.tokens_in) == (10, 0, 0)
    assert (client.counts["cached"], client.counts["ok"]) == (10, 0)


def test_a_run_that_is_all_in_the_cache_needs_no_key_and_no_openai_package(serve, file, monkeypatch) -> None:
    server = serve(in_turn(GOOD))
    ask(Client("m", server.url, cache=file))
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "openai", None)
    assert ask(Client("m", cache=file))[0].cached
    assert Client("m", cache=file).ask_all([]) == []


@pytest.mark.parametrize("changed", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 99}])
def test_another_model_or_parameter_is_another_request(serve, file, changed) -> None:
    server = serve(in_turn(GOOD))
    for settings in ({}, changed):
        ask(Client(**{"model": "m", "base_url": server.url, "cache": file} | settings))
    assert len(server.asked) == 2


def test_the_same_request_of_two_tasks_is_paid_once(serve, file) -> None:
    server = serve(lambda asked: Answer(explanation(), delay=0.05))
    client = Client("m", server.url, cache=file)
    ask(client, *[question()] * 8)
    assert (len(server.asked), client.counts["ok"], client.counts["cached"]) == (1, 1, 7)


def test_the_budget_is_never_exceeded(serve, file) -> None:
    server = serve(in_turn(GOOD))
    client = Client("m", server.url, cache=file, max_calls=7)
    replies = ask(client, *map(question, range(20)))
    assert (len(server.asked), client.counts["ok"], client.counts["budget"]) == (7, 7, 13)
    assert {reply.value for reply in replies if reply.status is Outcome.BUDGET} == {None}
    assert Client("m", server.url, cache=file, max_calls=7).predict([*map(question, range(20))]).calls == 7
    assert Client("m", server.url, cache=file).predict([*map(question, range(20))]).calls == 13
    assert client.predict([*map(question, range(20))]).calls == 0
    ask(client, *map(question, range(20)))
    assert len(server.asked) == 7, "the budget is the client's, not that of one ask_all"


def test_second_questions_count_towards_the_budget(serve, file) -> None:
    server = serve(in_turn(Answer("no")))
    replies = ask(Client("m", server.url, cache=file, max_calls=3, concurrency=1), *map(question, range(3)))
    assert [reply.status for reply in replies] == [Outcome.INVALID, Outcome.BUDGET, Outcome.BUDGET]
    assert len(server.asked) == 3
    again = ask(Client("m", server.url, cache=file), question(1))[0]
    assert (again.status, len(server.asked)) == (Outcome.INVALID, 4), "only its second question was left to ask"


def test_predicted_tokens_are_those_of_the_documented_estimate() -> None:
    request = Request([{"role": "user", "content": "x" * 41}, {"role": "user", "content": "é" * 4}], EXPLAIN)
    assert Client("m", cache=None).predict([request] * 3) == (3, 3 * (11 + 4 + 2 + 4))


def test_a_run_killed_in_the_middle_repeats_no_paid_call(serve, file) -> None:
    """kill -9 while replies come in; what the cache holds then is never asked again."""
    server = serve(lambda asked: Answer(explanation(asked.last), delay=0.02))
    code = (
        "import sys; from pathlib import Path; from tests.autointerp.asking import Client, ask, question\n"
        "ask(Client('m', sys.argv[1], cache=Path(sys.argv[2]), concurrency=4), *map(question, range(200)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(file)])
    while len(server.asked) < 40 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.3)  # what was on its way
    asked, kept = len(server.asked), len(ReplyCache(file))
    assert 40 - 4 <= kept < 200
    assert asked - kept <= 4, "more is lost than what was on its way"
    replies = ask(Client("m", server.url, cache=file), *map(question, range(200)))
    assert [reply.value.label for reply in replies] == [f"item {number}" for number in range(200)]
    assert len(server.asked) - asked == 200 - kept


# --- keys ------------------------------------------------------------------------------------------------------


def test_the_key_reaches_neither_disk_nor_log_nor_screen(serve, tmp_path, caplog, capfd) -> None:
    def behave(asked: Asked) -> Answer:
        """Quotes the key in every kind of body."""
        script = {
            0: Answer(explanation(f"it is {KEY}")),
            1: Answer.error(400, f"bad {KEY}"),
            2: Answer.error(500, f"bad {KEY}"),
            3: Answer(f"not JSON {KEY}"),
            4: Answer(None, refusal=f"no, {KEY}"),
        }
        return script[int(asked.last.split()[1]) if asked.last.startswith("item") else 3]

    server = serve(behave)
    client = Client("m", server.url, cache=tmp_path / "replies.sqlite", concurrency=1, max_retries=0)
    with caplog.at_level(logging.DEBUG):
        replies = client.ask_all([*map(question, range(5))], progress=True)
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert {reply.status for reply in replies} == set(map(Outcome, ("ok", "failed", "invalid", "refused")))
    files = list(tmp_path.iterdir())
    assert files
    assert all(KEY.encode() not in path.read_bytes() for path in files)
    assert caplog.records, "the log at DEBUG is part of the test"
    assert KEY not in "".join(record.getMessage() for record in caplog.records)
    assert KEY not in repr(replies) + repr(client) + "".join(capfd.readouterr())


# --- speed and event loops -------------------------------------------------------------------------------------


def test_it_works_inside_a_running_event_loop(serve, file) -> None:
    server = serve(in_turn(GOOD))

    async def notebook() -> list[Reply]:
        client = Client("m", server.url, cache=file)
        twice = ask(client, question(0)) + ask(client, question(1))
        one = await client.ask(*question(2))
        await client.aclose()
        return [*twice, one]

    assert [reply.status for reply in asyncio.run(notebook())] == [Outcome.OK] * 3
    assert len(server.asked) == 3


def test_the_stop_button_of_a_notebook_keeps_the_replies_so_far(serve, file) -> None:
    """Ctrl-C reaches the main thread, the requests run in another one."""

    def behave(asked: Asked) -> Answer:
        if asked.number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return Answer(explanation(), delay=0 if asked.number < 5 else 9)

    server = serve(behave)

    async def notebook() -> None:
        with pytest.raises(KeyboardInterrupt):
            ask(Client("m", server.url, cache=file, concurrency=1), *map(question, range(30)))

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(notebook())  # asyncio.run would take the signal to itself
    finally:
        signal.signal(signal.SIGINT, handler)
        loop.close()
    assert time.monotonic() - start < 5
    assert (len(ReplyCache(file)), len(server.asked)) == (5, 6)


def test_an_error_inside_a_running_event_loop_is_the_same_sentence(serve) -> None:
    server = serve(in_turn(Answer.error(401)))

    async def notebook() -> None:
        ask(Client("m", server.url, cache=None))

    with pytest.raises(BadConfig, match="OPENAI_API_KEY"):
        asyncio.run(notebook())


@pytest.mark.slow
def test_sixteen_at_a_time_take_a_tenth_of_the_time(serve, file, record_property) -> None:
    """The best of three, which other load on the machine hardly changes."""
    server = serve(lambda asked: Answer(explanation(), delay=0.2))
    client = Client("m", server.url, cache=file, concurrency=16)
    ask(client, question(-1))  # the first call goes alone
    shares = []
    for run in range(3):
        requests = [question(64 * run + number) for number in range(64)]
        start = time.monotonic()
        assert all(reply.status is Outcome.OK for reply in ask(client, *requests))
        shares.append((time.monotonic() - start) / (64 * 0.2))
    record_property("share_of_sequential_time", min(shares))
    assert len(server.asked) == 1 + 3 * 64
    assert min(shares) < 0.1
