"""``moe-lens autointerp`` in a process of its own: with a key alone, killed on the way, and with a bad server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.autointerp.llm_server import KEY, Answer, Asked, LLMServer, answers, explanation
from tests.autointerp.test_local_server import model_file
from tests.cli.conftest import contents, leftovers
from tests.e2e.conftest import Moe, environment, start

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LIST = '{"object": "list", "data": [{"id": "loop-1", "object": "model", "created": 0, "owned_by": "me"}]}'
TABLES = ("exemplars", "logit_lens", "labels", "label_answers", "label_scores", "label_summary", "routing")
CONCURRENCY = 4


def is_question(asked: Asked) -> bool:
    return asked.path.endswith("/chat/completions")


def is_label(asked: Asked) -> bool:
    return is_question(asked) and "Items" not in first_question(asked)


def first_question(asked: Asked) -> str:
    """What was asked; a second question repeats it before its complaint."""
    return asked.body["messages"][1]["content"]


def marks(asked: Asked) -> dict[int, str]:
    """The marked token of every item by its number."""
    found = re.findall(r"^(\d+)\. .*?\[\[(.*?)\]\]", first_question(asked), re.MULTILINE)
    return {int(number): token for number, token in found}


def good(asked: Asked) -> Answer:
    """Labels every expert in words of its own, and judges by looking for a digit in the mark."""
    if not is_question(asked):
        return Answer(raw=LIST)
    if is_label(asked):
        layer, expert = re.search(r"Layer (\d+), expert (\d+)", first_question(asked)).groups()  # type: ignore[union-attr]
        return Answer(explanation(f"digits, as seen in {layer} by {expert}"))
    return Answer(answers({number: 4 * bool(re.search(r"\d", token)) for number, token in marks(asked).items()}))


def questions(server: LLMServer) -> Counter[str]:
    """How often each question was sent."""
    return Counter(json.dumps(asked.body, sort_keys=True) for asked in server.asked if is_question(asked))


@pytest.fixture(autouse=True)
def only_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def words(moe_folder: Path, text_file: Path) -> tuple[object, ...]:
    return ("autointerp", "--model", moe_folder, "--dataset", text_file, "--concurrency", CONCURRENCY)


@pytest.fixture(scope="module")
def undisturbed(moe_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Tables of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with LLMServer(good) as server:
        words = ("autointerp", "--model", moe_folder, "--dataset", text_file, "--base-url", server.url, "-o", "a")
        process = start(words, folder, env={"OPENAI_API_KEY": KEY})
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return tables(folder / "a")


def tables(run: Path) -> dict[str, pd.DataFrame]:
    return {name: pd.read_parquet(run / f"{name}.parquet") for name in TABLES}


def assert_same_tables(run: Path, expected: dict[str, pd.DataFrame]) -> None:
    for name, table in tables(run).items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=True, obj=name)
    assert leftovers(run) == []


def test_a_key_and_an_address_are_all_it_needs_and_the_key_stays_in_the_environment(moe: Moe, tmp_path: Path) -> None:
    """The default model on the default text, a little of each document, with every log that there is."""
    with LLMServer(good) as server:
        done = moe(
            "autointerp", "--base-url", server.url, "--document-tokens", 48,
            env={"MOE_LENS_DEBUG": "1", "OPENAI_LOG": "debug"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / done.stdout.rstrip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    labels = pd.read_parquet(run / "labels.parquet")
    assert (len(labels), set(labels["status"]), set(labels["labeller"])) == (64, {"ok"}, {"openai:loop-1"})
    assert {"detection", "fuzz"} == set(pd.read_parquet(run / "label_scores.parquet")["scorer"])
    assert len(questions(server)) > 64 * 5

    assert any(asked.headers.get("authorization") == f"Bearer {KEY}" for asked in server.asked)
    assert "openai._base_client" in done.stderr, "the log of the package is on"
    assert KEY not in done.stdout + done.stderr
    assert [name for name, content in contents(run).items() if KEY.encode() in content] == []


@pytest.mark.parametrize(("labelling", "number"), [(True, 6), (False, 25)], ids=["labelling", "scoring"])
def test_killed_among_its_requests_it_sends_none_again_that_was_answered(
    words: tuple[object, ...],
    moe: Moe,
    tmp_path: Path,
    undisturbed: dict[str, pd.DataFrame],
    labelling: bool,
    number: int,
) -> None:
    seen: list[Asked] = []
    running: list[subprocess.Popen[str]] = []

    def fatal(asked: Asked) -> Answer:
        if is_question(asked) and is_label(asked) == labelling:
            seen.append(asked)
            if len(seen) == number:
                running[0].send_signal(signal.SIGKILL)
        return good(asked)

    with LLMServer(fatal) as server:
        running.append(start((*words, "--base-url", server.url, "-o", "a"), tmp_path))
        running[0].communicate(timeout=300)
        assert running[0].returncode == -signal.SIGKILL
        assert not (tmp_path / "a" / "label_scores.parquet").exists()
    before = questions(server)
    assert number <= sum(before.values()), "it was killed with work behind it"

    with LLMServer(good) as server:
        done = moe(*words, "--base-url", server.url, "-o", "a")
    assert done.returncode == 0, done.stderr
    after = questions(server)
    assert max(after.values()) == 1
    assert len(before & after) <= CONCURRENCY, "what was on its way may be asked again, nothing else"
    assert_same_tables(tmp_path / "a", undisturbed)


LAUNCHER = """
import os, signal, sys
from moe_lens.capture import checkpointed
from moe_lens.cli.app import main

