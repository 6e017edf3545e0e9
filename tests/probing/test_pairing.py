"""Which layers, experts, neurons and tokens are paired in the ``equal_*`` arms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_lens.capture.tokens import TokenTable
from moe_lens.models.spec import LayerSpec
from moe_lens.probing.equal.pairing import Alignment, Visits, draw_pairs, layer_pairs
from moe_lens.types import Role
from tests.synthetic import make_batch

# ---- who stands against whom


def layer(number, n_experts, d_ff):
    return LayerSpec(number, Role.MOE if n_experts > 1 else Role.DENSE, n_experts, 1, d_ff, None, True)


class Shape:
    def __init__(self, n_layers):
        self.n_layers = n_layers
        self.layers = tuple(layer(i, 2, 8) for i in range(n_layers))


@pytest.mark.parametrize(
    ("deep", "chosen", "shallow", "expected"),
    [
        (8, range(8), 4, [(0, 0), (2, 1), (5, 2), (7, 3)]),
        (4, range(4), 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (8, [7], 4, [(7, 3)]),
        (8, [5, 6, 7], 4, [(5, 1), (6, 2), (7, 3)]),
    ],
)
def test_layers_are_paired_by_relative_depth_and_none_twice(deep, chosen, shallow, expected):
    found = layer_pairs(Shape(deep), Shape(shallow), moe_layers=chosen, dense_layers=range(shallow))
    assert [(a.layer, b.layer) for a, b in found] == expected


def test_a_draw_has_as_many_neurons_in_disjoint_blocks_as_in_its_experts():
    load = np.arange(16)[::-1]
    drawn = draw_pairs(layer(3, 16, 10), layer(2, 1, 45), load, draws=50, seed=0)
    for draw in range(50):
        pairs = [p for p in drawn if p.draw == draw]
        assert len(pairs) == 4
        assert len({p.expert for p in pairs}) == 4
        assert len({n for p in pairs for n in p.dense_neurons}) == 40
        assert sorted(p.expert // 4 for p in pairs) == [0, 1, 2, 3], "one expert of each quarter of the load"
    assert {p.expert for p in drawn} == set(range(16))


def test_a_dense_ffn_narrower_than_the_experts_meets_a_part_of_one_expert():
    (one,) = draw_pairs(layer(0, 8, 100), layer(0, 1, 30), np.ones(8), draws=1, seed=0)
    assert len(set(one.neurons)) == len(set(one.dense_neurons)) == one.width == 30
    assert one.neurons.max() < 100


def test_more_draws_leave_the_earlier_ones_as_they_were():
    few, many = (draw_pairs(layer(0, 8, 4), layer(0, 1, 16), np.arange(8), draws=n, seed=5) for n in (2, 6))
    for a, b in zip(few, many, strict=False):
        assert (a.expert, a.draw) == (b.expert, b.draw)
        assert (a.dense_neurons == b.dense_neurons).all()


# ---- which tokens


def spans(*ends, document=0, first_id=0):
    """A token table of one window whose tokens end at these characters."""
    n = len(ends)
    batch = make_batch(torch.zeros(1, n, 1), documents=[document])
    start = torch.tensor([[0, *ends[:-1]]])
    batch = replace(
        batch, char_start=start, char_end=torch.tensor([list(ends)]), input_ids=torch.arange(n)[None] + first_id
    )
    found = TokenTable()
    found.start_batch(batch)
    return found


def test_across_tokenizers_a_token_belongs_iff_most_of_its_characters_do():
    #      0123456789012
    moe = spans(4, 6, 9, 13)  # [0,4) [4,6) [6,9) [9,13)
    dense = spans(1, 6, 8, 10, 13)  # [0,1) [1,6) [6,8) [8,10) [10,13)
    alignment = Alignment(moe, dense)
    assert not alignment.same
    carried = {chosen: alignment.carry(torch.tensor(chosen), 5).tolist() for chosen in [(0,), (1,), (2,), (0, 2), (3,)]}
    assert carried[0,] == [True, True, False, False, False]  # 3 of 5 characters of the second
    assert carried[1,] == [False, False, False, False, False]  # 2 of 5
    assert carried[2,] == [False, False, True, False, False]  # half of the fourth is not most of it
    assert carried[0, 2] == [True, True, True, False, False]
    assert carried[3,] == [False, False, False, False, True]


def test_documents_are_not_mixed_up_when_tokens_are_carried():
    moe, dense = spans(2, 4, document=1), spans(3, 4, document=1, first_id=9)
    other = spans(4, document=0)
    dense.merge(other)
    assert Alignment(moe, dense).carry(torch.tensor([0, 1]), 3).tolist() == [True, True, False]


def test_with_one_tokenizer_tokens_that_share_a_character_are_told_apart():
    same = spans(1, 1, 1, 2)  # three pieces of one character
    same._joined.clear()
    alignment = Alignment(same, same)
    assert alignment.carry(torch.tensor([1]), 4).tolist() == [False, True, False, False]


def visits(document, positive):
    n = len(document)
    classes = torch.stack([positive.T, ~positive.T])
    return Visits(torch.arange(n), torch.arange(n), document, classes)


def test_whole_documents_are_added_until_both_classes_are_there():
    r = np.random.default_rng(0)
    row = torch.from_numpy(r.permutation(600))  # by random key
    document, positive = row // 20, row[:, None] % 4 == 0  # 30 documents of 20 rows, 5 of them positive
    order = r.permutation(30)
    sample = visits(document, positive).draw(np.array([0]), torch.tensor([[12], [20]]), order=order)
    assert set(sample.document[0].tolist()) <= set(order[:3].tolist())
    assert (sample.n, sample.n_pos) == ([32], [12])
    wider = visits(document, positive).draw(
        np.array([0]), torch.tensor([[12], [20]]), order=order, spread=np.array([[10, 10]])
    )
    assert set(wider.document[0].tolist()) <= set(order[:10].tolist())
    assert wider.documents[0].max() > 5 > 3 >= sample.documents[0].max()
    assert (wider.n, wider.n_pos) == ([32], [12])


def test_a_sample_takes_the_first_rows_of_each_class_of_each_concept():
    r = np.random.default_rng(1)
    positive = torch.from_numpy(r.random((5000, 3)) < [0.5, 0.02, 0.97])
    some = visits(torch.arange(5000) // 100, positive)
    n = torch.tensor([[30, 40, 50], [60, 20, 70]])
    sample = some.draw(np.array([0, 1, 2]), n)
    for c in range(3):
        rows, yes = sample.row[c][sample.used[c]], sample.positive[c][sample.used[c]]
        for side, want in ((yes, positive[:, c]), (~yes, ~positive[:, c])):
            m = n[0 if want is positive[:, c] else int(side is not yes), c]
            assert sorted(rows[side].tolist()) == want.nonzero().squeeze(1)[:m].tolist()
