"""What a labeller is shown, and what becomes of each of its replies."""

from __future__ import annotations

import json
import re
from typing import Any

import pandas as pd
import pytest

from moe_lens.autointerp.client import Client
from moe_lens.autointerp.explain import explain, explain_requests
from moe_lens.autointerp.labels import LABEL_COLUMNS
from moe_lens.autointerp.prompts import marked, prompt_hash
from moe_lens.errors import BadConfig
from tests.autointerp.asking import in_turn
from tests.autointerp.llm_server import Answer, Asked, explanation, facets
from tests.autointerp.planted_tables import COUNTS, EXPERTS, exemplar_rows, lens_rows

pytestmark = pytest.mark.usefixtures("api_key")


@pytest.fixture(scope="module")
def exemplars() -> pd.DataFrame:
    return exemplar_rows()


def shown_rows(exemplars: pd.DataFrame, **settings: Any) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """The rows behind the routed and the other examples of every question, in the order shown."""
    texts = zip(exemplars["text"], exemplars["char_start"], exemplars["char_end"], strict=True)
    by_text = exemplars.assign(shown=[marked(*text) for text in texts]).set_index("shown")
    pairs = []
    for question in explain_requests(exemplars, None, corpus_name="prose", **settings):
        content = question.request.messages[1]["content"]
        routed = re.findall(r"^R\d+\. \(strength \d+\) (.*)$", content, re.MULTILINE)
        others = re.findall(r"^N\d+\. (.*)$", content, re.MULTILINE)
        assert [*routed, *others] == list(question.shown.values())
        assert len(routed) == question.n_exemplars
        pairs.append((by_text.loc[routed], by_text.loc[others]))
    return pairs


def labels_of(server: Any, exemplars: pd.DataFrame, client: dict[str, Any] | None = None, **settings: Any):
    settings = {"corpus_name": "prose", "progress": False} | settings
    given = {"cache": None, "max_retries": 0} | (client or {})
    return explain(Client("openai:m", server.url, **given), exemplars, settings.pop("lens", None), **settings)


# --- what is shown ----------------------------------------------------------------------------------------------


def test_routed_examples_come_from_the_whole_range_of_scores(exemplars) -> None:
    for routed, _ in shown_rows(exemplars):
        assert routed["kind"].value_counts().to_dict() == {"quantile": 10, "top": 5, "random": 5}
        spread = routed.loc[routed["kind"] == "quantile", "quantile"]
        assert set((spread * 4).astype(int)) == {0, 1, 2, 3}
        assert routed["score"].is_monotonic_decreasing
        assert routed["routed"].all()


def test_the_highest_scores_of_kind_top_are_taken_one_per_document(exemplars) -> None:
    one = exemplars[(exemplars["layer"] == 0) & (exemplars["expert"] == 0)]
    top = one[(one["kind"] == "top") & (one["split"] == "select")].sort_values("score", ascending=False)
    crowded = one.assign(document=one["document"].where(~one.index.isin(top.index[:8]), -1))
    ((before, _),) = shown_rows(one)
    ((after, _),) = shown_rows(crowded)
    assert set(before.index[before["kind"] == "top"]) == set(map(marked_row, top[:5].itertuples()))
    assert set(after.index[after["kind"] == "top"]) == set(map(marked_row, top.iloc[[0, 8, 9, 10, 11]].itertuples()))


def marked_row(row: Any) -> str:
    return marked(row.text, row.char_start, row.char_end)


def test_other_examples_are_the_same_tokens_first_then_the_other_kinds(exemplars) -> None:
    for routed, others in shown_rows(exemplars):
        assert others["kind"].str.removeprefix("negative_").tolist() == (
            ["same_token"] * 4 + ["near_miss"] * 2 + ["random"] * 2 + ["other"] * 2
        )
        assert set(others["token_id"][:4]) <= set(routed["token_id"]), "the same token as one that is shown"
        assert not others["routed"].any()


def test_kinds_that_run_short_are_made_up_for_by_others(exemplars) -> None:
    few = exemplars[~exemplars["kind"].isin(["top", "negative_same_token"])]
    for routed, others in shown_rows(few):
        assert routed["kind"].value_counts().to_dict() == {"quantile": 13, "random": 7}
        assert len(others) == 10


def test_nothing_of_the_validate_split_is_shown(exemplars) -> None:
    for routed, others in shown_rows(exemplars):
        assert {*routed["split"], *others["split"]} == {"select"}


def test_random_tokens_that_were_routed_are_no_counterexamples(exemplars) -> None:
    routed = exemplars["kind"] == "negative_random"
    table = exemplars.assign(routed=exemplars["routed"] | routed)
    for _, others in shown_rows(table):
        assert len(others) == 10
        assert "negative_random" not in set(others["kind"])


