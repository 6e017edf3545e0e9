"""The waterfall: steps add up, pair up, and say in words what they are."""

import numpy as np
import pytest

from moe_lens.errors import BadConfig
from moe_lens.probing.waterfall import MEAN, common_concepts, finding, waterfall
from moe_lens.stats import Bootstrap, cluster_bootstrap, document_multiplicities

EQUAL = ("equal_random_tokens", "equal_router_tokens")
CHOSEN_ON_TEST = tuple(f"{arm}_raw" for arm in EQUAL)
ARMS = ("raw", "search", "held_out", *EQUAL, *CHOSEN_ON_TEST)


def certain(value, n_resamples=50, n_documents=10):
    """A gap that is the same in every bootstrap sample."""
    return Bootstrap(np.float64(value), np.full(n_resamples, float(value)), (np.full(n_documents, float(value)),))


def certain_gaps(**by_arm):
    """Arm -> concepts a, b, c with these gaps."""
    return {arm: {c: certain(v) for c, v in zip("abc", values, strict=False)} for arm, values in by_arm.items()}


def noisy_gaps(seed=0, concepts=12, documents=60, arms=ARMS, shared=1.0, own=0.2, n_resamples=800):
    """Gaps whose documents matter in all arms alike (`shared`), and in each arm by itself (`own`)."""
    r = np.random.default_rng(seed)
    times = document_multiplicities(documents, n_resamples, seed=seed)
    common = r.normal(0, shared, (concepts, documents, 1))
    out = {}
    for n, arm in enumerate(arms):
        per_document = 0.3 - 0.05 * n + common + r.normal(0, own, (concepts, documents, 1))
        boot = cluster_bootstrap(np.concatenate([per_document, np.ones_like(common)], -1), mean_of, times=times)
        out[arm] = {f"c{i:02}": one(boot, i) for i in range(concepts)}
    return out


def mean_of(total):
    return total[..., 0] / total[..., 1]


def one(boot, i):
    return Bootstrap(boot.estimate[i], boot.draws[:, i], tuple(j[:, i] for j in boot.jackknives))


def bars(table, order="forward"):
    return table[(table.order == order) & (table.group == MEAN) & (table.kind != "null")].set_index("step")


def test_hand_computed():
    # groups: g = {a, b}, c alone. Means over groups of (mean of a and b, c).
    gaps = certain_gaps(
        raw=(0.10, 0.30, 0.40), search=(0.10, 0.10, 0.10), held_out=(0.10, 0.20, 0.15),
        equal_random_tokens=(0.05, 0.05, 0.07), equal_router_tokens=(0.00, 0.02, 0.03),
        equal_random_tokens_raw=(0.10, 0.10, 0.12), equal_router_tokens_raw=(0.04, 0.06, 0.07),
    )  # fmt: skip
    table = waterfall(gaps, group_of={"a": "g", "b": "g", "c": "c"})
    forward, reverse = bars(table), bars(table, "reverse")
    assert forward.value.to_dict() == pytest.approx(
        {"raw": 0.30, "search": 0.10, "reuse": 0.05, "candidates": 0.09, "routing": 0.04, "left": 0.02}
    )
    assert forward.after.to_dict() == pytest.approx(
        {"raw": 0.30, "search": 0.20, "reuse": 0.15, "candidates": 0.06, "routing": 0.02, "left": 0.02}
    )
    assert reverse.value.to_dict() == pytest.approx(
        {"raw": 0.30, "candidates": 0.19, "routing": 0.05, "reuse": 0.04, "left": 0.02}
    )
    reuse = table[(table.order == "forward") & (table.step == "reuse")].set_index("group")
    assert reuse.value.to_dict() == pytest.approx({MEAN: 0.05, "g": -0.05, "c": 0.15})
    assert reuse.after.to_dict() == pytest.approx({MEAN: 0.15, "g": 0.15, "c": 0.15})
    assert set(forward.n_groups) == {2}
    assert set(forward.n_concepts) == {3}


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_steps_add_up_to_raw_minus_left_in_the_mean_and_in_every_group(order):
    table = waterfall(noisy_gaps(), group_of={"c00": "g", "c01": "g"})
    for _, own in table[table.order == order].groupby("group"):
        level = own[own.kind == "level"].set_index("step").value
        removed = own[own.kind == "removed"]
        assert removed.value.sum() == pytest.approx(level["raw"] - level["left"], abs=1e-12)
        assert removed.after.iloc[-1] == pytest.approx(level["left"], abs=1e-12)
    mean = table[(table.order == order)].groupby(["step", table.group == MEAN]).value.mean().unstack()
    assert mean[True].to_numpy() == pytest.approx(mean[False].to_numpy()), "the bar is the mean of its dots"


