"""``moe-lens probe --from-published``: one table, one sentence, one parquet file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.cli.conftest import Cli, leftovers
from tests.probing.released_files import DENSE, MOE, Cell, both, release

NAMES = ("small-moe", "small-dense")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return both(tmp_path)


def test_one_table_and_what_is_left(cli: Cli, files: list[Path]) -> None:
    outcome = cli("probe", "--from-published", *files)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    moe, dense = (next(line.split() for line in lines if line.split()[:1] == [name]) for name in NAMES)
    assert moe[1:3] == ["4", "20"]
    assert moe[3:7] == [".8000", ".8889", ".8000", ".7226"]
    assert dense[3:5] == [".6667", ".6667"]
    said = " ".join(outcome.out.split())
    assert "search: expected best if all cells were alike" in said
    assert "is left against small-dense" in said
    assert said.endswith("these tables cannot say.")
    assert all(len(line) <= 100 for line in lines)


def test_json_is_one_object(cli: Cli, files: list[Path]) -> None:
    outcome = cli("probe", "--from-published", files[0], "--from-published", files[1], "--json")
    told = json.loads(outcome.out)
    assert [model["model"] for model in told["summary"]["models"]] == list(NAMES)
    assert told["summary"]["models"][0]["always_positive"] == pytest.approx(40 / 45)
    assert {gap["control"] for gap in told["summary"]["gaps"]} >= {"raw", "one_expert", "homogeneous"}
    assert told["finding"].startswith("small-moe minus small-dense")
    assert "run" not in told


def test_the_run_directory_holds_every_probe(cli: Cli, files: list[Path], tmp_path: Path) -> None:
    outcome = cli("probe", "--from-published", *files, "-o", "out")
    assert (outcome.code, outcome.last_line) == (0, "out")
    frame = pd.read_parquet(tmp_path / "out" / "published.parquet")
    assert len(frame) == len(MOE) + len(DENSE)
    assert frame["f1"].dtype == float
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["commands"]["published"]["files"]) == set(NAMES)
    assert str(tmp_path) not in json.dumps({k: v for k, v in manifest.items() if k != "command_line"})
    assert leftovers(tmp_path / "out") == []
    assert "published" in cli("ls", "out").out


def test_the_same_files_may_be_written_again_and_others_not(cli: Cli, files: list[Path], tmp_path: Path) -> None:
    words = ("probe", "--from-published", *files, "-o", "out")
    assert cli(*words).code == 0
    assert cli(*words).code == 0
    other = cli("probe", "--from-published", files[0], "-o", "out")
    assert (other.code, other.out) == (2, "")
    assert "give another -o" in other.err
    assert set(pd.read_parquet(tmp_path / "out" / "published.parquet")["model"]) == set(NAMES)


def test_k_and_seed_are_taken(cli: Cli, tmp_path: Path) -> None:
    file = release(tmp_path / "m.csv", [*MOE, *(Cell(0, e, 8 + e, 0, 10, 10, k=4) for e in range(2))])
    assert ".9474" in cli("probe", "--from-published", file, "--k", "4").out
    a, b, c = (json.loads(cli("probe", "--from-published", file, "--seed", s, "--json").out) for s in (1, 1, 2))
    assert a == b
    assert a["summary"]["models"][0]["homogeneous"] != c["summary"]["models"][0]["homogeneous"]


BAD = {
    "no such file": (["--from-published", "none.csv.gz"], ["none.csv.gz", "give a readable"]),
    "a text": (["--from-published", "notes.txt"], ["notes.txt", "no column concept", "num_negative"]),
    "another option": (["--from-published", "m.csv", "--model", "x"], ["leave out --model"]),
    "a config file": (["--from-published", "m.csv", "--config", "c.yaml"], ["leave out --config"]),
    "a dry run": (["--from-published", "m.csv", "--dry-run"], ["leave out --dry-run"]),
    "a k that no table has": (["--from-published", "m.csv", "--k", "3"], ["k=3", "give one of 1"]),
    "two ks": (["--from-published", "m.csv", "--k", "1,2"], ["--k takes one number", "--k 1"]),
    "an unreadable seed": (["--from-published", "m.csv", "--seed", "x"], ["'x'"]),
    "a used folder": (["--from-published", "m.csv", "-o", "."], ["no moe-lens run"]),
    "a file without the option": (["m.csv"], ["unexpected argument 'm.csv'", "--help"]),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_sentence(cli: Cli, tmp_path: Path, case: str) -> None:
    words, expected = BAD[case]
    release(tmp_path / "m.csv", MOE)
    (tmp_path / "notes.txt").write_text("a note\n")
    (tmp_path / "c.yaml").write_text("model: x\n")
    before = sorted(tmp_path.rglob("*"))
    outcome = cli("probe", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    for word in expected:
        assert word in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_reading_tables_loads_no_model_code(files: list[Path]) -> None:
    words = ["probe", "--from-published", *map(str, files)]
    code = (
        f"from moe_lens.cli.app import main; code = main({words}); import sys; sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
