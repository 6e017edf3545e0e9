"""``moe-lens autointerp`` on a small random model, in this process, with a language model on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.autointerp.llm_server import KEY, Answer, Asked, LLMServer, answers, explanation, facets
from tests.autointerp.published_files import FULL, write_summary
from tests.cli.conftest import Cli, contents, leftovers

LIST = '{"object": "list", "data": [{"id": "loop-1", "object": "model", "created": 0, "owned_by": "me"}]}'
TABLES = ("exemplars", "logit_lens", "labels", "label_answers", "label_scores", "label_summary", "routing")
N_EXPERTS = 12


def digits(asked: Asked) -> Answer:
    """Labels every expert "digits", and judges by looking for one in the mark."""
    if asked.path.endswith("/models"):
        return Answer(raw=LIST)
    text = asked.last
    if "Items" not in text:
        name = asked.body.get("response_format", {}).get("json_schema", {}).get("name")
        return Answer(facets("digits", "words") if name == "facets" else explanation("digits"))
    marks = re.findall(r"^(\d+)\. .*?\[\[(.*?)\]\]", text, re.MULTILINE)
    return Answer(answers({int(number): 4 if re.search(r"\d", token) else 0 for number, token in marks}))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLMServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with LLMServer(digits) as found:
        yield found


@pytest.fixture(autouse=True)
def no_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def words(moe_folder: Path, text_file: Path) -> tuple[object, ...]:
    return ("autointerp", "--model", moe_folder, "--dataset", text_file, "-o", "runs/a")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


def questions(server: LLMServer) -> list[str]:
    return [json.dumps(asked.body, sort_keys=True) for asked in server.asked if not asked.path.endswith("/models")]


def test_a_lexical_run_leaves_a_run_directory(cli: Cli, words: tuple[object, ...], run: Path) -> None:
    outcome = cli(*words)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.last_line == "runs/a"
    assert {f"{table}.parquet" for table in TABLES} <= {path.name for path in run.iterdir()}
    assert leftovers(run) == []
    labels = pd.read_parquet(run / "labels.parquet")
    assert len(labels) == N_EXPERTS
    assert set(labels["labeller"]) == {"lexical"}
    assert not (run / "replies.sqlite").exists()


def test_an_equal_run_shows_the_first_and_changes_nothing(cli: Cli, words: tuple[object, ...], run: Path) -> None:
    first = cli(*words)
    before = contents(run)
    assert cli(*words) == first
    assert contents(run) == before


@pytest.mark.parametrize("change", [("--seed", "1"), ("--max-length", "16"), ("--max-tokens", "500")])
def test_exemplars_of_other_settings_are_refused(
    cli: Cli, words: tuple[object, ...], run: Path, change: tuple[str, str]
) -> None:
    assert cli(*words).code == 0
    before = contents(run)
    outcome = cli(*words, *change)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert contents(run) == before


def test_no_resume_leaves_the_results_of_other_commands(
    cli: Cli, words: tuple[object, ...], run: Path, moe_folder: Path, text_file: Path
) -> None:
    probe = ("probe", "--model", moe_folder, "--dataset", text_file, "--concepts", "all_digits", "--k", "1")
    assert cli(*probe, "-o", "runs/a").code == 0
    assert cli(*words).code == 0
    kept = (run / "probe.parquet").read_bytes()
    assert cli(*words, "--max-length", "16", "--no-resume").code == 0
    assert (run / "probe.parquet").read_bytes() == kept
    assert cli(*probe, "-o", "runs/a", "--no-resume").code == 0
    assert (run / "labels.parquet").exists()


def test_a_server_alone_labels_and_judges(cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer) -> None:
    outcome = cli(*words, "--base-url", server.url)
    assert outcome.code == 0, outcome.err
    assert "the model that wrote them, which favours them" in " ".join(outcome.out.split())
    labels = pd.read_parquet(run / "labels.parquet")
    assert set(labels["label"]) == {"digits"}
    assert set(labels["labeller"]) == {"openai:loop-1"}
    scores = pd.read_parquet(run / "label_scores.parquet")
    assert scores["same_model"].all()
    assert {"detection", "fuzz"} == set(scores["scorer"])
    assert set(scores["control"]) == {"none", "shuffled"}
    # every expert has the same label, so another expert's label is worth as much; a token id decides all of it
    same = scores[(scores["negatives"] == "same_token") & (scores["status"] == "ok")]
    assert len(same)
    assert (same["auroc"] == 0.5).all()


def test_the_key_is_nowhere(cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer) -> None:
    outcome = cli(*words, "--base-url", server.url)
    assert any(asked.headers.get("authorization") == f"Bearer {KEY}" for asked in server.asked)
    assert KEY not in outcome.out + outcome.err
    assert [name for name, content in contents(run).items() if KEY.encode() in content] == []


def test_no_call_is_made_twice(cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer) -> None:
    for budget in (5, 30):
        outcome = cli(*words, "--base-url", server.url, "--max-calls", budget)
        assert outcome.code == 0
        assert "budget" in outcome.out
    outcome = cli(*words, "--base-url", server.url)
    assert outcome.code == 0
    asked = questions(server)
    assert len(asked) == len(set(asked)) > 35
    assert "budget" not in outcome.out
    assert pd.read_parquet(run / "labels.parquet")["status"].eq("ok").all()
    assert cli(*words, "--base-url", server.url).out == outcome.out
    assert questions(server) == asked


def test_facets_are_scored_one_by_one(cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer) -> None:
    outcome = cli(*words, "--base-url", server.url, "--facets", 3, "--experts", "L0.E1", "--no-control", "--no-fuzz")
    assert outcome.code == 0, outcome.err
    labels = pd.read_parquet(run / "labels.parquet")
    assert labels[["layer", "expert", "facet"]].values.tolist() == [[0, 1, 1], [0, 1, 2]]
    scores = pd.read_parquet(run / "label_scores.parquet")
    assert {1, 2} == set(scores["facet"])
    random = scores[scores["negatives"] == "random"]
    assert random["coverage"].between(0, 1).all()


def test_a_persons_labels_are_scored_by_their_rules(
    cli: Cli, words: tuple[object, ...], run: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.csv").write_text("layer,expert,label,rule\n0,1,digits,\\d\n1,2,letters,\\p{L}\n")
    outcome = cli(*words, "--labels", "mine.csv", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["labeller"] == "file:mine.csv"
    assert [row["address"] for row in found["labels"]] == ["L0.E1", "L1.E2"]
    scores = pd.read_parquet(run / "label_scores.parquet")
    assert set(scores["scorer"]) == {"rule"}


def test_labels_of_several_labellers_stand_side_by_side(
    cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer
) -> None:
    assert cli(*words).code == 0
    assert cli(*words, "--base-url", server.url).code == 0
    for table in ("labels", "label_scores", "label_summary", "label_answers"):
        assert set(pd.read_parquet(run / f"{table}.parquet")["labeller"]) == {"lexical", "openai:loop-1"}, table
    assert "lexical" in cli(*words).out


def test_a_labeller_that_finds_nothing_is_a_result_and_takes_nothing_away(
    cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer
) -> None:
    assert cli(*words).code == 0
    scores = pd.read_parquet(run / "label_scores.parquet")
    server.behave = lambda asked: Answer(raw=LIST) if asked.path.endswith("/models") else Answer(explanation(None))
    outcome = cli(*words, "--base-url", server.url)
    assert outcome.code == 0, outcome.err
    assert f"0 of {N_EXPERTS} experts have a label" in outcome.out
    assert "none could be scored on tokens of the same id" in " ".join(outcome.out.split())
    labels = pd.read_parquet(run / "labels.parquet")
    assert set(labels["labeller"]) == {"lexical", "openai:loop-1"}
    assert set(labels[labels["labeller"] == "openai:loop-1"]["status"]) == {"abstained"}
    pd.testing.assert_frame_equal(pd.read_parquet(run / "label_scores.parquet"), scores)
    assert cli(*words, "--base-url", server.url).out == outcome.out


def test_labelling_fewer_experts_keeps_the_labels_of_the_others(
    cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer
) -> None:
    options = (*words, "--base-url", server.url)
    assert cli(*options).code == 0
    before = {table: pd.read_parquet(run / f"{table}.parquet") for table in ("labels", "label_scores", "label_summary")}
    asked = questions(server)
    assert cli(*options, "--experts", "L0.E1").code == 0
    assert questions(server) == asked
    assert cli(*options, "--experts", "L0.E1", "--facets", 2).code == 0
    labels = pd.read_parquet(run / "labels.parquet")
    assert labels.groupby(["layer", "expert"]).size().to_dict() == {
        (layer, expert): 1 + ((layer, expert) == (0, 1)) for layer in (0, 1) for expert in range(6)
    }
    assert cli(*options).code == 0
    for table, frame in before.items():
        pd.testing.assert_frame_equal(pd.read_parquet(run / f"{table}.parquet"), frame)


def test_a_server_that_answers_nothing_fails_the_run_and_replaces_nothing(
    cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer
) -> None:
    options = (*words, "--base-url", server.url, "--experts", "L0.E1")
    assert cli(*options).code == 0
    tables = {path.name: path.read_bytes() for path in run.glob("*.parquet")}
    server.behave = lambda asked: Answer(raw=LIST) if asked.path.endswith("/models") else Answer.error(500)
    outcome = cli(*options, "--items", 10, "--no-control", "--no-fuzz", "--labeller", "openai:other")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "HTTP 500" in outcome.err
    assert {path.name: path.read_bytes() for path in run.glob("*.parquet")} == tables


def test_a_token_budget_ends_the_calls(cli: Cli, words: tuple[object, ...], server: LLMServer) -> None:
    outcome = cli(*words, "--base-url", server.url, "--token-budget", 500, "--concurrency", 1)
    assert outcome.code == 0, outcome.err
    assert "budget" in outcome.out
    assert len(questions(server)) == 5  # the server says 110 tokens a call


def test_a_text_without_validate_documents_is_no_error(
    cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer
) -> None:
    options = (*words, "--limit", 4, "--base-url", server.url)
    outcome = cli(*options)
    assert outcome.code == 0, outcome.err
    exemplars = pd.read_parquet(run / "exemplars.parquet")
    assert exemplars["char_start"].dtype == exemplars["char_end"].dtype == "int64"
    visited = exemplars[exemplars["routed"]].iloc[0]
    assert cli("show", f"L{visited['layer']}.E{visited['expert']}", "-o", "runs/a").code == 0


def test_a_dry_run_counts_the_requests_and_writes_nothing(
    cli: Cli, words: tuple[object, ...], run: Path, server: LLMServer
) -> None:
    options = (*words, "--labeller", "openai:m", "--base-url", server.url)
    plan = json.loads(cli(*options, "--dry-run", "--json").out)
    assert not run.exists()
    assert server.asked == []
    assert plan["calls"] == sum(cost["calls"] for cost in plan["costs"])
    assert cli(*options).code == 0
    asked = len(questions(server))
    assert asked <= plan["calls"] <= 1.5 * asked
    size = sum(len(message["content"]) for one in server.asked for message in one.body["messages"]) / 4
    assert 0.5 * size <= plan["tokens_in"] <= 2 * size
    assert (
        "Requests" in cli(*words, "-o", "runs/b", "--labeller", "openai:m", "--base-url", server.url, "--dry-run").out
    )


def test_show_prints_what_the_run_says_about_one_expert(cli: Cli, words: tuple[object, ...]) -> None:
    assert cli(*words).code == 0
    outcome = cli("show", "L0.E1", "-o", "runs/a")
    assert outcome.code == 0, outcome.err
    assert "[[" in outcome.out
    assert outcome.last_line == "runs/a"


def test_released_labels_are_shown_with_their_controls(cli: Cli, tmp_path: Path) -> None:
    file = write_summary(tmp_path, {"Small-MoE_L9": FULL})
    outcome = cli("autointerp", "--from-published", file)
    assert outcome.code == 0, outcome.err
    assert "always says yes" in outcome.out
    found = json.loads(cli("autointerp", "--from-published", file, "--json").out)
    assert len(found["labels"]) == sum(row["n_experts"] + row["n_abstained"] for row in found["layers"])
    refused = cli("autointerp", "--from-published", file, "--labeller", "lexical")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert cli("autointerp", "--from-published", "none.json").code == 2


@pytest.mark.parametrize(
    ("behave", "says"),
    [
        (lambda _: Answer.error(401, f"Incorrect API key: {KEY}"), "wants another API key"),
        (
            lambda asked: Answer(raw=LIST) if asked.path.endswith("/models") else Answer.error(401),
            "refused the API key",
        ),
        (lambda asked: Answer(raw=LIST) if asked.path.endswith("/models") else Answer.error(404), "has no model"),
    ],
)
def test_a_server_that_cannot_be_used_ends_the_run_with_one_sentence(
    cli: Cli, words: tuple[object, ...], server: LLMServer, behave: Callable[[Asked], Answer], says: str
) -> None:
    server.behave = behave
    outcome = cli(*words, "--base-url", server.url)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert says in outcome.err
    assert KEY not in outcome.err
    assert len(questions(server)) <= 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--labeller", "lexicl"), "--labeller cannot be 'lexicl'"),
        (("--labeller", "gguf:none.gguf"), "none.gguf"),
        (("--labeller", "openai:m"), "OPENAI_API_KEY"),
        (("--labels", "none.csv"), "cannot read the labels none.csv"),
        (("--labeller", "lexical", "--labels", "none.csv"), "cannot read the labels"),
        (("--labeller", "openai:m", "--base-url", "ftp://x"), "--base-url"),
        (("--base-url", "http://127.0.0.1:9/v1"), "cannot reach"),
        (("--facets", "9"), "--facets"),
        (("--facets", "2"), "--facets needs a language model"),
        (("--items", "1"), "--items"),
        (("--layers", "7"), "no layer 7"),
        (("--experts", "L0.E99"), "no expert 99"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    cli: Cli,
    words: tuple[object, ...],
    run: Path,
    more: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    outcome = cli(*words, *more)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert says in outcome.err
    assert not run.exists()
