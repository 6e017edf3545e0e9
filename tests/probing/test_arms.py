"""What holds for every arm of the comparison, and how the arms are put together, said and shown."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest

from moe_lens.cli import render
from moe_lens.probing.arms import LADDER, METRICS, REGISTRY, Part
from moe_lens.probing.arms.whole_population import METRICS as TWO_PART
from moe_lens.probing.compare import MEAN, arm_scores, compare, comparison_table, gap_bootstraps
from moe_lens.probing.result import Probes
from moe_lens.probing.waterfall import waterfall
from tests.probing.scanned import Concept, alike


class TestEveryArm:
    """Metamorphic relations that hold for each arm on its own."""

    NAMES = tuple(f"c{i}" for i in range(4))

    @pytest.fixture(scope="class")
    @classmethod
    def models(cls):
        moe, documents = alike(role="moe", n_concepts=4, n_experts=5, seed=2, separation=1.5)
        dense, _ = alike(role="dense", n_concepts=4, n_experts=1, seed=2)
        return moe, dense, documents

    @staticmethod
    def table(a, b, documents, names=NAMES):
        found = compare([a], [b], [Concept(n) for n in names], [documents], n_resamples=200)  # type: ignore[arg-type]
        return found.set_index(["arm", "metric", "concept", "k"]).sort_index()

    @pytest.fixture(scope="class")
    @classmethod
    def forth(cls, models):
        return cls.table(*models)

    @pytest.fixture(params=REGISTRY)
    def arm(self, request):
        return request.param

    def test_is_run_and_carries_numbers(self, forth, arm):
        assert (forth.loc[arm].status == "ok").all()
        n_metrics = 2 * len(TWO_PART) if arm == "whole_population" else len(METRICS)
        assert len(forth.loc[arm]) == n_metrics * (len(self.NAMES) + 1)
        assert arm in LADDER

    def test_swapping_the_two_models_flips_the_sign_of_the_gap(self, models, forth, arm):
        back = self.table(models[1], models[0], models[2]).loc[arm]
        np.testing.assert_allclose(forth.loc[arm].gap, -back.gap, atol=1e-12)
        np.testing.assert_allclose(forth.loc[arm].ci_low, -back.ci_high, atol=1e-12)
        assert (forth.loc[arm].gap.abs() > 0).any()

    @pytest.mark.parametrize("which", [0, 1], ids=["moe", "dense"])
    def test_a_model_against_itself_has_no_gap(self, models, arm, which):
        found = self.table(models[which], models[which], models[2]).loc[arm]
        assert (found.gap == 0).all()
        assert ((found.ci_low <= 0) & (found.ci_high >= 0)).all()

    def test_the_order_of_rows_changes_nothing(self, models, forth, arm):
        def shuffled(model):
            evidence = {}
            for name, kept in model.evidence.items():
                order = np.random.default_rng(0).permutation(len(kept.frame))
                evidence[name] = replace(
                    kept, frame=kept.frame.iloc[order].reset_index(drop=True), counts=kept.counts[order]
                )
            return replace(model, cells=model.cells.sample(frac=1, random_state=0), evidence=evidence)

        other = self.table(*map(shuffled, models[:2]), models[2]).loc[arm]
        pd.testing.assert_frame_equal(forth.loc[arm], other)

    def test_new_names_for_the_concepts_change_nothing_but_names(self, models, forth, arm):
        new = dict(zip(self.NAMES, ("z", "q", "b", "a"), strict=True))

        def renamed(model):
            counts = {(a, b, new[c], k): value for (a, b, c, k), value in model.counts.items()}
            evidence = {
                name: replace(kept, frame=kept.frame.assign(concept=kept.frame.concept.map(new)))
                for name, kept in model.evidence.items()
            }
            cells = model.cells.assign(concept=model.cells.concept.map(new))
            return replace(model, cells=cells, counts=counts, evidence=evidence)

        other = self.table(*map(renamed, models[:2]), models[2], new.values()).loc[arm]
        for metric, (old, name) in product(forth.loc[arm].index.unique("metric"), new.items()):
            pd.testing.assert_series_equal(
                forth.loc[arm, metric, old, 1], other.loc[metric, name, 1], check_names=False
            )

    def test_documents_in_another_order_change_no_score(self, models, forth, arm):
        other = self.table(*models[:2], models[2][::-1].copy()).loc[arm]
        np.testing.assert_allclose(other[["moe", "dense", "gap"]], forth.loc[arm][["moe", "dense", "gap"]], atol=1e-12)


class TestWhatIsSaid:
    """The sentence and the printed table: raw never stands alone, and every number is one of the table."""

    @pytest.fixture(scope="class")
    @classmethod
    def probes(cls):
        moe, documents = alike(role="moe", n_concepts=20, n_experts=8, seed=1)
        dense, _ = alike(role="dense", n_concepts=20, n_experts=1, seed=1)
        concepts = [Concept(f"c{i}") for i in range(20)]
        cells = pd.concat([m.cells.assign(model=m.role, role=m.role) for m in (moe, dense)])
        scores = arm_scores([moe], [dense], [documents], n_resamples=200)
        with_dense = comparison_table(scores, [moe], [dense], concepts)  # type: ignore[arg-type]
        steps = waterfall(gap_bootstraps(scores, "f1_balanced", 1), group_of={})
        alone = compare([moe], [], concepts, [documents], n_resamples=200)  # type: ignore[arg-type]
        return Probes(cells, with_dense, steps), Probes(cells[cells.role == "moe"], alone)

    def test_the_finding_takes_the_raw_gap_apart_and_stops_where_the_arms_do(self, probes):
        said = " ".join(probes[0].findings()).replace("−", "-")
        arms = probes[0].arms(metric="f1_balanced").set_index("arm")
        lift = arms.moe - arms.one_cell_moe - arms.dense + arms.one_cell_dense
        assert f"Of the raw k=1 balanced F1 gap of {arms.gap['raw']:+.3f}" in said
        assert f"search among more cells explains {lift['homogeneous']:+.3f}" in said
        assert f"{arms.gap['held_out']:+.3f} [" in said
        assert "so it says nothing about the neurons" in said
        auroc = probes[0].arms(metric="auroc").set_index("arm")
        assert f"reaches AUROC {auroc.moe['routing_only']:.3f} over all tokens" in said
        whole = auroc.loc["whole_population"]
        assert f"with the best neuron on top {whole.moe:.3f} (dense: {whole.dense:.3f}" in said

    def test_without_a_baseline_the_finding_leads_with_the_held_out_score(self, probes):
        said = probes[1].finding()
        arms = probes[1].arms(metric="f1_balanced").set_index("arm")
        assert said.startswith(f"Best k=1 neuron per concept, held out: mean balanced F1 {arms.moe['held_out']:.3f}")
        assert f"it would read {arms.moe['raw']:.3f}, and {arms.moe['homogeneous']:.3f} if all cells were alike" in said
        assert "MoE minus dense" not in said

    @pytest.mark.parametrize("which", [0, 1], ids=["with a baseline", "alone"])
    def test_the_table_shows_the_arms_in_the_order_of_the_ladder(self, probes, which, capsys):
        render.arms(probes[which])
        lines = capsys.readouterr().out.splitlines()
        shown = [line.split()[0] for line in lines if line.split() and line.split()[0] in LADDER]
        assert shown == ["raw", "homogeneous", "held_out", "routing_only", "whole_population"]
        assert max(map(len, lines)) <= 100

    def test_every_arm_has_its_place_in_the_ladder(self):
        assert list(REGISTRY) == [arm for arm in LADDER if arm in REGISTRY]

    def test_the_summary_says_what_a_cell_scores_without_search(self, probes):
        f1 = probes[0].summary()["arms"]["homogeneous"]["f1"]
        assert f1["chance_moe"] < f1["one_cell_moe"] < f1["moe"]


def test_an_arm_without_its_evidence_has_no_rows():
    model, documents = alike(role="moe", n_concepts=2, n_experts=4, seed=0)
    bare = replace(model, evidence={})
    table = compare([bare], [], [Concept("c0"), Concept("c1")], [documents])  # type: ignore[arg-type]
    assert set(table.arm) == {"raw", "held_out"}


def test_every_arm_averages_the_same_concepts():
    """Routing can be scored where no cell has a usable probe; such a concept must not enter one mean only."""
    model, documents = alike(role="moe", n_concepts=2, n_experts=4, seed=0)
    cells = model.cells.copy()
    cells.loc[cells.concept == "c1", "status"] = "too_few"
    lost = replace(model, cells=cells, evidence={"routing_only": model.evidence["routing_only"]})
    table = compare([lost], [], [Concept("c0"), Concept("c1")], [documents]).set_index(["arm", "metric", "concept"])  # type: ignore[arg-type]
    assert table.loc[("routing_only", "f1", "c1"), "status"] == "ok"
    for arm in ("raw", "held_out", "routing_only"):
        assert table.loc[(arm, "f1", MEAN), "n_concepts"] == 1
        assert table.loc[(arm, "f1", MEAN), "moe"] == table.loc[(arm, "f1", "c0"), "moe"]


def test_arms_that_score_both_models_together_take_their_place_in_the_ladder():
    moe, documents = alike(role="moe", n_concepts=2, n_experts=4, seed=0)
    dense, _ = alike(role="dense", n_concepts=2, n_experts=1, seed=0)
    draws = np.linspace(-0.1, 0.1, 50)
    sides = {
        role: [{metric: {(f"c{i}", 1): Part(value + i / 10, value + draws, 0.5, 8, 64) for i in range(2)}
                for metric in METRICS}]
        for role, value in (("moe", 0.6), ("dense", 0.55))
    }  # fmt: skip
    concepts = [Concept("c0"), Concept("c1")]
    table = compare([moe], [dense], concepts, [documents], joint={"equal_random_tokens": sides})  # type: ignore[arg-type]
    assert list(table.arm.unique()) == [
        "raw",
        "homogeneous",
        "held_out",
        "equal_random_tokens",
        "routing_only",
        "whole_population",
    ]
    row = table.set_index(["arm", "metric", "concept"]).loc[("equal_random_tokens", "f1", MEAN)]
    assert row.moe == pytest.approx(0.65)
    assert (row.gap, row.ci_low, row.ci_high) == pytest.approx((0.05, 0.05, 0.05)), "draws are paired"
