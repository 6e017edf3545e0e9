"""What people see: one table, one sentence, the path; the rest on request; nothing wider than the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from rich.cells import cell_len

import moe_lens as ml
from moe_lens.cli import inputs, render, render_demo, render_faithfulness, render_labels, render_trial, terminal
from moe_lens.cli.app import main
from moe_lens.config import ModelConfig, SteerConfig
from moe_lens.errors import MemoryLimit, MoELensError
from tests.cli.conftest import Cli, contents
from tests.report import made

RULE = "─" * 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, moe_folder: Path, dense_folder: Path, text_file: Path) -> ml.Run:
    """Every command of a demo and faithfulness, on small random models."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    quick: dict[str, tuple[str, ...]] = {
        "probe": (
            "--baseline", str(dense_folder), "--concepts", "all_digits,contains_capital,is_not_alphanumeric",
            "--k", "1", "--draws", "2", "--permutations", "9",
        ),
        "autointerp": ("--labeller", "lexical"),
        "validate": ("--draws", "100", "--max-tokens", "600", "--nulls", "frequent-token,other-expert"),
        "faithfulness": (
            "--rankings", "load,gradient,random", "--modes", "zero", "--bins", "20,50", "--n-random", "2",
            "--n-matched", "1", "--draws", "20", "--max-tokens", "300", "--document-tokens", "16",
        ),
    }  # fmt: skip
    for command, words in quick.items():
        shared = ("--model", str(moe_folder), "--dataset", str(text_file), "-o", str(folder))
        assert main([command, *shared, *words]) == 0, command
    return ml.open_run(folder)


def probes(run: ml.Run, **how: bool) -> str:
    found = ml.Probes.of(run)
    render.probes(found, **how)
    return found.finding()


def labels(run: ml.Run, **how: bool) -> str:
    found = ml.Labels.of(run)
    render_labels.labels(found, **how)
    return found.finding()


def trial(run: ml.Run, **how: bool) -> str:
    found = ml.Trial.of(run)
    render_trial.trial(found, **how)
    return found.finding()


def faithfulness(run: ml.Run, **how: bool) -> str:
    found = ml.Faithfulness.of(run)
    render_faithfulness.faithfulness(found, **how)
    return found.finding()


def demo(run: ml.Run, **how: bool) -> str:
    parts = ml.Probes.of(run), ml.Labels.of(run), ml.Trial.of(run)
    render_demo.demo("one beside another", run.frame("routing_fields"), *parts, **how)
    return parts[2].finding()


Show = Callable[..., str]
ALL = pytest.mark.parametrize("show", [probes, labels, trial, faithfulness, demo])


def flat(text: str) -> str:
    return " ".join(text.split())