fatal, words = int(sys.argv[1]), sys.argv[2:]
checkpointed.checkpointed_stream.__kwdefaults__["every"] = 0.0
save, stream, saved = checkpointed._save, checkpointed.stream, []

def counted_save(*state):
    save(*state)
    saved.append(state)
    if len(saved) == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

def counted_stream(lens, loader, *rest, **settings):
    print("batches:", len(loader), file=sys.stderr, flush=True)
    return stream(lens, loader, *rest, **settings)

checkpointed._save, checkpointed.stream = counted_save, counted_stream
sys.exit(main(words))
"""
"""``moe-lens`` that saves after every batch, says how many it has before it, and ends at the save number `fatal`."""


def launch(fatal: int, *words: object, folder: Path) -> tuple[int, int, str]:
    """Return code, batches that the pass began with, and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(fatal), *map(str, words)],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    found = re.search(r"^batches: (\d+)$", done.stderr, re.MULTILINE)
    return done.returncode, int(found[1]) if found else 0, done.stderr


def test_killed_in_the_pass_it_continues_from_the_last_saved_batch(
    words: tuple[object, ...], tmp_path: Path, undisturbed: dict[str, pd.DataFrame]
) -> None:
    small = (*words, "--labeller", "lexical", "--batch-size", 1, "-o", "a")
    code, n_batches, err = launch(5, *small, folder=tmp_path)
    assert code == -signal.SIGKILL, err
    assert not (tmp_path / "a" / "exemplars.parquet").exists()
    code, left, err = launch(0, *small, folder=tmp_path)
    assert (code, left) == (0, n_batches - 5), err
    code, whole, err = launch(0, *small[:-1], "b", folder=tmp_path)
    assert (code, whole) == (0, n_batches), err
    assert_same_tables(tmp_path / "a", tables(tmp_path / "b"))


@pytest.mark.parametrize("change", [("--batch-size", 2), ("--document-tokens", 12)])
def test_a_pass_that_was_killed_under_other_settings_is_not_continued(
    words: tuple[object, ...], tmp_path: Path, change: tuple[str, object]
) -> None:
    small = (*words, "--labeller", "lexical", "--batch-size", 1)
    code, _, err = launch(5, *small, "-o", "a", folder=tmp_path)
    assert code == -signal.SIGKILL, err
    for folder in ("a", "b"):
        code, _, err = launch(0, *small, *change, "-o", folder, folder=tmp_path)
        assert code == 0, err
    assert_same_tables(tmp_path / "a", tables(tmp_path / "b"))


class BadServer:
    """Does something else wrong at each of the first questions, and answers the rest.

    What is wrong is wrong whenever the question comes, but for the troubles that a repetition cures.
    """

    LABELS = ("ok", "429", "500", "slow", "cut", "invalid", "refused", "empty")
    JUDGED = (
        "too_few_answers", "too_many_answers", "invalid", "refused", "empty", "failed", "429", "500", "slow", "cut",
        "null",
    )  # fmt: skip
    ONCE = ("429", "500", "slow", "cut")
    UNUSABLE = ("invalid", "refused", "empty", "too_few_answers", "too_many_answers", "failed")

    def __init__(self) -> None:
        self.trouble: dict[str, str] = {}
        self.n_items: Counter[str] = Counter()
        self.n_times: Counter[str] = Counter()
        self._left = {True: list(self.LABELS), False: list(self.JUDGED)}

    def __call__(self, asked: Asked) -> Answer:
        if not is_question(asked):
            return good(asked)
        text = first_question(asked)
        if text not in self.trouble:
            left = self._left[is_label(asked)]
            kind = self.trouble[text] = left.pop(0) if left else "ok"
            self.n_items[kind] += len(marks(asked)) if not is_label(asked) else 0
        kind = self.trouble[text]
        self.n_times[text] += 1
        return good(asked) if kind in self.ONCE and self.n_times[text] > 1 else self._wrong(kind, asked)

    def _wrong(self, kind: str, asked: Asked) -> Answer:
        scores: dict[int, int | None] = dict.fromkeys(marks(asked), 2)
        what: dict[str, Callable[[], Answer]] = {
            "429": lambda: Answer.error(429),
            "500": lambda: Answer.error(500),
            "failed": lambda: Answer.error(503),
            "slow": lambda: Answer("{}", delay=4),
            "cut": lambda: Answer(explanation(), cut=40),
            "invalid": lambda: Answer('{"label": "digits'),
            "refused": lambda: Answer(None, refusal="I cannot help with that"),
            "empty": lambda: Answer(""),
            "too_few_answers": lambda: Answer(answers(dict(list(scores.items())[1:]))),
            "too_many_answers": lambda: Answer(answers(scores | {len(scores) + 1: 2})),
            "null": lambda: Answer(answers(dict.fromkeys(scores))),
        }
        return what.get(kind, lambda: good(asked))()

    @property
    def expected(self) -> Counter[str]:
        """Outcomes of the requests that give no usable reply."""
        return Counter(kind for kind in self.trouble.values() if kind in self.UNUSABLE)


