"""``moe-lens validate --triggers DIR``, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_lens.capture.run import open_run
from moe_lens.causal.triggers.result import Triggers
from tests.causal.triggers.planted import write
from tests.cli.conftest import Cli, leftovers

CASES = [(f"{word} abX{word[::-1]}", "X", "u") for word in ("cd", "efg", "hij", "klm", "nop", "qrs")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "cases", {"L0-E1": [*CASES, ("abc", "Y", "u")], "L1-E2": CASES})


def test_cases_are_measured_into_a_run_directory(
    cli: Cli, moe_folder: Path, text_file: Path, folder: Path, tmp_path: Path
) -> None:
    words = ("validate", "--model", moe_folder, "--dataset", text_file, "--triggers", folder, "-o", tmp_path / "run")
    done = cli(*words)
    assert (done.code, done.last_line) == (0, str(tmp_path / "run"))
    assert "L0.E1" in done.out
    assert "trigger absent" in cli(*words, "--details").out
    assert "trigger absent" not in done.out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "manifest.json", "triggers.parquet", "trigger_cases.parquet", "triggers.md",
    }  # fmt: skip
    assert not leftovers(tmp_path / "run")
    again = cli(*words)
    assert again.out == done.out
    as_json = cli(*words, "--json")
    found = json.loads(as_json.out)
    assert found["defects"]["trigger absent"] == 1
    assert found["finding"] == Triggers.of(open_run(tmp_path / "run")).finding()


def test_a_dry_run_counts_cases_defects_and_passes_and_writes_nothing(
    cli: Cli, moe_folder: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_lens.cli import inputs

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run loads no weight")

    monkeypatch.setattr(inputs, "load_lens", refuse)
    words = ("validate", "--model", moe_folder, "--triggers", folder, "-o", tmp_path / "run", "--dry-run")
    shown, as_json = cli(*words), cli(*words, "--json")
    assert (shown.code, as_json.code) == (0, 0)
    assert "12 of 13 cases of 2 experts" in shown.out
    plan = json.loads(as_json.out)
    assert (plan["n_cases"], plan["n_used"], plan["passes"]) == (13, 12, 8)  # 2 layers x 2 modes x top-2
    assert plan["defects"]["trigger absent"] == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cases", "options", "message"),
    [
        ({}, (), "does not exist"),
        ({"L0-E9": CASES}, (), "L0-E9.json has cases of L0.E9"),
        ({"L0-E1": CASES}, ("--experts", "L0.E2"), "no case of the chosen experts"),
        ({"L0-E1": CASES}, ("--modes", "zeroo"), "no mode 'zeroo'"),
        ({"L0-E1": CASES}, ("--labels", "labels.csv"), "leave out --labels"),
    ],
)
def test_wrong_input_is_one_sentence(
    cli: Cli, moe_folder: Path, tmp_path: Path, cases: dict[str, list[tuple[str, str, str]]],
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    folder = write(tmp_path / "cases", cases) if cases else tmp_path / "nowhere"
    done = cli("validate", "--model", moe_folder, "--triggers", folder, *options)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1
