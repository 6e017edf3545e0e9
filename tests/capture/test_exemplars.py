"""TopExemplars keeps the right visits and windows, few enough of them, whatever the order they came in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_lens.capture import exemplars
from moe_lens.capture.exemplars import CONTEXT, TopExemplars, context_start
from moe_lens.capture.window_sample import nobody
from moe_lens.types import ExpertTap, TokenBatch
from tests.synthetic import feed, make_batch, make_tap

N_EXPERTS, TOP_K, LAYERS = 5, 2, (0, 3)
Stream = list[tuple[TokenBatch, list[ExpertTap]]]


def a_batch(documents: list[int], seed: int, *, ragged: bool = True) -> tuple[TokenBatch, list[ExpertTap]]:
    """Windows of 40 tokens or fewer, one per document, with random routing, weights and outputs in two layers."""
    g = torch.Generator().manual_seed(seed)
    n, seq = len(documents), 40
    length = torch.randint(20, seq + 1, (n,), generator=g) if ragged else torch.full((n,), seq)
    mask = torch.arange(seq) < length[:, None]
    plain = make_batch(torch.zeros(n, seq, 1), documents=documents, eligible=mask & (torch.arange(seq) > 0))
    ids = torch.randint(0, 9, (n, seq), generator=g)
    start = torch.where(mask, plain.char_start, -1)
    batch = TokenBatch(ids, mask.long(), plain.document, start, start + 3, plain.eligible, plain.labels, plain.in_scope)
    taps = []
    for layer in LAYERS:
        logits = torch.randn(n * seq, N_EXPERTS, generator=g) + torch.tensor([1.0, 0.5, 0, -0.5, -3])
        weights = torch.rand(n * seq, TOP_K, generator=g)
        output = torch.randn(n * seq, TOP_K, 6, generator=g)
        chosen = logits.topk(TOP_K).indices
        taps.append(
            make_tap(batch, chosen, output, n_experts=N_EXPERTS, layer=layer, weights=weights, router_logits=logits)
        )
    return batch, taps


def a_stream(n_batches: int = 6) -> Stream:
    return [a_batch([4 * b + i for i in range(4)], seed=b) for b in range(n_batches)]


def part_of(batch: TokenBatch, taps: list[ExpertTap], windows: list[int]) -> tuple[TokenBatch, list[ExpertTap]]:
    """The same windows and taps in another batch."""
    seq = batch.input_ids.shape[1]
    names = ("input_ids", "attention_mask", "document", "char_start", "char_end", "eligible", "labels", "in_scope")
    small = TokenBatch(*(getattr(batch, name)[windows] for name in names))
    tokens = (torch.tensor(windows)[:, None] * seq + torch.arange(seq)).reshape(-1)
    out = []
    for tap in taps:
        index, weight = (torch.zeros(tap.n_tokens, TOP_K, dtype=d) for d in (torch.long, torch.float32))
        output = torch.zeros(tap.n_tokens, TOP_K, 6)
        index[tap.token, tap.slot], weight[tap.token, tap.slot] = tap.expert, tap.weight
        output[tap.token, tap.slot] = tap.output
        assert tap.router_logits is not None
        logits = tap.router_logits[tokens]
        out.append(
            make_tap(small, index[tokens], output[tokens], n_experts=N_EXPERTS, layer=tap.layer,
                     weights=weight[tokens], router_logits=logits)
        )  # fmt: skip
    return small, out


SPLITS = [i % 3 for i in range(24)]
SMALL: dict[str, Any] = {"n_top": 5, "n_sample": 7, "window_tokens": 120}


def collect(stream: Stream, **changes) -> TopExemplars:
    kept = TopExemplars(SPLITS, **{**SMALL, **changes})
    feed([kept], stream)
    return kept


def assert_same(a: TopExemplars, b: TopExemplars) -> None:
    """Equal in everything that is kept."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def visits_of(stream: Stream, layer: int, split: int) -> list[tuple[float, int, int, int]]:
    """(score, expert, document, position) of every eligible visit, by a loop over rows."""
    found = []
    for batch, taps in stream:
        tap = next(tap for tap in taps if tap.layer == layer)
        for row, token in enumerate(tap.token.tolist()):
            window, position = divmod(token, batch.input_ids.shape[1])
            document = int(batch.document[window])
            if batch.eligible[window, position] and SPLITS[document] == split:
                score = float(tap.weight[row] * tap.output[row].norm())
                found.append((score, int(tap.expert[row]), document, position))
    return found


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("split", "code"), [("select", 0), ("validate", 1)])
def test_the_highest_scores_are_kept_exactly(layer, split, code):
    stream = a_stream()
    kept = collect(stream)
    everything = visits_of(stream, layer, code)
    v, (by_score, _) = kept.visits(layer, split), kept.places(layer, split)
    for expert in range(N_EXPERTS):
        want = sorted((s, d, p) for s, e, d, p in everything if e == expert)[::-1]
        assert kept.n_visits(layer, split)[expert] == len(want)
        mine = ((v.expert == expert) & (by_score < 5)).nonzero().squeeze(1)
        mine = mine[v.score[mine].argsort(descending=True)]
        got = list(zip(v.document[mine].tolist(), v.position[mine].tolist(), strict=True))
        assert got == [(d, p) for _, d, p in want[:5]]
        assert v.score[mine].tolist() == pytest.approx([s for s, _, _ in want[:5]])