def test_two_bytes_of_one_letter_do_not_make_a_contradiction(exemplars) -> None:
    """One routed, one not, and both mark the same characters."""
    routed = exemplars[(exemplars["split"] == "select") & (exemplars["kind"] == "top")]
    twins = routed.assign(kind="negative_same_token", routed=False, score=0.0, position=routed["position"] + 1)
    table = pd.concat([exemplars[exemplars["kind"] != "negative_same_token"], twins], ignore_index=True)
    for question in explain_requests(table, None, corpus_name="prose", n_negative=40):
        assert len(set(question.shown.values())) == len(question.shown)


def test_strength_is_relative_to_the_strongest_example(exemplars) -> None:
    content = explain_requests(exemplars, None, corpus_name="prose")[0].request.messages[1]["content"]
    strengths = [int(number) for number in re.findall(r"strength (\d+)", content)]
    assert (strengths[0], sorted(strengths, reverse=True)) == (100, strengths)
    assert 0 <= strengths[-1] < 20
    doubled = exemplars.assign(score=exemplars["score"] * 2)
    assert explain_requests(doubled, None, corpus_name="prose")[0].request.messages[1]["content"] == content


def test_experts_that_write_nothing_have_strength_0(exemplars) -> None:
    content = explain_requests(exemplars.assign(score=0.0), None, corpus_name="p")[0].request.messages[1]["content"]
    assert set(re.findall(r"strength (\d+)", content)) == {"0"}


def test_the_tokens_that_an_expert_promotes_are_quoted(exemplars) -> None:
    questions = explain_requests(exemplars, lens_rows(), corpus_name="prose")
    for question in questions:
        line = f': "up{question.layer}x{question.expert}", " the\\n"\n'
        assert line in question.request.messages[1]["content"]
    without = explain_requests(exemplars, None, corpus_name="prose")[0].request.messages[1]["content"]
    assert "more likely" not in without


def test_a_question_depends_on_nothing_but_its_expert(exemplars) -> None:
    """So that the cache holds whatever else is in the table."""
    everything = explain_requests(exemplars, lens_rows(), corpus_name="prose")
    assert [(question.layer, question.expert) for question in everything] == sorted(EXPERTS)
    shuffled = explain_requests(exemplars.sample(frac=1, random_state=1), lens_rows(), corpus_name="prose")
    alone = explain_requests(exemplars, lens_rows(), corpus_name="prose", experts=[(3, 0)])
    assert shuffled == everything
    assert alone == [everything[2]]


@pytest.mark.parametrize("settings", [{"n_positive": 0}, {"n_negative": -1}, {"facets": 6}, {"facets": -1}])
def test_impossible_numbers_are_refused(exemplars, settings) -> None:
    with pytest.raises(BadConfig):
        explain_requests(exemplars, None, corpus_name="prose", **settings)


# --- what becomes of a reply ------------------------------------------------------------------------------------


def test_a_label_is_a_row(serve, exemplars) -> None:
    said = json.dumps({"label": "closing  brackets", "evidence": ["R2, N1", "weak", "R99"], "confidence": 3})
    table = labels_of(serve(in_turn(Answer(said))), exemplars)
    assert tuple(table.columns) == LABEL_COLUMNS
    assert list(zip(table["layer"], table["expert"], strict=True)) == sorted(EXPERTS)
    row = table.iloc[0]
    assert (row["label"], row["status"], row["why"], row["facet"]) == ("closing brackets", "ok", "", 0)
    assert (row["labeller"], row["model_id"], row["n_exemplars"]) == ("openai:m", "m", 20)
    assert (row["confidence"], row["rule"], row["prompt_hash"]) == (3, None, prompt_hash("explain"))
    shown = explain_requests(exemplars, None, corpus_name="prose")[0].shown
    assert row["evidence"] == [f"routed: {shown['R2']}", f"not routed: {shown['N1']}", "weak", "routed: ?"]


NOTHING = "the labeller found nothing that separates them"


@pytest.mark.parametrize("mode", [0, 3])
@pytest.mark.parametrize(
    ("reply", "status", "why"),
    [
        (None, "abstained", NOTHING),
        (Answer("no idea"), "abstained", "no JSON object"),
        (Answer(""), "abstained", "empty"),
        (Answer(None, refusal="no"), "refused", "refused"),
        (Answer.error(500), "failed", "HTTP 500"),
    ],
)
def test_a_reply_without_a_label_is_a_row_that_says_why(serve, exemplars, mode, reply, status, why) -> None:
    answer = reply or Answer(facets() if mode else explanation(None))
    table = labels_of(serve(in_turn(answer)), exemplars, facets=mode)
    assert table["status"].tolist() == [status] * len(EXPERTS)
    assert table["facet"].tolist() == [int(mode > 0)] * len(EXPERTS)
    assert table["label"].tolist() == [None] * len(EXPERTS)
    assert table["n_exemplars"].tolist() == [20] * len(EXPERTS)
    assert all(why in one for one in table["why"])


