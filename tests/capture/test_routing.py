"""Routing tables against hand-computed cases (METRICS 6.1, O10) and invariants."""

import numpy as np
import pytest
import torch

from moe_lens.capture.routing import RoutingStats
from moe_lens.capture.tables import coactivation_table, notable_experts, routing_by_field, routing_table
from moe_lens.types import Role
from tests.synthetic import feed, make_batch, make_tap, random_stream


def stats_of(experts, *, n_experts, weights=None, output=None, logits=None, documents=None, shared=None):
    n = len(experts)
    windows = len(documents or [0])
    batch = make_batch(torch.zeros(windows, n // windows, 1), documents=documents or [0])
    choice = torch.tensor(experts)
    tap = make_tap(
        batch, choice, torch.ones(n, choice.shape[1], 2), n_experts=n_experts, weights=weights, output=output,
        router_logits=logits,
    )  # fmt: skip
    taps = [tap]
    if shared is not None:
        one = torch.zeros(n, 1, dtype=torch.long)
        taps.append(make_tap(batch, one, shared[:, None], n_experts=1, role=Role.SHARED, weights=torch.ones(n, 1)))
    stats = RoutingStats(max(documents or [0]) + 1)
    feed([stats], [(batch, taps)])
    return stats


def test_oracle_o10_load_entropy_and_cv():
    experts = [[0]] * 6 + [[1]] * 3 + [[2]] * 2 + [[3]]
    table = routing_table(stats_of(experts, n_experts=4))
    assert table.load.tolist() == [6, 3, 2, 1]
    assert table.load_cv[0] == pytest.approx(0.62361, abs=1e-5)
    assert table.load_entropy[0] / np.log(4) == pytest.approx(0.86479, abs=1e-5)


def test_oracle_o10_router_entropy():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    table = routing_table(stats_of([[0]], n_experts=3, logits=logits))
    assert table.router_entropy[0] == pytest.approx(1.02965, abs=1e-5)
    assert table.router_margin[0] == pytest.approx(np.log(0.5 / 0.3), abs=1e-5)


def test_oracle_o10_coactivation_lift_and_jaccard():
    pairs = coactivation_table(stats_of([[0, 1], [0, 1], [0, 2], [1, 2]], n_experts=3)).set_index(["expert", "other"])
    assert pairs.lift[0, 1] == pytest.approx(0.8889, abs=1e-4)
    assert pairs.jaccard[0, 1] == pytest.approx(0.5)
    assert pairs["count"].tolist() == [2, 1, 1]
    assert pairs.lift_null[0, 1] == pytest.approx(1 * 3 / (2 * 2))


def test_router_weighted_views_and_the_shared_experts_row():
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    output = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [6.0, 8.0]]])
    shared = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    table = routing_table(stats_of([[0, 1], [0, 1]], n_experts=3, weights=weights, output=output, shared=shared))
    moe, other = table[table.role == "moe"].set_index("expert"), table[table.role == "shared"]
    assert moe.gate_mass[0] == pytest.approx(1.25)
    assert moe.mean_weight[1] == pytest.approx(0.375)
    assert moe.output_norm[0] == pytest.approx((5 + 2) / 2)
    assert moe.weighted_norm[0] == pytest.approx((0.75 * 5 + 0.5 * 2) / 2)
    written = 0.75 * 5 + 0.5 * 2 + 0.25 * 1 + 0.5 * 10 + 1 + 3
    assert moe.write_share[0] == pytest.approx(4.75 / written)
    assert other.expert.tolist() == [0]
    assert other.write_share.item() == pytest.approx(4 / written)
    assert table.write_share.sum() == pytest.approx(1)
    assert moe.max_output.tolist() == [4.0, 8.0, 0.0]
    assert np.isnan(moe.mean_weight[2])


def test_field_table_counts_a_domains_tokens():
    stats = stats_of([[0], [0], [1], [1]], n_experts=2, documents=[0, 1])
    table = routing_by_field(stats, [{"domain": "fr"}, {"domain": "de"}], ["domain"]).set_index(["value", "expert"])
    assert table.share["fr", 0] == 1.0
    assert table.share["de", 0] == 0.0
    assert table.lift["fr", 0] == 2.0
    assert table.n_tokens["fr", 0] == 2


def test_dead_always_on_and_super_experts_are_found():
    experts = [[0, 1 + i % 2] for i in range(128)]  # expert 0 always, 3 never
    output = torch.ones(128, 2, 2)
    output[5, 1, 0] = 500.0
    stats = stats_of(experts, n_experts=8, output=output, documents=[0])
    found = notable_experts(stats).set_index(["kind", "expert"])
    assert ("always_on", 0) in found.index
    assert found.value["always_on", 0] == 1.0
    assert {e for kind, e in found.index if kind == "dead"} == {3, 4, 5, 6, 7}
    assert {e for kind, e in found.index if kind == "super"} == {experts[5][1]}


def test_padding_and_first_tokens_are_not_counted():
    ((batch, (tap,)),) = random_stream(n_batches=1)
    batch.eligible[:, 0] = False
    stats = RoutingStats(4)
    feed([stats], [(batch, [tap])])
    table = routing_table(stats)
    assert table.n_tokens[0] == 4 * 19
    assert table.load.sum() == 4 * 19 * 2
    assert stats.tokens_of_document.tolist() == [19] * 4


def test_merge_and_state_equal_one_stream():
    stream = random_stream(n_batches=4, layers=2)
    whole, left, right, read = (RoutingStats(16) for _ in range(4))
    feed([whole], stream)
    feed([left], stream[:1])
    feed([right], stream[1:])
    left.merge(right)
    read.load_state_dict(left.state_dict())
    for got in (left, read):
        a, b = routing_table(whole), routing_table(got)
        assert np.allclose(a.select_dtypes("number"), b.select_dtypes("number"), equal_nan=True)
        assert coactivation_table(whole).equals(coactivation_table(got))