def test_the_random_sample_does_not_look_at_the_score():
    stream = [a_batch(list(range(24)), seed=7, ragged=False)]
    kept = TopExemplars([0] * 24, n_top=3, n_sample=100)
    feed([kept], stream)
    v, (_, by_key) = kept.visits(0, "select"), kept.places(0, "select")
    mine = v.score[(v.expert == 0) & (by_key < 100)]
    tap = stream[0][1][0]
    all_scores = (tap.weight * tap.output.norm(dim=1))[tap.expert == 0]
    assert len(mine) == 100
    standard_error = all_scores.std() / 10
    assert abs(mine.mean() - all_scores.mean()) < 3 * standard_error
    other = TopExemplars([0] * 24, n_top=3, n_sample=100, seed=1)
    feed([other], stream)
    assert not torch.equal(other.visits(0, "select").position, v.position)


def test_neither_batch_size_nor_order_matters():
    stream = a_stream()
    whole = collect(stream)
    single = [part_of(batch, taps, [w]) for batch, taps in stream for w in range(4)]
    assert_same(whole, collect(stream[::-1]))
    assert_same(whole, collect(single))
    assert_same(whole, collect(single[::-1]))


def test_dropping_old_rows_early_changes_nothing():
    stream = a_stream()
    early, late = TopExemplars(SPLITS, **SMALL), TopExemplars(SPLITS, **SMALL)
    for item in stream:
        feed([early], [item])
        early.state_dict()  # settles
    feed([late], stream)
    assert_same(early, late)


def test_merge_of_two_halves_equals_the_whole():
    stream = a_stream()
    whole = collect(stream)
    for cut in (1, 3, 5):
        left, right = collect(stream[:cut]), collect(stream[cut:])
        left.merge(right)
        assert_same(left, whole)
    left.merge(TopExemplars(SPLITS, **SMALL))
    assert_same(left, whole)


def test_a_saved_state_goes_on_as_if_it_had_never_been_saved():
    stream = a_stream()
    first, second = collect(stream[:3]), TopExemplars(SPLITS, **SMALL)
    second.load_state_dict(first.state_dict())
    feed([second], stream[3:])
    assert_same(second, collect(stream))


def test_test_documents_and_ineligible_tokens_are_not_kept():
    kept = collect(a_stream(), n_top=1000, n_sample=1000, window_tokens=10_000)
    for split, code in (("select", 0), ("validate", 1)):
        v = kept.visits(0, split)
        assert {SPLITS[d] for d in v.document.tolist()} == {code}
        assert (v.position > 0).all()
        assert len(v) == len(visits_of(a_stream(), 0, code))
    documents = kept.windows.column("document").tolist()
    assert sorted(documents) == [d for d in range(24) if SPLITS[d] < 2]