@ALL
def test_a_command_prints_one_table_and_its_finding_and_the_rest_on_request(
    show: Show, run: ml.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = show(run)
    short = capsys.readouterr().out
    show(run, details=True)
    long = capsys.readouterr().out
    assert short.count(f"\n{RULE}") == 1
    n_tables = long.count(f"\n{RULE}")
    assert n_tables > 1
    promised = "every table of probe" if show is demo else f"{n_tables - 1} more table"
    assert f"--details prints {promised}" in short
    assert "--details prints" not in long
    for text in (short, long):
        assert flat(finding) in flat(text.replace("\n- ", "\n"))


@ALL
@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_terminal_and_no_cell_wraps(
    show: Show,
    details: bool,
    width: int,
    run: ml.Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(terminal, "WIDTH", width)
    show(run, details=details)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= width
    for at, line in enumerate(lines):
        if line.startswith(RULE):
            assert cell_len(lines[at - 1].rstrip()) <= cell_len(line), "the head is one line above its rule"
            assert lines[at + 1][:1] not in ("", " "), "a row begins with what it is about"


def test_text_gives_way_before_columns_and_numbers_never_do(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["L0.E1", "routing-only", "0.123456", "17", "a long label " * 9]]
    columns = ["=expert", "=verdict", ">score", "~>docs", "label"]
    for width in (100, 60, 50, 40):
        layout = terminal.fitted(columns, rows, width)
        assert sum(layout.widths.values()) + layout.gap * (len(layout.widths) - 1) <= width
        assert [layout.widths[at] for at in (0, 1, 2)] == [6, 12, 8]
        assert (3 in layout.widths) == (width > 50)
    assert terminal.fitted(columns, [[*row[:4], "short"] for row in rows], 100).gap == 2


def test_control_characters_of_a_label_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table("", ["label"], [["a\x1b[2Jb\nc"]])
    terminal.say("d\x1b[2Je")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a\\x1b[2Jb c" in out
    assert "d\\x1b[2Je" in out


def test_the_demo_names_the_domain_the_neuron_and_the_label_of_every_expert_on_trial(
    run: ml.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "WIDTH", 240)
    demo(run)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("L") and ".E" in line[:6]]
    assert [row.split()[0] for row in rows] == ml.Trial.of(run).verdicts["address"].tolist()
    cells = ml.Probes.of(run).cells
    for address, (neuron, f1) in render_demo.best_concepts(cells).items():
        at = cells[(cells["role"] == "moe") & (cells["k"] == 1) & (cells["seed"] == cells["seed"].min())]
        mine = at[("L" + at["layer"].astype(str) + ".E" + at["expert"].astype(str)) == address]
        best = mine.loc[mine["f1_balanced_validate"].idxmax()]
        assert neuron == f"N{best['neurons'][0]} {best['concept']}", "chosen on validation documents"
        assert f1.split()[0] == terminal.number(best["f1"], 2), "scored on test documents"


def test_a_domain_is_named_only_where_enough_of_it_visits_the_expert() -> None:
    frame = pd.DataFrame(
        {"field": "domain", "value": ["code", "prose", "verse"], "layer": 0, "expert": 1, "n_tokens": 1000,
         "visits": [500, 3, 300], "share": [0.5, 0.9, 0.1], "lift": [2.5, 9.0, 7.0]}
    )  # fmt: skip
    assert render_demo.top_domains(frame) == {"L0.E1": ("code", "2.5x")}


def test_details_show_a_finished_run_without_another(
    cli: Cli, moe_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    concepts = ("--concepts", "all_digits,contains_capital", "--k", "1", "--permutations", "9", "--draws", "0")
    words = ("probe", "--model", moe_folder, "--dataset", text_file, *concepts, "-o", "a")
    first = cli(*words)
    before = contents(tmp_path)
    monkeypatch.setattr("moe_lens.probing.probe._probe_and_compare", lambda *_: pytest.fail("the model was run"))
    more = cli(*words, "--details")
    assert contents(tmp_path) == before
    assert first.out.count(f"\n{RULE}") == 1 < more.out.count(f"\n{RULE}")
    assert first.last_line == more.last_line == "a"


@pytest.mark.parametrize("existed", [False, True])
def test_a_refusal_leaves_nothing(
    cli: Cli, moe_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    def refuse(*_: object) -> None:
        assert (tmp_path / "a" / "manifest.json").exists()
        raise MemoryLimit("no layer fits")

    monkeypatch.setattr("moe_lens.probing.probe._probe_and_compare", refuse)
    if existed:
        (tmp_path / "a").mkdir()
    outcome = cli("probe", "--model", moe_folder, "--dataset", text_file, "--concepts", "all_digits", "-o", "a")
    assert (outcome.code, outcome.err) == (2, "moe-lens: no layer fits\n")
    assert (tmp_path / "a").exists() == existed
    assert not existed or list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("kept", ["probe.parquet", ".partial/part.parquet"])
def test_a_refusal_keeps_what_was_finished(tmp_path: Path, kept: str) -> None:
    folder = tmp_path / "new"

    def refused() -> None:
        with inputs.refusal_leaves_nothing(folder):
            (folder / kept).parent.mkdir(parents=True)
            (folder / kept).touch()
            (folder / "manifest.json").touch()
            raise MoELensError("no")

    with pytest.raises(MoELensError):
        refused()
    assert (folder / kept).exists()
    assert (folder / "manifest.json").exists()


def test_a_run_that_was_there_before_keeps_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(MoELensError), inputs.refusal_leaves_nothing(tmp_path):
        raise MoELensError("no")
    assert (tmp_path / "manifest.json").exists()


def test_report_and_export_write_where_o_says(cli: Cli, tmp_path: Path) -> None:
    run = made.write_run(tmp_path / "run")
    assert cli("export", run, "-o", tmp_path / "csv").last_line == str(tmp_path / "csv")
    assert cli("report", run, "-o", tmp_path / "page.html").last_line == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()


def test_what_steers_is_told_of_the_model_and_nothing_of_a_text() -> None:
    assert ModelConfig.model_fields.keys() < SteerConfig.model_fields.keys()
    assert not {"dataset", "layers", "experts", "max_tokens", "batch_size"} & SteerConfig.model_fields.keys()
