"""The null arm against a slow, plain recomputation, and against the evaluator that it must agree with."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import moe_lens as ml
from moe_lens.capture.rows import Rows, RowStore
from moe_lens.capture.tokens import TokenTable
from moe_lens.errors import BadConfig
from moe_lens.probing import scan
from moe_lens.probing.evaluate import Evaluator, columns_needed
from moe_lens.probing.exchange import exchange_labels, label_tracks
from moe_lens.probing.fit import Probe
from moe_lens.probing.nulls import MORE_NEURONS_PERMUTATIONS, CellColumns, cell_columns, null_statistics
from moe_lens.types import Granularity, Split, Status
from tests.planted import CONCEPTS, planted_model, planted_text
from tests.probing.simulate import simulate
from tests.synthetic import feed, random_stream

VALIDATE, TEST = 1, 2


def slow_pipeline(s, labels, score, minimum):
    """Held-out AUROC, F1_bal, cell and studentised maximum by loops, from the definitions."""
    t, c = s.tracks, s.columns
    best, largest = (-1.0, 0, -1, np.nan, np.nan), -np.inf
    for cell in range(len(c.address)):
        here = slice(c.offsets[cell], c.offsets[cell + 1])
        token, values = c.token[here], score[here]
        split, truth = t.split[t.document[token]], labels[token]
        sizes = [[(truth[split == x] == y).sum() for y in (True, False)] for x in (VALIDATE, TEST)]
        if np.min(sizes) < minimum or np.isnan(values).any():
            continue
        validate, test = (roc_auc_score(truth[split == x], values[split == x]) for x in (VALIDATE, TEST))
        yes, y = values[split == TEST] >= 0, truth[split == TEST]
        recall, fpr = yes[y].mean(), yes[~y].mean()
        p, n = sizes[1]
        largest = max(largest, (test - 0.5) / np.sqrt((p + n + 1) / (12 * p * n)))
        best = max(best, (validate, p + n, -cell, test, 2 * recall / (recall + fpr + 1)), key=lambda x: x[:3])
    return largest, best[3], best[4], -best[2]


@pytest.mark.parametrize("kind", ["span", "document", "type"])
def test_every_labelling_equals_a_recomputation_from_the_definitions(kind):
    s = simulate(kind, seed=3, n_simulations=3, n_documents=16)
    s.scores[:] = s.scores.round(1)  # with ties
    s.scores[: s.columns.offsets[1], 1] = np.nan  # one probe was not fitted
    pairs = s.scores + s.scores[:, ::-1]  # at k = 2, in half of the cells
    pairs[: s.columns.offsets[3]] = np.nan
    columns = replace(s.columns, larger={2: lambda concept: pairs[:, concept]})
    result = null_statistics(s.tracks, columns, n_permutations=5, seed=1)
    (block,) = exchange_labels(s.tracks, n_permutations=5, seed=1)
    for (k, table), concept in product(((1, s.scores), (2, pairs)), range(3)):
        at_k = result if k == 1 else result.larger[k]
        labels = np.concatenate([s.tracks.labels[:, [concept]], block.labels(concept)], 1)
        for i in range(6):
            found, row = (at_k.observed, 0) if i == 0 else (at_k.null, i - 1)
            want = slow_pipeline(s, labels[:, i], table[:, concept], 25)
            got = [getattr(found, f)[row, concept] for f in ("statistic", "auroc", "f1_balanced", "cell")]
            np.testing.assert_allclose(got, want, rtol=2e-5)
    assert result.n_cells.tolist() == [7, 6, 7]
    assert result.larger[2].n_cells.tolist() == [4, 4, 4]


def test_memory_limit_changes_no_number():
    s = simulate("span", seed=0, n_simulations=4, n_documents=16)
    one = null_statistics(s.tracks, s.columns, n_permutations=30, max_bytes=1 << 28)
    two = null_statistics(s.tracks, s.columns, n_permutations=30, max_bytes=1 << 17)
    np.testing.assert_allclose(one.null.auroc, two.null.auroc, rtol=1e-6)
    np.testing.assert_array_equal(one.null.cell, two.null.cell)
    np.testing.assert_allclose(one.kept, two.kept)


def test_equal_cells_tie_to_more_rows_then_to_the_lower_address():
    s = simulate("span", seed=0, n_simulations=1, n_documents=16)
    token = np.arange(s.tracks.n_tokens)
    few = token[s.tracks.document % 4 < 2]
    perfect = s.tracks.labels[:, 0].astype(np.float32)
    parts = [few, token, token]
    table = np.concatenate([perfect[p] for p in parts])
    columns = CellColumns(
        np.array([[0, 0], [0, 1], [1, 0]]), np.cumsum([0, *map(len, parts)]), np.concatenate(parts), lambda c: table
    )
    result = null_statistics(s.tracks, columns, n_permutations=19)
    assert result.frame.loc[0, ["layer", "expert"]].tolist() == [0, 1]
    assert result.observed.auroc[0, 0] == 1.0
    assert result.p[0] == 1 / 20


def test_a_concept_without_a_usable_cell_has_no_p_value_and_counts_in_no_family():
    s = simulate("span", seed=0, n_simulations=2, n_documents=16)
    s.scores[:, 0] = np.nan
    result = null_statistics(s.tracks, s.columns, n_permutations=19)
    for p in (result.p, result.p_held_out, result.p_adjusted):
        assert np.isnan(p[0])
        assert 1 / 20 <= p[1] <= 1
    assert result.frame.layer.tolist()[0] == -1
    assert np.isnan(result.frame.auroc[0])


def test_adjusting_for_the_family_never_lowers_a_p_value():
    s = simulate("span", seed=0, n_simulations=20)
    result = null_statistics(s.tracks, s.columns, n_permutations=99)
    assert (result.p_adjusted >= result.p - 1e-12).all()
    strong = simulate("span", seed=0, n_simulations=20, effect=4.0)
    adjusted = null_statistics(strong.tracks, strong.columns, n_permutations=99).p_adjusted
    assert (adjusted <= 0.05).mean() > 0.5


def test_two_models_get_the_same_exchanged_labels():
    s = simulate("span", seed=0, n_simulations=2, n_documents=16)
    one, two = (null_statistics(s.tracks, s.columns, n_permutations=20, seed=4) for _ in range(2))
    assert (one.gap(two) == 0).all()
    flipped = CellColumns(s.columns.address, s.columns.offsets, s.columns.token, lambda c: -s.scores[:, c])
    mirror = null_statistics(s.tracks, flipped, n_permutations=20, seed=4)
    assert (one.gap(mirror) != 0).any()


def test_the_sign_learnt_on_select_is_kept():
    s = simulate("span", seed=0, n_simulations=1, effect=6.0)
    flipped = CellColumns(s.columns.address, s.columns.offsets, s.columns.token, lambda c: -s.scores[:, c])
    assert null_statistics(s.tracks, s.columns, n_permutations=99).p[0] <= 0.05
    assert null_statistics(s.tracks, flipped, n_permutations=99).p_held_out[0] > 0.2


def test_a_null_without_cells_is_refused():
    s = simulate("span", seed=0, n_simulations=1, n_documents=16)
    none = CellColumns(np.zeros((0, 2), int), np.array([0]), np.zeros(0, int), lambda c: np.zeros(0))
    with pytest.raises(BadConfig, match="larger corpus"):
        null_statistics(s.tracks, none)


@pytest.fixture(scope="module")
def stored():
    """Streamed rows with hand-made k = 1 probes: 40 documents, half validate, half test."""
    tokens = TokenTable()
    rows = RowStore(tokens, [0, 0, 0], max_rows=None)
    feed([tokens, rows], random_stream(n_batches=10, windows=4, seq=40, n_experts=3, layers=2, d_ff=5))
    tokens.in_scope[tokens.document < 10, 2] = False
    r = np.random.default_rng(0)
    probes = [
        Probe(
            layer, e, c, 1, Status.OK, np.array([int(r.integers(5))]), r.choice([-1.0, 1.0], 1) * 0.7, 0.1, 100, 50, 0.6
        )
        for layer in range(2) for e in range(3) for c in range(3) if (layer, e, c) != (0, 1, 1)
    ]  # fmt: skip
    return tokens, rows, probes


def test_the_true_labelling_gives_what_the_evaluator_reports(stored):
    tokens, rows, probes = stored
    splits = np.array([1, 2] * 20)
    zeros = np.zeros(40, int)
    tracks, number = label_tracks(
        tokens,
        splits=splits,
        stratum=zeros,
        length_bin=zeros,
        names=("a", "b", "c"),
        granularity=[Granularity.SPAN] * 3,
    )
    every = {layer: torch.arange(5).repeat(3, 1) for layer in range(2)}
    columns = cell_columns(rows, every, probes, number)
    result = null_statistics(tracks, columns, n_permutations=9)
    evaluator = Evaluator(rows, every, [list(Split)[s] for s in splits])
    table = [row for p in probes for row in evaluator.score(p.layer, p.expert, [p])]
    assert columns_needed(probes, {0: 3, 1: 3})[0].shape[0] == 3
    for c in range(3):
        mine = [row for row in table if row["concept"] == c]
        best = max(mine, key=lambda row: (round(row["auroc_validate"], 6), row["n_test"]))
        chosen = result.frame.iloc[c]
        assert (chosen.layer, chosen.expert) == (best["layer"], best["expert"])
        assert chosen.auroc == pytest.approx(best["auroc"], abs=1e-6)
        assert chosen.f1_balanced == pytest.approx(best["f1_balanced"], abs=1e-6)


def test_tracks_are_in_reading_order_whatever_the_order_of_the_stream(stored):
    tokens, _, _ = stored
    zeros = np.zeros(40, int)
    tracks, number = label_tracks(
        tokens, splits=zeros + 2, stratum=zeros, length_bin=zeros, names=("a", "b", "c"),
        granularity=[Granularity.SPAN] * 3,
    )  # fmt: skip
    shuffled = TokenTable()
    order = torch.randperm(tokens.n_tokens, generator=torch.Generator().manual_seed(0))
    shuffled.load_state_dict({name: value[order] for name, value in tokens.state_dict().items()})
    again, number_again = label_tracks(
        shuffled, splits=zeros + 2, stratum=zeros, length_bin=zeros, names=("a", "b", "c"),
        granularity=[Granularity.SPAN] * 3,
    )  # fmt: skip
    np.testing.assert_array_equal(tracks.labels, again.labels)
    np.testing.assert_array_equal(tracks.in_scope, again.in_scope)
    np.testing.assert_array_equal(number[order.numpy()], number_again)
    assert (np.diff(tracks.document) >= 0).all()


def test_a_cell_without_rows_in_a_split_is_no_cell_of_the_concept():
    s = simulate("span", seed=0, n_simulations=2, n_documents=16)
    of_test = np.flatnonzero(s.tracks.split[s.tracks.document] == TEST)
    first = slice(0, s.columns.offsets[1])
    s.columns.token[first] = np.resize(of_test, first.stop)  # nothing of validate
    assert null_statistics(s.tracks, s.columns, n_permutations=2).n_cells.tolist() == [6, 6]


class TestMoreNeurons:
    def test_k_1_is_the_same_with_and_without_them_and_they_get_its_first_exchanges(self):
        s = simulate("span", seed=0, n_simulations=2, n_documents=16)
        columns = replace(s.columns, larger={4: s.columns.score, 2: lambda c: -s.columns.score(c)})
        n = MORE_NEURONS_PERMUTATIONS + 30
        alone, both = (null_statistics(s.tracks, c, n_permutations=n, max_bytes=1 << 20) for c in (s.columns, columns))
        for name in ("statistic", "auroc", "f1_balanced", "cell"):
            np.testing.assert_array_equal(getattr(alone.null, name), getattr(both.null, name))
        assert (both.kept == alone.kept).all()
        same = both.larger[4].null.auroc
        assert same.shape == (MORE_NEURONS_PERMUTATIONS, 2)
        np.testing.assert_array_equal(same, alone.null.auroc[:MORE_NEURONS_PERMUTATIONS])
        assert (both.larger[2].null.auroc != same).any()
        assert not alone.larger

    def test_of_labels_that_no_probe_knows_about_95_percent_score_inside_the_band(self):
        inside = []
        for seed in range(3):
            s = simulate("span", seed=seed, n_simulations=100)
            # scores at k = 2 of another data set's neurons
            columns = replace(s.columns, larger={2: lambda c, s=s: s.scores[:, c - 1]})
            more = null_statistics(s.tracks, columns, n_permutations=99, seed=seed).larger[2]
            low, high = more.band()
            inside += ((low <= more.observed.auroc[0]) & (more.observed.auroc[0] <= high)).tolist()
        assert 0.91 <= np.mean(inside) <= 0.98

    def test_two_neurons_whose_difference_is_the_concept_beat_their_band_and_one_of_them_does_not(self):
        s = simulate("span", seed=1, n_simulations=1, n_documents=60)
        r = np.random.default_rng(0)
        shared = 12 * s.scores[: s.columns.offsets[-1], 0][-len(s.tracks.token_id) :]
        label = s.tracks.labels[:, 0] + 0.3 * r.standard_normal(len(s.tracks.token_id))
        h = torch.from_numpy(np.stack([shared + label, shared, r.standard_normal(len(shared))], 1)).float()

        class OneCell:
            def rows(self, layer, expert):
                token = torch.arange(len(h))
                return Rows(token, h, torch.ones(len(h)), token)

        probes = [
            Probe(0, 0, 0, k, Status.OK, np.arange(k), coef, 0.0, 100, 50)
            for k, coef in ((1, np.array([1.0])), (2, np.array([1.0, -1.0])))
        ]
        columns = cell_columns(OneCell(), {0: torch.arange(3)[None]}, probes, np.arange(len(h)))
        one = null_statistics(s.tracks, columns, n_permutations=99)
        two = one.larger[2]
        (low, high), (_, top) = one.band(), two.band()
        assert low < one.observed.auroc[0] < high
        assert two.observed.auroc[0] > 0.9 > 0.65 > top

    @pytest.fixture(scope="class")
    @classmethod
    def planted(cls, tmp_path_factory):
        """A whole run at k = 1 and 2 on a planted model, and what its null was given."""
        folder, given = tmp_path_factory.mktemp("planted"), {}
        with pytest.MonkeyPatch.context() as patch:

            def columns(rows, stored, probes, number):
                given.update(rows=rows, stored=stored, probes=probes, number=number)
                return cell_columns(rows, stored, probes, number)

            def statistics(tracks, columns, **settings):
                given.update(tracks=tracks, settings=settings)
                return null_statistics(tracks, columns, **settings)

            patch.setattr(scan, "cell_columns", columns)
            patch.setattr(scan, "null_statistics", statistics)
            lens = ml.load(str(planted_model(folder / "moe")))
            text = ml.corpus(str(planted_text(folder / "text.jsonl", 200)))
            found = ml.probe(
                lens,
                text,
                concepts=CONCEPTS,
                k=(1, 2),
                permutations=19,
                neurons=False,
                progress=False,
                out=folder / "r",
            )
        return found, given

    @pytest.mark.parametrize("concept", ["after_digit", "ab", "coin"])
    def test_the_band_of_a_run_is_where_a_loop_over_permutations_puts_it(self, planted, concept):
        found, given = planted
        tracks, rows, number = given["tracks"], given["rows"], given["number"]
        c = tracks.names.index(concept)
        (block,) = exchange_labels(tracks, **given["settings"])
        labels = block.labels(c)
        split = tracks.split[tracks.document]
        cells = []
        for probe in (p for p in given["probes"] if (p.concept, p.k, p.fitted) == (c, 2, True)):
            stored = rows.rows(probe.layer, probe.expert)
            where = [given["stored"][probe.layer][probe.expert].tolist().index(j) for j in probe.neurons]
            h = stored.activation[:, where].double().numpy()
            cells.append((number[stored.token.numpy()], h @ probe.coef + probe.intercept))
        assert 2 <= len(cells) <= 8
        null = []
        for permuted in labels.T:
            best = (-1.0, np.nan)
            for token, logit in cells:
                y, at = permuted[token], split[token]
                sizes = [(y[at == x] == value).sum() for x in (VALIDATE, TEST) for value in (True, False)]
                if min(sizes) >= 25:
                    best = max(best, tuple(roc_auc_score(y[at == x], logit[at == x]) for x in (VALIDATE, TEST)))
            null.append(best[1])
        table = found.comparison.query("arm == 'null' and metric == 'auroc' and k == 2").set_index("concept")
        row = table.loc[concept]
        assert row.moe == pytest.approx(np.mean(null), abs=1e-4)
        assert (row.moe_low, row.moe_high) == pytest.approx(tuple(np.quantile(null, [0.025, 0.975])), abs=1e-4)
        assert (row.n_cells_moe, row.n_permutations) == (len(cells), 19)

    def test_a_run_has_rows_of_every_k_and_tests_at_k_1_only(self, planted):
        table = planted[0].comparison
        null = table[table.arm == "null"]
        assert (null.groupby(["k", "metric"]).size() == len(CONCEPTS) + 1).all()
        assert null.k.unique().tolist() == [1, 2]
        assert null.loc[null.k == 2, ["p_value", "q_value", "p_adjusted"]].isna().all(axis=None)
        assert null.p_value[(null.k == 1) & (null.metric == "auroc")].notna().all()
        held = table[(table.arm == "held_out") & table.metric.isin(["auroc", "f1_balanced"])]
        means = null.set_index(["metric", "concept", "k"]).moe
        assert held.null_mean.tolist() == [means[key] for key in zip(held.metric, held.concept, held.k, strict=True)]
        assert held.p_value[held.k == 2].isna().all()

    def test_the_sentences_count_only_the_tests(self, planted):
        result, _ = planted
        first = replace(result, comparison=result.comparison[result.comparison.k == 1])
        assert result.findings() == first.findings()
