"""``herbst2026``: cells, tables and findings, against a plain loop over texts, cells and concepts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

import moe_lens as ml
from moe_lens.corpus.concepts import concept
from moe_lens.corpus.text import Corpus, Document
from moe_lens.errors import BadConcept, BadConfig, BadCorpus, MemoryLimit, MoELensError, OutOfRange
from moe_lens.models.lens import Lens
from moe_lens.probing.herbst2026 import Herbst2026, cells, herbst2026, protocol
from moe_lens.probing.herbst2026.sampling import Sample
from moe_lens.probing.published import CONTROLS, read_published
from tests.models import tiny
from tests.probing.conftest import soup
from tests.probing.herbst_reference import CONCEPTS, DIGIT, Reference, long_texts, measured

KS = (1, 4)
SIZES = {"num_tokens": 1500, "k": KS, "progress": False}
LAYER, EXPERT, NEURON = 1, 3, 7


@pytest.fixture(scope="module")
def texts() -> Corpus:
    return long_texts()


@pytest.fixture(scope="module")
def reader() -> Lens:
    """An MoE whose context holds 300 bytes."""
    return Lens(tiny.build("olmoe", max_position_embeddings=512), tiny.tokenizer(), name="org/tiny-olmoe")


@pytest.fixture(scope="module")
def other() -> Lens:
    return Lens(tiny.build("llama", max_position_embeddings=512), tiny.tokenizer(), name="org/tiny-llama")


@pytest.fixture(scope="module")
def result(reader, other, texts) -> Herbst2026:
    return herbst2026(reader, texts, baseline=other, concepts=CONCEPTS, **SIZES)


def planted() -> torch.nn.Module:
    """A model in which one neuron fires on digits and nothing else: embedding dimension 0 says "digit"."""
    model = tiny.build("olmoe")
    digits = tiny.tokenizer().convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[digits, 0] = 1
        for layer in model.model.layers:  # nobody else writes dimension 0
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.experts.down_proj[:, 0] = 0
        h = model.model.layers[LAYER].mlp.experts.gate_up_proj
        for row in (NEURON, NEURON + h.shape[1] // 2):
            h[EXPERT, row] = 0
            h[EXPERT, row, 0] = 12  # loud: features are raw, and the penalty holds quiet neurons back
    return model


class TestAgainstAPlainLoop:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_tokens_split_neurons_and_scores_of_every_expert_are_those_of_the_source(self, reader, texts, batch_size):
        ours = herbst2026(reader, texts, concepts=CONCEPTS, batch_size=batch_size, **SIZES).cells
        theirs = Reference(reader, texts, 1500, batch_size).table(CONCEPTS, KS)
        pd.testing.assert_frame_equal(measured(ours), measured(theirs), check_dtype=False, rtol=1e-12)
        merged = ours.merge(theirs, on=["concept", "layer", "expert", "k"], suffixes=("", "_theirs"))
        fitted = merged[merged["status"] == "ok"]
        assert fitted["neurons"].tolist() == fitted["neurons_theirs"].tolist()
        assert len(fitted) > 20
        assert 0 < fitted["f1"].mean() < 1

    def test_a_dense_model_is_probed_like_one_expert_that_sees_every_token(self, other, texts):
        ours = herbst2026(other, texts, concepts=CONCEPTS, **SIZES).cells
        theirs = Reference(other, texts, 1500).table(CONCEPTS, KS)
        pd.testing.assert_frame_equal(measured(ours), measured(theirs), check_dtype=False, rtol=1e-12)
        assert set(ours["expert"]) == {0}

    @pytest.mark.filterwarnings("ignore:The max_iter was reached")
    def test_the_optimum_scores_like_saga_stopped_at_500_steps(self, result, reader, texts):
        ours = measured(result.cells[result.cells["role"] == "moe"])
        theirs = measured(Reference(reader, texts, 1500, solver="saga").table(CONCEPTS, KS))
        difference = (ours["f1"] - theirs["f1"]).dropna().abs()
        assert len(difference) > 20
        assert difference.mean() < 0.01


class TestCells:
    def wanted(self, n_pos: int, n_neg: int) -> tuple[cells.CellRows, cells.SampledTokens]:
        n = n_pos + n_neg
        y = np.arange(n) < n_pos
        sample = Sample(np.zeros(n, np.int64), np.arange(n), np.zeros(n, np.int64), y)
        tokens = cells.SampledTokens(np.zeros(1, np.int64), np.arange(n), n, (sample,))
        x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
        x[:, 3] = 2.0 * torch.from_numpy(y) - 1
        return cells.CellRows(np.arange(n), np.zeros(n, np.int64), x), tokens

    @pytest.mark.parametrize(("n_pos", "n_neg", "status"), [(50, 50, "ok"), (49, 99, "too_few"), (99, 49, "too_few")])
    def test_a_cell_needs_50_tokens_of_each_class(self, n_pos, n_neg, status):
        rows, wanted = self.wanted(n_pos, n_neg)
        (row,) = cells.probe_cell(rows, wanted, [1], seed=42)
        assert (row["status"], row["num_positive"], row["num_negative"]) == (status, n_pos, n_neg)
        assert np.isnan(row["f1"]) == (status == "too_few")

    def test_a_neuron_that_is_the_concept_is_found_and_scores_1(self):
        (row,) = cells.probe_cell(*self.wanted(60, 80), [1], seed=42)
        assert (row["neurons"], row["f1"], row["recall"], row["precision"]) == ([3], 1.0, 1.0, 1.0)

    def test_a_probe_that_never_says_yes_has_f1_0_and_no_precision(self):
        rows, wanted = self.wanted(60, 80)
        silent = cells.CellRows(rows.token, rows.slot, torch.zeros_like(rows.activation))
        (row,) = cells.probe_cell(silent, wanted, [1], seed=42)
        assert (row["f1"], row["recall"]) == (0.0, 0.0)
        assert np.isnan(row["precision"])

    @given(st.integers(0, 10_000), st.sampled_from([1, 2, 8, 32]), st.sampled_from([1e-4, 1e-2, 1.0, 50.0]))
    @settings(max_examples=25, deadline=None)
    def test_fits_are_the_optimum_of_scikit_learn_on_raw_features(self, seed, k, scale):
        r = np.random.default_rng(seed)
        x = torch.from_numpy(r.standard_normal((2, 260, k)) * scale * np.exp(r.standard_normal(k)) + scale)
        y = torch.from_numpy((x[..., 0].numpy() + r.standard_normal((2, 260)) * scale > scale) * 1.0)
        used = torch.ones(2, 260, dtype=torch.bool)
        used[1, 200:] = False
        fit = cells.fit_to_optimum(x * used[..., None], y * used, used)
        for i in range(2):
            model = LogisticRegression(solver="newton-cholesky", class_weight="balanced", tol=1e-12, max_iter=1000)
            model.fit(x[i][used[i]].numpy(), y[i][used[i]].numpy())
            np.testing.assert_allclose(fit.coef[i], model.coef_[0], atol=1e-5)
            np.testing.assert_allclose(fit.intercept[i], model.intercept_[0], atol=1e-5)  # type: ignore[index]

    def test_a_fit_that_the_batched_steps_do_not_finish_is_finished_alone(self, monkeypatch):
        x, y = torch.randn(3, 200, 2, dtype=torch.double), (torch.rand(3, 200) < 0.4).double()
        used = torch.ones(3, 200, dtype=torch.bool)
        whole = cells.fit_to_optimum(x, y, used)
        real = cells.fit_logistic

        def gives_up(*args, **kwargs):
            fit = real(*args, **kwargs)
            fit.coef[1], fit.converged[1] = 9.0, False
            return fit

        monkeypatch.setattr(cells, "fit_logistic", gives_up)
        torch.testing.assert_close(cells.fit_to_optimum(x, y, used).coef, whole.coef, atol=1e-6, rtol=0)


class TestTables:
    def test_cells_have_the_released_columns_and_one_row_per_cell_concept_and_k(self, result):
        expected = ["concept", "layer", "expert", "k", "f1", "recall", "precision", "num_positive", "num_negative"]
        assert {*expected, "model", "role", "protocol", "status"} <= {*result.cells}
        assert not result.cells.duplicated(["model", "concept", "layer", "expert", "k"]).any()
        assert len(result.cells) == (2 * 6 + 2) * len(CONCEPTS) * len(KS)
        assert set(result.cells["protocol"]) == {"herbst2026"}
        assert dict(result.cells.groupby("model")["role"].first()) == {
            "org/tiny-olmoe": "moe",
            "org/tiny-llama": "dense",
        }

    def test_numbers_stand_where_both_classes_have_50_tokens(self, result):
        few = result.cells[["num_positive", "num_negative"]].min(axis=1) < 50
        assert few.any()
        assert not few.all()
        assert (result.cells["status"] == np.where(few, "too_few", "ok")).all()
        assert (result.cells["f1"].isna() == few).all()

    def test_the_same_seed_gives_the_same_tables_and_another_seed_others(self, reader, texts, result):
        again, third = (herbst2026(reader, texts, concepts=CONCEPTS, seed=seed, **SIZES).cells for seed in (42, 43))
        mine = result.cells[result.cells["role"] == "moe"].reset_index(drop=True)
        pd.testing.assert_frame_equal(again, mine)
        assert not third["f1"].equals(mine["f1"])

    def test_our_batches_and_groups_of_layers_change_nothing(self, reader, texts, result, monkeypatch):
        monkeypatch.setattr(protocol, "layer_groups", lambda layers, **_: [[layer.layer] for layer in layers])
        mine = result.cells[result.cells["role"] == "moe"]
        other = herbst2026(reader, texts, concepts=CONCEPTS, batch_tokens=1, **SIZES).cells
        pd.testing.assert_frame_equal(measured(other), measured(mine), rtol=0.02)
        assert np.mean([a == b for a, b in zip(other["neurons"], mine["neurons"], strict=True)]) > 0.98

    def test_chosen_experts_get_the_rows_they_have_in_the_whole_table(self, reader, texts, result):
        some = herbst2026(reader, texts, concepts=CONCEPTS, experts=["L1.E2", "1:4"], **SIZES).cells
        whole = result.cells[(result.cells["role"] == "moe") & (result.cells["layer"] == 1)]
        whole = whole[whole["expert"].isin([2, 4])].reset_index(drop=True)
        pd.testing.assert_frame_equal(some, whole)

    def test_what_was_sampled_is_counted(self, result):
        row = result.sampled.set_index(["model", "concept"]).loc["org/tiny-llama", "digit"]
        cell = result.cells[(result.cells["role"] == "dense") & (result.cells["concept"] == "digit")].iloc[0]
        assert (row["num_positive"], row["num_negative"]) == (cell["num_positive"], cell["num_negative"])
        assert row["num_positive"] + row["num_negative"] >= 1500
        assert not row["corpus_ended"]

    def test_a_planted_neuron_wins_its_concept_with_f1_1(self, tmp_path):
        corpus = ml.corpus(str(soup(tmp_path / "soup.jsonl")))
        lens = Lens(planted(), tiny.tokenizer())
        found = herbst2026(lens, corpus, concepts=["contains_digit"], k=(1,), progress=False)
        here = found.cells[(found.cells["layer"] == LAYER) & (found.cells["expert"] == EXPERT)].iloc[0]
        assert (here["f1"], here["neurons"]) == (1.0, [NEURON])
        best = found.comparison[found.comparison["concept"] == "contains_digit"].iloc[0]
        assert (best["cell_model"], best["f1_model"]) == (f"L{LAYER}.E{EXPERT}", 1.0)


class TestComparison:
    def test_the_best_cell_is_the_highest_test_f1_with_its_controls_beside_it(self, result):
        for k in KS:
            rows = result.comparison[result.comparison["k"] == k].set_index("concept")
            at = result.cells[result.cells["k"] == k]
            for side, role in (("model", "moe"), ("baseline", "dense")):
                mine = at[at["role"] == role]
                best = mine.groupby("concept")["f1"].max()
                np.testing.assert_allclose(rows.loc[best.index, f"f1_{side}"], best)
                assert rows.loc["__mean__", f"f1_{side}"] == pytest.approx(best.mean())
                won = mine[mine["f1"] == mine["concept"].map(best)].drop_duplicates("concept").set_index("concept")
                pi = won["num_positive"] / (won["num_positive"] + won["num_negative"])
                np.testing.assert_allclose(rows.loc[won.index, f"f1_always_positive_{side}"], 2 * pi / (1 + pi))
                n = (mine["status"] == "ok").groupby(mine["concept"]).sum()
                assert (rows.loc[n.index, f"n_cells_{side}"] == n).all()
            np.testing.assert_allclose(rows["gap"], rows["f1_model"] - rows["f1_baseline"])

    def test_the_finding_gives_the_number_and_what_stands_beside_it(self, result):
        table = result.comparison
        mean = table[(table["concept"] == "__mean__") & (table["k"] == 1)].iloc[0]
        text = result.finding()
        for column in ("f1_model", "f1_baseline", "f1_always_positive_model", "f1_balanced_baseline"):
            assert f"{mean[column]:.3f}" in text
        assert f"({mean['gap']:+.3f})" in text.replace("−", "-")
        assert "one random expert a layer" in text
        assert text.endswith(".")
        assert text.count(". ") == 0

    def test_one_model_alone_is_compared_with_nothing(self, reader, texts):
        alone = herbst2026(reader, texts, concepts=[DIGIT], **SIZES)
        assert alone.comparison["gap"].isna().all()
        assert "tiny-olmoe" in alone.finding()
        assert "random expert" not in alone.finding()

    def test_a_model_against_itself_has_no_gap(self, other, texts):
        twice = herbst2026(other, texts, baseline=other, concepts=CONCEPTS, **SIZES)
        assert twice.models == ["org/tiny-llama", "org/tiny-llama (baseline)"]
        assert (twice.comparison["gap"] == 0).all()

    def test_swapping_the_models_flips_the_gap(self, reader, other, texts, result):
        swapped = herbst2026(other, texts, baseline=reader, concepts=CONCEPTS, **SIZES)
        np.testing.assert_allclose(swapped.comparison["gap"], -result.comparison["gap"])
        left = [float(one.finding().replace("−", "-").split("a layer ")[1].split()[0]) for one in (result, swapped)]
        assert left[0] == -left[1] != 0

    def test_too_little_text_is_said_and_not_scored(self, reader, other):
        enough_for_a_dense_layer = Corpus.of([Document("a", _shuffled("0123ab cA DE" * 14))], id="few")
        few = herbst2026(reader, enough_for_a_dense_layer, baseline=other, concepts=[DIGIT], **SIZES)
        assert few.comparison["f1_baseline"].notna().all()
        assert few.comparison[["f1_model", "gap"]].isna().all(axis=None)
        assert "nothing is compared" in few.finding()
        none = herbst2026(reader, Corpus.of([Document("a", "1x")], id="t"), concepts=[DIGIT], **SIZES)
        assert set(none.cells["status"]) == {"too_few"}
        assert none.comparison["f1_model"].isna().all()
        with pytest.raises(BadCorpus, match="more documents"):
            _ = none.published


def _shuffled(text: str) -> str:
    return "".join(np.random.default_rng(0).permutation(list(text)))


class TestPublished:
    def test_our_files_are_read_as_released_ones(self, result, tmp_path):
        files = result.to_csv(tmp_path)
        assert [file.name for file in files] == ["tiny-olmoe.csv", "tiny-llama.csv"]
        read = read_published(files)
        pd.testing.assert_frame_equal(read.frame, result.published.frame)
        ours = result.cells.assign(model=result.cells["model"].str.removeprefix("org/"))
        keys = ["model", "concept", "layer", "expert", "k"]
        both = read.frame.merge(ours, on=keys, suffixes=("", "_ours"))
        assert len(both) == len(read.frame) == (ours["num_positive"] + ours["num_negative"] > 0).sum()
        for name in ("f1", "recall", "precision", "status"):
            pd.testing.assert_series_equal(both[name], both[f"{name}_ours"], check_names=False)
        counts = both.loc[both["status"] == "ok", ["tp", "n_test"]]
        np.testing.assert_allclose(counts, counts.round(), atol=1e-9)  # so the split is the one it recovers

    def test_the_curve_of_the_published_reader_is_our_comparison(self, result, tmp_path):
        curve = read_published(result.to_csv(tmp_path)).curve()
        means = result.comparison[result.comparison["concept"] == "__mean__"]
        np.testing.assert_allclose(curve.loc["tiny-olmoe"], means["f1_model"])
        np.testing.assert_allclose(curve.loc["tiny-llama"], means["f1_baseline"])

    def test_a_file_says_dense_and_not_enough_samples_as_the_source_does(self, result, tmp_path):
        moe, dense = (pd.read_csv(file, dtype=str) for file in result.to_csv(tmp_path))
        assert list(moe) == [
            "concept",
            "layer",
            "expert",
            "k",
            "f1",
            "recall",
            "precision",
            "num_positive",
            "num_negative",
        ]
        assert set(dense["expert"]) == {"dense"}
        few = moe[["num_positive", "num_negative"]].astype(int).min(axis=1) < 50
        assert (moe.loc[few, ["f1", "recall", "precision"]] == "Not Enough Samples").all(axis=None)
        assert (moe.loc[~few, "f1"] != "Not Enough Samples").all()

    def test_every_control_can_be_shown(self, result):
        assert {*CONTROLS} <= {*result.published.controls(k=1)}
        assert {trace.name for trace in result.plot().data}
        assert result.summary()["protocol"] == "herbst2026"
        assert "__mean__" in result._repr_html_()
        assert "tiny-olmoe" in repr(result)


BAD = {
    "k of nothing": ({"k": (0,)}, BadConfig, "positive"),
    "k wider than an expert": ({"k": (25,)}, BadConfig, "24 neurons"),
    "too few tokens": ({"num_tokens": 99}, BadConfig, "50 tokens"),
    "no batch": ({"batch_size": 0}, BadConfig, "positive"),
    "no concept": ({"concepts": []}, BadConfig, "concept"),
    "a concept of documents": (
        {"concepts": [concept("d", field="kind", equals="x")]}, BadConcept, "same text",
    ),
    "a layer that is not there": ({"layers": [9]}, OutOfRange, "no layer 9"),
    "an expert of another layer": ({"layers": [0], "experts": ["L1.E0"]}, OutOfRange, "--layers"),
    "no match anywhere": ({"concepts": [concept("q", regex="Q")]}, BadCorpus, "other text"),
    "no memory": ({"max_memory": 1_000_000}, MemoryLimit, "--max-memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_cannot_be_met_is_one_sentence(reader, case):
    changes, error, says = BAD[case]
    documents = [Document(f"{i}", "a1 B2 c3", {"kind": "x"}) for i in range(3)]
    corpus = Corpus.of(documents, id="few")
    with pytest.raises(error, match=says) as caught:
        herbst2026(reader, corpus, **{"concepts": CONCEPTS, "k": KS, "progress": False, **changes})
    assert isinstance(caught.value, MoELensError)
    assert str(caught.value).count("\n") == 0
