"""``probe --protocol herbst2026`` through the command line: its own tables, read back, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd


def test_it_writes_tables_of_its_own_and_reads_them_back(cli, moe_folder: Path, text_file: Path, tmp_path: Path):
    call = ["probe", "--model", moe_folder, "--dataset", text_file, "--protocol", "herbst2026", "--k", "1"]
    call += ["--concepts", "all_digits,leading_capital", "-o", tmp_path / "r", "--json"]
    first = cli(*call)
    assert first.code == 0, first.err
    names = {path.stem for path in (tmp_path / "r").glob("*.parquet")}
    assert names == {"probe_herbst2026", "sampled_herbst2026", "comparison_herbst2026"}
    table = pd.read_parquet(tmp_path / "r/probe_herbst2026.parquet")
    assert set(table.protocol) == {"herbst2026"}
    assert "a probe with no neuron scores" in json.loads(first.out)["finding"]
    before = (tmp_path / "r/probe_herbst2026.parquet").stat().st_mtime_ns
    assert cli(*call).out == first.out
    assert (tmp_path / "r/probe_herbst2026.parquet").stat().st_mtime_ns == before
    other = cli(*call[:-1], "--seed", "3")
    assert other.code == 2
    assert "another" in other.err


def test_what_the_protocol_fixes_cannot_be_asked_for(cli, moe_folder: Path, text_file: Path, tmp_path: Path):
    outcome = cli(
        "probe", "--model", moe_folder, "--dataset", text_file, "--protocol", "herbst2026", "--draws", "3",
        "-o", tmp_path / "r",
    )  # fmt: skip
    assert outcome.code == 2
    assert outcome.err.strip() == "moe-lens: --protocol herbst2026 fixes --draws: leave it out"
    assert not (tmp_path / "r").exists()
