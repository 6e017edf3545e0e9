"""Tables over the hand-made set function O1 of METRICS 6.1, which every document follows up to a factor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_lens.causal.faithfulness.kept import SetEffect
from moe_lens.causal.faithfulness.sets import Bins
from moe_lens.causal.faithfulness.tables import Case, Tabulator
from tests.causal.faithfulness.test_scores import O1

TOKENS = np.array([10.0, 20, 30, 40])
BINS = Bins((1 / 3, 2 / 3, 1.0))
EVERYONE = np.ones(3, bool)


class HandMade:
    """Stands in for `Measured`: removing a set costs F(U) - F(rest) nats per token, times a factor of the document."""

    n_tokens = TOKENS
    layer = np.zeros(3, int)

    def __init__(self, factor: Any = (1, 1, 1, 1)) -> None:
        self.factor = np.array(factor, float)

    def of(self, mode: str, removed: np.ndarray) -> SetEffect:
        rest = tuple(int(i) for i in np.flatnonzero(~removed))
        loss = TOKENS * self.factor * (O1[0, 1, 2] - O1[rest])
        return SetEffect(2 * loss, loss, 0, float("nan"), 0)


def case(order: tuple[int, ...] = (0, 1, 2), draws: tuple[tuple[int, ...], ...] = ()) -> Case:
    chosen, *drawn = (np.stack([np.isin(range(3), o[:k]) for k in (1, 2, 3)]) for o in (order, *draws))
    return Case("mine", "included", EVERYONE, chosen, {"random": np.stack(drawn)} if drawn else {}, np.full(3, np.nan))


def tables(factor: Any = (1, 1, 1, 1), draws: int = 200, bins: Bins = BINS) -> Tabulator:
    return Tabulator(HandMade(factor), bins, draws=draws, seed=0)  # type: ignore[arg-type]


def test_o1_through_the_tables():
    frame = tables().frame(["zero"], [case()], {})
    np.testing.assert_allclose(frame["comprehensiveness_logp"], [0.6, 0.8, 0.8, 2.2 / 3])
    np.testing.assert_allclose(frame["sufficiency_logp"], [0.3, 0.1, 0, 0.4 / 3], atol=1e-12)
    np.testing.assert_allclose(frame["comprehensiveness_kl"], 2 * frame["comprehensiveness_logp"])
    assert frame["comprehensiveness_kl_p"].isna().all()
    zero = tables(bins=Bins(BINS.shares, include_zero=True)).frame(["zero"], [case()], {}).iloc[-1]
    assert (zero["comprehensiveness_logp"], zero["sufficiency_logp"]) == pytest.approx((0.55, 0.3))


def test_o1_circuit_through_the_tables():
    rows = tables().circuit(["zero"], [case()], ends=True)
    assert set(rows["status"]) == {"ok"}
    values = rows.groupby("quantity", sort=False)["value"].apply(list)
    np.testing.assert_allclose(values["faithfulness"], [0.625, 0.875, 1])
    np.testing.assert_allclose(values["completeness"], [0.25, 0, 0], atol=1e-12)
    assert values["cpr"] == pytest.approx([2 / 3])
    assert values["cmd"] == pytest.approx([1 / 3])
    inside = tables().circuit(["zero"], [case()], ends=False).set_index("quantity")["value"]
    assert inside["cpr"] == pytest.approx((0.625 / 2 + 0.875 + 0.5) / 3)  # from the first bin on


def test_a_circuit_is_refused_where_documents_disagree_whether_there_is_anything_to_lose():
    rows = tables((3, -3, 2, -1)).circuit(["zero"], [case()], ends=True)
    assert set(rows["status"]) == {"refused"}
    assert rows[["value", "low", "high"]].isna().all(axis=None)


def test_documents_count_by_their_tokens_and_spread_makes_the_interval():
    even = tables().frame(["zero"], [case()], {}).iloc[0]
    assert even["comprehensiveness_logp_low"] == pytest.approx(0.6)
    assert even["comprehensiveness_logp_high"] == pytest.approx(0.6)
    uneven = tables((0, 0, 0, 2)).frame(["zero"], [case()], {}).iloc[0]
    assert uneven["comprehensiveness_logp"] == pytest.approx(0.6 * 2 * 40 / 100)
    assert uneven["comprehensiveness_logp_low"] == 0
    assert uneven["comprehensiveness_logp_high"] > 0.8


def test_gaps_are_paired_by_document():
    """A factor of the document moves score and control alike: their gap varies less than either."""
    made = tables((1, 2, 3, 4))
    gaps = made.gaps(["zero"], [case(draws=((1, 0, 2), (1, 0, 2)))])
    row = gaps[(gaps["score"] == "comprehensiveness_logp") & (gaps["bin"] == BINS.shares[0])].iloc[0]
    mean = (TOKENS * [1, 2, 3, 4]).sum() / TOKENS.sum()
    assert row["gap"] == pytest.approx(mean * (0.6 - 0.3))
    own = made.frame(["zero"], [case()], {}).iloc[0]
    assert row["high"] - row["low"] == pytest.approx(
        0.5 * (own["comprehensiveness_logp_high"] - own["comprehensiveness_logp_low"]), rel=1e-6
    )
    assert row["p"] == pytest.approx(1 / 3)
    suff = gaps[(gaps["score"] == "sufficiency_logp") & (gaps["bin"] == BINS.shares[0])].iloc[0]
    assert suff["gap"] == pytest.approx(mean * (0.6 - 0.3))  # random 0.9 - 0.3, own 0.9 - 0.6


def test_draws_of_a_control_widen_its_interval():
    same, mixed = (
        tables().frame(["zero"], [case(draws=draws)], {}).query("control == 'random'").iloc[0]
        for draws in (((1, 0, 2),) * 4, ((1, 0, 2), (0, 1, 2), (2, 1, 0), (2, 1, 0)))
    )
    assert same["comprehensiveness_logp_high"] - same["comprehensiveness_logp_low"] == pytest.approx(0)
    assert mixed["comprehensiveness_logp_high"] - mixed["comprehensiveness_logp_low"] > 0.1
