"""``moe-lens ls``: what is in a run, which runs are in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.cli.conftest import Cli


def make_run(path: Path, *, state: str = "done", rows: int = 3) -> Path:
    path.mkdir(parents=True)
    manifest = {
        "model": {"name": "bundled:tiny-moe"}, "corpus": {"id": "bundled:"}, "seed": 0,
        "created": "2026-11-22T04:10:00+00:00",
        "commands": {"probe": {"state": state, "request": {"baseline": "bundled:tiny-dense"}}},
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    pd.DataFrame({"a": range(rows)}).to_parquet(path / "probe.parquet")
    return path


def test_a_run_is_listed_with_rows_sizes_status_model_and_time(cli: Cli, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", rows=1234)
    outcome = cli("ls", run)
    assert outcome.code == 0
    assert outcome.last_line == str(run)
    for word in ("probe", "1,234", "kB", "finished", "bundled:tiny-moe", "bundled:tiny-dense", "2026-11-22 04:10"):
        assert word in outcome.out


def test_a_folder_of_runs_is_listed_one_line_each(cli: Cli, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", state="running")
    outcome = cli("ls", "runs", "--json")
    runs = {Path(r["path"]).name: r for r in json.loads(outcome.out)["runs"]}
    assert {name: r["status"] for name, r in runs.items()} == {"a": "finished", "b": "unfinished"}
    assert runs["a"]["tables"][0]["table"] == "probe"
    assert runs["a"]["tables"][0]["rows"] == 3
    assert cli("ls", "runs").last_line == "runs"


@pytest.mark.parametrize("what", ["none", "empty", "file", "damaged"])
def test_what_is_no_run_is_refused(cli: Cli, tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    outcome = cli("ls", what)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)


def test_a_damaged_table_is_listed_as_such(cli: Cli, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "labels.parquet").write_text("junk")
    outcome = cli("ls", run)
    assert outcome.code == 0
    assert [line.split()[1] for line in outcome.out.splitlines() if line.startswith("labels")] == ["damaged"]
