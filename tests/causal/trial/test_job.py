"""`ml.validate` with a run directory: what is kept, shown again, continued, replaced, and left alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.trial import job
from moe_lens.causal.trial.kept import Kept
from moe_lens.causal.trial.plan import plan_trial
from moe_lens.errors import BadConfig, BadOutput, MoELensError
from tests.causal.trial.made import LABELS, made, text
from tests.cli.conftest import contents

FEW = {"draws": 200, "progress": False}


@pytest.fixture(scope="module")
def lens():
    return made()


@pytest.fixture(scope="module")
def corpus():
    return text()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch):
    """From here on nothing may be tried."""

    def ban():
        def refuse(*_: Any, **__: Any):
            raise AssertionError("a trial was run")

        monkeypatch.setattr(job.trial, "validate", refuse)

    return ban


def test_a_trial_leaves_its_table_its_page_and_what_rebuilds_it(lens, corpus, out):
    trial = ml.validate(lens, corpus, LABELS, out=out, **FEW)
    assert sorted(contents(out)) == ["manifest.json", "validation.md", "validation.parquet"]
    run = ml.open_run(out)
    again = ml.Trial.of(run)
    pd.testing.assert_frame_equal(again.frame, trial.frame)
    assert again.settings == trial.settings
    assert again.finding() in (out / "validation.md").read_text()
    entry = run.manifest["commands"]["validate"]
    assert entry["state"] == "done"
    assert entry["seconds"] > 0
    assert entry["peak_memory"] > 0


def test_the_run_directory_changes_no_number(lens, corpus, out):
    kept = ml.validate(lens, corpus, LABELS, out=out, **FEW)
    plain = ml.validate(lens, corpus, LABELS, **FEW)
    pd.testing.assert_frame_equal(kept.frame, plain.frame, check_dtype=False)
    assert plain.run is None


def test_an_equal_trial_is_shown_at_once(lens, corpus, out, no_trial):
    first = ml.validate(lens, corpus, LABELS, out=out, **FEW)
    before = contents(out)
    no_trial()
    noted = LABELS.assign(note="mine")  # a column that no trial reads makes no other labels
    again = ml.validate(lens, corpus, noted, out=out, **FEW)
    pd.testing.assert_frame_equal(again.frame, first.frame)
    assert contents(out) == before


@pytest.mark.parametrize(
    "change",
    [
        {"labels": LABELS.assign(label=["x", "y", "z", "v"])},
        {"labels": LABELS.assign(rule=["[0-4]", "[A-Z]", "#", "[aeiou]"])},
        {"horizon": 2},
        {"experts": ["L0.E3"]},
        {"null_labels": ()},
        {"document_tokens": 20},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_labels_or_settings_replace_only_what_a_trial_wrote(lens, corpus, out, change):
    first = ml.validate(lens, corpus, LABELS, out=out, **FEW)
    (out / "labels.parquet").write_bytes(b"of autointerp")
    ml.open_run(out).update_manifest(commands={"autointerp": {"state": "done"}})
    second = ml.validate(lens, corpus, **{"labels": LABELS, **FEW, **change}, out=out)
    assert not second.frame.equals(first.frame)
    pd.testing.assert_frame_equal(ml.Trial.of(ml.open_run(out)).frame, second.frame)
    assert (out / "labels.parquet").read_bytes() == b"of autointerp"
    assert ml.open_run(out).manifest["commands"]["autointerp"] == {"state": "done"}


def stop_after(monkeypatch: pytest.MonkeyPatch, n: int) -> list[str]:
    """Interrupt the process when the measurement after the n-th was written; returns what is written."""
    written: list[str] = []
    write = Kept.write

    def counting(self, found, *, alone):
        write(self, found, alone=alone)
        written.append(f"{found.expert} {found.mode}")
        if len(written) == n:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "write", counting)
    return written


def test_a_killed_trial_measures_only_what_is_left(lens, corpus, out, monkeypatch):
    whole = ml.validate(lens, corpus, LABELS, **FEW)
    with monkeypatch.context() as patch:
        first = stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            ml.validate(lens, corpus, LABELS, out=out, **FEW)
    assert len(first) == 3
    with monkeypatch.context() as patch:
        second = stop_after(patch, 99)
        resumed = ml.validate(lens, corpus, LABELS, out=out, **FEW)
    assert sorted(first + second) == sorted(f"L0.E{e} {mode}" for e in (2, 3, 4, 5) for mode in ("zero", "mean_off"))
    pd.testing.assert_frame_equal(resumed.frame, whole.frame, check_dtype=False)
    assert not (out / ".partial").exists()


def test_no_resume_starts_anew(lens, corpus, out, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            ml.validate(lens, corpus, LABELS, out=out, **FEW)
    with monkeypatch.context() as patch:
        written = stop_after(patch, 99)
        ml.validate(lens, corpus, LABELS, out=out, resume=False, **FEW)
    assert len(written) == 8


def test_the_earlier_trial_stays_until_the_next_is_finished(lens, corpus, out, monkeypatch, no_trial):
    first = ml.validate(lens, corpus, LABELS, out=out, **FEW)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            ml.validate(lens, corpus, LABELS, horizon=2, out=out, **FEW)
    assert ml.open_run(out).manifest["commands"]["validate"]["state"] == "running"
    pd.testing.assert_frame_equal(ml.Trial.of(ml.open_run(out)).frame, first.frame)
    no_trial()
    assert ml.validate(lens, corpus, LABELS, out=out, **FEW).settings["horizon"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"labels": LABELS.assign(rule="~~~")},
        {"labels": LABELS.assign(rule=None)},
        {"labels": LABELS.assign(rule="(")},
        {"labels": LABELS.assign(expert=9)},
        {"labels": pd.concat([LABELS, LABELS])},
        {"labels": LABELS.assign(label=" ")},
        {"horizon": 99},
        {"modes": ["zero", "mean_of"]},
        {"null_labels": ["topics"]},
    ],
    ids=["marks nothing", "no rule", "bad rule", "no expert", "twice", "empty", "horizon", "mode", "kind"],
)
def test_what_is_refused_leaves_everything_as_it_was(lens, corpus, out, change):
    settings = {"labels": LABELS, "out": out, **FEW} | change
    with pytest.raises(MoELensError) as caught:
        ml.validate(lens, corpus, **settings)
    assert caught.value.exit_code == 2
    assert not out.exists()
    ml.validate(lens, corpus, LABELS, out=out, **FEW)
    before = contents(out)
    with pytest.raises(MoELensError):
        ml.validate(lens, corpus, **settings)
    assert contents(out) == before


def test_another_runs_directory_is_refused(lens, corpus, out):
    ml.validate(lens, corpus, LABELS, out=out, **FEW)
    before = contents(out)
    with pytest.raises(BadOutput, match="holds another run"):
        ml.validate(lens, text(seed=1), LABELS, out=out, **FEW)
    other = job.create_run(out.with_name("other"), {"model": {}, "corpus": {}, "seed": 0})
    with pytest.raises(BadOutput, match="holds no trial"):
        ml.Trial.of(other)
    assert contents(out) == before


@dataclass
class Given:
    labels: pd.DataFrame


def test_labels_are_a_table_or_what_holds_one(lens, corpus):
    table = ml.validate(lens, corpus, LABELS, **FEW)
    pd.testing.assert_frame_equal(ml.validate(lens, corpus, Given(LABELS), **FEW).frame, table.frame)
    with pytest.raises(BadConfig, match=r"labels= is a str: give a table"):
        ml.validate(lens, corpus, "mine.csv", **FEW)


def test_a_sample_is_drawn_unless_experts_are_named(lens, corpus):
    assert ml.validate(lens, corpus, LABELS, n_labels=2, **FEW).settings["is_sample"]
    named = ml.validate(lens, corpus, LABELS, n_labels=1, experts=["L0.E3", "L0.E5"], **FEW)
    assert sorted(named.verdicts["address"]) == ["L0.E3", "L0.E5"]
    assert not named.settings["is_sample"]


@dataclass
class Oracle:
    """Says that a label holds at digits; `complete` says whether it was asked everything."""

    name: str = "oracle"
    complete: bool = True

    def __call__(self, items: pd.DataFrame) -> np.ndarray:
        focal = [c[a:b] for c, a, b in zip(items["context"], items["start"], items["end"], strict=True)]
        return np.where([any(s.isdigit() for s in f) for f in focal], 4.0, 0.0)


def test_a_judge_that_left_questions_open_is_asked_again(lens, corpus, out, no_trial):
    settings = {"experts": ["L0.E3"], "null_labels": (), "out": out, **FEW}
    ml.validate(lens, corpus, LABELS, judge=Oracle(complete=False), **settings)
    asked = ml.validate(lens, corpus, LABELS, judge=Oracle(), **settings)
    assert asked.settings["judge"] == "oracle"
    no_trial()
    ml.validate(lens, corpus, LABELS, judge=Oracle(), **settings)
    with pytest.raises(AssertionError, match="a trial was run"):
        ml.validate(lens, corpus, LABELS, **settings)


def test_the_outlook_counts_the_passes_and_knows_who_is_underpowered(lens, corpus, out, monkeypatch):
    plan = plan_trial(lens, corpus, LABELS, progress=False)
    passes = []
    of_each = Effects.of_each

    def counting(self, edits, **more):
        passes.extend(edits)
        return of_each(self, edits, **more)

    monkeypatch.setattr("moe_lens.causal.effects.Effects.of_each", counting)
    trial = ml.validate(lens, corpus, LABELS, **FEW)
    assert plan.n_passes == len(passes)
    rows = trial.frame.query("label_kind == 'real' and mode == 'zero'")
    assert {label.address for label in plan.labels if label.lacks} == set(
        trial.verdicts.query("verdict == 'underpowered'")["address"]
    )
    assert [label.n_documents for label in plan.labels] == rows["n_docs_z1r1"].tolist()
    assert [label.visits for label in plan.labels] == (rows["n_tokens_z1r1"] + rows["n_tokens_z0r1"]).tolist()
    assert (plan.n_predictions, plan.n_documents) == (trial.settings["n_predictions"], trial.settings["n_documents"])
    assert 0 < plan.minutes < 1
