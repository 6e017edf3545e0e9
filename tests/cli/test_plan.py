"""``--dry-run``: numbers that can be checked by hand on a text of known tokens (one token a byte)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def plan(cli: Cli, moe_folder: Path, dense_folder: Path, text_file: Path) -> dict[str, Any]:
    words = ["--model", moe_folder, "--baseline", dense_folder, "--dataset", text_file]
    words += ["--concepts", "all_digits,is_not_ascii,contains_capital", "--k", "1,2", "-o", "out"]
    outcome = cli("probe", *words, "--dry-run", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_tokens_per_expert_are_tokens_times_top_k_over_experts(plan: dict[str, Any]) -> None:
    moe, dense = plan["models"]
    assert moe["shares"] == [
        {
            "layers": [0, 1],
            "n_experts": 6,
            "top_k": 2,
            "tokens_per_expert": {split: n * 2 // 6 for split, n in moe["tokens"].items()},
        }
    ]
    assert dense["shares"][0]["tokens_per_expert"] == dense["tokens"]


def test_all_bytes_but_the_first_of_every_window_are_counted(plan: dict[str, Any], text_file: Path) -> None:
    documents = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    n_bytes = sum(len(text.encode()) for text in documents)
    n_windows = sum(-(-len(text.encode()) // 64) for text in documents)
    assert sum(plan["models"][0]["tokens"].values()) == n_bytes - n_windows
    assert plan["n_documents"] == len(documents)


def test_a_concept_that_never_occurs_is_out_of_reach_and_a_common_one_is_not(plan: dict[str, Any]) -> None:
    short = {s["concept"]: s for s in plan["models"][0]["shortages"]}
    assert short["is_not_ascii"]["impossible"]
    assert short["is_not_ascii"]["tokens"] == 0
    assert "all_digits" not in short


def test_memory_and_disk_are_predicted(plan: dict[str, Any]) -> None:
    moe = plan["models"][0]
    assert 0 < moe["least_bytes"] < moe["most_bytes"]
    assert moe["weight_bytes"] == 4 * json_parameters(moe)
    probes = 3 * 2 * 12 + 3 * 2 * 2  # concepts x ks x cells, of both models: a row each, fitted or not
    assert plan["disk_bytes"] == 110 * probes


def json_parameters(model: dict[str, Any]) -> int:
    import moe_lens

    return moe_lens.inspect(model["name"]).total_parameters


def test_a_dry_run_writes_nothing_and_needs_no_output(
    cli: Cli, moe_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    words = (
        "probe",
        "--model",
        moe_folder,
        "--dataset",
        text_file,
        "--dry-run",
        "--concepts",
        "is_not_ascii,all_digits",
    )
    outcome = cli(*words)
    assert outcome.code == 0
    assert "concepts fall short in the average expert of" in " ".join(outcome.out.split())
    assert "every expert" not in outcome.out
    assert "every expert" in cli(*words, "--details").out
    assert list(tmp_path.iterdir()) == []
