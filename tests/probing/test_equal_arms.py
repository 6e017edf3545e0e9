"""What the ``equal_*`` arms give to the comparison, and that their scores survive on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.corpus.batches import tokenize
from moe_lens.errors import OutOfRange
from moe_lens.probing.arms.base import f1_of_counts
from moe_lens.probing.equal import CHOICES, EqualScores, equal_arms
from moe_lens.stats import document_multiplicities
from tests.models import tiny
from tests.probing.conftest import soup
from tests.probing.equal_runs import CONCEPTS, parts, run


@pytest.fixture(scope="module")
def real(moe, dense, tmp_path_factory):
    text = ml.corpus(str(soup(tmp_path_factory.mktemp("soup") / "soup.jsonl", n_documents=160)))
    return run(moe, dense, tokenize(text, tiny.tokenizer(), CONCEPTS, max_length=64))


def test_the_spread_is_over_draws_and_documents(real):
    n_documents = len(real.documents)
    both = parts(real, document_multiplicities(n_documents, 300, seed=0))
    only_draws = parts(real, np.ones((300, n_documents)))
    spread = {at: (only_draws[at].draws.std(), part.draws.std()) for at, part in both.items()}
    assert np.mean([b > a > 0 for a, b in spread.values()]) > 0.9
    for at, part in only_draws.items():
        known = part.by_draw[~np.isnan(part.by_draw)]
        assert part.value == pytest.approx(known.mean())
        assert known.min() - 1e-5 <= part.draws.min() <= part.draws.max() <= known.max() + 1e-5
        assert part.draws.mean() == pytest.approx(part.value, abs=0.3 * np.ptp(known) + 1e-5), at


@pytest.mark.parametrize("choice", CHOICES)
def test_a_document_left_out_gives_the_mean_over_draws_of_the_score_without_it(real, choice):
    n = len(real.documents)
    times = np.concatenate([np.zeros((7, n)), np.ones((n, n)) - np.eye(n)])
    found = parts(real, times, n_jackknife=n, cell_choice=choice)
    frame = real.chosen(choice).groupby(["arm", "role", "metric", "concept", "k"])
    for at, part in list(found.items())[::7]:
        counts = real.counts[frame.get_group(at).entry].astype(float)
        without = counts.sum(1, keepdims=True) - counts
        if at[2] == "auroc":
            area = counts[..., 4].sum(1) / counts[..., [0, 2]].sum((1, 2))
            want = without[..., 4] / without[..., [0, 2]].sum(-1) + without[..., 5] / without[..., [1, 3]].sum(-1)
            want = want - area[:, None]
        else:
            want = f1_of_counts(without, at[2])
        np.testing.assert_allclose(part.draws[7:], want.mean(0), atol=2e-5)
        assert np.isnan(part.draws[:7]).all(), "nothing was drawn"


def test_only_what_half_of_the_draws_could_score_is_reported(real):
    times = np.ones((3, len(real.documents)))
    at = ("equal_random_tokens", "moe", "auroc", "c0", 1)
    frame = real.frame
    c0 = (frame.arm == at[0]) & (frame.concept == "c0") & (frame.k == 1)
    for n_lost, reported in ((1, True), (2, False)):
        entry = frame.entry.where(~(c0 & (frame.draw < n_lost)), -1)
        found = parts(replace(real, frame=frame.assign(entry=entry)), times)
        assert (at in found) == reported
    lost = parts(replace(real, frame=frame.assign(entry=frame.entry.where(~(c0 & (frame.draw == 0)), -1))), times)
    assert np.isnan(lost[at].by_draw).tolist() == [True, False, False]
    assert parts(real, times).keys() - lost.keys() == set()


def test_the_cell_chosen_on_test_is_the_best_of_all_and_no_other_number_moves(real):
    at = ["arm", "draw", "concept", "k", "metric", "role"]
    sides = [real.chosen(choice).set_index(at).sort_index() for choice in CHOICES]
    assert sides[0].index.equals(sides[1].index)
    validate, test = sides
    assert (test.value >= validate.value).all()
    assert (test.value > validate.value).mean() > 0.05
    assert (validate.auroc_validate >= test.auroc_validate).all()
    assert (validate.n_cells == test.n_cells).all()
    single = validate[validate.n_cells == 1]
    assert (single.entry == test.loc[single.index].entry).all()
    with pytest.raises(OutOfRange, match="validate, test"):
        equal_arms(real, np.ones((1, len(real.documents))), cell_choice="best")


def test_scores_that_were_written_are_read_back_as_they_were(real, tmp_path):
    path = tmp_path / "equal-0"
    assert EqualScores.read(path) is None
    real.write(path)
    again = EqualScores.read(path)
    pd.testing.assert_frame_equal(again.frame, real.frame)
    np.testing.assert_array_equal(again.counts, real.counts)
    np.testing.assert_array_equal(again.documents, real.documents)
    assert (again.seed, again.draws, again.n_tokens, again.n_passes) == (0, 3, real.n_tokens, 1)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".npz", ".parquet"]
    (tmp_path / "equal-0.parquet").unlink()
    assert EqualScores.read(path) is None, "the counts alone are half of it"
