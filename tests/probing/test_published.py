"""The released tables: reading them, and every control by hand on small files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.model_selection import train_test_split

from moe_lens.errors import BadConfig, MoELensError
from moe_lens.probing.published import CONTROLS, plot_published, read_published
from moe_lens.probing.published_controls import homogeneous, one_expert, thinned
from moe_lens.probing.released import split_counts
from tests.probing.released_files import DENSE, MOE, Cell, both, release


def controls(folder: Path, *cells: Cell, name: str = "m.csv") -> pd.Series:
    return read_published(release(folder / name, cells)).controls(k=1).iloc[0]


class TestReading:
    def test_counts_of_the_test_tokens_are_recovered(self, tmp_path):
        frame = read_published(release(tmp_path / "m.csv.gz", MOE)).frame
        fitted = frame[frame["status"] == "ok"]
        columns = ["n_test", "n_pos_test", "tp", "fp"]
        expected = [[20, 10, 8, 2], [20, 10, 4, 0], [25, 20, 10, 1]]
        np.testing.assert_allclose(fitted[columns], expected, atol=1e-9)
        assert list(frame["status"]) == ["ok", "ok", "ok", "too_few"]
        assert frame.loc[3, ["f1", "tp", "fp", "f1_balanced"]].isna().all()

    @given(st.integers(4, 400), st.integers(4, 400), st.integers(0, 2**32 - 1))
    @settings(max_examples=150, deadline=None)
    def test_the_split_is_the_one_scikit_learn_makes(self, n_pos, n_neg, seed):
        y = np.repeat([0, 1], [n_neg, n_pos])
        test = train_test_split(y, test_size=0.25, stratify=y, random_state=42)[1]
        n_pos_test, n_neg_test = int(test.sum()), int((1 - test).sum())
        if n_pos_test < 2 or n_neg_test < 1:
            return
        r = np.random.default_rng(seed)
        tp, fp = int(r.integers(1, n_pos_test)), int(r.integers(0, n_neg_test + 1))  # a recall of 0 or 1 tells nothing
        found = split_counts(*map(np.array, ([n_pos], [n_neg], [tp / n_pos_test], [tp / (tp + fp)])))
        assert (int(found[0][0]), int(found[1][0])) == (n_pos_test, n_neg_test)

    def test_numbers_are_numbers_and_a_dense_layer_is_expert_0(self, tmp_path):
        frame = read_published(both(tmp_path)).frame
        words = {name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])}
        assert words == {"model", "role", "concept", "status"}
        assert dict(frame.groupby("model")["role"].first()) == {"small-moe": "moe", "small-dense": "dense"}
        assert set(frame.loc[frame["role"] == "dense", "expert"]) == {0}

    def test_compression_is_seen_from_the_bytes_and_not_from_the_name(self, tmp_path):
        plain, packed = release(tmp_path / "m.csv", MOE), release(tmp_path / "packed.gz", MOE)
        packed.rename(tmp_path / "n.csv")
        a, b = (read_published(path).frame.drop(columns="model") for path in (plain, tmp_path / "n.csv"))
        pd.testing.assert_frame_equal(a, b)


class TestControls:
    def test_every_control_by_hand(self, tmp_path):
        found = controls(tmp_path, *MOE)
        f1 = [0.8, 8 / 14, 20 / 31]
        assert found["raw"] == pytest.approx(0.8)
        assert found["always_positive"] == pytest.approx(40 / 45)
        assert found["f1_balanced"] == pytest.approx(0.8)
        assert found["typical_cell"] == pytest.approx(np.mean(f1))
        assert found["one_expert"] == pytest.approx((0.8 + 20 / 31) / 2)  # layer 0 draws .8 or 8/14, layer 1 has one
        assert found["one_expert_sd"] == pytest.approx((0.8 - 20 / 31) / 2)
        assert (found["n_cells"], found["n_layers"], found["n_concepts"]) == (4, 2, 1)
        assert (found["n_test_min"], found["n_test_median"], found["n_test_max"]) == (20, 20, 25)
        assert found["share_cells_below"] == pytest.approx(2 / 3)
        assert found["share_winners_below"] == 0

    def test_a_winner_below_its_own_always_positive_probe_is_counted(self, tmp_path):
        assert controls(tmp_path, Cell(0, 0, 10, 1, 20, 5))["share_winners_below"] == 1

    def test_prevalence_alone_does_not_move_the_balanced_f1(self, tmp_path):
        rare, common = Cell(0, 0, 8, 8, 10, 40), Cell(0, 0, 32, 2, 40, 10)  # TPR .8, FPR .2
        a, b = (controls(tmp_path, cell, name=f"{cell.n_pos}.csv") for cell in (rare, common))
        assert a["f1_balanced"] == pytest.approx(b["f1_balanced"])
        assert a["raw"] < b["raw"] - 0.2

    def test_the_mean_is_over_concepts_and_not_over_cells(self, tmp_path):
        many = [Cell(layer, 0, 10, 0, 10, 10, "a") for layer in range(9)]
        found = controls(tmp_path, *many, Cell(0, 0, 5, 5, 10, 10, "b"))
        assert found["raw"] == pytest.approx((1 + 0.5) / 2)
        assert found["typical_cell"] == pytest.approx((1 + 0.5) / 2)

    @pytest.mark.parametrize("seed", range(8))
    def test_one_expert_a_layer_is_the_mean_over_all_choices(self, seed):
        r = np.random.default_rng(seed)
        layers = [r.integers(0, 6, r.integers(1, 5)) / 5 for _ in range(4)]  # ragged, with ties
        rows = [("c", at, e, f1) for at, scores in enumerate(layers) for e, f1 in enumerate(scores)]
        best = [max(choice) for choice in itertools.product(*layers)]
        mean, variance = one_expert(pd.DataFrame(rows, columns=["concept", "layer", "expert", "f1"]), "f1")
        assert mean == pytest.approx([np.mean(best)])
        assert variance == pytest.approx([np.var(best)])

    def test_a_dense_model_keeps_its_score_with_one_expert_a_layer(self, tmp_path):
        found = controls(tmp_path, *DENSE)
        assert found["one_expert"] == pytest.approx(found["raw"])
        assert found["one_expert_sd"] == pytest.approx(0, abs=1e-12)

    def test_an_unknown_k_names_the_known_ones(self, tmp_path):
        tables = read_published(both(tmp_path))
        with pytest.raises(BadConfig, match="k=3: give one of 1"):
            tables.controls(k=3)

    def test_a_k_that_no_model_fitted_is_refused(self, tmp_path):
        tables = read_published(release(tmp_path / "m.csv", [*MOE, Cell(0, 0, None, None, 10, 10, k=2)]))
        with pytest.raises(BadConfig, match="no probe with k=2 was fitted"):
            tables.finding(k=2)

    def test_curve_and_best_cell(self, tmp_path):
        tables = read_published(release(tmp_path / "m.csv", [*MOE, Cell(0, 0, 9, 1, 10, 10, k=2)]))
        assert tables.curve().loc["m"].to_dict() == pytest.approx({1: 0.8, 2: 0.9})
        best = tables.best(k=1).iloc[0]
        assert (best["layer"], best["expert"]) == (0, 0)


class TestHomogeneous:
    def test_it_equals_the_expectation_over_all_outcomes(self):
        n = np.array([[3, 2], [2, 4], [1, 3]])  # positives, negatives of three cells
        tp, fp = np.array([2, 2, 0]), np.array([1, 1, np.nan])  # no hit: nothing says how many false alarms
        tpr, fpr = 4 / 6, 2 / 6
        expected = {"homogeneous": 0.0, "homogeneous_balanced": 0.0, "one_alike": 0.0}
        for hits in itertools.product(*(range(m + 1) for m in n[:, 0])):
            for alarms in itertools.product(*(range(m + 1) for m in n[:, 1])):
                chance = np.prod(stats.binom.pmf(hits, n[:, 0], tpr) * stats.binom.pmf(alarms, n[:, 1], fpr))
                f1 = 2 * np.array(hits) / np.maximum(np.add(hits, alarms) + n[:, 0], 1)
                r, f = np.array(hits) / n[:, 0], np.array(alarms) / n[:, 1]
                expected["homogeneous"] += chance * f1.max()
                expected["homogeneous_balanced"] += chance * (2 * r / (r + f + 1)).max()
                expected["one_alike"] += chance * f1.mean()
        cells = pd.DataFrame({"concept": "c", "n_pos_test": n[:, 0], "n_test": n.sum(1), "tp": tp, "fp": fp})
        drawn = homogeneous(cells, 40_000, np.random.default_rng(0))
        for name, value in expected.items():
            assert drawn[name].mean() == pytest.approx(value, abs=4 * drawn[name].std() / 200), name

    def test_it_recovers_a_model_whose_cells_are_alike(self, tmp_path):
        """The null that it states: raw is explained by search where nothing else is there."""
        r = np.random.default_rng(1)
        raw, explained = [], []
        for i in range(30):
            tp, fp = r.binomial(80, 0.7, 64), r.binomial(80, 0.2, 64)
            found = controls(
                tmp_path, *(Cell(j, 0, int(tp[j]), int(fp[j]), 80, 80) for j in range(64)), name=f"{i}.csv"
            )
            raw.append(found["raw"])
            explained.append(found["homogeneous"])
        assert np.mean(explained) == pytest.approx(np.mean(raw), abs=3 * np.std(raw) / np.sqrt(30))
        assert np.mean(explained) > 0.79, "one such cell has .737"

    def test_search_lifts_more_among_more_and_smaller_cells(self, tmp_path):
        few = controls(tmp_path, *(Cell(j, 0, 280, 80, 400, 400) for j in range(4)), name="few.csv")
        many = controls(tmp_path, *(Cell(j, e, 14, 4, 20, 20) for j in range(4) for e in range(20)), name="many.csv")
        assert few["raw"] == pytest.approx(many["raw"])
        assert few["search_lift"] < 0.04
        assert many["search_lift"] > 0.12

    def test_perfect_cells_leave_nothing_to_search(self, tmp_path):
        found = controls(tmp_path, *(Cell(j, 0, 10, 0, 10, 10) for j in range(5)))
        assert (found["homogeneous"], found["homogeneous_sd"], found["search_lift"]) == (1, 0, 0)

    def test_a_cell_that_never_said_yes_counts_its_misses(self, tmp_path):
        found = controls(tmp_path, Cell(0, 0, 10, 0, 10, 10), Cell(1, 0, 0, 0, 10, 10))
        one = read_published(tmp_path / "m.csv").frame.iloc[1]
        assert np.isnan(one["fp"])
        assert one["f1_balanced"] == 0
        assert 0.5 < found["homogeneous"] < 0.9, "pooled TPR is .5"

    def test_other_tables_and_their_order_change_nothing(self, tmp_path):
        files = both(tmp_path)
        alone, ab, ba = (read_published(x).controls(k=1).set_index("model") for x in (files[0], files, files[::-1]))
        pd.testing.assert_series_equal(alone.loc["small-moe"], ab.loc["small-moe"])
        pd.testing.assert_frame_equal(ab, ba.loc[ab.index])


class TestThinned:
    @staticmethod
    def cells(*rows: tuple[int, int, int, int]) -> pd.DataFrame:
        n_pos, n_neg, tp, fp = np.array(rows).T
        counts = {"n_pos_test": n_pos, "n_test": n_pos + n_neg, "tp": tp * 1.0, "fp": fp * 1.0}
        return pd.DataFrame({"concept": "c", **counts})

    def test_it_equals_the_expectation_over_all_parts(self):
        dense = self.cells((6, 5, 4, 1), (6, 5, 3, 0))
        moe = self.cells((3, 2, 0, 0), (2, 4, 0, 0))
        sizes = [(3, 2), (2, 4)]
        outcomes = []  # per layer: F1 and chance
        for n_pos, n_neg, tp, fp in ((6, 5, 4, 1), (6, 5, 3, 0)):
            outcomes.append(
                [
                    (2 * t / max(t + f + p, 1), 0.5 * hyper(n_pos, tp, p, t) * hyper(n_neg, fp, n, f))
                    for p, n in sizes for t in range(p + 1) for f in range(n + 1)
                ]
            )  # fmt: skip
        expected = sum(max(a, b) * p * q for (a, p), (b, q) in itertools.product(*outcomes))
        drawn = thinned(dense, moe, 40_000, np.random.default_rng(0))
        assert drawn.mean() == pytest.approx(expected, abs=4 * drawn.std() / 200)

    def test_an_expert_that_saw_as_much_changes_nothing(self):
        dense = self.cells((60, 50, 40, 10), (60, 50, 30, 5))
        other = self.cells((4, 4, 1, 1)).assign(concept="another concept")
        moe = pd.concat([self.cells((90, 90, 1, 1)), other])
        drawn = thinned(dense, moe, 20, np.random.default_rng(0))
        np.testing.assert_allclose(drawn, 80 / 110)

    def test_it_closes_the_gap_between_equal_cells_of_unequal_size(self, tmp_path):
        """One true rate everywhere, one expert a layer: what is left of the gap is the size of the test sets."""
        r = np.random.default_rng(2)

        def draw(layer: int, expert: int | str, n: int, concept: str) -> Cell:
            return Cell(layer, expert, int(r.binomial(n, 0.8)), int(r.binomial(n, 0.2)), n, n, concept)

        concepts = [f"c{i}" for i in range(40)]
        moe = [draw(j, e, 40, c) for c in concepts for j in range(16) for e in range(4)]
        dense = [draw(j, "dense", 640, c) for c in concepts for j in range(16)]
        files = [release(tmp_path / "a.csv", moe), release(tmp_path / "b.csv", dense)]
        gaps = read_published(files).gaps(k=1).set_index("control")["gap"]
        assert gaps["raw"] > gaps["one_expert"] > 0.04
        assert abs(gaps["equal_tests"]) < 0.01


def hyper(total: int, marked: int, drawn: int, hits: int) -> float:
    return float(stats.hypergeom.pmf(hits, total, marked, drawn))


class TestGaps:
    def test_a_gap_is_the_mean_difference_over_shared_concepts(self, tmp_path):
        files = [
            release(tmp_path / "a.csv", [*MOE, Cell(0, 0, 10, 0, 10, 10, "only_here")]),
            release(tmp_path / "b.csv", DENSE),
        ]
        gaps = read_published(files).gaps(k=1).set_index("control")
        assert gaps.loc["raw", "gap"] == pytest.approx(0.8 - 12 / 18)
        assert gaps.loc["one_expert", "gap"] == pytest.approx((0.8 + 20 / 31) / 2 - 12 / 18)
        assert gaps.loc["always_positive", "gap"] == pytest.approx(40 / 45 - 2 / 3)
        assert set(CONTROLS) <= set(gaps.index)
        assert set(gaps["n_concepts"]) == {1}

    def test_experts_that_are_the_dense_layers_show_no_gap(self, tmp_path):
        cells = [Cell(j, "dense", 5 + j, 3, 10, 10, c) for j in range(4) for c in ("a", "b")]
        experts = [Cell(c.layer, 0, c.tp, c.fp, c.n_pos, c.n_neg, c.concept) for c in cells]
        gaps = read_published([release(tmp_path / "a.csv", experts), release(tmp_path / "b.csv", cells)]).gaps(k=1)
        exact = gaps[gaps["control"].isin(["raw", "always_positive", "f1_balanced", "one_expert", "equal_tests"])]
        assert len(exact) == 5
        np.testing.assert_allclose(exact[["gap", "ci_low", "ci_high"]], 0, atol=1e-12)
        assert gaps["gap"].abs().max() < 0.02

    def test_more_copies_of_the_same_experts_leave_one_expert_where_it_was(self, tmp_path):
        twice = [Cell(c.layer, int(c.expert) + 2 * i, c.tp, c.fp, c.n_pos, c.n_neg) for c in MOE for i in range(2)]
        once, doubled = controls(tmp_path, *MOE, name="a.csv"), controls(tmp_path, *twice, name="b.csv")
        assert doubled["one_expert"] == pytest.approx(once["one_expert"])
        assert doubled["n_cells"] == 2 * once["n_cells"]

    def test_duplicate_concepts_are_resampled_together(self, tmp_path):
        def interval(*names: str) -> float:
            hits = dict(zip(names, (10, 6, 8), strict=True))
            files = [
                release(tmp_path / "a.csv", [Cell(0, 0, n, 0, 10, 10, name) for name, n in hits.items()]),
                release(tmp_path / "b.csv", [Cell(0, "dense", 5, 0, 10, 10, name) for name in hits]),
            ]
            raw = read_published(files).gaps(k=1).set_index("control").loc["raw"]
            return raw["ci_high"] - raw["ci_low"]

        assert interval("is_frac", "is_numerator", "is_denominator") == pytest.approx(0)
        assert interval("is_frac", "is_math", "is_title") > 0.1

    def test_the_finding_says_what_is_left_and_against_whom(self, tmp_path):
        files = both(tmp_path)
        said = read_published(files).finding(k=1)
        assert said.startswith("small-moe minus small-dense is +0.133 in raw k=1 F1")
        assert "a probe with no neuron scores 0.889 (dense 0.667)" in said
        assert "one random expert a layer +0.056" in said
        assert "hold no dense model" in read_published(files[0]).finding()
        assert "hold no MoE" in read_published(files[1]).finding()

    def test_a_table_of_another_split_is_still_compared(self, tmp_path):
        """More false positives than a quarter of the negatives: the recovered counts are an estimate there."""
        files = [release(tmp_path / "a.csv", MOE), release(tmp_path / "b.csv", [Cell(0, "dense", 8, 4, 10, 1)])]
        assert np.isfinite(read_published(files).gaps(k=1)["gap"]).all()

    def test_models_without_a_shared_concept_are_not_compared(self, tmp_path):
        files = [release(tmp_path / "a.csv", MOE), release(tmp_path / "b.csv", [Cell(0, "dense", 5, 0, 9, 9, "x")])]
        tables = read_published(files)
        assert len(tables.gaps()) == 0
        assert "shares no concept" in tables.finding()

    def test_the_figure_and_the_notebook_view_show_every_control(self, tmp_path):
        tables = read_published(both(tmp_path))
        figure = plot_published(tables, k=1)
        assert len(figure.data) == len(CONTROLS)
        assert {model for trace in figure.data for model in trace.y} == {"small-moe", "small-dense"}
        assert "small-moe" in tables._repr_html_()
        assert "2 models, 6 probes" in repr(tables)


def text_file(path: Path, old: str, new: str) -> Path:
    """A released table with a part of its text replaced."""
    text = release(path, MOE).read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BAD = {
    "not there": (lambda p: p / "none.csv", "cannot read"),
    "a folder": (lambda p: p, "cannot read"),
    "another csv": (lambda p: text_file(p / "m.csv", "recall,precision", "r,p"), "no column recall, precision"),
    "no rows": (lambda p: release(p / "m.csv", []), "holds no row"),
    "an empty file": (lambda p: written(p / "m.csv", b""), "is no CSV"),
    "binary": (lambda p: written(p / "m.csv", b"\xff\xfe\x00\x81"), "is no CSV"),
    "a cut gzip": (
        lambda p: written(p / "n.csv.gz", release(p / "m.csv.gz", MOE).read_bytes()[:-20]), "damaged gzip file",
    ),
    "words for a score": (lambda p: text_file(p / "m.csv", ",0.8,", ",good,"), "'good' as f1 in row 2"),
    "a score above 1": (lambda p: text_file(p / "m.csv", ",0.8,", ",1.8,"), "'1.8' as f1 in row 2"),
    "half a token": (lambda p: text_file(p / "m.csv", ",40,40", ",40.5,40"), "'40.5' as num_positive in row 2"),
    "an expert by name": (lambda p: text_file(p / "m.csv", "0,1,1", "0,second,1"), "'second' as expert in row 3"),
    "scores that disagree": (lambda p: text_file(p / "m.csv", ",0.8,", ",0.6,"), "row 2 that its recall"),
    "hits at precision 0": (lambda p: text_file(p / "m.csv", ",0.8,0.8,0.8,", ",0,0.8,0,"), "row 2 that its recall"),
    "experts and layers": (lambda p: release(p / "m.csv", [MOE[0], DENSE[1]]), "mixes dense layers with experts"),
    "a row twice": (lambda p: release(p / "m.csv", [*MOE, MOE[0]]), "repeats 1 of its rows"),
    "nothing fitted": (lambda p: release(p / "m.csv", [MOE[3]]), "holds no fitted probe"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_another_kind_is_one_sentence(tmp_path, case):
    make, expected = BAD[case]
    with pytest.raises(MoELensError) as caught:
        read_published(make(tmp_path))
    message = str(caught.value)
    assert expected in message
    assert message.count("\n") == 0
    assert caught.value.exit_code == 2


def test_two_tables_of_one_name_and_no_table_are_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    files = [release(tmp_path / "m.csv", MOE), release(tmp_path / "sub" / "m.csv.gz", DENSE)]
    with pytest.raises(MoELensError, match="two tables are called 'm'"):
        read_published(files)
    with pytest.raises(MoELensError, match="no table was given"):
        read_published([])
