"""ClassMoments equals a two-pass computation, whatever the batching, and merges exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.capture.moments import ClassMoments
from tests.synthetic import feed, make_batch, make_tap, random_stream


def brute_force(stream, expert, concept, *, positive):
    rows = []
    for batch, taps in stream:
        for tap in taps:
            mine = tap.expert == expert
            label = batch.token_labels[tap.token, concept] == positive
            rows.append(tap.activation[mine & label & batch.token_eligible[tap.token]])
    return torch.cat(rows).double()


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_streamed_moments_equal_a_two_pass_computation(mean):
    stream = random_stream(mean=mean)
    moments = ClassMoments([0, 0, 0])
    feed([moments], stream)
    got = moments.moments(0)
    for e in range(4):
        for c in range(3):
            pos, neg = brute_force(stream, e, c, positive=True), brute_force(stream, e, c, positive=False)
            assert got.n_pos[e, c] == len(pos)
            assert got.n_neg[e, c] == len(neg)
            torch.testing.assert_close(got.mean_pos[e, c], pos.mean(0), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got.var_pos[e, c], pos.var(0, correction=0), rtol=2e-4, atol=1e-6)
            torch.testing.assert_close(got.mean_neg[e, c], neg.mean(0), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got.var_neg[e, c], neg.var(0, correction=0), rtol=2e-4, atol=1e-6)


def test_out_of_scope_and_ineligible_tokens_are_in_neither_class():
    labels = torch.tensor([[[1, 1], [0, 1], [1, 0], [0, 0]], [[1, 1], [1, 1], [1, 1], [1, 1]]])
    eligible = torch.tensor([[False, True, True, True], [True] * 4])
    batch = make_batch(labels, documents=[0, 1], eligible=eligible)
    batch.in_scope[1, 0] = False  # concept 0 is not defined on document 1
    tap = make_tap(batch, torch.zeros(8, 1, dtype=torch.long), torch.arange(8.0).view(8, 1, 1), n_experts=2)
    moments = ClassMoments([0, 1])
    feed([moments], [(batch, [tap])])
    got = moments.moments(0)
    assert got.n_pos[0].tolist() == [1, 5]
    assert got.n_neg[0].tolist() == [2, 2]
    assert got.mean_pos[0, 0, 0] == 2.0  # token 2 only: token 0 is not eligible
    assert got.mean_neg[0, 0, 0] == 2.0  # tokens 1 and 3
    assert got.mean_pos[0, 1, 0] == pytest.approx((1 + 4 + 5 + 6 + 7) / 5)
    assert got.n.tolist() == [7, 0]
    assert got.mean_pos[1].isnan().all()


@given(cut=st.integers(1, 3), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_merging_two_halves_equals_one_stream(cut, seed):
    stream = random_stream(n_batches=4, seed=seed, mean=5.0)
    whole, left, right = (ClassMoments([0, 0, 0]) for _ in range(3))
    feed([whole], stream)
    feed([left], stream[:cut])
    feed([right], stream[cut:])
    left.merge(right)
    a, b = whole.moments(0), left.moments(0)
    for name in ("n_pos", "mean_pos", "var_pos", "mean_neg", "var_neg", "mean", "var"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_state_round_trips():
    moments, copy = ClassMoments([0, 0, 0]), ClassMoments([0])
    feed([moments], random_stream(layers=2))
    copy.load_state_dict(moments.state_dict())
    assert copy.layers == [0, 1]
    assert torch.equal(copy.moments(1).var_pos, moments.moments(1).var_pos)