def test_experts_beyond_the_budget_are_not_run(serve, exemplars) -> None:
    table = labels_of(serve(in_turn(Answer(explanation()))), exemplars, client={"max_calls": 3})
    assert sorted(table["status"]) == ["not_run", "ok", "ok", "ok"]
    assert "budget" in table.loc[table["status"] == "not_run", "why"].iloc[0]


def test_a_rare_expert_is_explained_from_what_there_is(serve, exemplars) -> None:
    """One with three visits is asked about, one without a visit is not, and nothing is aborted."""
    rare = exemplar_rows([(0, 0)], {"top": 3, "negative_random": 1}).assign(status="too_few")
    never = exemplar_rows([(0, 1)], {"negative_random": 5}).assign(status="too_few")
    server = serve(in_turn(Answer(explanation())))
    table = labels_of(server, pd.concat([rare, never]), experts=[(0, 0), (0, 1), (0, 2)])
    assert table["status"].tolist() == ["ok", "too_few", "too_few"]
    assert table["n_exemplars"].tolist() == [3, 0, 0]
    assert "no visit" in table["why"].iloc[2]
    assert len(server.asked) == 1
    assert labels_of(server, exemplars[:0], experts=[]).empty


def test_another_name_for_the_labeller_can_be_given(serve, exemplars) -> None:
    table = labels_of(serve(in_turn(Answer(explanation()))), exemplars, labeller="gguf:file")
    assert set(table["labeller"]) == {"gguf:file"}


# --- facets -----------------------------------------------------------------------------------------------------


def test_each_facet_is_a_row(serve, exemplars) -> None:
    server = serve(in_turn(Answer(facets("verbs", "closing brackets"))))
    table = labels_of(server, exemplars, facets=5)
    assert table["facet"].tolist() == [1, 2] * len(EXPERTS)
    assert table["label"].tolist() == ["verbs", "closing brackets"] * len(EXPERTS)
    assert set(table["prompt_hash"]) == {prompt_hash("facets")}
    assert all(row[0].startswith("routed: ") for row in table["evidence"])
    assert "between one and 5" in server.asked[0].body["messages"][0]["content"]
    form = server.asked[0].body["response_format"]["json_schema"]["schema"]
    assert list(form["properties"]) == ["facets"]


@pytest.mark.parametrize(
    ("labels", "why"),
    [(("a", "b", "c"), "3 facets, 2 at most"), (("Verbs", "verbs"), "same label twice"), ((" ",), "blank")],
)
def test_facets_that_break_the_rules_are_asked_for_again(serve, exemplars, labels, why) -> None:
    server = serve(lambda asked: Answer(facets("one") if len(asked.body["messages"]) > 2 else facets(*labels)))
    table = labels_of(server, exemplars, facets=2)
    assert table["label"].tolist() == ["one"] * len(EXPERTS)
    assert len(server.asked) == 2 * len(EXPERTS)
    assert all(why in asked.last for asked in server.asked if len(asked.body["messages"]) > 2)
    table = labels_of(serve(in_turn(Answer(facets(*labels)))), exemplars, facets=2)
    assert set(table["status"]) == {"abstained"}
    assert all(why in one for one in table["why"])


# --- money ------------------------------------------------------------------------------------------------------


def test_the_prediction_is_what_is_asked(serve, exemplars, file) -> None:
    server = serve(in_turn(Answer(explanation())))
    requests = [question.request for question in explain_requests(exemplars, lens_rows(), corpus_name="prose")]
    client = Client("m", server.url, cache=file)
    assert client.predict(requests).calls == len(EXPERTS)
    explain(client, exemplars, lens_rows(), corpus_name="prose", progress=False)
    assert (len(server.asked), client.predict(requests).calls) == (len(EXPERTS), 0)


def test_a_second_run_with_more_experts_asks_about_the_new_ones(serve, exemplars, file) -> None:
    def behave(asked: Asked) -> Answer:
        return Answer(explanation(asked.last.splitlines()[0]))

    server = serve(behave)
    settings: dict[str, Any] = {"client": {"cache": file}}
    first = labels_of(server, exemplars, experts=EXPERTS[:2], **settings)
    everything = labels_of(server, exemplars, **settings)
    assert len(server.asked) == len(EXPERTS)
    pd.testing.assert_frame_equal(everything[:2], first)
    assert sum(COUNTS.values()) * 2 * len(EXPERTS) == len(exemplars)
