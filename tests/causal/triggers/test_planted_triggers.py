"""What is planted comes out, what is not does not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from moe_lens.causal.triggers.result import Triggers
from moe_lens.causal.triggers.run import trigger_target
from tests.causal.triggers import planted


@pytest.fixture(scope="module")
def written(writer_folder: Path) -> Triggers:
    return trigger_target(planted.writer(), writer_folder, corpus=planted.reference(), draws=999, progress=False)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Triggers:
    folder = planted.write(tmp_path_factory.mktemp("cases") / "crowd", planted.crowd_cases(n=12))
    return trigger_target(planted.crowd(), folder, corpus=planted.reference(), draws=999, progress=False)


def test_an_expert_that_writes_the_target_after_the_trigger_is_causal(written: Triggers) -> None:
    rows = written.frame[written.frame["address"] == "L0.E3"]
    assert rows["outcome"].tolist() == ["causal", "causal"]
    assert (rows["routed"] == 1).all()
    assert (rows["rank1"] == 1).all()
    assert (rows["rank1_matched"] < 0.2).all()
    for name in ("effect", "over_co_selected", "over_matched"):
        assert (rows[f"{name}_low"] > 1).all()  # nats


def test_an_expert_that_is_chosen_and_writes_nothing_is_not(written: Triggers) -> None:
    rows = written.frame[written.frame["address"] == "L0.E4"]
    assert rows["outcome"].tolist() == ["not shown", "not shown"]
    assert (rows["routed"] == 1).all()
    assert rows["effect"].abs().max() < 1e-5
    assert (rows["q_rank"] > 0.5).all()


def test_writing_at_the_trigger_shows_where_the_target_stands_only_through_attention(written: Triggers) -> None:
    """The planted model has none."""
    assert written.frame["effect_at_place"].abs().max() < 1e-5


def test_a_largest_gate_is_first_and_costs_most_but_no_more_than_like_gates(crowd: Triggers) -> None:
    frame = crowd.frame[crowd.frame["mode"] == "zero"]
    assert (frame["rank1"] == 1).all()  # twice as often as one time in K
    assert (frame["over_co_selected_low"] > 0.5).all()
    assert (frame["rank1_matched"] == 1).all()
    assert (frame["p_rank"] == 1).all()
    assert frame["over_matched"].abs().max() < 1e-5
    assert set(crowd.frame["outcome"]) == {"not shown"}


@pytest.mark.slow
def test_experts_with_large_gates_that_write_noise_are_seldom_called_causal(tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    small, first = 0, []
    for seed in range(12):
        folder = planted.write(tmp_path / str(seed), planted.crowd_cases(seed=seed))
        lens = planted.crowd(noise=0.5, seed=seed)
        frame = trigger_target(lens, folder, modes=["zero"], corpus=planted.reference(), progress=False).frame
        found.update(frame["outcome"])
        small += int((frame["p_rank"] < 0.05).sum())
        first += frame["rank1"].tolist()
    assert sum(first) / len(first) > 0.7  # chance alone would be .5
    assert found["causal"] <= 3  # of 36: 5 % and what the binomial leaves
    assert small <= 5