def test_a_server_that_does_everything_wrong_costs_abstentions_and_not_the_run(
    words: tuple[object, ...], moe: Moe, tmp_path: Path
) -> None:
    bad = BadServer()
    with LLMServer(bad) as server:
        command = (*words, "--base-url", server.url, "--timeout", 2, "-o", "a")
        done = moe(*command)
        assert done.returncode == 0, done.stderr
        asked = questions(server)
        assert set(bad.trouble.values()) == {*BadServer.LABELS, *BadServer.JUDGED}
        assert bad.expected == {
            "invalid": 2, "refused": 2, "empty": 2, "too_few_answers": 1, "too_many_answers": 1, "failed": 1,
        }  # fmt: skip
        said = re.search(r"Requests without a usable reply: (.*?)\.", " ".join(done.stdout.split()))
        assert said is not None
        counted = re.findall(r"(\d+) (\w+)(?: \(([^)]*)\))?", said[1])
        assert {name: int(n) for n, name, _ in counted} == bad.expected
        assert {name: causes for _, name, causes in counted if causes} == {"failed": "1 HTTP 503"}

        labels = pd.read_parquet(tmp_path / "a" / "labels.parquet")
        assert labels["status"].value_counts().to_dict() == {"ok": 9, "abstained": 2, "refused": 1}
        assert labels.loc[labels["status"] != "ok", "label"].isna().all()
        given = pd.read_parquet(tmp_path / "a" / "label_answers.parquet")
        unusable = {kind: bad.n_items[kind] for kind in BadServer.UNUSABLE} | {"abstained": bad.n_items["null"]}
        assert given["outcome"].value_counts().drop("ok").to_dict() == unusable
        assert (given["score"].isna() == (given["outcome"] != "ok")).all()
        scores = pd.read_parquet(tmp_path / "a" / "label_scores.parquet")
        assert scores["n_abstain"].sum() > 0

        failing = next(text for text, kind in bad.trouble.items() if kind == "failed")
        bad.trouble[failing] = "ok"
        again = moe(*command, "--json")
        assert again.returncode == 0, again.stderr
        found: dict[str, Any] = json.loads(again.stdout)["requests_by_outcome"]
        assert found == {**bad.expected, "ok": 1, "cached": len(bad.trouble) - bad.expected.total() - 1}
        repeated = questions(server) - asked
        assert repeated.total() == 1, "only what had failed is asked again"


def test_a_local_model_labels_and_leaves_no_server_behind(
    words: tuple[object, ...], moe: Moe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    mark = f"mark-{uuid.uuid4()}"
    file = model_file()
    more = ("--experts", "L0.E1", "--items", 5, "--no-control", "--no-fuzz", "--reply-tokens", 60, "--timeout", 240)
    done = moe(*words, "--labeller", f"gguf:{file}", *more, "-o", "a", env={"MOE_LENS_TEST": mark})
    assert done.returncode == 0, done.stderr
    labels = pd.read_parquet(tmp_path / "a" / "labels.parquet")
    assert labels[["layer", "expert"]].values.tolist() == [[0, 1]]
    assert set(labels["status"]) <= {"ok", "abstained"}
    assert set(labels["labeller"]) == {f"gguf:{file.name}"}
    entry = json.loads((tmp_path / "a" / "manifest.json").read_text())["commands"]["autointerp"]
    outcomes = entry["labellers"][f"gguf:{file.name}"]["outcomes"]
    assert (outcomes["failed"], sum(outcomes.values()) >= 1) == (0, True)
    assert with_mark(mark) == []


def with_mark(mark: str) -> list[int]:
    """Processes whose environment holds `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended, or is another user's
            continue
    return [pid for pid in found if pid != os.getpid()]
