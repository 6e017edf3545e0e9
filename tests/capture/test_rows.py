"""RowStore keeps the right rows, few enough of them, whatever the order they came in."""

import torch

from moe_lens.capture.rows import RowStore, row_keys
from moe_lens.capture.tokens import TokenTable
from tests.synthetic import feed, random_stream


def collect(stream, **kwargs):
    tokens = TokenTable()
    rows = RowStore(tokens, [0, 0, 0], **kwargs)
    feed([tokens, rows], stream)
    return tokens, rows


def test_unbounded_store_keeps_every_row_with_its_own_activation_and_label():
    stream = random_stream()
    tokens, store = collect(stream, max_rows=None)
    for e in range(4):
        rows = store.rows(0, e)
        expected = torch.cat([tap.activation[tap.expert == e] for _, (tap,) in stream])
        labels = torch.cat([b.token_labels[tap.token[tap.expert == e]] for b, (tap,) in stream])
        assert len(rows) == len(expected)
        got = torch.cat([rows.activation, tokens.labels[rows.token].float()], 1)
        want = torch.cat([expected, labels.float()], 1)
        key = lambda t: t[t[:, 0].argsort()]  # noqa: E731
        assert torch.equal(key(got), key(want))


def test_a_bounded_store_is_a_subset_that_does_not_depend_on_batch_order():
    stream = random_stream(n_batches=6, seq=40)
    tokens, store = collect(stream, max_rows=30)
    back_tokens, backwards = collect(stream[::-1], max_rows=30)
    for e in range(4):
        a, b = store.rows(0, e), backwards.rows(0, e)
        assert torch.equal(a.key, b.key)
        assert torch.equal(a.activation, b.activation)
        assert torch.equal(tokens.document[a.token], back_tokens.document[b.token])
        n_visits = sum(int((tap.expert == e).sum()) for _, (tap,) in stream)
        assert 30 <= len(a) < n_visits


def test_compaction_changes_nothing_that_is_read():
    stream = random_stream(n_batches=40, seq=40)
    _, store = collect(stream, max_rows=20)
    assert store._layers[0].since_compaction < 40 * 160 * 2  # it did compact
    _, reference = collect(stream, max_rows=None)
    for e in range(4):
        full = reference.rows(0, e)
        reference.max_rows = 20
        needed = reference._needed(full.token)
        reference.max_rows = None
        assert torch.equal(store.rows(0, e).key, full.key[needed])


def test_rare_positives_survive_a_small_store():
    stream = random_stream(n_batches=6, seq=40, concepts=3)
    for batch, _ in stream:
        batch.labels[:, :, 2] = False
    stream[0][0].labels[0, :5, 2] = True
    _, store = collect(stream, max_rows=10)
    kept = {int(t) for e in range(4) for t in store.rows(0, e).token}
    assert set(range(5)) <= kept


def test_only_the_asked_columns_are_kept():
    stream = random_stream(d_ff=6)
    columns = {0: torch.tensor([[1, 3], [0, 5], [2, 2], [4, 0]])}
    _, some = collect(stream, max_rows=None, columns=columns)
    _, full = collect(stream, max_rows=None)
    for e in range(4):
        assert torch.equal(some.rows(0, e).activation, full.rows(0, e).activation[:, columns[0][e]])


def test_merge_equals_one_stream():
    stream = random_stream(n_batches=4)
    _, whole = collect(stream, max_rows=25)
    left_tokens, left = collect(stream[:2], max_rows=25)
    right_tokens, right = collect(stream[2:], max_rows=25)
    left.merge(right)
    left_tokens.merge(right_tokens)
    for e in range(4):
        a, b = whole.rows(0, e), left.rows(0, e)
        assert torch.equal(a.key, b.key)
        assert torch.equal(a.activation, b.activation)


def test_keys_are_uniform_and_depend_on_the_seed():
    document, position = torch.arange(100).repeat_interleave(100), torch.arange(100).repeat(100)
    keys = row_keys(document, position, 0).double() / 2**63
    assert keys.min() >= 0
    assert keys.unique().numel() == 10_000
    assert abs(keys.mean() - 0.5) < 0.01
    assert abs(keys.var() - 1 / 12) < 0.005
    assert not torch.equal(row_keys(document, position, 0), row_keys(document, position, 1))
