"""``moe-lens probe`` on small random models, in this process: the run directory and what may share it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.cli.conftest import Cli, contents, leftovers

CONCEPTS = ("--concepts", "all_digits,contains_capital,is_not_alphanumeric")


@pytest.fixture
def words(moe_folder: Path, text_file: Path) -> tuple[object, ...]:
    """A run of a second."""
    return ("probe", "--model", moe_folder, "--dataset", text_file, *CONCEPTS, "-o", "runs/a")


def test_a_folder_and_a_baseline_give_a_run_directory(
    cli: Cli, words: tuple[object, ...], dense_folder: Path, tmp_path: Path
) -> None:
    outcome = cli(*words, "--baseline", dense_folder, "--k", "1,2")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.last_line == "runs/a"
    run = tmp_path / "runs" / "a"
    cells = pd.read_parquet(run / "probe.parquet")
    assert set(cells["role"]) == {"moe", "dense"}
    assert set(cells["k"]) == {1, 2}
    assert cells["status"].eq("ok").any()
    assert {"routing.parquet", "comparison.parquet", "manifest.json"} <= {p.name for p in run.iterdir()}
    assert leftovers(run) == []
    prompts = json.loads((run / "manifest.json").read_text())["prompts"]
    assert {"explain.md", "detection.md", "fuzz.md", "trigger.md"} <= prompts.keys()


def test_the_shown_best_neuron_is_the_one_in_the_table(cli: Cli, words: tuple[object, ...], tmp_path: Path) -> None:
    out = cli(*words, "--k", "1").out
    cells = pd.read_parquet(tmp_path / "runs" / "a" / "probe.parquet")
    usable = cells[(cells["concept"] == "contains_capital") & cells["status"].isin(["ok", "separable"])]
    best = usable.loc[usable["auroc_validate"].idxmax()]
    line = next(line.split() for line in out.splitlines() if line.split()[:1] == ["contains_capital"])
    assert line[1] == f"L{best.layer}.E{best.expert}.N{best.neurons[0]}"
    assert [float(x) for x in line[2:5]] == pytest.approx([best.f1, best.f1_always_positive, best.auroc], abs=0.005)


def test_an_equal_run_shows_the_first_and_changes_nothing(cli: Cli, words: tuple[object, ...], tmp_path: Path) -> None:
    first = cli(*words, "--k", "1")
    before = contents(tmp_path)
    assert cli(*words, "--k", "1") == first
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", [("--seed", "1"), ("--k", "1,2"), ("--max-rows", "500"), ("--limit", "70")])
def test_another_run_in_the_same_directory_is_refused(
    cli: Cli, words: tuple[object, ...], tmp_path: Path, change: tuple[str, str]
) -> None:
    base = () if "--k" in change else ("--k", "1")
    assert cli(*words, "--k", "1").code == 0
    before = contents(tmp_path)
    outcome = cli(*words, *base, *change)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "--resume" in outcome.err
    assert contents(tmp_path) == before


def test_no_resume_replaces_a_run_of_the_same_model_and_text(
    cli: Cli, words: tuple[object, ...], tmp_path: Path
) -> None:
    assert cli(*words, "--k", "1,2").code == 0
    assert cli(*words, "--k", "1", "--no-resume").code == 0
    assert set(pd.read_parquet(tmp_path / "runs" / "a" / "probe.parquet")["k"]) == {1}


def test_only_chosen_layers_and_experts_are_probed(cli: Cli, words: tuple[object, ...], tmp_path: Path) -> None:
    assert cli(*words, "--k", "1", "--layers", "1", "--experts", "0-1,L1.E4").code == 0
    cells = pd.read_parquet(tmp_path / "runs" / "a" / "probe.parquet")
    assert set(zip(cells["layer"], cells["expert"], strict=True)) == {(1, 0), (1, 1), (1, 4)}


def test_the_yaml_file_says_the_same_as_the_options(cli: Cli, words: tuple[object, ...], tmp_path: Path) -> None:
    assert cli(*words, "--k", "1").code == 0
    values = dict(zip(words[1::2], words[2::2], strict=True))
    lines = [f"{str(option).lstrip('-')}: {value}" for option, value in values.items() if option != "-o"]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "k: 1", "output: runs/b"]))
    assert cli("probe", "--config", "c.yaml").code == 0
    a, b = (pd.read_parquet(tmp_path / "runs" / run / "probe.parquet") for run in "ab")
    pd.testing.assert_frame_equal(a, b)
