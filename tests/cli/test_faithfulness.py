"""``moe-lens faithfulness`` on a small random model, in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.faithfulness.kept import KeptSets
from moe_lens.causal.faithfulness.measure import Measured
from moe_lens.causal.faithfulness.result import TABLES, Faithfulness
from moe_lens.errors import BadOutput
from tests.cli.conftest import Cli, contents, leftovers

QUICK = (
    "--rankings", "load,random", "--modes", "zero", "--bins", "50", "--n-random", "2", "--n-matched", "1",
    "--draws", "20", "--max-tokens", "300", "--document-tokens", "16",
)  # fmt: skip
MORE = ("--rankings", "load,leave-one-out,random", "--modes", "zero,mask-refill-keep", "--bins", "20,50")


@pytest.fixture
def words(moe_folder: Path, text_file: Path) -> tuple[object, ...]:
    """Some ten passes."""
    return ("faithfulness", "--model", moe_folder, "--dataset", text_file, "-o", "runs/a", *QUICK)


@pytest.fixture
def more(words: tuple[object, ...]) -> tuple[object, ...]:
    """Two modes, two bins and leave-one-out."""
    return changed(words, *MORE)


def changed(words: tuple[object, ...], *change: object) -> tuple[object, ...]:
    """`words` with options in place of those of the same name: lists given twice add up."""
    names = {word for word in change if str(word).startswith("-")}
    kept = [words[0]]
    for name, value in zip(words[1::2], words[2::2], strict=True):
        kept += [] if name in names else [name, value]
    return (*kept, *change)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Effects, "__init__", lambda *_a, **_k: pytest.fail("the model was run"))


def test_a_run_leaves_its_tables_and_prints_a_comparison(cli: Cli, more: tuple[object, ...], run: Path) -> None:
    outcome = cli(*more)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.last_line == "runs/a"
    assert {f"{name}.parquet" for name in TABLES} <= {path.name for path in run.iterdir()}
    assert leftovers(run) == []
    for part in ("WITHOUT", "ONLY", "lead over such sets", "matched", "match: share of experts"):
        assert part in " ".join(outcome.out.split())
    assert "20, 50 % of the experts" in outcome.out
    details = cli(*more, "--details").out
    for part in ("comprehensiveness", "sufficiency", "lead over such sets", "LOO tau", "CPR", "given load", "L1"):
        assert part in details
    frame = pd.read_parquet(run / "faithfulness.parquet")
    assert {"ranking", "mode", "routing", "universe", "axis", "quantity", "bin", "control", "rounding", "include_zero",
            "aggregate", "comprehensiveness_kl", "sufficiency_kl", "comprehensiveness_logp",
            "sufficiency_logp_low"} <= set(frame)  # fmt: skip
    assert set(frame["bin"].dropna()) == {0.2, 0.5}
    assert set(frame["mode"]) == {"zero", "mask_refill_keep"}
    entry = json.loads((run / "manifest.json").read_text())["commands"]["faithfulness"]
    assert entry["bins"] == {"shares": [0.2, 0.5], "rounding": "ceil", "include_zero": False, "aggregate": "mean"}
    assert entry["seconds"] > 0


def test_an_equal_run_shows_the_first_without_a_pass(
    cli: Cli, words: tuple[object, ...], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli(*words)
    before = contents(run)
    monkeypatch.setattr(Effects, "__init__", lambda *_a, **_k: pytest.fail("the model was run"))
    assert cli(*words) == first
    assert contents(run) == before


@pytest.mark.parametrize(
    "change", [("--bins", "20"), ("--max-tokens", "200"), ("--modes", "mean"), ("--draws", "10"), ("--layers", "1")]
)
def test_other_settings_replace_the_result(
    cli: Cli, words: tuple[object, ...], run: Path, change: tuple[str, str]
) -> None:
    cli(*words)
    before = contents(run)["faithfulness.parquet"]
    outcome = cli(*changed(words, *change))
    assert outcome.code == 0
    assert contents(run)["faithfulness.parquet"] != before


def test_another_model_or_seed_needs_another_directory(cli: Cli, words: tuple[object, ...], run: Path) -> None:
    cli(*words)
    before = contents(run)
    outcome = cli(*words, "--seed", "1")
    assert outcome.code == 2
    assert "holds another run" in outcome.err
    assert contents(run) == before


def test_json_is_one_object(cli: Cli, more: tuple[object, ...]) -> None:
    outcome = cli(*more, "--json")
    found = json.loads(outcome.out)
    assert found["run"] == "runs/a"
    assert len(found["aopc"]) == 2 * 2 * 3
    assert {row["quantity"] for row in found["circuit"]} == {"cpr", "cmd"}
    assert found["agreement"][0]["ranking"] == "load"


def test_a_result_is_read_back_as_it_was(
    cli: Cli, more: tuple[object, ...], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Faithfulness] = []
    from moe_lens.causal.faithfulness import directory

    real = directory.write
    monkeypatch.setattr(directory, "write", lambda r, f, *a, **k: kept.append(f) or real(r, f, *a, **k))
    cli(*more)
    back = Faithfulness.of(ml.open_run(run))
    for name, table in kept[0].tables().items():
        pd.testing.assert_frame_equal(back.tables()[name], table, check_dtype=len(table) > 0)
    assert back.finding() == kept[0].finding()
    assert (back.bins, back.noise, back.n_passes) == (kept[0].bins, kept[0].noise, kept[0].n_passes)


def test_a_directory_without_a_result_says_so(cli: Cli, words: tuple[object, ...], run: Path) -> None:
    cli(*words)
    found = ml.open_run(run)
    found.update_manifest(commands={"faithfulness": {"state": "writing"}})
    with pytest.raises(BadOutput, match="moe-lens faithfulness -o"):
        Faithfulness.of(found)


def count_passes(monkeypatch: pytest.MonkeyPatch, *, until: int | None = None) -> list[int]:
    """Sets that are measured from now on; the run is interrupted after `until` of them."""
    measured: list[int] = []
    real = Measured._measure

    def measure(self: Measured, work):
        if until is not None and len(measured) >= until:
            raise KeyboardInterrupt
        measured.extend(1 for key, _ in work if any(key[1]))
        return real(self, work)

    monkeypatch.setattr(Measured, "_measure", measure)
    return measured


def test_an_interrupted_run_continues_and_ends_alike(
    cli: Cli, more: tuple[object, ...], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        whole = count_passes(patch)
        cli(*more, "-o", "runs/whole")
    with monkeypatch.context() as patch:
        some = count_passes(patch, until=30)
        outcome = cli(*more)
    assert outcome.code == 130
    assert "continues from its finished parts" in outcome.err
    assert not (run / "faithfulness.parquet").exists()
    with monkeypatch.context() as patch:
        rest = count_passes(patch)
        assert cli(*more).code == 0
    assert len(some) == 30
    assert len(some) + len(rest) == len(whole)
    assert leftovers(run) == []
    for name in TABLES:
        left, right = (pd.read_parquet(folder / f"{name}.parquet") for folder in (run, tmp_path / "runs/whole"))
        pd.testing.assert_frame_equal(left, right)


@pytest.mark.parametrize(
    ("change", "is_used"),
    [
        (("--rankings", "load,gate_norm,random"), True),
        (("--n-random", "5"), True),
        (("--max-tokens", "200"), False),
        (("--routing", "frozen"), False),
        (("--modes", "zero,mean"), False),
        (("--include-first",), False),
        (("--document-tokens", "20"), False),
    ],
)
def test_kept_effects_serve_only_settings_that_do_not_change_them(
    cli: Cli, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...], is_used: bool
) -> None:
    with monkeypatch.context() as patch:
        count_passes(patch, until=4)
        cli(*words)
    read: list[int] = []
    real = KeptSets.read
    monkeypatch.setattr(KeptSets, "read", lambda self: read.append(len(found := real(self))) or found)
    assert cli(*changed(words, *change)).code == 0
    assert (sum(read) > 0) is is_used


def test_no_resume_measures_everything_anew(
    cli: Cli, words: tuple[object, ...], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cli(*words)
    passes = count_passes(monkeypatch)
    assert cli(*words, "--no-resume") == first
    assert len(passes) > 6


@pytest.mark.slow
def test_a_killed_run_continues(tmp_path: Path, moe_folder: Path, text_file: Path, cli: Cli) -> None:
    words = ["--model", moe_folder, "--dataset", text_file, *QUICK]
    words = changed(("faithfulness", *words), *MORE, "--n-random", "60")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "moe_lens", *map(str, words), "-o", str(tmp_path / "k")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "k" / ".partial" / "faithfulness"
    while not list(partial.rglob("*.safetensors")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "k" / "faithfulness.parquet").exists()
    assert cli(*words, "-o", tmp_path / "k").code == 0
    assert cli(*words, "-o", tmp_path / "whole").code == 0
    left, right = (pd.read_parquet(tmp_path / folder / "faithfulness.parquet") for folder in ("k", "whole"))
    pd.testing.assert_frame_equal(left, right)


def test_a_dry_run_counts_passes_and_writes_nothing(cli: Cli, more: tuple[object, ...], run: Path) -> None:
    outcome = cli(*more, "--dry-run")
    assert outcome.code == 0
    for part in ("leave one out", "random sets", "12 experts", "minutes"):
        assert part in outcome.out
    assert not run.exists()
    found = json.loads(cli(*more, "--dry-run", "--json").out)
    assert found["passes"]["sets of rankings"] == 2 * 2 * 2 * 2 + 2
    assert found["passes"]["leave one out"] == 2 * 12
    assert found["n_passes"] == sum(found["passes"].values())
    assert found["minutes"] == pytest.approx(found["n_passes"] * found["seconds_per_pass"] / 60)
    assert found["seconds_per_pass"] > 0


@pytest.mark.parametrize("preset", ["eraser", "seed", "mib"])
def test_presets_are_stored_with_their_rounding(cli: Cli, words: tuple[object, ...], run: Path, preset: str) -> None:
    small = ("--rankings", "load", "--modes", "zero", "--n-matched", "0", "--draws", "0")
    assert cli(*changed(words, *small, "--bins", preset)).code == 0
    entry = json.loads((run / "manifest.json").read_text())["commands"]["faithfulness"]["bins"]
    assert entry["rounding"] == ("truncate" if preset == "mib" else "ceil")
    assert entry["aggregate"] == ("trapezoid" if preset == "mib" else "mean")
    assert len(entry["shares"]) == {"eraser": 5, "seed": 5, "mib": 10}[preset]


def test_every_ranking_and_mode_of_the_issue_runs(cli: Cli, words: tuple[object, ...], run: Path, tmp_path) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text("layer,expert,score\n0,1,2\n1,3,1\n")
    names = "load,gate_mass,gate_norm,reap,ean,max_activation,esft_gate,esft_token,gradient,leave_one_out"
    modes = "zero,mean,mean_off,resample,drop_renorm,mask_refill,mask_refill_keep,noise"
    few = ("--bins", "20", "--n-matched", "0", "--draws", "0", "--naopc", "2", "--universe", "per-layer")
    outcome = cli(*changed(words, *few, "--rankings", f"{names},{mine}", "--modes", modes, "--axis", "gate-mass"))
    assert (outcome.code, outcome.err) == (0, "")
    frame = pd.read_parquet(run / "faithfulness.parquet")
    assert set(frame["ranking"]) == {*names.split(","), "mine"}
    assert set(frame["mode"]) == set(modes.split(","))
    assert (frame["universe"].unique().tolist(), frame["axis"].unique().tolist()) == (["per-layer"], ["gate-mass"])
    naopc = frame[frame["quantity"] == "naopc"]
    assert len(naopc) == 11 * 8
    assert naopc["comprehensiveness_kl"].dropna().between(-1e-9, 1 + 1e-9).all()
    assert "of the gate mass of each layer" in outcome.out


def test_experts_that_are_not_chosen_always_stay(cli: Cli, more: tuple[object, ...], run: Path) -> None:
    outcome = cli(*changed(more, "--layers", "1", "--experts", "0-3", "--bins", "100"))
    assert outcome.code == 0
    frame = pd.read_parquet(run / "faithfulness.parquet")
    assert set(frame["n_units"].dropna()) == {4}
    units = pd.read_parquet(run / "faithfulness_units.parquet")
    assert units[units["in_universe"]][["layer", "expert"]].values.tolist() == [[1, e] for e in range(4)]
    assert units["score_leave_one_out"].notna().tolist() == units["in_universe"].tolist()
    assert len(pd.read_parquet(run / "faithfulness_agreement.parquet")) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("--rankings", "laod"), "did you mean 'load'"),
        (("--rankings", "random"), "name one more"),
        (("--rankings", "none.csv"), "none.csv is not there"),
        (("--modes", "zeroo"), "did you mean 'zero'"),
        (("--modes", "patch"), "unknown mode 'patch'"),
        (("--bins", "erasr"), "did you mean 'eraser'"),
        (("--bins", "5,200"), "above 0 and up to 100"),
        (("--bins", "0"), "above 0 and up to 100"),
        (("--bins", "5,x"), "above 0 and up to 100"),
        (("--bins", "nan"), "unknown bins 'nan'"),
        (("--routing", "cold"), "'live' or 'frozen'"),
        (("--universe", "layer"), "'global' or 'per-layer'"),
        (("--axis", "mass"), "'count' or 'gate-mass'"),
        (("--naopc", "31"), "less than or equal to 30"),
        (("--n-random", "-1"), "greater than or equal to 0"),
        (("--max-tokens", "0"), "greater than or equal to 1"),
        (("--experts", "L0.E9"), "has no expert 9"),
        (("--layers", "7"), "no layer 7"),
        (("--dataset", "one.txt"), "no document of the split"),
        (("--max-tokens", "10"), "the evaluation text has one"),
    ],
)
def test_bad_input_is_one_sentence_before_any_pass(
    cli: Cli, words: tuple[object, ...], tmp_path: Path, no_pass: None, change: tuple[str, str], why: str
) -> None:
    (tmp_path / "one.txt").write_text("alpha beta gamma 12 delta and so on")
    outcome = cli(*changed(words, *change))
    assert outcome.code == 2
    assert why in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("layer,expert,score\n0,9,1\n", "L0.E9, which is no routed expert"),
        ("layer,expert\n0,1\n", "give a CSV with the columns layer, expert, score"),
        ("layer,expert,score\n0,1,1\n0,1,2\n", "twice"),
        ("layer,expert,score\n0,1,\n", "scores empty"),
        ("", "give a CSV with the columns"),
    ],
)
def test_a_bad_file_of_scores_is_refused_before_any_pass(
    cli: Cli, words: tuple[object, ...], tmp_path: Path, no_pass: None, text: str, why: str
) -> None:
    (tmp_path / "mine.csv").write_text(text)
    outcome = cli(*changed(words, "--rankings", "mine.csv,load"))
    assert outcome.code == 2
    assert why in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_dense_model_is_refused(cli: Cli, dense_folder: Path, no_pass: None) -> None:
    outcome = cli("faithfulness", "--model", dense_folder, "-o", "d")
    assert outcome.code == 2
    assert "dense" in outcome.err or "Mixture-of-Experts" in outcome.err
    assert outcome.err.count("\n") == 1
