"""Rows of arm ``null``, from null distributions small enough to do by hand."""

from dataclasses import replace

import numpy as np
import pytest

from moe_lens.probing.null_rows import mean_null_gap, null_rows
from moe_lens.probing.nulls import NullDistribution, PipelineScores

NAMES = ("a", "b", "c")
GROUP = {"a": "a", "b": "twins", "c": "twins"}


def distribution(observed, null, n_cells=4):
    """Statistic and scores alike, for one labelling and for each exchange."""
    sides = []
    for table in (np.array([observed], float), np.array(null, float)):
        sides.append(PipelineScores(table, table, table, np.where(np.isnan(table), -1, 0).astype(np.int64)))
    return NullDistribution(NAMES, np.zeros((n_cells, 2), np.int64), *sides, np.array([0.1, 0.2, 0.3]))


MOE = distribution([0.9, 0.8, 0.5], [[0.5, 0.4, 0.6], [0.6, 0.8, 0.6], [0.7, 0.6, 0.6]])
DENSE = distribution([0.7, np.nan, 0.5], [[0.5, np.nan, 0.5], [0.5, np.nan, 0.4], [0.5, np.nan, 0.6]], n_cells=2)
HELD = [
    {"arm": "held_out", "concept": name, "metric": "auroc", "k": k, "moe": 0.5, "p_value": np.nan}
    for k, name in [(8, "a"), *((1, name) for name in "abc")]
]


def rows_of(nulls, averaged=("a", "b", "c"), held=HELD, types=()):
    rows = null_rows(held, nulls, GROUP, {"auroc": set(averaged), "f1_balanced": set(averaged)}, types)
    return {(r["arm"], r["metric"], r["concept"], r["k"]): r for r in rows}


def test_means_bands_and_gaps_are_those_of_the_exchanges():
    row = rows_of({"moe": MOE, "dense": DENSE})["null", "auroc", "a", 1]
    assert (row["moe"], row["dense"], row["gap"]) == pytest.approx((0.6, 0.5, 0.1))
    assert (row["moe_low"], row["moe_high"]) == pytest.approx((0.505, 0.695)), "95 % of 3 exchanges, by percentile"
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.005, 0.195))
    assert (row["n_cells_moe"], row["n_cells_dense"], row["kept"]) == (4, 2, 0.1)


def test_p_counts_the_exchanges_that_do_as_well_and_the_true_labels():
    rows = rows_of({"moe": MOE, "dense": DENSE})
    p = {name: rows["null", "auroc", name, 1]["p_value"] for name in NAMES}
    assert p == pytest.approx({"a": 1 / 4, "b": 2 / 4, "c": 4 / 4}), "a tie counts against the concept"
    assert rows["null", "auroc", "a", 1]["p_value_dense"] == pytest.approx(1 / 4)
    assert rows["null", "auroc", "a", 1]["q_value"] == pytest.approx(3 / 4)
    assert "p_value" not in rows["null", "f1_balanced", "a", 1], "the statistic is an AUROC"


def test_a_concept_that_one_model_could_not_be_scored_on_says_so():
    row = rows_of({"moe": MOE, "dense": DENSE})["null", "auroc", "b", 1]
    assert row["status"] == "too_few"
    assert np.isnan(row["dense"])
    assert row["moe"] == pytest.approx(0.6)


def test_the_mean_is_over_groups_and_over_the_concepts_of_the_other_arms():
    every = rows_of({"moe": MOE})["null", "auroc", "__mean__", 1]
    # exchanges: (.5 + (.4 + .6) / 2) / 2, (.6 + .7) / 2, (.7 + .6) / 2; observed (.9 + .65) / 2
    assert every["moe"] == pytest.approx((0.5 + 0.65 + 0.65) / 3)
    assert every["p_value"] == pytest.approx(1 / 4)
    assert every["n_concepts"] == 2
    alone = rows_of({"moe": MOE}, averaged=["c"])["null", "auroc", "__mean__", 1]
    assert alone["moe"] == pytest.approx(0.6)
    assert alone["p_value"] == pytest.approx(1.0)


def test_held_out_rows_at_k_1_get_the_mean_of_the_null_and_its_p():
    rows = rows_of({"moe": MOE, "dense": DENSE})
    assert rows["held_out", "auroc", "a", 1]["null_mean"] == pytest.approx(0.6)
    assert rows["held_out", "auroc", "a", 1]["p_value"] == pytest.approx(1 / 4)
    assert np.isnan(rows["held_out", "auroc", "a", 8]["p_value"])


def test_the_mean_gap_is_taken_exchange_by_exchange():
    dense = distribution([0.7, 0.6, 0.5], [[0.5, 0.5, 0.5], [0.5, 0.4, 0.4], [0.4, 0.6, 0.6]])
    gap = mean_null_gap({"moe": MOE, "dense": dense}, "auroc", NAMES, GROUP)
    assert gap == pytest.approx([0.5 - 0.5, 0.65 - 0.45, 0.65 - 0.5])


def test_a_concept_that_no_cell_was_scored_on_has_no_p_and_is_in_no_family():
    row = rows_of({"moe": MOE}, held=[row for row in HELD if row["concept"] != "c"])["null", "auroc", "c", 1]
    assert row["status"] == "too_few"
    assert np.isnan([row["p_value"], row["q_value"], row["p_adjusted"]]).all()


def test_concepts_of_token_types_get_no_adjusted_p_and_do_not_weigh_on_the_others():
    rows = rows_of({"moe": MOE}, types={"b", "c"})
    assert np.isnan(rows["null", "auroc", "b", 1]["q_value"])
    assert np.isnan(rows["null", "auroc", "b", 1]["p_adjusted"])
    assert rows["null", "auroc", "b", 1]["p_value"] == pytest.approx(2 / 4)
    assert rows["null", "auroc", "a", 1]["q_value"] == pytest.approx(1 / 4), "a family of one"


def test_rows_at_larger_k_say_where_the_null_is_and_test_nothing():
    few = replace(MOE, n_cells=np.array([2, 3, 1]))
    rows = null_rows(HELD, {"moe": few}, GROUP, {"auroc": {"a", "b"}, "f1_balanced": {"a", "b"}}, k=8)
    by_key = {(r["arm"], r["metric"], r["concept"], r["k"]): r for r in rows}
    a, mean = (by_key["null", "auroc", name, 8] for name in ("a", "__mean__"))
    assert (a["moe"], a["moe_low"], a["moe_high"]) == pytest.approx((0.6, 0.505, 0.695))
    assert not [name for name in ("p_value", "q_value", "p_adjusted") if name in {**a, **mean}]
    assert (a["n_cells_moe"], mean["n_cells_moe"], a["n_permutations"]) == (2, 3, 3)
    assert (a["status"], by_key["null", "auroc", "b", 8]["status"]) == ("ok", "too_few"), "only a was scored at k = 8"
    assert by_key["held_out", "auroc", "a", 8]["null_mean"] == pytest.approx(0.6)
    assert "null_mean" not in by_key["held_out", "auroc", "a", 1]
