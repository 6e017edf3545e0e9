"""Similarity of a label and a marked text, from a server that embeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens.autointerp.cache import ReplyCache
from moe_lens.autointerp.client import TEXTS_PER_CALL, Client
from moe_lens.autointerp.prompts import marked
from moe_lens.autointerp.replies import Outcome
from moe_lens.autointerp.scoring.embedding import embedding_answers, embedding_texts
from moe_lens.autointerp.scoring.items import make_items
from moe_lens.autointerp.scoring.judge import ANSWER_COLUMNS
from moe_lens.errors import BadConfig
from tests.autointerp.asking import in_turn, question
from tests.autointerp.llm_server import KEY, Answer, Asked, LLMServer, vectors
from tests.autointerp.planted_tables import EXPERTS, exemplar_rows, label_rows

pytestmark = pytest.mark.usefixtures("api_key")
COUNTS = {"random": 10, "negative_random": 10, "negative_near_miss": 5}
N_TEXTS = len(EXPERTS) * (1 + 10 + 10 + 10 + 5)  # labels, positives, moved, random, near miss


@pytest.fixture(scope="module")
def items() -> pd.DataFrame:
    return make_items(exemplar_rows(counts=COUNTS))


@pytest.fixture(scope="module")
def labels() -> pd.DataFrame:
    return label_rows()


def direction(text: str) -> list[float]:
    """A vector that depends on the text alone."""
    return np.random.default_rng(list(text.encode())).normal(size=8).round(3).tolist()


def embed(asked: Asked) -> Answer:
    return vectors([direction(text) for text in asked.texts], tokens=10 * len(asked.texts))


def run(server: LLMServer, labels: pd.DataFrame, items: pd.DataFrame, **settings: Any) -> tuple[Client, pd.DataFrame]:
    client = Client("openai:e", server.url, **({"cache": None, "max_retries": 1} | settings))
    return client, embedding_answers(client, labels, items, progress=False)


def test_the_score_is_the_cosine_of_label_and_marked_text(serve, labels, items) -> None:
    server = serve(embed)
    client, table = run(server, labels, items)
    assert tuple(table.columns) == ANSWER_COLUMNS
    assert (set(table["scorer"]), set(table["control"]), set(table["outcome"])) == ({"embedding"}, {"none"}, {"ok"})
    assert table["item"].tolist() == sorted(items["item"])
    rows = table.merge(items, on=["layer", "expert", "item"]).merge(labels[["layer", "expert", "label"]])
    for row in rows.sample(40, random_state=0).itertuples():
        a, b = (np.array(direction(t)) for t in (row.label, marked(row.text, row.char_start, row.char_end)))
        assert row.score_x == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    assert {asked.path for asked in server.asked} == {"/v1/embeddings"}
    assert {asked.body["model"] for asked in server.asked} == {"e"}
    assert (client.tokens_in, client.calls) == (10 * N_TEXTS, len(server.asked))
    assert client.counts["ok"] == N_TEXTS


def test_a_label_in_the_direction_of_its_positives_scores_1(serve, labels, items) -> None:
    """What a perfect embeddings model would do."""
    near = {*labels["label"], *(marked(r.text, r.char_start, r.char_end)
                                for r in items[items["negatives"] == ""].itertuples())}  # fmt: skip
    server = serve(lambda asked: vectors([[1, 0] if text in near else [0, 1] for text in asked.texts]))
    _, table = run(server, labels, items)
    positive = items.set_index("item")["negatives"][table["item"]] == ""
    assert table["score"].tolist() == positive.astype(float).tolist()


def test_the_prediction_is_what_is_asked(serve, labels, items, file) -> None:
    server = serve(embed)
    texts = embedding_texts(labels, items)
    client = Client("e", server.url, cache=file)
    predicted = client.predict_embeddings(texts)
    assert predicted.calls == -(-N_TEXTS // TEXTS_PER_CALL)
    assert predicted.tokens_in == sum(-(-len(text.encode()) // 4) for text in texts)
    embedding_answers(client, labels, items, progress=False)
    assert (len(server.asked), client.predict_embeddings(texts)) == (predicted.calls, (0, 0))
    assert Client("e", cache=None, max_calls=1).predict_embeddings(texts).calls == 1


def test_a_second_run_asks_for_new_texts_only(serve, labels, items, file) -> None:
    server = serve(embed)
    run(server, labels[:2], items, cache=file)
    half = len(server.asked)
    _, first = run(server, labels, items, cache=file)
    new = [text for asked in server.asked[half:] for text in asked.texts]
    assert len(new) == N_TEXTS // 2
    asked = len(server.asked)
    client, second = run(server, labels, items, cache=file)
    assert (len(server.asked), client.calls, client.counts["cached"]) == (asked, 0, N_TEXTS)
    pd.testing.assert_frame_equal(first, second)


def test_another_model_is_another_embedding(serve, file) -> None:
    server = serve(embed)
    for model in ("a", "b"):
        Client(model, server.url, cache=file).embed_all(["x"], progress=False)
    assert len(server.asked) == 2


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_run_that_breaks_off_loses_no_call_that_was_answered(serve, labels, items, file, monkeypatch, n) -> None:
    class Killed(BaseException):
        pass

    server = serve(embed)
    put_all = ReplyCache.put_all

    def fragile(self, replies):
        if len(server.asked) > n:
            raise Killed  # the last reply has come, and is lost
        put_all(self, replies)

    monkeypatch.setattr(ReplyCache, "put_all", fragile)
    with pytest.raises(Killed):
        run(server, labels, items, cache=file, concurrency=1)
    monkeypatch.setattr(ReplyCache, "put_all", put_all)
    assert len(ReplyCache(file)) == n * TEXTS_PER_CALL
    lost = sum(len(asked.texts) for asked in server.asked[n:])
    run(server, labels, items, cache=file, concurrency=1)
    assert sum(len(asked.texts) for asked in server.asked) == N_TEXTS + lost


# --- trouble ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [Answer.error(429, headers={"retry-after": "0.02"}), Answer.error(503), vectors([[1.0]])],
    ids=["429", "503", "cut"],
)
def test_transport_trouble_is_survived(serve, labels, items, trouble) -> None:
    cut = Answer(raw=trouble.body.decode(), cut=20) if trouble.status == 200 else trouble
    server = serve(lambda asked: cut if asked.number == 0 else embed(asked))
    _, table = run(server, labels, items)
    assert set(table["outcome"]) == {"ok"}


BAD = {
    "too few": vectors([[1.0, 0.0]]),
    "too many": vectors([[1.0, 0.0]] * 200),
    "none": vectors([]),
    "no numbers": Answer(raw=vectors([[1.0]]).body.decode().replace("[1.0]", '["x"]')),
    "zero": "zero",
    "NaN": "NaN",
    "ragged": "ragged",
    "same index": "same index",
    "500": Answer.error(500),
    "no data": Answer(raw='{"object": "list"}'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_call_without_usable_vectors_fails_its_texts_and_is_made_again(serve, labels, items, file, name) -> None:
    broken = True

    def behave(asked: Asked) -> Answer:
        if not broken or asked.number == 0:
            return embed(asked)
        given = BAD[name]
        if isinstance(given, Answer):
            return given
        found: list[list[float]] = [[1.0, 2.0] for _ in asked.texts]
        found[0] = {"zero": [0.0, 0.0], "NaN": [float("nan"), 1.0], "ragged": [1.0]}.get(given, [1.0, 2.0])
        body = vectors(found).body.decode()
        return Answer(raw=body.replace('"index": 1,', '"index": 0,') if given == "same index" else body)

    server = serve(behave)
    client, table = run(server, labels, items, cache=file, concurrency=1, max_retries=0)
    failed = N_TEXTS - TEXTS_PER_CALL
    assert (client.counts["ok"], client.counts["failed"]) == (TEXTS_PER_CALL, failed)
    assert set(table["outcome"]) == {"ok", "failed"}
    assert (table["score"].isna() == (table["outcome"] == "failed")).all()
    broken, before = False, len(server.asked)
    client, table = run(server, labels, items, cache=file)
    assert set(table["outcome"]) == {"ok"}
    assert sum(len(asked.texts) for asked in server.asked[before:]) == failed


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (Answer.error(401, f"bad {KEY}"), "OPENAI_API_KEY"),
        (Answer.error(404, "no such model"), "correct the model's name or --base-url"),
        (Answer.error(402), "no credit"),
        (Answer.error(400, f"{KEY} is no embeddings model"), r"turned the first request .* \[key\] is no embeddings"),
        (Answer(raw="<html>hello</html>", headers={"content-type": "text/html"}), "does not speak OpenAI's protocol"),
        (Answer(raw='{"choices": []}'), "does not speak OpenAI's protocol"),
    ],
)
def test_a_wrong_setting_stops_at_the_first_call_with_one_sentence(serve, labels, items, trouble, sentence) -> None:
    server = serve(in_turn(trouble))
    with pytest.raises(BadConfig, match=sentence) as caught:
        run(server, labels, items, max_retries=0)
    assert len(server.asked) == 1
    assert KEY not in str(caught.value) + repr(caught.value.__context__)


def test_texts_beyond_the_budget_say_so(serve, labels, items) -> None:
    client, table = run(serve(embed), labels, items, max_calls=1, concurrency=1)
    assert set(table["outcome"]) == {"ok", "budget"}
    assert client.counts["budget"] == N_TEXTS - TEXTS_PER_CALL


def test_a_chat_model_and_an_embeddings_model_share_a_client(serve, labels, items, file) -> None:
    """The first call of each kind goes alone, and what the server turned down of one says nothing of the other."""

    def behave(asked: Asked) -> Answer:
        return embed(asked) if asked.path.endswith("embeddings") else Answer.error(404)

    client = Client("m", serve(behave).url, cache=file, max_retries=0)
    assert client.embed_all(["a", "a", "b"], progress=False)["a"].status is Outcome.OK
    with pytest.raises(BadConfig, match="no model 'm'"):
        client.ask_all([question()], progress=False)


def test_no_labels_is_no_call(serve, labels, items) -> None:
    server = serve(embed)
    _, table = run(server, labels[:0], items)
    assert (len(table), len(server.asked), tuple(table.columns)) == (0, 0, ANSWER_COLUMNS)
    assert table["score"].dtype == np.float32