def test_swapping_the_models_flips_every_sign():
    gaps = noisy_gaps()
    flipped = {arm: {c: certain(0, 800, 60) - b for c, b in own.items()} for arm, own in gaps.items()}
    here, there = (waterfall(g, group_of={}).set_index(["order", "step", "group"]) for g in (gaps, flipped))
    for column, other in [
        ("value", "value"), ("after", "after"), ("ci_low", "ci_high"), ("ci_high", "ci_low"),
        ("after_low", "after_high"), ("ci_low_groups", "ci_high_groups"),
    ]:  # fmt: skip
        assert here[column].to_numpy() == pytest.approx(-there[other].to_numpy(), abs=1e-9, nan_ok=True), column


def test_a_step_has_the_interval_of_the_paired_difference():
    gaps = noisy_gaps(shared=1.0, own=0.1)
    paired = bars(waterfall(gaps, group_of={}))
    unpaired = bars(waterfall(gaps | {"held_out": noisy_gaps(seed=1)["held_out"]}, group_of={}))
    narrow, wide = ((t.ci_high - t.ci_low)["candidates"] for t in (paired, unpaired))
    assert 0 < 5 * narrow < wide
    # equal to the interval of the difference, taken concept by concept and then averaged
    names = list(gaps["raw"])
    steps = [gaps["held_out"][c] - gaps["equal_random_tokens"][c] for c in names]
    mean = Bootstrap(
        np.mean([b.estimate for b in steps]), np.mean([b.draws for b in steps], 0),
        (np.mean([b.jackknives[0] for b in steps], 0),),
    )  # fmt: skip
    assert list(paired.loc["candidates", ["ci_low", "ci_high"]]) == pytest.approx([float(end) for end in mean.bca()])
    assert tuple(paired.loc["left", ["ci_low", "ci_high"]]) == tuple(paired.loc["left", ["after_low", "after_high"]])


def test_the_interval_over_groups_is_wider_where_groups_differ():
    gaps = noisy_gaps(shared=0.1, own=0.05)
    spread = np.random.default_rng(3).normal(0, 0.5, len(gaps["raw"]))
    gaps["raw"] = {
        c: Bootstrap(b.estimate + s, b.draws + s, tuple(j + s for j in b.jackknives))
        for (c, b), s in zip(gaps["raw"].items(), spread, strict=True)
    }
    raw = bars(waterfall(gaps, group_of={})).loc["raw"]
    assert raw.ci_high_groups - raw.ci_low_groups > 3 * (raw.ci_high - raw.ci_low)


def test_every_bar_is_over_the_concepts_that_all_arms_could_score():
    gaps = noisy_gaps()
    del gaps["equal_router_tokens"]["c03"]
    nan = np.float64(np.nan)
    gaps["search"]["c05"] = Bootstrap(nan, gaps["search"]["c05"].draws * nan, gaps["search"]["c05"].jackknives)
    assert common_concepts(gaps) == [c for c in gaps["raw"] if c not in ("c03", "c05")]
    table = waterfall(gaps, group_of={})
    assert not set(table.group) & {"c03", "c05"}
    assert set(table[table.group == MEAN].n_concepts) == {10}
    others = {arm: {c: b for c, b in own.items() if c not in ("c03", "c05")} for arm, own in gaps.items()}
    assert bars(table).equals(bars(waterfall(others, group_of={})))


def test_a_bootstrap_sample_without_a_class_in_one_arm_counts_in_no_arm():
    gaps = noisy_gaps()
    holed = gaps["raw"]["c00"].draws.copy()
    holed[:200] = np.nan
    gaps["raw"]["c00"] = Bootstrap(gaps["raw"]["c00"].estimate, holed, gaps["raw"]["c00"].jackknives)
    everywhere = {
        arm: own | {"c00": Bootstrap(own["c00"].estimate, np.where(np.isnan(holed), np.nan, own["c00"].draws),
                                     own["c00"].jackknives)}
        for arm, own in gaps.items()
    }  # fmt: skip
    group_of = {"c00": "g", "c01": "g"}
    assert waterfall(gaps, group_of=group_of).equals(waterfall(everywhere, group_of=group_of))


@pytest.mark.parametrize(
    ("missing", "steps", "said"),
    [
        (EQUAL, ["raw", "search", "reuse", "left"], "candidates, token counts and routing are still in it"),
        (EQUAL[:1], ["raw", "search", "reuse", "left"], "candidates, token counts and routing are still in it"),
        (EQUAL[1:], ["raw", "search", "reuse", "candidates", "left"], "routing is still in it"),
        ((), ["raw", "search", "reuse", "candidates", "routing", "left"], "is left for the neurons"),
    ],
)
def test_the_ladder_stops_before_a_missing_arm_and_says_so(missing, steps, said):
    gaps = noisy_gaps()
    for arm in missing:
        gaps[arm] = {}  # was run, and could score nothing
    table = waterfall(gaps, group_of={})
    assert list(bars(table).index) == steps
    assert said in finding(table)
    assert ("for the neurons" in finding(table)) == (not missing)
    assert table.equals(waterfall({a: own for a, own in gaps.items() if a not in missing}, group_of={}))


