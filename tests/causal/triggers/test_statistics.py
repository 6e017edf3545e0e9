"""From cases to experts: intervals, sign flips, exchanges within cases, outcomes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest

from moe_lens.causal.triggers.statistics import QUANTITIES, expert_table, over_texts, ranks

TEXTS = np.arange(6)


def test_the_sign_flip_p_is_that_of_all_flips() -> None:
    values = np.array([0.3, 0.1, -0.05, 0.2, 0.02, 0.4])
    flips = np.array(list(product([-1, 1], repeat=6)))
    exact = (flips @ values >= values.sum() - 1e-12).mean()
    _, _, _, p = over_texts(values[None], TEXTS, draws=20_000, seed=0)
    assert p[0] == pytest.approx(exact, abs=0.005)


def test_cases_of_one_text_are_flipped_and_drawn_together() -> None:
    values, text = np.full((1, 12), 1.0), np.repeat(np.arange(3), 4)
    _, _, _, together = over_texts(values, text, draws=5000, seed=0)
    _, _, _, apart = over_texts(values, np.arange(12), draws=5000, seed=0)
    assert together[0] == pytest.approx(1 / 8, abs=0.02)
    assert apart[0] < 0.002
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=10), 8)[None]
    _, low, high, _ = over_texts(values, np.repeat(np.arange(10), 8), draws=2000, seed=0)
    _, narrow_low, narrow_high, _ = over_texts(values, np.arange(80), draws=2000, seed=0)
    assert high[0] - low[0] > 2 * (narrow_high[0] - narrow_low[0])


def test_no_effect_at_all_has_p_1_and_nothing_measured_has_none() -> None:
    values = np.stack([np.zeros(6), np.full(6, np.nan)])
    estimate, _, _, p = over_texts(values, TEXTS, draws=500, seed=0)
    assert (estimate[0], p[0]) == (0, 1)
    assert np.isnan([estimate[1], p[1]]).all()


def test_missing_values_are_left_out() -> None:
    values = np.array([[1.0, np.nan, 3.0, np.nan, 2.0, 2.0]])
    estimate, low, high, _ = over_texts(values, TEXTS, draws=500, seed=0)
    assert estimate[0] == 2
    assert low[0] < 2 < high[0]


def test_p_values_without_an_effect_are_uniform() -> None:
    rng = np.random.default_rng(0)
    _, _, _, p = over_texts(rng.normal(size=(400, 20)), np.arange(20), draws=999, seed=0)
    assert kstest(p, "uniform").pvalue > 0.01


def test_a_first_rank_that_controls_have_too_is_no_evidence() -> None:
    found = ranks(np.ones(20), [[1.0, 1.0]] * 20, draws=999, seed=0)
    assert (found["rank1"], found["rank1_matched"], found["p_rank"]) == (1, 1, 1)


def test_a_first_rank_that_controls_do_not_have_is_evidence() -> None:
    found = ranks(np.ones(10), [[3.0, 5.0, 8.0]] * 10, draws=999, seed=0)
    assert (found["rank_matched"], found["rank1_matched"], found["p_rank"]) == (pytest.approx(16 / 3), 0, 0.001)
    last = ranks(np.full(10, 8.0), [[3.0, 5.0, 1.0]] * 10, draws=999, seed=0)
    assert last["p_rank"] == 1


def test_ranks_of_exchangeable_experts_give_uniform_p() -> None:
    rng = np.random.default_rng(0)
    p = []
    for seed in range(200):
        table = rng.uniform(1, 8, (15, 5))
        p.append(ranks(table[:, 0], [row[1:].tolist() for row in table], draws=299, seed=seed)["p_rank"])
    assert kstest(p, "uniform").pvalue > 0.01


def test_cases_without_controls_count_in_the_rank_alone() -> None:
    found = ranks(np.array([1.0, 4.0]), [[], [4.0]], draws=99, seed=0)
    assert (found["rank"], found["rank_matched"], found["p_rank"]) == (2.5, 4, 1)
    nothing = ranks(np.array([]), [], draws=99, seed=0)
    assert all(np.isnan(value) for value in nothing.values())


def made_cases(effect: float, *, n: int = 12, other: float = 0.0, matched: float = 0.0, beside: float = 0.0):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, n)
    columns = {column for pair in QUANTITIES.values() for column in pair if column}
    rows = {name: np.zeros(n) for name in columns}
    rows |= {"effect": effect + noise, "effect_other_targets": np.full(n, other)}
    rows |= {"effect_matched": np.full(n, matched), "effect_co_selected": np.full(n, beside)}
    parts = [
        pd.DataFrame(rows).assign(
            layer=0, expert=1, mode=mode, used=True, routed=True, text=[f"t{i}" for i in range(n)], rank=1.0, gate=0.5,
            elsewhere=0.1, ranks_matched=pd.Series([[2.0]] * n),
        )
        for mode in ("zero", "mean_off")
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(
    ("cases", "outcome"),
    [
        (made_cases(0.5), "causal"),
        (made_cases(0.0), "not shown"),
        (made_cases(-0.5), "not shown"),
        (made_cases(0.5, beside=0.6), "not shown"),
        (made_cases(0.5, matched=0.6), "not shown"),
        (made_cases(0.5, other=0.6), "not shown"),
        (made_cases(0.5, n=4), "too few"),
    ],
)
def test_an_outcome_needs_all_contrasts_and_enough_texts(cases: pd.DataFrame, outcome: str) -> None:
    found = expert_table(cases, draws=500, seed=0, floor=1e-4)
    assert found["outcome"].tolist() == [outcome] * 2


def test_an_outcome_needs_every_mode() -> None:
    cases = made_cases(0.5)
    cases.loc[cases["mode"] == "mean_off", "effect"] -= 0.5
    assert set(expert_table(cases, draws=500, seed=0, floor=1e-4)["outcome"]) == {"not shown"}


def test_an_effect_below_the_noise_floor_is_not_shown() -> None:
    assert set(expert_table(made_cases(0.5), draws=500, seed=0, floor=0.6)["outcome"]) == {"not shown"}


def test_contrasts_that_do_not_exist_are_not_asked_for() -> None:
    cases = made_cases(0.5).assign(effect_co_selected=np.nan, effect_other_targets=np.nan)
    assert set(expert_table(cases, draws=500, seed=0, floor=1e-4)["outcome"]) == {"causal"}
    without = made_cases(0.5).assign(effect_matched=np.nan)
    assert set(expert_table(without, draws=500, seed=0, floor=1e-4)["outcome"]) == {"not shown"}


def test_cases_without_the_expert_count_in_its_share_alone() -> None:
    cases = made_cases(0.5)
    cases.loc[cases["text"].isin(["t0", "t1", "t2"]), "routed"] = False
    cases.loc[cases["text"] == "t3", "used"] = False
    found = expert_table(cases, draws=500, seed=0, floor=1e-4).iloc[0]
    assert found[["n_cases", "n_used", "n_routed", "n_texts"]].tolist() == [12, 11, 8, 8]
    assert found["routed"] == 8 / 11
    assert found["routed_low"] < 8 / 11 < found["routed_high"]
