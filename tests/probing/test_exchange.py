"""What an exchange of labels may move, and what it must leave alone."""

from dataclasses import replace

import numpy as np
import pytest

from moe_lens.errors import BadConcept, BadConfig
from moe_lens.probing.exchange import LabelTracks, exchange_labels, frequency_bins, strata
from moe_lens.types import Granularity
from tests.probing.simulate import simulate

SPAN, DOCUMENT, TYPE = Granularity.SPAN, Granularity.DOCUMENT, Granularity.TYPE


def tracks(length, labels=None, *, kind=SPAN, stratum=None, split=None, in_scope=None, token_id=None, length_bin=None):
    """Tracks of one concept; by default one stratum of test documents with random labels."""
    length = np.asarray(length)
    n = length.sum()
    r = np.random.default_rng(0)
    zeros = np.zeros(len(length), int)
    return LabelTracks(
        np.append(0, np.cumsum(length)), zeros + 2 if split is None else np.asarray(split),
        zeros if stratum is None else np.asarray(stratum), zeros if length_bin is None else np.asarray(length_bin),
        r.integers(0, 12, n) if token_id is None else token_id,
        (r.random(n) < 0.4 if labels is None else labels)[:, None],
        np.ones((len(length), 1), bool) if in_scope is None else np.asarray(in_scope)[:, None], ("c",), (kind,),
    )  # fmt: skip


def sources(t, n=50, seed=0, block=128):
    return np.concatenate([b.sources(0) for b in exchange_labels(t, n_permutations=n, seed=seed, block=block)], 1)


def position(t, token):
    return token - t.offsets[t.document[token]]


def test_documents_of_equal_length_exchange_whole_tracks_and_keep_positions():
    t = tracks([7] * 9)
    src = sources(t)
    assert (position(t, src) == position(t, np.arange(63))[:, None]).all()
    donor = t.document[src].reshape(9, 7, -1)
    assert (donor == donor[:, :1]).all()  # no document is cut
    assert (np.sort(donor[:, 0], 0) == np.arange(9)[:, None]).all()  # each gives its labels once
    assert len(np.unique(donor[:, 0], axis=1).T) > 40


def test_every_document_is_equally_likely_to_be_a_donor():
    t = tracks([3] * 4)
    donor = t.document[sources(t, 8000)][::3]
    share = (donor[:, :, None] == np.arange(4)).mean(1)
    assert np.abs(share - 0.25).max() < 0.02


def test_nothing_crosses_the_border_of_a_stratum_a_split_or_a_scope():
    stratum, split = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([1, 1, 2, 2] * 2)
    scope = np.array([True] * 6 + [False] * 2)
    t = tracks([5] * 8, stratum=stratum, split=split, in_scope=scope)
    donor, own = t.document[sources(t)], t.document[:, None]
    for border in (stratum, split, scope):
        assert (border[donor] == border[own]).all()
    assert (donor != own).any()