def test_the_sample_of_windows_fits_its_budget_and_knows_their_routing():
    stream = a_stream()
    windows = collect(stream).windows
    split, length = windows.column("split"), windows.column("length")
    for code in (0, 1):
        assert 80 < length[split == code].sum() <= 120
    at = 0
    for document, n in zip(windows.column("document").tolist(), length.tolist(), strict=True):
        batch, taps = stream[document // 4]
        window = document % 4
        assert windows.column("input_ids")[at : at + n].tolist() == batch.input_ids[window, :n].tolist()
        assert windows.column("eligible")[at : at + n].tolist() == batch.eligible[window, :n].tolist()
        for tap in taps:
            assert tap.router_logits is not None
            ranks = tap.router_logits[window * 40 : window * 40 + n].argsort(descending=True)
            assert torch.equal(windows.column(f"chosen.{tap.layer}")[at : at + n].long(), ranks[:, :TOP_K])
            assert torch.equal(windows.column(f"passed.{tap.layer}")[at : at + n].long(), ranks[:, TOP_K : 2 * TOP_K])
        at += n


def test_the_context_holds_the_focal_token_and_stays_in_its_window():
    position = torch.arange(50)
    start = context_start(position, torch.full((50,), 50))
    assert start.tolist() == [0] * 17 + list(range(1, 18)) + [18] * 16
    assert context_start(torch.tensor([3, 9]), torch.tensor([10, 10])).tolist() == [0, 0]
    stream = a_stream()
    kept = collect(stream)
    v = kept.visits(0, "select")
    for i in range(len(v)):
        document, at = int(v.document[i]), int(v.position[i])
        batch, (tap, _) = stream[document // 4]
        n = int(batch.attention_mask[document % 4].sum())
        first = int(context_start(torch.tensor(at), torch.tensor(n)))
        assert tap.router_logits is not None
        want = tap.router_logits.topk(TOP_K).indices.view(4, 40, TOP_K)[document % 4, first : min(first + CONTEXT, n)]
        assert torch.equal(v.experts[i, : len(want)].long(), want)
        assert (v.experts[i, len(want) :] == nobody(v.experts)).all()
        assert int(v.expert[i]) in v.experts[i, at - first].tolist()


def test_the_direction_times_the_score_is_what_the_visit_wrote():
    batch, taps = a_batch([0, 1], seed=3, ragged=False)
    huge = taps[0].output.clone()
    huge[torch.arange(len(huge)) % 2 == 0] *= 1e6  # beyond float16
    tap = make_tap(batch, torch.zeros(80, 1, dtype=torch.long), huge[:80], n_experts=1)
    kept = TopExemplars([0, 1], n_top=4, n_sample=4)
    feed([kept], [(batch, [tap])])
    v = kept.visits(0, "select")
    for i in range(len(v)):
        row = 40 * int(v.document[i]) + int(v.position[i])
        wrote = tap.weight[row] * tap.output[row]
        assert torch.allclose(v.score[i] * v.direction[i].float(), wrote, atol=2e-3 * float(wrote.norm()))
    assert kept.visits(0, "validate").direction.shape[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(700, 2048), (3, 200_000), (0, 8)])
def test_norms_taken_in_pieces_are_those_taken_at_once(shape, dtype):
    output = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    at_once = torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)
    assert torch.equal(exemplars._norms(output), at_once)


def test_memory_stays_below_what_the_docstring_says_however_long_the_stream():
    def held(kept: TopExemplars) -> int:
        pools = [getattr(p, n).nbytes for pool in kept._pools.values() for p in pool.parts for n in exemplars._VISIT]
        return sum(pools) + sum(part.nbytes for parts in kept.windows.parts.values() for part in parts)

    kept = TopExemplars([0] * 400, **SMALL)
    sizes = []
    for b in range(100):
        feed([kept], [a_batch([4 * b + i for i in range(4)], seed=b)])
        sizes.append(held(kept))
    per_visit = 2 * 6 + 64 * TOP_K + 96
    bound = 2 * len(LAYERS) * N_EXPERTS * 12 * per_visit + 8 * 280 * (len(LAYERS) * TOP_K + 3)
    assert max(sizes) <= bound
    visited = sum(int(kept.n_visits(layer, "select").sum()) for layer in LAYERS)
    assert visited * per_visit / 2 > 20 * bound


def test_tokens_that_left_a_slot_empty_and_routers_without_logits_are_read():
    batch, (tap, _) = a_batch([0, 1], seed=5, ragged=False)
    rows = tap.slot == 0
    counts = torch.bincount(tap.expert[rows], minlength=N_EXPERTS)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    one = ExpertTap(0, tap.role, tap.token[rows], tap.slot[rows], tap.weight[rows], offsets, tap.activation[rows], None,
                    tap.n_tokens, lambda: tap.output[rows])  # fmt: skip
    kept = TopExemplars([0] * 8, **SMALL)
    later, (full, _) = a_batch([4, 5], seed=6, ragged=False)
    feed([kept], [(batch, [one]), (later, [full])])
    chosen = kept.windows.column("chosen.0")
    assert chosen.shape[1] == TOP_K
    short = (chosen[:, 1] == nobody(chosen)).sum() // 40
    assert short == sum(d < 4 for d in kept.windows.column("document").tolist())
