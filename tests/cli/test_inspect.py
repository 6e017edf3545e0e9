"""``moe-lens inspect`` for a bundled model, a folder, a dense model, and one too large to load."""

from __future__ import annotations

import json
from pathlib import Path

import moe_lens
from tests.cli.conftest import Cli


def test_the_table_says_what_the_model_is_made_of(cli: Cli, moe_folder: Path) -> None:
    out = cli("inspect", moe_folder).out
    assert "OlmoeForCausalLM" in out
    row = next(line.split() for line in out.splitlines() if line.split()[1:2] == ["moe"])
    assert row == ["0-1", "moe", "6", "2", "24", "-", "yes"]


def test_json_is_one_object_with_the_same_numbers(cli: Cli, moe_folder: Path) -> None:
    found = json.loads(cli("inspect", moe_folder, "--json").out)
    assert found == json.loads(json.dumps(moe_lens.inspect(str(moe_folder)).to_dict()))
    assert (found["model_type"], found["n_layers"], len(found["layers"])) == ("olmoe", 2, 2)
    assert found["layers"][1]["n_experts"] == 6
    assert found["active_parameters"] < found["total_parameters"]


def test_the_bundled_model_names_its_twin_and_its_gate(cli: Cli) -> None:
    out = cli("inspect", "bundled:tiny-moe").out
    assert "(--baseline): bundled:tiny-dense" in out
    assert "trained on the same data with the same active width" in out
    assert "softmax over all experts, then top-k (weights not renormalised)" in out
    assert "2 of 16 for each token (N_A/N = 0.125)" in out
    assert json.loads(cli("inspect", "bundled:tiny-moe", "--json").out)["suggested_baseline"] == "bundled:tiny-dense"


def test_a_model_too_large_to_load_is_described(cli: Cli, tmp_path: Path) -> None:
    from tests.models.test_spec import DEEPSEEK

    DEEPSEEK.save_pretrained(tmp_path / "v3")
    file = tmp_path / "v3" / "config.json"
    quantised = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    file.write_text(json.dumps(quantised))
    out = cli("inspect", "v3").out
    for words in ("671B", "8 of 256", "2048 neurons that every token visits", "sigmoid, then top-k", "fp8"):
        assert words in out
    assert "times 2.5, from 4 of 8 groups, chosen with a selection bias" in out
    assert "--baseline" not in out
    gate = json.loads(cli("inspect", "v3", "--json").out)["gate"]
    assert (gate["scale"], gate["groups"], gate["selection_bias"]) == (2.5, [8, 4], True)
    rows = [line.split()[:5] for line in out.splitlines() if line.strip()[:1] in ("0", "3")]
    assert rows == [["0-2", "dense", "1", "1", "18432"], ["3-60", "moe", "256", "8", "2048"]]


def test_a_suggested_baseline_comes_with_both_sizes(cli: Cli, tmp_path: Path) -> None:
    from tests.models.test_spec import OLMOE

    OLMOE.save_pretrained(tmp_path / "olmoe")
    out = cli("inspect", "olmoe").out
    assert "(--baseline): allenai/OLMo-1B-0724-hf" in out
    assert "not matched in size: 1.28B parameters against 1.28B active" in out


def test_a_dense_model_has_no_gate(cli: Cli, dense_folder: Path) -> None:
    out = cli("inspect", dense_folder).out
    assert "none: a dense model" in out
    assert "gate" not in out.replace("gated", "")