def test_a_shorter_track_is_mirrored_for_a_quarter_and_then_another_document_takes_over():
    t = tracks([8, 20, 9, 30, 12])
    src = sources(t, 200)
    at, length = position(t, np.arange(t.n_tokens))[:, None], np.diff(t.offsets)[t.document[src]]
    taken = position(t, src)
    mirrored = taken != at
    assert (taken[mirrored] == (2 * length - 1 - at)[mirrored]).all()
    assert (at < length + length // 4).all()
    assert mirrored.any()
    assert (taken >= 0.55 * at).all()  # starts stay at the start


def test_prevalence_is_kept_where_lengths_are_equal_and_nearly_so_where_they_are_not():
    equal, ragged = tracks([20] * 30), tracks(np.random.default_rng(1).integers(15, 40, 30))
    for t, tolerance in ((equal, 0), (ragged, 0.01)):
        prevalence = t.labels[:, 0][sources(t, 400)].mean(0)
        assert abs(prevalence.mean() - t.labels.mean()) <= tolerance + 1e-12


def test_a_lone_document_is_shifted_in_a_circle():
    t = tracks([10, 10, 6], stratum=[0, 0, 1])
    lone = sources(t, 300)[20:] - 20
    shift = lone[0]
    assert (lone == (np.arange(6)[:, None] + shift) % 6).all()
    assert set(shift) == set(range(6))


def test_document_labels_stay_whole_and_are_exchanged_within_strata():
    label = np.array([1, 0, 1, 0, 0, 1, 1, 1], bool)
    length = np.array([3, 9, 4, 5, 3, 8, 4, 4])
    stratum = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    t = tracks(length, np.repeat(label, length), kind=DOCUMENT, stratum=stratum)
    out = t.labels[:, 0][sources(t, 200)]
    first = out[t.offsets[:-1]]
    assert (out == first[t.document]).all()
    assert (first[:4].sum(0) == 2).all()
    assert (first[4:].sum(0) == 3).all()


def test_a_label_that_the_source_decides_is_exchanged_within_length_bins():
    label, length_bin = np.array([1] * 6 + [0] * 6, bool), np.tile([0, 1], 6)
    t = tracks([4] * 12, np.repeat(label, 4), kind=DOCUMENT, stratum=label.astype(int), length_bin=length_bin)
    first = t.labels[:, 0][sources(t, 100)][::4]
    assert (first != label[:, None]).any()
    for code in (0, 1):
        assert (first[length_bin == code].sum(0) == 3).all()


def test_a_document_label_that_changes_inside_a_document_is_refused():
    with pytest.raises(BadConcept, match="declare granularity span"):
        sources(tracks([5, 5], kind=DOCUMENT))


def test_a_type_concept_stays_a_function_of_the_type_in_both_splits():
    r = np.random.default_rng(2)
    token_id = r.integers(0, 40, 600)
    t = tracks([50] * 12, np.isin(token_id, r.permutation(40)[:15]), kind=TYPE, split=[1, 2] * 6, token_id=token_id)
    out = t.labels[:, 0][sources(t, 30)]
    for v in range(40):
        assert (out[token_id == v] == out[token_id == v][0]).all()
    names = np.unique(token_id, return_index=True)[1]
    assert (out[names].sum(0) == 15).all()
    assert (out[names] != t.labels[names]).any()


def test_types_change_places_only_with_types_as_frequent():
    token_id = np.repeat(np.arange(40), [64] * 20 + [2] * 20)
    t = tracks([len(token_id)], token_id < 5, kind=TYPE, token_id=token_id)
    donor = token_id[sources(t, 100)]
    assert ((donor < 20) == (token_id < 20)[:, None]).all()


def test_frequency_bins_never_hold_fewer_types_than_asked_for():
    count = np.concatenate([[5000, 900, 300], np.full(12, 40), np.full(30, 1)])
    bins = frequency_bins(count)
    assert (np.bincount(bins) >= 10).all()
    assert bins.max() == 1
    assert set(frequency_bins(np.array([3, 1, 9]))) == {0}


def test_strata_are_length_bins_inside_each_source():
    source = ["a"] * 40 + ["b"] * 5
    length = np.random.default_rng(0).permutation(45)
    stratum = strata(source, length)
    assert len(np.unique(stratum)) == 3
    a = stratum[:40]
    assert (np.bincount(a) == 20).all()
    assert length[:40][a == 0].max() < length[:40][a == 1].min()
    assert len(np.unique(strata(["a"] * 1000, np.arange(1000)))) == 8


def test_documents_of_equal_length_are_never_separated_by_their_order():
    length = np.repeat([100, 600], [30, 70])
    stratum = strata(["a"] * 100, length)
    assert len(np.unique(stratum[length == 600])) == 1
    assert stratum[0] != stratum[-1]


def test_permutations_do_not_depend_on_the_block_size_but_on_the_seed():
    for kind in (SPAN, TYPE):
        t = tracks([6, 9, 7, 8, 5], kind=kind)
        np.testing.assert_array_equal(sources(t, 20, block=3), sources(t, 20, block=20))
        assert (sources(t, 20) != sources(t, 20, seed=1)).any()


def test_concepts_that_share_documents_share_permutations():
    t = tracks([6] * 8)
    two = LabelTracks(**{
        **{f: getattr(t, f) for f in ("offsets", "split", "stratum", "length_bin", "token_id")},
        "labels": np.repeat(t.labels, 2, 1), "in_scope": np.repeat(t.in_scope, 2, 1), "names": ("a", "b"),
        "granularity": (SPAN, SPAN),
    })  # fmt: skip
    (block,) = exchange_labels(two, n_permutations=9, seed=0)
    np.testing.assert_array_equal(block.labels(0), block.labels(1))


def test_kept_is_the_share_that_got_its_own_label_back():
    for kind in (SPAN, DOCUMENT):
        t = tracks([5] * 4, np.repeat([True, False, True, False], 5), kind=kind)
        (block,) = exchange_labels(t, n_permutations=4000, seed=0, block=4000)
        assert block.kept(0) == pytest.approx(1 / 4, abs=0.02)


def test_no_permutation_and_no_token_are_refused():
    with pytest.raises(BadConfig, match="positive"):
        sources(tracks([5]), 0)
    with pytest.raises(BadConfig, match="larger corpus"):
        sources(tracks(np.zeros(0, int)), 5)


def test_the_share_of_labels_that_stay_is_that_of_the_concept_and_its_scope():
    t = simulate("span", seed=0, n_simulations=4, n_documents=24).tracks
    t.in_scope[:12, 1] = t.in_scope[4:, 2] = False
    t = replace(t, granularity=(*[Granularity.SPAN] * 3, Granularity.TYPE))
    (block,) = exchange_labels(t, n_permutations=9, seed=0)
    kept = [block.kept(c) for c in range(4)]
    for c in range(4):
        scope = t.in_scope[t.document, c]
        assert kept[c] == (block.sources(c)[scope] == np.flatnonzero(scope)[:, None]).mean()
    assert len(set(kept)) == 4
