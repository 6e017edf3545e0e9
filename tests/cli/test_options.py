"""Options made from the settings: every field has one, and only what was given overrides the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_lens.config import ProbeConfig
from moe_lens.errors import MoELensError
from tests.cli.conftest import Cli


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[ProbeConfig]:
    """The settings that `probe` arrives at; it stops there."""
    found: list[ProbeConfig] = []

    def stop(settings: ProbeConfig) -> Any:
        found.append(settings)
        raise MoELensError("far enough")

    monkeypatch.setattr("moe_lens.cli.probe.check_models", stop)
    return found


def test_every_setting_is_an_option_with_its_description(cli: Cli) -> None:
    text = " ".join(cli("probe", "--help").out.split())
    for name, field in ProbeConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in text
        assert (field.description or "") in text


def test_nothing_given_leaves_the_defaults(cli: Cli, seen: list[ProbeConfig]) -> None:
    cli("probe", "--model", "m", "-o", "x")
    assert seen == [ProbeConfig(model="m", output=Path("x"))]


def test_options_arrive_parsed(cli: Cli, seen: list[ProbeConfig]) -> None:
    words = "--k 1,2 --k 8 --layers 0,2-3 --concepts a,b --concepts c --max-memory 4GB --batch-size 8 --no-resume"
    cli("probe", "--model", "m", "-o", "x", *words.split(), "--all-cells", "--limit", "5", "--dtype", "bfloat16")
    assert seen == [
        ProbeConfig(
            model="m", output=Path("x"), k=[1, 2, 8], layers=[0, 2, 3], concepts=["a", "b", "c"], max_memory=4 * 10**9,
            batch_size=8, resume=False, all_cells=True, limit=5, dtype="bfloat16",
        )
    ]  # fmt: skip


def test_a_flag_that_was_not_given_does_not_undo_the_file(cli: Cli, seen: list[ProbeConfig], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: m\noutput: x\nall-cells: true\nresume: false\nconcepts: [a]\n")
    cli("probe", "--config", "c.yaml")
    assert seen == [ProbeConfig(model="m", output=Path("x"), all_cells=True, resume=False, concepts=["a"])]
    cli("probe", "--config", "c.yaml", "--resume", "--concepts", "b")
    assert seen[1] == ProbeConfig(model="m", output=Path("x"), all_cells=True, resume=True, concepts=["b"])
