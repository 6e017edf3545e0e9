"""``moe-lens probe`` is killed, again and again, and started again in the same folder."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.cli.conftest import leftovers
from tests.e2e.conftest import Moe, start

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PARTS = {
    "model-0": "model-0.cells.parquet",
    "baseline-0": "baseline-0.cells.parquet",
    "equal-0": "equal-0.parquet",
    "neurons": "neurons.layers.parquet",
}
"""Parts in the order of the run, and the file that each writes last."""
WRITING = 0.02
"""Seconds after the last part within which the tables are being written."""
SEED = 20260


Finished = dict[str, dict[str, int]]


def finished_parts(run: Path) -> Finished:
    """Files of every finished part by name, with their modification times."""
    files = {p.name: p.stat().st_mtime_ns for p in (run / ".partial" / "probe").glob("*") if p.suffix != ".tmp"}
    return {
        part: {name: at for name, at in files.items() if name.startswith(f"{part}.")}
        for part, last in PARTS.items()
        if last in files
    }


def probe_entry(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["commands"]["probe"]


def kill(words: tuple[object, ...], run: Path, *, during: int, after: float) -> None:
    """Start the command, wait until it works on part number `during`, then for `after` seconds, then SIGKILL."""
    manifest = run / "manifest.json"
    before = manifest.stat().st_mtime_ns if manifest.exists() else 0
    needed = set(list(PARTS)[:during])
    process = start((*words, "-o", run), run.parent)
    deadline = time.monotonic() + 120

    def waits() -> bool:
        begun = manifest.exists() and manifest.stat().st_mtime_ns != before
        return not (begun and needed <= set(finished_parts(run)))

    while waits():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"part {during} never began"
        time.sleep(0.001)
    time.sleep(after)
    process.kill()
    process.communicate()


def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one_and_repeats_no_finished_part(
    moe: Moe, text_file: Path, moe_folder: Path, dense_folder: Path, tmp_path: Path
) -> None:
    """Killed once inside each part and once after the last, then left alone."""
    words = ("probe", "--model", moe_folder, "--baseline", dense_folder, "--dataset", text_file, "--concepts", "text")
    words += ("--k", "1,2,4", "--draws", "6", "--permutations", "199")
    undisturbed = moe(*words, "-o", "a")
    assert undisturbed.returncode == 0, undisturbed.stderr
    seconds = [entry["seconds"] for entry in probe_entry(tmp_path / "a")["passes"]]
    assert len(seconds) == len(PARTS)

    rng = random.Random(SEED)
    run = tmp_path / "b"
    kept: Finished = {}
    for during, whole in enumerate([*seconds, WRITING]):
        kill(words, run, during=during, after=rng.random() * whole)
        if probe_entry(run)["state"] == "done":  # it was faster than the killer
            assert during >= len(PARTS) - 1
            break
        finished = finished_parts(run)
        assert {part: finished.get(part) for part in kept} == kept, "a finished part was written again"
        kept = finished
    assert len(kept) >= len(PARTS) - 1

    resumed = moe(*words, "-o", "b")
    assert (resumed.returncode, resumed.stdout) == (0, undisturbed.stdout.removesuffix("a\n") + "b\n")
    entry = probe_entry(run)
    assert (entry["state"], len(entry["passes"])) == ("done", len(PARTS) - len(kept)), "only what was left is computed"
    names = sorted(p.name for p in (tmp_path / "a").glob("*.parquet"))
    assert {"probe.parquet", "comparison.parquet", "waterfall.parquet", "neurons.parquet"} <= set(names)
    assert sorted(p.name for p in run.glob("*.parquet")) == names
    for name in names:
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "a" / name), pd.read_parquet(run / name), check_exact=True
        )
    assert leftovers(run) == []
