"""``moe-lens probe`` as a process: hub ids, JSON, interruption and a full disk."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.cli.conftest import leftovers
from tests.e2e.conftest import Moe, start
from tests.models.hub_cache import COMMIT, make_hub_cache

pytestmark = pytest.mark.e2e


@pytest.fixture
def small(text_file: Path) -> tuple[object, ...]:
    """Options of a run of a few seconds."""
    return ("--dataset", text_file, "--concepts", "all_digits,contains_capital", "--k", "1,2")


def test_the_literal_olmoe_id_gives_what_its_folder_gives(
    moe: Moe, small: tuple[object, ...], moe_folder: Path, tmp_path: Path
) -> None:
    make_hub_cache(tmp_path / "hub", "allenai/OLMoE-1B-7B-0125", moe_folder)
    words = ("probe", "--model", "allenai/OLMoE-1B-7B", *small, "--json")
    done = moe(*words, env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["run"] == "runs/OLMoE-1B-7B", "the default place"
    assert answer["summary"]["models"] == {"moe": "allenai/OLMoE-1B-7B-0125"}
    assert "allenai/OLMoE-1B-7B-0125" in done.stderr, "the notice of the alias"
    model = json.loads((tmp_path / answer["run"] / "manifest.json").read_text())["model"]
    assert (model["name"], model["revision"]) == ("allenai/OLMoE-1B-7B-0125", COMMIT)

    folder = moe("probe", "--model", moe_folder, *small, "-o", "b")
    assert (folder.returncode, folder.stderr) == (0, ""), "silent when stderr is no terminal"
    assert folder.stdout.splitlines()[-1] == "b"
    a, b = (pd.read_parquet(tmp_path / name / "probe.parquet").drop(columns="model") for name in (answer["run"], "b"))
    pd.testing.assert_frame_equal(a, b)


def test_an_interrupted_run_goes_on_and_ends_like_an_undisturbed_one(
    moe: Moe, text_file: Path, moe_folder: Path, dense_folder: Path, tmp_path: Path
) -> None:
    words = ("probe", "--model", moe_folder, "--baseline", dense_folder, "--dataset", text_file, "--concepts", "text")
    words += ("--k", "1,2,4", "--all-cells")
    process = start((*words, "-o", "a"), tmp_path)
    deadline = time.monotonic() + 300
    while not (tmp_path / "a" / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("moe-lens: interrupted; the same command continues from its finished parts\n")
    assert moe(*words, "-o", "a").returncode == 0
    assert moe(*words, "-o", "b").returncode == 0
    for name in ("probe", "comparison", "routing"):
        a, b = (pd.read_parquet(tmp_path / run / f"{name}.parquet") for run in "ab")
        pd.testing.assert_frame_equal(a, b)
    assert leftovers(tmp_path / "a") == []


def test_a_full_disk_leaves_nothing_half_written_and_the_run_can_go_on(
    moe: Moe, small: tuple[object, ...], moe_folder: Path, tmp_path: Path
) -> None:
    """Files over 6 kB fail as on a full disk: the manifest and small tables fit, larger ones do not."""
    words = ("probe", "--model", moe_folder, *small, "-o", "a")
    failed = moe(*words, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000)))
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1), failed.stderr
    assert "could not write" in failed.stderr
    run = tmp_path / "a"
    json.loads((run / "manifest.json").read_text())
    for table in run.glob("*.parquet"):
        pd.read_parquet(table)
    assert list(run.rglob("*.tmp")) == []
    assert moe(*words).returncode == 0
    assert leftovers(run) == []
