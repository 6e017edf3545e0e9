"""``trigger_target``: one call, a run directory that resumes, and a result that reads itself back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens.capture.run import Run, open_run
from moe_lens.causal.triggers import run as module
from moe_lens.causal.triggers.result import Triggers
from moe_lens.causal.triggers.run import trigger_target
from moe_lens.errors import BadConfig, BadOutput, OutOfRange
from moe_lens.models.lens import Lens
from tests.causal.triggers import planted

KEY = ["case", "mode"]


def measure(lens: Lens, folder: Path, **options: Any) -> Triggers:
    return trigger_target(
        lens, folder, **{"corpus": planted.reference(), "draws": 200, "progress": False, **options}
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(lens: Lens, folder: Path) -> Triggers:
    return measure(lens, folder)


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_there_is_a_row_for_every_expert_and_case_in_every_mode(found: Triggers) -> None:
    assert found.frame[["address", "mode"]].drop_duplicates().shape == (8, 2)
    assert found.cases[KEY].drop_duplicates().shape == (48, 2)
    assert found.modes == ["zero", "mean_off"]


def test_cases_that_cannot_be_used_stay_with_their_defects(lens: Lens, tmp_path: Path) -> None:
    cases = [("abXc", "X", "u"), ("abc", "Y", "u"), ("", "X", "u")]
    table = measure(lens, planted.write(tmp_path, {"L0-E1": cases}), modes=["zero"]).cases
    assert table["used"].tolist() == [True, False, False]
    assert "trigger absent" in table["defects"][1]
    assert table["defects"][2] == ["empty field"]
    assert table.loc[1:, "effect"].isna().all()


def test_a_folder_of_unusable_cases_is_a_finding(lens: Lens, tmp_path: Path) -> None:
    found = measure(lens, planted.write(tmp_path, {"L0-E1": [("abc", "Y", "u")]}))
    assert found.outcomes == {"causal": 0, "not shown": 0, "too few": 1}
    assert "0 of 1 cases can be measured" in found.findings()[1]
    found.plot()
    found.to_markdown()


def test_the_order_of_cases_in_a_file_changes_no_effect(
    lens: Lens, folder: Path, found: Triggers, tmp_path: Path
) -> None:
    turned = {
        path.stem: [tuple(entry.values()) for entry in json.loads(path.read_text())][::-1]
        for path in folder.glob("*.json")
    }
    again = measure(lens, planted.write(tmp_path, turned))  # type: ignore[arg-type]
    key = ["layer", "expert", "text", "mode"]
    columns = ["routed", "gate", "logit", "rank", "log_p", "effect", "effect_at_place", "effect_co_selected"]
    same(
        found.cases.sort_values(key)[key + columns].reset_index(drop=True),
        again.cases.sort_values(key)[key + columns].reset_index(drop=True),
    )


def test_a_run_directory_gives_the_result_back(lens: Lens, folder: Path, found: Triggers, tmp_path: Path) -> None:
    written = measure(lens, folder, out=tmp_path / "run")
    read = Triggers.of(open_run(tmp_path / "run"))
    for result in (written, read):
        same(result.frame, found.frame)
        assert result.finding() == found.finding()
        assert result.defects == found.defects
        assert result["L0.E1"]["ranks_matched"].map(len).tolist() == found["L0.E1"]["ranks_matched"].map(len).tolist()
    assert (tmp_path / "run" / "triggers.md").read_text() == written.to_markdown()
    assert not (tmp_path / "run" / ".partial").exists()


def test_a_finished_run_is_shown_at_once(
    lens: Lens, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(lens, folder, out=tmp_path / "run", modes=["zero"])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "_measure", refuse)
    measure(lens, folder, out=tmp_path / "run", modes=["zero"])
    with pytest.raises(AssertionError, match="measured again"):
        measure(lens, folder, out=tmp_path / "run", modes=["zero"], resume=False)


def test_a_killed_run_measures_only_the_layers_that_are_left(
    lens: Lens, folder: Path, found: Triggers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, measured = module._measure, []
    monkeypatch.setattr(module, "_measure", _stopping(original, at=1, log=measured))
    with pytest.raises(KeyboardInterrupt):
        measure(lens, folder, out=tmp_path / "run")
    assert measured == [0]
    monkeypatch.setattr(module, "_measure", _stopping(original, at=None, log=measured))
    again = measure(lens, folder, out=tmp_path / "run")
    assert measured == [0, 1]
    same(again.frame, found.frame)


def _stopping(original: Any, *, at: int | None, log: list[int]) -> Any:
    def measured(lens: Lens, layer: int, *rest: Any, **options: Any) -> Any:
        if layer == at:
            raise KeyboardInterrupt
        log.append(layer)
        return original(lens, layer, *rest, **options)

    return measured


def test_other_settings_use_no_finished_part(
    lens: Lens, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, log = module._measure, []
    monkeypatch.setattr(module, "_measure", _stopping(original, at=1, log=log))
    with pytest.raises(KeyboardInterrupt):
        measure(lens, folder, out=tmp_path / "run", modes=["zero"])
    monkeypatch.setattr(module, "_measure", _stopping(original, at=None, log=log))
    measure(lens, folder, out=tmp_path / "run", modes=["mean"])
    assert log == [0, 0, 1]


def test_experts_and_layers_choose_cases(lens: Lens, folder: Path) -> None:
    assert set(measure(lens, folder, modes=["zero"], layers=[1]).frame["address"]) == {"L1.E0", "L1.E3"}
    assert set(measure(lens, folder, modes=["zero"], experts=["L0.E4"]).frame["address"]) == {"L0.E4"}
    with pytest.raises(BadConfig, match=r"it has those of L0\.E1"):
        measure(lens, folder, experts=["L0.E5"])


@pytest.mark.parametrize("options", [{"modes": ["zeroo"]}, {"modes": []}, {"draws": 0}])
def test_impossible_settings_are_refused(lens: Lens, folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        measure(lens, folder, **options)


def test_cases_of_another_model_are_refused(lens: Lens, tmp_path: Path) -> None:
    with pytest.raises(OutOfRange, match="L9-E60"):
        measure(lens, planted.write(tmp_path, {"L9-E60": [("abX", "X", "u")]}))


def test_a_run_without_cases_says_so(lens: Lens, tmp_path: Path) -> None:
    run = module.create_run(tmp_path / "run", {"model": {}, "corpus": {}, "seed": 0})
    with pytest.raises(BadOutput, match="--triggers"):
        Triggers.of(run)
    assert isinstance(run, Run)


def test_the_result_can_be_shown_in_every_way(found: Triggers) -> None:
    assert "L0.E1" in found._repr_html_()
    assert "4 experts, 24 cases" in repr(found)
    assert "| L1.E3 |" in found.to_markdown()
    assert len(list(found.plot().data)) == 3
    values = found.to_dict()
    assert sum(values["outcomes"].values()) == 4
    json.dumps(values, default=lambda value: value.tolist() if isinstance(value, np.generic) else str(value))
    with pytest.raises(OutOfRange, match="no cases"):
        found["L0.E0"]
