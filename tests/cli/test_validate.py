"""``moe-lens validate`` on a planted checkpoint, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.autointerp.labels import read_labels
from moe_lens.causal.trial import job
from moe_lens.causal.trial.kept import Kept
from tests.autointerp.llm_server import KEY, Answer, Asked, LLMServer
from tests.causal.trial import made
from tests.cli.conftest import Cli, contents, leftovers
from tests.cli.test_autointerp import digits
from tests.models import tiny

KINDS = ("frequent-token", "token-class", "topic", "other-expert", "random-expert")
CSV = "layer,expert,label,rule\n" + "".join(
    f"{row.layer},{row.expert},{row.label},{row.rule}\n" for row in made.LABELS.itertuples()
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(made.made().model, tmp_path_factory.mktemp("models") / "planted")


@pytest.fixture(scope="module")
def planted_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "planted.jsonl"
    rows = [{"text": document.text, "domain": document.fields["domain"]} for document in made.text().documents]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    path.write_text(CSV, encoding="utf-8")
    return path


@pytest.fixture
def words(planted: Path, planted_text: Path) -> tuple[object, ...]:
    """Without labels."""
    return ("validate", "--model", planted, "--dataset", planted_text, "--draws", 200, "-o", "runs/a")


@pytest.fixture
def tried(words: tuple[object, ...], mine: Path) -> tuple[object, ...]:
    return (*words, "--labels", mine)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLMServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with LLMServer(digits) as found:
        yield found


def test_the_verdicts_that_are_planted_are_printed_with_the_false_labels_beside_them(
    cli: Cli, tried: tuple[object, ...], run: Path
) -> None:
    outcome = cli(*tried)
    assert (outcome.code, outcome.err) == (0, "")
    for line in ("L0.E3 supported", "L0.E4 routing-only", "L0.E5 refuted", "L0.E2 underpowered"):
        assert line in " ".join(outcome.out.split())
    assert all(kind.split("-")[0] in outcome.out for kind in KINDS)
    assert "1 of 4 labels on trial are supported" in outcome.out
    assert outcome.last_line == "runs/a"
    assert max(map(len, outcome.out.splitlines()[:10])) <= 100
    assert {"validation.parquet", "validation.md", "manifest.json"} == set(contents(run))
    assert leftovers(run) == []


def test_json_is_one_object_with_every_label(cli: Cli, tried: tuple[object, ...]) -> None:
    found = json.loads(cli(*tried, "--json").out)
    verdicts = {row["address"]: row["verdict"] for row in found["labels"]}
    assert verdicts == {
        "L0.E2": "underpowered",
        "L0.E3": "supported",
        "L0.E4": "routing-only",
        "L0.E5": "refuted",
    }
    assert {row["label_kind"] for row in found["false_labels"]} == set(KINDS)
    assert sum(row["n"] for row in found["summary"] if row["label_kind"] == "real") == 4
    assert found["run"] == "runs/a"


def test_an_equal_trial_is_shown_without_a_pass(
    cli: Cli, tried: tuple[object, ...], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli(*tried)
    before = contents(run)
    monkeypatch.setattr(job.trial, "validate", None)
    assert cli(*tried) == first
    assert contents(run) == before


def test_an_interrupted_trial_continues(
    cli: Cli, tried: tuple[object, ...], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Kept.write

    def stopping(self: Kept, found, *, alone: bool) -> None:
        write(self, found, alone=alone)
        written.append(f"{found.expert} {found.mode}")
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "write", stopping)
    stopped = cli(*tried)
    assert stopped.code == 130
    assert "continues from its finished parts" in stopped.err
    assert not (run / "validation.parquet").exists()
    assert cli(*tried).code == 0
    assert len(written) == len(set(written)) == 8
    assert leftovers(run) == []


def test_experts_and_samples_are_chosen(cli: Cli, tried: tuple[object, ...]) -> None:
    def of(*more: object) -> tuple[list[str], bool]:
        found = json.loads(cli(*tried, "--nulls", "none", "--json", *more).out)
        return sorted(row["address"] for row in found["labels"]), found["settings"]["is_sample"]

    everyone = ["L0.E2", "L0.E3", "L0.E4", "L0.E5"]
    assert of("--experts", "L0.E3,L0.E5") == (["L0.E3", "L0.E5"], False)
    assert of("--n-labels", 1, "--experts", "all") == (everyone, False)
    sampled, is_sample = of("--n-labels", 2)
    assert is_sample
    assert set(sampled) < set(everyone)
    assert "a sample of 4 labels" in cli(*tried, "--nulls", "none", "--n-labels", 2).out


def test_more_modes_and_fewer_false_labels(cli: Cli, tried: tuple[object, ...], run: Path) -> None:
    assert cli(*tried, "--modes", "zero,mean_off,mean", "--nulls", "topic,other-expert", "--horizon", 2).code == 0
    table = pd.read_parquet(run / "validation.parquet")
    assert set(table["mode"]) == {"zero", "mean_off", "mean"}
    assert set(table["label_kind"]) == {"real", "topic", "other-expert"}
    assert set(table["horizon"]) == {2}


def test_a_concept_of_a_csv_judges_its_label(cli: Cli, words: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("layer,expert,label,concept\n0,3,digits,all_digits\n", encoding="utf-8")
    found = json.loads(cli(*words, "--labels", "c.csv", "--json").out)
    assert [row["verdict"] for row in found["labels"]] == ["supported"]


def test_only_tables_that_name_a_concept_have_the_column(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(
        "layer,expert,label,concept\n0,3,digits,all_digits\n0,4,code,domain_code\n0,5,x,\n", encoding="utf-8"
    )
    table = read_labels(path)
    assert table["concept"].tolist() == ["all_digits", "domain_code", None]
    path.write_text("layer,expert,label,concept\n0,3,digits,\n", encoding="utf-8")
    assert "concept" not in read_labels(path)


def label(cli: Cli, words: tuple[object, ...], *more: object) -> None:
    model, text = words[2], words[4]
    outcome = cli("autointerp", "--model", model, "--dataset", text, "-o", "runs/a", *more)
    assert outcome.code == 0, outcome.err


def test_labels_of_the_run_directory_are_tried_with_what_shuffled_activations_give(
    cli: Cli, words: tuple[object, ...], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label(cli, words, "--labeller", "lexical")
    before = {name: data for name, data in contents(run).items() if name != "manifest.json"}
    outcome = cli(*words)
    assert (outcome.code, outcome.err) == (0, "")
    table = pd.read_parquet(run / "validation.parquet")
    assert "shuffled" in set(table["label_kind"])
    assert table["label_kind"].iloc[0] == "real"
    after = contents(run)
    assert {name: after[name] for name in before} == before
    monkeypatch.setattr("moe_lens.autointerp.shuffled.shuffled_labels", None)
    assert cli(*words).out == outcome.out  # neither labelled nor tried again
    assert cli(*words, "--nulls", "topic").code == 0


def test_a_labeller_is_chosen_by_name(cli: Cli, words: tuple[object, ...], run: Path, mine: Path) -> None:
    label(cli, words, "--labels", mine)
    label(cli, words, "--labeller", "lexical")
    assert cli(*words, "--labeller", "file:mine.csv").code == 0
    table = pd.read_parquet(run / "validation.parquet")
    assert set(table[table["label_kind"] == "real"]["label"]) == set(made.LABELS["label"])
    refused = cli(*words, "--labeller", "openai:m")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "it has those of file:mine.csv, lexical" in refused.err


def test_a_language_model_judges_blind_and_is_not_asked_twice(
    cli: Cli, tried: tuple[object, ...], run: Path, server: LLMServer
) -> None:
    asks = (*tried, "--judge", "openai:m", "--base-url", server.url, "--experts", "L0.E3", "--judge-positions", 60)
    asks = (*asks, "--nulls", "other-expert")
    plan = json.loads(cli(*asks, "--dry-run", "--json").out)
    assert server.asked == []
    outcome = cli(*asks, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["settings"]["judge"] == "openai:m"
    assert found["labels"][0]["verdict"] in ("supported", "underpowered", "undecided")
    asked = len(server.asked)
    assert 0 < asked <= plan["calls"]["openai:m"]["calls"]
    assert all("L0.E3" not in one.last and "routed" not in one.last for one in server.asked)
    assert cli(*asks, "--json").out == outcome.out
    assert cli(*asks, "--draws", 300, "--json").code == 0
    assert len(server.asked) == asked


def test_a_second_judge_gives_kappa(cli: Cli, tried: tuple[object, ...], run: Path, server: LLMServer) -> None:
    outcome = cli(
        *tried, "--second-judge", "openai:m", "--base-url", server.url, "--experts", "L0.E3", "--nulls", "none"
    )
    assert outcome.code == 0, outcome.err
    table = pd.read_parquet(run / "validation.parquet")
    assert table["kappa_judge"].iloc[0] == pytest.approx(1)  # a server that looks for digits, and a rule that does


def test_a_judge_that_abstains_on_everything_is_refused(
    cli: Cli, tried: tuple[object, ...], run: Path, server: LLMServer
) -> None:
    def silent(asked: Asked) -> Answer:
        return Answer("I would rather not.")

    server.behave = silent
    asks = ("--judge", "openai:m", "--base-url", server.url, "--experts", "L0.E3", "--judge-positions", 20)
    outcome = cli(*tried, *asks, "--nulls", "none")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "abstained on every token" in outcome.err


def test_a_dry_run_says_what_a_trial_takes_and_writes_nothing(cli: Cli, tried: tuple[object, ...], run: Path) -> None:
    outcome = cli(*tried, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "16 passes" in outcome.out  # 4 experts, 2 modes, the expert and one beside it
    assert "L0.E2" in outcome.out
    assert "documents with the label" in outcome.out
    assert not run.exists()
    plan = json.loads(cli(*tried, "--dry-run", "--json").out)
    assert plan["n_passes"] == 16
    assert plan["calls"] == {}


ROW = "layer,expert,label,rule\n"


@pytest.mark.parametrize(
    ("csv", "more", "says"),
    [
        (ROW + "0,9,digits,[0-9]\n", (), "has no expert 9"),
        (ROW + "4,1,digits,[0-9]\n", (), "has no MoE layer 4"),
        (CSV + "0,3,numbers,[0-9]\n", (), "two labels for L0.E3"),
        (ROW + "0,3, ,[0-9]\n", (), "the label of L0.E3 is empty"),
        (ROW + "0,3,digits,[0-9\n", (), "the rule of L0.E3: bad regular expression"),
        ("expert,label\n3,digits\n", (), "has no column 'layer'"),
        ("", (), "has no column 'layer'"),
        ("layer,expert,label,concept\n0,3,digits,all_digit\n", (), "no concept is named 'all_digit'"),
        (ROW + "0,3,digits,\n", (), "none of these labels has a rule"),
        (ROW + "0,3,digits,~~~\n", (), "the labels mark no token"),
        (ROW + "0,3,all,(?s).\n", (), "every label marks every token"),
        (CSV, ("--horizon", "99"), "no document under test has 99 tokens"),
        (CSV, ("--horizon", "0"), "--horizon cannot be '0'"),
        (CSV, ("--modes", "zero,mean_of"), "unknown mode 'mean_of', did you mean 'mean_off'?"),
        (CSV, ("--modes", "zero"), "add mean_off"),
        (CSV, ("--nulls", "topics"), "unknown kind of null label 'topics', did you mean 'topic'?"),
        (CSV, ("--nulls", "shuffled"), "cannot be made anew"),
        (CSV, ("--judge", "opnai:m"), "--judge cannot be 'opnai:m'"),
        (CSV, ("--judge", "openai:m"), "OPENAI_API_KEY"),
        (CSV, ("--second-judge", "gguf:none.gguf"), "none.gguf"),
        (CSV, ("--labeller", "lexical"), "--labels and --labeller exclude each other"),
        (CSV, ("--experts", "L0.E9"), "has no expert 9"),
        (CSV, ("--experts", "L0.E1"), "there is no label to put on trial"),
        (CSV, ("--layers", "3"), "has no layer 3"),
        (CSV, ("--n-labels", "0"), "--n-labels"),
        (CSV, ("--batch-size", "4"), "--batch-size"),
        (CSV, ("--labels", "none.csv"), "cannot read the labels none.csv"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    cli: Cli, tried: tuple[object, ...], mine: Path, run: Path, csv: str, more: tuple[str, ...], says: str
) -> None:
    mine.write_text(csv, encoding="utf-8")
    outcome = cli(*tried, *more)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert says in outcome.err
    assert not run.exists()


def test_a_run_without_labels_says_what_to_do(cli: Cli, words: tuple[object, ...], run: Path) -> None:
    outcome = cli(*words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "run moe-lens autointerp --model" in outcome.err
    assert not run.exists()


def test_another_runs_directory_stays_as_it_was(
    cli: Cli, tried: tuple[object, ...], run: Path, moe_folder: Path, text_file: Path
) -> None:
    other = ml.load(str(moe_folder))
    ml.capture(other, ml.corpus(str(text_file)), out=run, progress=False)
    before = contents(run)
    outcome = cli(*tried)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "holds another run" in outcome.err
    assert contents(run) == before
