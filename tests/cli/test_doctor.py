"""``moe-lens doctor``: the table, JSON, exit codes and the sentence of a line that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli, contents


def test_a_sound_model_passes_and_the_last_line_is_the_verdict(cli: Cli, moe_folder: Path) -> None:
    before = contents(moe_folder)
    outcome = cli("doctor", moe_folder)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.last_line.startswith("all 14 checks passed: moe-lens sees what")
    numbered = [line.split()[0] for line in outcome.out.splitlines() if " ok " in line]
    assert numbered == [str(i) for i in range(1, 15)]
    for word in ("gate:", "gradients:", "context:", "quantisation:"):
        assert word in outcome.out
    assert contents(moe_folder) == before


def test_the_bundled_model_passes(cli: Cli) -> None:
    outcome = cli("doctor", "bundled:tiny-moe", "--dtype", "float32", "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert found["ok"]
    assert {line["status"] for line in found["checks"]} == {"ok"}
    assert found["capabilities"]["dtype"] == "float32"


def test_options_reach_the_model(cli: Cli, moe_folder: Path) -> None:
    words = ("--dtype", "bf16", "--kernel", "eager", "--device", "cpu", "--experts", "L1.E3,0:2", "--json")
    found = json.loads(cli("doctor", moe_folder, *words).out)
    names = [line["check"] for line in found["checks"]]
    assert [name for name in names if name.startswith("ablation")] == ["ablation L1.E3", "ablation L0.E2"]
    assert found["capabilities"]["dtype"] == "bfloat16"
    assert found["capabilities"]["implementation"].endswith("taps follow eager")


@pytest.mark.parametrize("json_too", [False, True])
def test_a_failed_line_exits_1_and_says_what_it_means(
    cli: Cli, moe_folder: Path, monkeypatch: pytest.MonkeyPatch, json_too: bool
) -> None:
    from moe_lens.models import seam

    sound = seam.tapping

    @contextmanager
    def forgetful(model: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with sound(model, *args, **kwargs) as current:
            yield current
        model.set_experts_implementation("eager")

    monkeypatch.setattr(seam, "tapping", forgetful)
    outcome = cli("doctor", moe_folder, *(["--json"] if json_too else []))
    assert outcome.code == 1
    assert outcome.err.startswith("moe-lens: check 'restored' failed: the model is not what it was")
    assert outcome.err.count("\n") == 1
    if json_too:
        assert not json.loads(outcome.out)["ok"]
    else:
        assert outcome.last_line == "1 of 14 checks failed: restored"
