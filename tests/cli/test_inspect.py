"""``moe-lens inspect`` for a bundled model, a folder and a dense model."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Cli


def test_the_table_says_what_the_model_is_made_of(cli: Cli, moe_folder: Path) -> None:
    out = cli("inspect", moe_folder).out
    assert "OlmoeForCausalLM" in out
    row = next(line.split() for line in out.splitlines() if line.split()[1:2] == ["moe"])
    assert row == ["0-1", "moe", "6", "2", "24", "-", "yes"]


def test_json_is_one_object_with_the_same_numbers(cli: Cli, moe_folder: Path) -> None:
    found = json.loads(cli("inspect", moe_folder, "--json").out)
    assert (found["model_type"], found["n_layers"], len(found["layers"])) == ("olmoe", 2, 2)
    assert found["layers"][1]["n_experts"] == 6
    assert found["active_parameters"] < found["total_parameters"]


def test_the_bundled_model_names_its_twin(cli: Cli) -> None:
    assert "bundled:tiny-dense" in cli("inspect", "bundled:tiny-moe").out
