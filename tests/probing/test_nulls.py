"""The null arm against a slow, plain recomputation, and against the evaluator that it must agree with."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from moe_lens.capture.rows import RowStore
from moe_lens.capture.tokens import TokenTable
from moe_lens.errors import BadConfig
from moe_lens.probing.evaluate import Evaluator, columns_needed
from moe_lens.probing.exchange import exchange_labels, label_tracks
from moe_lens.probing.fit import Probe
from moe_lens.probing.nulls import CellColumns, cell_columns, null_statistics
from moe_lens.types import Granularity, Split, Status
from tests.probing.simulate import simulate
from tests.synthetic import feed, random_stream

VALIDATE, TEST = 1, 2


def slow_pipeline(s, labels, concept, minimum):
    """Held-out AUROC, F1_bal, cell and studentised maximum by loops, from the definitions."""
    t, c, score = s.tracks, s.columns, s.columns.score(concept)
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
    result = null_statistics(s.tracks, s.columns, n_permutations=5, seed=1)
    (block,) = exchange_labels(s.tracks, n_permutations=5, seed=1)
    for concept in range(3):
        labels = np.concatenate([s.tracks.labels[:, [concept]], block.labels(concept)], 1)
        for i in range(6):
            found, row = (result.observed, 0) if i == 0 else (result.null, i - 1)
            want = slow_pipeline(s, labels[:, i], concept, 25)
            got = [getattr(found, f)[row, concept] for f in ("statistic", "auroc", "f1_balanced", "cell")]
            np.testing.assert_allclose(got, want, rtol=2e-5)


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
