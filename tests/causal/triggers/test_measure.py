"""The clean model and the ablations at triggers, against plain passes of the whole model, one case at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_lens as ml
from moe_lens.causal.triggers.cases import Located, locate, read_cases
from moe_lens.causal.triggers.direct import CALIPER, Direct, look
from moe_lens.causal.triggers.measure import measure_layer, other_targets
from moe_lens.models.lens import Lens
from moe_lens.models.reference import Reference
from tests.causal.triggers import planted
from tests.models import tiny

LAYER = 0


@pytest.fixture(scope="module")
def chosen(located: list[Located]) -> list[Located]:
    return [one for one in located if one.case.expert.layer == LAYER]


@pytest.fixture(scope="module")
def direct(lens: Lens, chosen: list[Located]) -> list[Direct]:
    return [look(lens, one, seed=number) for number, one in enumerate(chosen)]


@pytest.fixture(scope="module")
def reference(lens: Lens) -> Reference:
    return lens.reference(["abcdefgh ijklmnop", "mnopqrst uvwxyz"], experts=["L0.E0"])


@pytest.fixture(scope="module")
def table(lens: Lens, chosen: list[Located], direct: list[Direct], reference: Reference) -> pd.DataFrame:
    others = other_targets(chosen, seed=0)
    modes = ("zero", "mean_off", "mean")
    found, _ = measure_layer(lens, LAYER, chosen, direct, others, modes=modes, reference=reference, progress=False)
    return found


def log_p(lens: Lens, ids: Sequence[int], target: int, edit: Any = None, at: int = 0) -> float:
    """Log-probability of `target` after `ids`, with `edit` at one position, in a plain pass."""
    mask = torch.zeros(1, len(ids), dtype=torch.bool)
    mask[0, at] = True
    with torch.no_grad(), lens.edit(edit, tokens=mask) if edit is not None else nullcontext():
        logits = lens.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    return float(logits[0, -1].double().log_softmax(-1)[target])


def loss_of(lens: Lens, case: Located, edit: Any, *, until: int, at: int, target: int | None = None) -> float:
    """Nats that log p(target) falls by."""
    ids, target = case.input_ids[: until + 1], case.target_id if target is None else target
    return log_p(lens, ids, target) - log_p(lens, ids, target, edit, at)


def experts_at(lens: Lens, case: Located, position: int) -> list[int]:
    visits = lens.trace(case.text, layers=[LAYER]).routing
    return visits.loc[visits["position"] == position, "expert"].tolist()


def make(mode: str, expert: int, reference: Reference) -> Any:
    address = f"L{LAYER}.E{expert}"
    return ml.zero(address) if mode == "zero" else getattr(ml, mode)(address, reference=reference)


@pytest.mark.parametrize("mode", ["zero", "mean_off", "mean"])
def test_effects_equal_plain_passes_that_edit_one_token(
    lens: Lens, chosen: list[Located], direct: list[Direct], table: pd.DataFrame, reference: Reference, mode: str
) -> None:
    rows = table[table["mode"] == mode].set_index("case").to_dict("index")
    assert sum(found.routed for found in direct) >= 4
    for number, (case, found) in enumerate(zip(chosen, direct, strict=True)):
        if not found.routed:
            continue
        row, own = rows[number], case.case.expert.expert
        edit, at = make(mode, own, reference), case.position
        assert row["log_p"] == pytest.approx(log_p(lens, case.input_ids[: at + 1], case.target_id), abs=1e-5)
        assert row["effect"] == pytest.approx(loss_of(lens, case, edit, until=at, at=at), abs=1e-5)
        assert row["effect_at_place"] == pytest.approx(loss_of(lens, case, edit, until=case.place, at=at), abs=1e-5)
        beside = [make(mode, e, reference) for e in experts_at(lens, case, at) if e != own]
        assert len(beside) == 2
        lost = np.mean([loss_of(lens, case, one, until=at, at=at) for one in beside])
        assert row["effect_co_selected"] == pytest.approx(lost, abs=1e-5)
        later = np.mean([loss_of(lens, case, one, until=case.place, at=at) for one in beside])
        assert row["effect_co_selected_at_place"] == pytest.approx(later, abs=1e-5)


def test_matched_effects_equal_plain_passes_at_their_own_tokens(
    lens: Lens, chosen: list[Located], direct: list[Direct], table: pd.DataFrame, reference: Reference
) -> None:
    rows = table[table["mode"] == "zero"].set_index("case")
    n = 0
    for number, (case, found) in enumerate(zip(chosen, direct, strict=True)):
        lost = [
            loss_of(lens, case, make("zero", c.expert, reference), until=c.position, at=c.position)
            for c in found.controls
        ]
        n += len(lost)
        if lost:
            assert rows.loc[number, "effect_matched"] == pytest.approx(np.mean(lost), abs=1e-5)
    assert n >= 4


def test_other_targets_are_read_under_the_same_edit(
    lens: Lens, chosen: list[Located], direct: list[Direct], table: pd.DataFrame, reference: Reference
) -> None:
    others, rows = other_targets(chosen, seed=0), table[table["mode"] == "zero"].set_index("case")
    number = next(i for i, found in enumerate(direct) if found.routed and others[i])
    case = chosen[number]
    edit = make("zero", case.case.expert.expert, reference)
    lost = [loss_of(lens, case, edit, until=case.position, at=case.position, target=t) for t in others[number]]
    assert rows.loc[number, "effect_other_targets"] == pytest.approx(np.mean(lost), abs=1e-5)


def test_other_targets_are_never_the_experts_own(located: list[Located]) -> None:
    own: dict[Any, set[int]] = {}
    for one in located:
        own.setdefault(one.case.expert, set()).add(one.target_id)
    found = other_targets(located, seed=0)
    assert any(found)
    for one, targets in zip(located, found, strict=True):
        assert not own[one.case.expert] & set(targets)


def test_an_expert_that_is_not_at_the_trigger_has_no_effect_there(direct: list[Direct], table: pd.DataFrame) -> None:
    rows = table[[not direct[number].routed for number in table["case"].tolist()]]
    assert len(rows)
    assert (rows["effect"] == 0).all()
    assert rows["effect_co_selected"].isna().all()


def test_cases_measured_together_equal_cases_measured_alone(
    lens: Lens, chosen: list[Located], direct: list[Direct], table: pd.DataFrame
) -> None:
    others = other_targets(chosen, seed=0)
    for number in (0, len(chosen) - 1):
        alone, _ = measure_layer(
            lens, LAYER, chosen[number : number + 1], direct[number : number + 1], others[number : number + 1],
            modes=["zero"], reference=None, progress=False,
        )  # fmt: skip
        together = table[(table["mode"] == "zero") & (table["case"] == number)]
        for name in ("effect", "effect_at_place", "effect_co_selected", "effect_matched", "effect_other_targets"):
            assert alone[name].iloc[0] == pytest.approx(together[name].iloc[0], abs=1e-5, nan_ok=True)


def test_controls_are_other_experts_with_like_gates_at_other_tokens_before_the_target(
    lens: Lens, chosen: list[Located], direct: list[Direct]
) -> None:
    for case, found in zip(chosen, direct, strict=True):
        for control in found.controls:
            assert control.expert != case.case.expert.expert
            assert case.first < control.position <= case.place
            assert not case.start <= control.position <= case.position
            assert abs(np.log(control.gate) - np.log(found.gate)) <= CALIPER
            assert control.expert in experts_at(lens, case, control.position)


def test_gate_logit_and_rank_are_those_of_the_trace(lens: Lens, chosen: list[Located], direct: list[Direct]) -> None:
    number = next(i for i, found in enumerate(direct) if found.routed)
    case, found = chosen[number], direct[number]
    written = lens.trace(case.text, layers=[LAYER]).contributions(case.position, case.target_id)
    own = written[written["expert"] == case.case.expert.expert].iloc[0]
    assert (found.gate, found.logit) == (pytest.approx(own["weight"]), pytest.approx(own["logit"]))
    assert found.rank == 1 + (written["logit"] > own["logit"]).sum()
    assert found.gate_rank == 1 + (written["weight"] > own["weight"]).sum()


def test_experts_that_write_alike_share_their_rank(writer_folder: Path) -> None:
    lens = planted.writer()
    case = locate(read_cases(writer_folder / "L0-E4.json"), lens.tokenizer)[0]
    assert look(lens, case).rank == 1.5


def test_an_expert_alone_at_its_token_has_no_rank_and_no_co_selected(located: list[Located]) -> None:
    lens = Lens(tiny.build("olmoe", num_experts_per_tok=1), tiny.tokenizer())
    chosen = [one for one in located if one.case.expert.layer == LAYER]
    direct = [look(lens, one) for one in chosen]
    table, _ = measure_layer(
        lens, LAYER, chosen, direct, other_targets(chosen, seed=0), modes=["zero"], reference=None, progress=False
    )
    assert all(np.isnan(found.rank) for found in direct)
    assert table["effect_co_selected"].isna().all()
    assert np.isfinite(table["effect"]).all()