def test_without_the_cells_chosen_on_test_there_is_no_reverse_order():
    gaps = noisy_gaps()
    assert set(waterfall(gaps, group_of={}).order) == {"forward", "reverse"}
    del gaps["equal_random_tokens_raw"]
    assert set(waterfall(gaps, group_of={}).order) == {"forward"}


def test_the_null_becomes_its_95_percent_range():
    null = np.append(np.linspace(-1, 1, 201), np.nan)
    row = waterfall(noisy_gaps(), group_of={}, null=null).query("kind == 'null'").squeeze()
    assert (row.ci_low, row.ci_high, row.value) == pytest.approx((-0.95, 0.95, 0))
    assert (row.step, row.group) == ("reuse", MEAN), "beside the gap that the held-out cells leave"


def test_counts_stand_under_the_bar_of_their_arm():
    counts = {"raw": {"n_cells_moe": 64}, "equal_router_tokens": {"n_cells_moe": 4, "n_documents": 99}}
    table = bars(waterfall(noisy_gaps(), group_of={}, counts=counts))
    cells = table.n_cells_moe
    assert (cells["raw"], cells["search"], cells["routing"], cells["left"]) == (64, 64, 4, 4)
    assert cells[["reuse", "candidates"]].isna().all()
    assert table.n_documents["left"] == 99


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda gaps: ({a: g for a, g in gaps.items() if a != "search"}, {}), "search is missing"),
        (lambda gaps: (gaps, {"counts": {"raw": {"cells": 3}}}), "'cells'"),
        (lambda gaps: (gaps | {"held_out": noisy_gaps(n_resamples=7)["held_out"]}, {}), "same bootstrap samples"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(break_it, word):
    gaps, more = break_it(noisy_gaps(concepts=2))
    with pytest.raises(BadConfig, match=word) as refused:
        waterfall(gaps, group_of={}, **more)
    assert "\n" not in str(refused.value)


def test_no_shared_concept_is_a_finding_and_not_an_error():
    table = waterfall({arm: {} for arm in ARMS}, group_of={})
    assert not len(table)
    assert "larger corpus" in finding(table)


def said(*levels, **more):
    """The finding of certain gaps with these levels left after raw, search, reuse, candidates, routing."""
    raw, search, *rest = levels
    by_arm = dict(zip(("held_out", *EQUAL), rest, strict=False))
    values = {"raw": raw, "search": raw - search, **by_arm}
    return finding(waterfall(certain_gaps(**{arm: [v] * 3 for arm, v in values.items()}), group_of={}, **more))


def test_the_finding_of_a_gap_that_shrinks_step_by_step():
    assert said(0.123, 0.073, 0.053, 0.033, 0.01) == (
        "Of the raw k=1 balanced F1 gap of +0.123 [+0.123, +0.123] (mean over 3 concept groups, too few to speak of "
        "the models), search among more cells explains +0.050, "
        "reuse of test data +0.020, candidates and token counts +0.020, routing +0.023; "
        "+0.010 [+0.010, +0.010] is left for the neurons, above zero."
    )


def test_the_finding_says_which_removal_makes_the_gap_larger_or_turns_it():
    text = said(0.10, 0.05, 0.08, 0.02, -0.03, metric="auroc", k=8)
    assert "k=8 AUROC" in text
    assert "reuse of test data −0.030 (its removal makes the gap larger), candidates" in text
    assert "routing +0.050 (its removal turns the gap around); −0.030" in text
    assert text.endswith("below zero.")
    mirrored = said(-0.10, -0.05, -0.08, -0.02, 0.0)
    assert "explains −0.050, reuse of test data +0.030 (its removal makes the gap larger)" in mirrored
    assert mirrored.endswith("0.000 [0.000, 0.000] is left for the neurons, not distinguishable from zero.")


def test_the_finding_doubts_a_raw_gap_whose_interval_holds_zero():
    text = finding(waterfall(noisy_gaps(shared=30), group_of={}, null=np.linspace(-10, 10, 201)))
    assert "itself not distinguishable from zero, search" in text
    assert "is within what exchanged labels give there (−9.500 to +9.500)" in text
    for null, side in ((-9.0, "above"), (9.0, "below")):
        far = finding(waterfall(noisy_gaps(shared=30), group_of={}, null=np.full(99, null)))
        assert f"{side} what exchanged labels give" in far


def test_several_seeds_without_a_jackknife_have_percentile_intervals():
    gaps = {arm: {c: Bootstrap(b.estimate, b.draws, ()) for c, b in own.items()} for arm, own in noisy_gaps().items()}
    raw = bars(waterfall(gaps, group_of={})).loc["raw"]
    draws = np.mean([b.draws for b in gaps["raw"].values()], 0)
    assert (raw.ci_low, raw.ci_high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
