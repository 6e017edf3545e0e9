"""A judge sees a label and marked texts, in an order that says nothing, and each answer finds its item."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from moe_lens.autointerp.cache import ReplyCache
from moe_lens.autointerp.client import Client
from moe_lens.autointerp.explain import explain
from moe_lens.autointerp.prompts import marked
from moe_lens.autointerp.scoring.items import MOVED, make_items
from moe_lens.autointerp.scoring.judge import ANSWER_COLUMNS, judge, judge_requests
from moe_lens.autointerp.transport import ChatLine
from moe_lens.errors import BadConfig
from tests.autointerp.asking import in_turn
from tests.autointerp.llm_server import KEY, Answer, Asked, Behave, LLMServer, answers, explanation
from tests.autointerp.planted_tables import EXPERTS, exemplar_rows, label_rows, lens_rows

pytestmark = pytest.mark.usefixtures("api_key")
SCORERS = ("detection", "fuzz")
ITEM = re.compile(r"^(\d+)\. (.*)$", re.MULTILINE)
Texts = dict[str, Any]


@pytest.fixture(scope="module")
def exemplars() -> pd.DataFrame:
    return exemplar_rows()


@pytest.fixture(scope="module")
def items(exemplars) -> pd.DataFrame:
    return make_items(exemplars)


@pytest.fixture(scope="module")
def labels() -> pd.DataFrame:
    return label_rows()


def shown(items: pd.DataFrame) -> pd.Series:
    texts = zip(items["text"], items["char_start"], items["char_end"], strict=True)
    return pd.Series([marked(*text) for text in texts], index=items.index)


def oracle(items: pd.DataFrame, wrong: Callable[[int], bool] = lambda number: False) -> Behave:
    """A judge that knows which marks are right. It answers from the text alone, whatever the numbers are."""
    truth = dict(zip(shown(items), items["negatives"] == "", strict=True))
    assert len(truth) == len(items), "texts are ambiguous"

    def behave(asked: Asked) -> Answer:
        if wrong(asked.number):
            return Answer("cannot say")
        found = ITEM.findall(asked.body["messages"][1]["content"])
        return Answer(answers({int(number): 4 * bool(truth[text]) for number, text in found}))

    return behave


def auroc(scores: pd.Series, positive: pd.Series) -> float:
    yes, no = scores[positive].to_numpy(), scores[~positive].to_numpy()
    return float((np.sign(yes[:, None] - no) / 2 + 0.5).mean())


def run(server: LLMServer, labels, items, scorer="detection", client: dict[str, Any] | None = None, **settings: Any):
    given = {"cache": None, "max_retries": 0} | (client or {})
    return judge(Client("m", server.url, **given), labels, items, scorer=scorer, progress=False, **settings)


# --- answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_judge_that_knows_the_truth_scores_1_for_every_expert_and_kind(serve, labels, items, scorer) -> None:
    table = run(serve(oracle(items)), labels, items, scorer, control="shuffled")
    assert tuple(table.columns) == ANSWER_COLUMNS
    assert (set(table["scorer"]), set(table["control"]), set(table["outcome"])) == ({scorer}, {"shuffled"}, {"ok"})
    asked = items[(items["negatives"] == "") | ((items["negatives"] == MOVED) == (scorer == "fuzz"))]
    assert sorted(table["item"]) == sorted(asked["item"]), "every item once"
    found = table.merge(items, on=["item", "layer", "expert"], suffixes=("", "_item"))
    kinds = {MOVED} if scorer == "fuzz" else {"random", "same_token", "near_miss", "other"}
    for _, mine in found.groupby(["layer", "expert"]):
        assert set(mine["negatives"]) == kinds | {""}
        for kind in kinds:
            pair = mine[mine["negatives"].isin(["", kind])]
            assert auroc(pair["score"], pair["negatives"] == "") == 1.0


def test_a_null_is_an_abstention_of_that_item(serve, labels, items) -> None:
    def behave(asked: Asked) -> Answer:
        numbers = [int(number) for number, _ in ITEM.findall(asked.body["messages"][1]["content"])]
        return Answer(answers({number: None if number == 3 else 2 for number in numbers}))

    table = run(serve(behave), labels, items)
    n_prompts = len(judge_requests(labels, items, scorer="detection"))
    assert table["outcome"].value_counts().to_dict() == {"ok": len(table) - n_prompts, "abstained": n_prompts}
    assert (table["score"].isna() == (table["outcome"] == "abstained")).all()


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (Answer("no"), "invalid"),
        (Answer(""), "empty"),
        (Answer(answers({1: 4})), "too_few_answers"),
        (Answer(answers(dict.fromkeys(range(1, 40), 4))), "too_many_answers"),
        (Answer(None, refusal="no"), "refused"),
        (Answer.error(500), "failed"),
    ],
)
def test_an_unusable_reply_takes_its_whole_prompt_and_no_other(serve, labels, items, reply, outcome) -> None:
    good = oracle(items)
    requests = judge_requests(labels, items, scorer="detection")
    victim = requests[2]
    text = victim.request.messages[1]["content"]
    server = serve(lambda asked: reply if asked.body["messages"][1]["content"] == text else good(asked))
    table = run(server, labels, items).set_index("item")
    hit = table.index.isin(victim.items)
    assert set(table.loc[hit, "outcome"]) == {outcome}
    assert table.loc[hit, "score"].isna().all()
    assert set(table.loc[~hit, "outcome"]) == {"ok"}
    assert table.loc[~hit, "score"].notna().all()


def test_items_beyond_the_budget_say_so(serve, labels, items) -> None:
    table = run(serve(oracle(items)), labels, items, client={"max_calls": 3})
    assert set(table.loc[table["score"].isna(), "outcome"]) == {"budget"}
    assert 3 * 15 < table["score"].notna().sum() <= 3 * 20


def test_rows_without_a_label_and_labels_without_items_are_passed_over(serve, labels, items) -> None:
    some = labels.assign(status=["ok", "abstained", "ok", "ok"], expert=[0, 1, 0, 99])
    table = run(serve(oracle(items)), some, items)
    assert set(zip(table["layer"], table["expert"], strict=True)) == {(0, 0), (3, 0)}
    assert run(serve(oracle(items)), some[:0], items).empty


def test_each_facet_is_judged_by_itself(serve, labels, items) -> None:
    one = labels[:1]
    both = pd.concat([one.assign(facet=1), one.assign(facet=2, label="something else")], ignore_index=True)
    server = serve(oracle(items))
    table = run(server, both, items)
    assert table.groupby("facet")["item"].nunique().tolist() == [len(table) / 2] * 2
    described = {asked.body["messages"][1]["content"].splitlines()[0] for asked in server.asked}
    assert described == {f"Description: {label}" for label in both["label"]}


@pytest.mark.parametrize("settings", [{"scorer": "simulation"}, {"scorer": "fuzz", "per_prompt": 1}])
def test_impossible_settings_are_refused(labels, items, settings) -> None:
    with pytest.raises(BadConfig):
        judge_requests(labels, items, **settings)


# --- what the judge can know ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_judge_sees_label_and_texts_and_nothing_else(labels, items, scorer) -> None:
    """Other layers, experts, kinds, scores and numbers of items make the same prompts."""
    disguised = items.assign(
        layer=items["layer"] + 50, expert=items["expert"] + 1000, score=-1.0, weight=9.0, quantile=0.5,
        item=items["item"] * 7 + 3, routed=False, document=0, position=0, token_id=0,
        negatives=items["negatives"].replace({"random": "other", "other": "random"}),
    )  # fmt: skip
    moved = labels.assign(layer=labels["layer"] + 50, expert=labels["expert"] + 1000)
    before, after = (
        [question.request for question in judge_requests(*tables, scorer=scorer)]
        for tables in ((labels, items), (moved, disguised))
    )
    assert before == after


@pytest.mark.parametrize("scorer", SCORERS)
def test_requests_depend_on_no_order_and_no_other_expert(labels, items, scorer) -> None:
    def requests(labels: pd.DataFrame, items: pd.DataFrame, **settings: Any) -> dict[str, list[Any]]:
        found = judge_requests(labels, items, scorer=scorer, **settings)
        return {f"{q.layer}.{q.expert}": [x.request for x in found if x[:2] == q[:2]] for q in found}

    everything = requests(labels, items)
    assert requests(labels[::-1], items.sample(frac=1, random_state=0)) == everything
    assert requests(labels[1:2], items[items["expert"] == 1]) == {"0.1": everything["0.1"]}
    assert requests(labels, items, seed=1) != everything


@pytest.mark.parametrize(("scorer", "per_prompt"), [("detection", 20), ("fuzz", 20), ("detection", 7), ("fuzz", 4)])
def test_every_prompt_holds_both_classes(labels, items, scorer, per_prompt) -> None:
    kind = items.set_index("item")["negatives"]
    sizes, positives = [], []
    for question in judge_requests(labels, items, scorer=scorer, per_prompt=per_prompt):
        is_positive = kind[list(question.items)] == ""
        assert len(set(is_positive)) == 2
        assert len(question.items) <= per_prompt
        sizes.append(len(question.items))
        positives.append(int(is_positive.sum()))
    assert max(sizes) - min(sizes) <= 1
    assert len(set(positives)) > 1, "how many fit is left to chance"


def test_a_class_of_one_item_is_in_one_prompt(labels, items) -> None:
    """Nothing can be done about the others, and nothing is lost."""
    mine = items[(items["layer"] == 0) & (items["expert"] == 0)]
    few = pd.concat([mine[mine["negatives"] == ""][:1], mine[mine["negatives"] == "random"]])
    questions = judge_requests(labels, few, scorer="detection", per_prompt=4)
    assert sorted(item for question in questions for item in question.items) == sorted(few["item"])


@pytest.mark.parametrize("per_prompt", [20, 1000])
def test_the_two_marks_of_one_text_are_in_different_prompts(labels, items, per_prompt) -> None:
    """Side by side, one of the two would give the other away."""
    text = items.set_index("item")["text"]
    for question in judge_requests(labels, items, scorer="fuzz", per_prompt=per_prompt):
        assert text[list(question.items)].is_unique


@pytest.fixture(scope="module")
def orders() -> dict[str, pd.DataFrame]:
    """Place in the prompt, kind, and the kind before it, of thousands of items (a prompt's last places vary)."""
    experts = [(layer, expert) for layer in range(2) for expert in range(6)]
    items = make_items(exemplar_rows(experts))
    kind = items.set_index("item")["negatives"]
    found = {}
    for scorer in SCORERS:
        parts = []
        for seed in range(3):
            for question in judge_requests(label_rows(experts), items, scorer=scorer, per_prompt=10, seed=seed):
                kinds = kind[list(question.items)].to_numpy()
                parts.append(pd.DataFrame({"place": range(len(kinds)), "kind": kinds}))
                parts[-1]["before"] = parts[-1]["kind"].shift(fill_value="start")
                parts[-1]["rank"] = np.argsort(np.argsort(question.items))
        found[scorer] = pd.concat(parts, ignore_index=True).assign(positive=lambda rows: rows["kind"] == "")
    return found


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_place_in_the_prompt_tells_nothing(orders, scorer) -> None:
    rows = orders[scorer]
    assert len(rows) > 3000
    for told in ("positive", "kind", "rank"):
        table = pd.crosstab(rows.loc[rows["place"] < 9, "place"], rows[told])
        assert chi2_contingency(table).pvalue > 1e-3, told


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_item_before_tells_nothing(orders, scorer) -> None:
    """But that a prompt holds a fixed stock of both: of 10 items, one that fits leaves 9 others."""
    rows = orders[scorer]
    rows = rows[rows["before"] != "start"]
    after_yes, after_no = (rows.loc[(rows["before"] == "") == yes, "positive"].mean() for yes in (True, False))
    assert abs(after_yes - after_no) < 0.1


# --- money, kills and keys --------------------------------------------------------------------------------------


def label_and_judge(client: Client, exemplars: pd.DataFrame) -> list[pd.DataFrame]:
    """The whole of a small run: labels, detection, fuzz."""
    labels = explain(client, exemplars, lens_rows(), corpus_name="prose", progress=False)
    items = make_items(exemplars)
    return [labels, *(judge(client, labels, items, scorer=s, per_prompt=30, progress=False) for s in SCORERS)]


def labeller_and_judge(items: pd.DataFrame, delay: float = 0) -> Behave:
    good = oracle(items)

    def behave(asked: Asked) -> Answer:
        content = asked.body["messages"][1]["content"]
        if content.startswith("Layer"):
            return Answer(explanation(content.splitlines()[0]), delay=delay)
        return Answer(good(asked).content, delay=delay)

    return behave


N_REQUESTS = 4 + 4 * 4 + 4 * 4  # experts, and prompts of each for detection and fuzz


@pytest.mark.parametrize("n", [0, 1, 4, 5, 20, N_REQUESTS - 1])
def test_a_run_that_breaks_off_after_any_call_repeats_none(serve, exemplars, items, file, monkeypatch, n) -> None:
    class Killed(BaseException):
        pass

    server = serve(labeller_and_judge(items))
    send = ChatLine.send

    async def fragile(self, question):
        if len(server.asked) >= n:
            raise Killed
        return await send(self, question)

    settings: dict[str, Any] = {"cache": file, "concurrency": 1}
    monkeypatch.setattr(ChatLine, "send", fragile)
    with pytest.raises(Killed):
        label_and_judge(Client("m", server.url, **settings), exemplars)
    assert len(server.asked) == n
    monkeypatch.setattr(ChatLine, "send", send)
    resumed = label_and_judge(Client("m", server.url, **settings), exemplars)
    assert len(server.asked) == N_REQUESTS, "every request was made exactly once"
    assert len({json.dumps(asked.body["messages"]) for asked in server.asked}) == N_REQUESTS
    again = label_and_judge(Client("m", server.url, **settings), exemplars)
    assert len(server.asked) == N_REQUESTS
    for one, other in zip(resumed, again, strict=True):
        pd.testing.assert_frame_equal(one, other)


@pytest.mark.slow
def test_a_killed_process_repeats_no_reply_that_was_there(serve, exemplars, items, file, tmp_path: Path) -> None:
    """kill -9 in the middle of the judging."""
    server = serve(labeller_and_judge(items, delay=0.03))
    exemplars.to_parquet(tmp_path / "exemplars.parquet")
    code = (
        "import sys; import pandas as pd; from pathlib import Path\n"
        "from tests.autointerp.test_judge import Client, label_and_judge\n"
        "client = Client('m', sys.argv[1], cache=Path(sys.argv[2]), concurrency=4)\n"
        "label_and_judge(client, pd.read_parquet(sys.argv[3]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(file), str(tmp_path / "exemplars.parquet")])
    while len(server.asked) < 14 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9
    time.sleep(0.2)  # what was on its way
    asked, kept = len(server.asked), len(ReplyCache(file))
    assert 14 - 4 <= kept < N_REQUESTS
    assert asked - kept <= 4, "more is lost than what was on its way"
    tables = label_and_judge(Client("m", server.url, cache=file), exemplars)
    assert len(server.asked) - asked == N_REQUESTS - kept
    assert all(set(table["outcome"]) == {"ok"} for table in tables[1:])


def test_keys_and_prompts_reach_no_file(serve, exemplars, items, tmp_path: Path, caplog, capfd) -> None:
    """A server that quotes the key everywhere, and a cache that holds replies only."""
    good = labeller_and_judge(items)

    def behave(asked: Asked) -> Answer:
        if asked.number % 3 == 1:
            return (Answer(f"no {KEY}"), Answer.error(500, KEY), Answer(None, refusal=KEY))[asked.number // 3 % 3]
        if asked.last.startswith("Layer"):
            return Answer(explanation(f"it is {KEY}"))
        return good(asked) if len(asked.body["messages"]) == 2 else Answer(f"no {KEY}")

    client = Client("m", serve(behave).url, cache=tmp_path / "replies.sqlite", concurrency=1, max_retries=0)
    with caplog.at_level("DEBUG"):
        tables = label_and_judge(client, exemplars)
    for i, table in enumerate(tables):
        table.to_parquet(tmp_path / f"{i}.parquet", compression=None)
    assert set(tables[1]["outcome"]) > {"ok"}
    assert any("[key]" in str(label) for label in tables[0]["label"])
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(files) >= 4
    said = "".join(record.getMessage() for record in caplog.records) + "".join(capfd.readouterr())
    assert all(KEY.encode() not in content for content in [*files, said.encode()])
    stored = b"".join(content for content in files if content.startswith(b"SQLite"))
    assert b"Description:" not in stored
    assert stored


def test_the_prediction_is_what_is_asked(serve, labels, items, file) -> None:
    server = serve(oracle(items))
    requests = [question.request for question in judge_requests(labels, items, scorer="fuzz")]
    client = Client("m", server.url, cache=file)
    predicted = client.predict(requests).calls
    judge(client, labels, items, scorer="fuzz", progress=False)
    assert (len(server.asked), client.predict(requests).calls) == (predicted, 0)
    assert len(EXPERTS) * 2 <= predicted


def test_a_wrong_key_stops_the_judge_at_the_first_call(serve, labels, items) -> None:
    server = serve(in_turn(Answer.error(401)))
    with pytest.raises(BadConfig, match="OPENAI_API_KEY"):
        run(server, labels, items)
    assert len(server.asked) == 1
