"""Exemplars and negatives of a tiny model against a trace of every window of its corpus."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch

import moe_lens as ml
from moe_lens.autointerp.exemplars import NEGATIVES, POSITIVES, ExemplarCounts, exemplar_status, exemplar_table
from moe_lens.autointerp.logit_lens import logit_lens, to_logits
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.capture.stream import stream
from moe_lens.corpus.batches import Tokenized, batches, tokenize
from moe_lens.errors import BadConfig, BadCorpus, OutOfRange, UnsupportedModel
from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.models import tiny

COUNTS = ExemplarCounts(top=4, quantiles=2, per_quantile=2, random=5, negatives=6)
N_EXPERTS, TOP_K, LENGTH = 6, 2, 40
PLACE = ["document", "window_char", "position"]


@pytest.fixture(scope="module")
def lens() -> Lens:
    model = tiny.build("olmoe")
    with torch.no_grad():  # expert 5 of layer 1 is rare: the router wants it no more than the average of the others
        router = model.model.layers[1].mlp.gate.weight
        router[5] = router[:5].mean(0)
    return Lens(model, tiny.tokenizer(), name="tiny-olmoe")


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory, lens: Lens) -> Tokenized:
    """Byte soup with letters of two bytes, in windows of 40 tokens and a shorter last one."""
    r = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("soup") / "soup.jsonl"
    texts = ["".join(r.choice(list("aaabbbcdeé 12"), 55)) for _ in range(24)]
    path.write_text("\n".join(json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)))
    return tokenize(ml.corpus(str(path)), lens.tokenizer, [], max_length=LENGTH)


def capture(lens: Lens, tokenized: Tokenized, *, tokens_per_batch: int = 512, **settings) -> TopExemplars:
    kept = TopExemplars(tokenized.splits, **{"n_top": 4, "n_sample": 30, **settings})
    stream(lens, batches(tokenized, tokens_per_batch=tokens_per_batch), [kept], progress=False)
    return kept


@pytest.fixture(scope="module")
def kept(lens: Lens, tokenized: Tokenized) -> TopExemplars:
    return capture(lens, tokenized)


@pytest.fixture(scope="module")
def table(kept: TopExemplars, tokenized: Tokenized, lens: Lens) -> pd.DataFrame:
    return exemplar_table(kept, tokenized, lens.tokenizer, explain=COUNTS, score=COUNTS)


@pytest.fixture(scope="module")
def traced(lens: Lens, tokenized: Tokenized) -> pd.DataFrame:
    """Every (token, layer, expert) with weight, score and rank by router logit, from a trace of each window alone."""
    frames = []
    for w in range(len(tokenized)):
        at = slice(tokenized.offsets[w], tokenized.offsets[w + 1])
        document, first = int(tokenized.document[w]), int(tokenized.char_start[at].min())
        text = tokenized.corpus.documents[document].text[first : tokenized.char_end[at].max()]
        t = lens.trace(text)
        assert list(t.token_ids) == tokenized.input_ids[at].tolist()
        for tap in t.taps:
            assert tap.router_logits is not None
            rank = tap.router_logits.argsort(descending=True).argsort()
            n = len(t.tokens)
            rows = pd.DataFrame(list(itertools.product(range(n), range(N_EXPERTS))), columns=["position", "expert"])
            rows["rank"] = rank.reshape(-1).numpy()
            rows["token_id"] = np.repeat(t.token_ids, N_EXPERTS)
            rows["eligible"] = np.repeat(tokenized.eligible[at], N_EXPERTS)
            mine = t.routing[t.routing["layer"] == tap.layer][["position", "expert", "weight", "weighted_norm"]]
            rows = rows.merge(mine.astype({"expert": int}), how="left")
            split = ["select", "validate", "test"][tokenized.splits[document]]
            frames.append(rows.assign(layer=tap.layer, document=document, window_char=first, split=split))
    return pd.concat(frames, ignore_index=True)


def with_truth(rows: pd.DataFrame, traced: pd.DataFrame) -> pd.DataFrame:
    """`rows` beside what the trace says of the same token and expert (columns ending in ``_true``)."""
    on = ["layer", "expert", *PLACE]
    found = rows.merge(traced, on=on, how="left", suffixes=("", "_true"))
    assert found["rank"].notna().all()
    return found


def test_top_rows_are_the_highest_scores_of_a_brute_force_trace(table, traced):
    cells = itertools.product((0, 1), range(N_EXPERTS), ("select", "validate"))
    for layer, expert, split in cells:
        here = traced[(traced.layer == layer) & (traced.expert == expert) & (traced.split == split) & traced.eligible]
        visits = here.dropna(subset="weighted_norm").sort_values("weighted_norm", ascending=False)
        got = table[(table.layer == layer) & (table.expert == expert) & (table.split == split) & (table.kind == "top")]
        want = visits.head(COUNTS.top)
        assert got[PLACE].to_numpy().tolist() == want[PLACE].to_numpy().tolist()
        assert got["score"].to_numpy() == pytest.approx(want["weighted_norm"].to_numpy(), rel=1e-4)
        assert got["quantile"].to_numpy() == pytest.approx(1 - (np.arange(len(want)) + 0.5) / max(len(visits), 1))


def test_every_row_says_what_the_trace_says(table, traced):
    found = with_truth(table, traced)
    assert (found["routed"] == (found["rank"] < TOP_K)).all()
    assert (found["token_id"] == found["token_id_true"]).all()
    assert (found["split"] == found["split_true"]).all()
    assert found["eligible"].all()
    positive = found[found.kind.isin(POSITIVES)]
    assert positive["routed"].all()
    assert positive["weight"].to_numpy() == pytest.approx(positive["weight_true"].to_numpy(), rel=1e-4)
    assert positive["score"].to_numpy() == pytest.approx(positive["weighted_norm"].to_numpy(), rel=1e-4)
    negative = found[found.kind.isin(NEGATIVES)]
    assert (negative[~negative.routed][["score", "weight"]] == 0).all(axis=None)
    assert negative[negative.routed][["score", "weight"]].isna().all(axis=None)


def test_negatives_of_each_kind_are_what_they_are_called(table, traced):
    found = with_truth(table, traced)
    assert not found[found.kind.isin(set(NEGATIVES) - {"negative_random"})]["routed"].any()
    assert found[found.kind == "negative_near_miss"]["rank"].between(TOP_K, 2 * TOP_K - 1).all()
    assert found[found.kind == "negative_random"]["routed"].any()
    for _, cell in table.groupby(["layer", "expert", "split"]):
        mine = cell[cell.kind.isin(POSITIVES)]["token_id"].value_counts()
        same = cell[cell.kind == "negative_same_token"]["token_id"].value_counts()
        assert (same <= mine.reindex(same.index, fill_value=0)).all()
    assert (found.kind == "negative_same_token").sum() > 50
    top = table[table.kind == "top"]
    keys = {(r.layer, r.split, r.document, r.window_char, r.position, r.expert) for r in top.itertuples()}
    others = {key[:-1] for key in keys}
    for r in table[table.kind == "negative_other"].itertuples():
        place = (r.layer, r.split, r.document, r.window_char, r.position)
        assert place in others
        assert (*place, r.expert) not in keys


def test_random_negatives_come_at_the_natural_rate_and_differ_between_experts(kept, tokenized, lens, traced):
    many = ExemplarCounts(top=1, quantiles=1, per_quantile=1, random=1, negatives=200)
    table = exemplar_table(kept, tokenized, lens.tokenizer, explain=many, score=many, layers=[1])
    drawn = table[(table.kind == "negative_random") & (table.split == "select")]
    rate = drawn.groupby("expert")["routed"].mean()
    here = traced[(traced.layer == 1) & (traced.split == "select") & traced.eligible]
    natural = here.groupby("expert")["rank"].apply(lambda rank: (rank < TOP_K).mean())
    assert rate.to_numpy() == pytest.approx(natural.to_numpy(), abs=0.12)
    places = [set(map(tuple, g[PLACE].head(20).to_numpy())) for _, g in drawn.groupby("expert")]
    assert all(a != b for a, b in itertools.combinations(places, 2))


def test_a_document_explains_or_scores_but_not_both(table):
    documents = table.groupby("split")["document"].agg(set)
    assert set(documents.index) == {"select", "validate"}
    assert not documents["select"] & documents["validate"]


def test_a_token_is_one_exemplar_and_strata_cover_the_range(kept, tokenized, lens):
    counts = ExemplarCounts(top=2, quantiles=4, per_quantile=3, random=6)
    table = exemplar_table(kept, tokenized, lens.tokenizer, explain=counts, score=counts)
    positive = table[table.kind.isin(POSITIVES)]
    assert not positive.duplicated(["layer", "expert", *PLACE]).any()
    for _, cell in positive[(positive.kind == "quantile") & (positive.status == "ok")].groupby(
        ["layer", "expert", "split"]
    ):
        stratum = (cell["quantile"] * 4).astype(int)
        assert set(stratum) == {0, 1, 2, 3}
        assert stratum.value_counts().max() <= 3
        by_score = cell.sort_values("score")
        assert by_score["quantile"].is_monotonic_increasing


def test_contexts_point_at_their_tokens(table, tokenized, lens, traced):
    visited = set(map(tuple, traced[traced["rank"] < TOP_K][["layer", "expert", *PLACE]].to_numpy().tolist()))
    assert (table.token_starts.map(len) <= 32).all()
    for r in table.itertuples():
        assert len(r.token_starts) == len(r.token_ends) == len(r.routed_tokens)
        assert 0 <= r.char_start < r.char_end <= len(r.text)
        document = tokenized.corpus.documents[r.document]
        assert r.text in document.text
        w = next(
            w for w in np.flatnonzero(tokenized.document == r.document)
            if tokenized.char_start[tokenized.offsets[w]] == r.window_char
        )  # fmt: skip
        first = int(min(max(0, r.position - 16), max(0, tokenized.offsets[w + 1] - tokenized.offsets[w] - 32)))
        focal = r.position - first
        assert (r.token_starts[focal], r.token_ends[focal]) == (r.char_start, r.char_end)
        assert r.token == lens.tokenizer.decode([r.token_id])
        if "é" not in r.text[r.char_start : r.char_end]:  # its two tokens cover it together
            assert r.text[r.char_start : r.char_end] == r.token
        got = [(r.layer, r.expert, r.document, r.window_char, first + i) in visited for i in range(len(r.token_starts))]
        assert r.routed_tokens.tolist() == got


def test_rare_experts_have_fewer_rows_and_a_status(lens, tokenized, traced):
    chosen = [int(np.flatnonzero(tokenized.splits == code)[0]) for code in (0, 1)]  # a document of each split
    few = tokenize(tokenized.corpus, lens.tokenizer, [], max_length=LENGTH, splits=tokenized.splits, documents=chosen)
    kept = capture(lens, few)
    table, status = (
        exemplar_table(kept, few, lens.tokenizer, explain=COUNTS, score=COUNTS),
        exemplar_status(kept, explain=COUNTS, score=COUNTS),
    )
    assert len(status) == 2 * N_EXPERTS * 2
    seen = traced[traced.eligible & (traced["rank"] < TOP_K) & traced.document.isin(chosen)]
    truth = seen.groupby(["layer", "expert", "split"]).size()
    for r in status.itertuples():
        n = int(truth.get((r.layer, r.expert, r.split), 0))
        assert r.n_visits == n
        assert r.status == ("too_few" if n < COUNTS.positives else "ok")
        here = (table.layer == r.layer) & (table.expert == r.expert) & (table.split == r.split)
        assert (table[here].status == r.status).all()
        n_positive = int((here & table.kind.isin(POSITIVES)).sum())
        assert n_positive <= min(n, COUNTS.positives)
        assert n_positive > 0 or n == 0
    assert {"too_few", "ok"} == set(status.status)


def test_a_dead_expert_has_a_status_and_negatives_only(lens, tokenized):
    with lens.edit(ml.mask_refill("L0.E4")):
        kept = capture(lens, tokenized)
    table = exemplar_table(kept, tokenized, lens.tokenizer, explain=COUNTS, score=COUNTS)
    dead = table[(table.layer == 0) & (table.expert == 4)]
    assert set(dead.kind) == {"negative_random", "negative_near_miss", "negative_other"}
    assert not dead.routed.any()
    assert (dead.status == "too_few").all()
    status = exemplar_status(kept, explain=COUNTS, score=COUNTS)
    here = status[(status.layer == 0) & (status.expert == 4)]
    assert here.n_visits.tolist() == [0, 0]
    assert here.status.tolist() == ["too_few", "too_few"]
    found = logit_lens(lens, kept, table)
    assert not ((found.layer == 0) & (found.expert == 4)).any()


def test_batch_size_changes_no_row(table, lens, tokenized):
    other = exemplar_table(
        capture(lens, tokenized, tokens_per_batch=40), tokenized, lens.tokenizer, explain=COUNTS, score=COUNTS
    )
    exact = [c for c in table.columns if c not in ("score", "weight", "quantile")]
    lists = ["token_starts", "token_ends", "routed_tokens"]
    plain = [c for c in exact if c not in lists]
    pd.testing.assert_frame_equal(table[plain], other[plain])
    assert all(a.tolist() == b.tolist() for c in lists for a, b in zip(table[c], other[c], strict=True))
    assert np.allclose(table["score"], other["score"], rtol=1e-4, equal_nan=True)


def test_the_table_survives_parquet(table, tmp_path):
    table.to_parquet(tmp_path / "exemplars.parquet", index=False)
    again = pd.read_parquet(tmp_path / "exemplars.parquet")
    assert list(again.columns) == list(table.columns)
    assert again["routed_tokens"][0].tolist() == table["routed_tokens"][0].tolist()
    assert again["text"].tolist() == table["text"].tolist()


def test_too_many_exemplars_another_tokenisation_and_unknown_layers_are_refused(kept, tokenized, lens):
    with pytest.raises(BadConfig, match="n_top=4"):
        exemplar_table(kept, tokenized, lens.tokenizer, explain=ExemplarCounts(top=5))
    other = tokenize(tokenized.corpus, lens.tokenizer, [], max_length=30)
    with pytest.raises(BadCorpus, match="max_length"):
        exemplar_table(kept, other, lens.tokenizer, explain=COUNTS, score=COUNTS)
    with pytest.raises(OutOfRange, match="layer 2 was not captured"):
        exemplar_table(kept, tokenized, lens.tokenizer, explain=COUNTS, score=COUNTS, layers=[1, 2])


def logits_and_contributions(lens: Lens, row: int, targets: range) -> tuple[np.ndarray, np.ndarray]:
    """Logit lens and trace of the same visit, for several tokens."""
    t = lens.trace("cats and dogs")
    tap = next(tap for tap in t.taps if (tap.layer, tap.role) == (1, Role.MOE))
    ours = to_logits(lens, 1)(tap.output[row, None] * tap.weight[row])
    position, slot = int(tap.token[row]), int(tap.slot[row])
    theirs = []
    for target in targets:
        frame = t.contributions(position, target)
        theirs.append(frame[(frame.layer == 1) & (frame.role == "moe") & (frame.slot == slot)]["logit"].item())
    return ours[0, list(targets)].numpy(), np.array(theirs)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral"])
def test_logits_are_the_direct_contributions_up_to_one_positive_factor_per_token(family):
    lens = Lens(tiny.build(family), tiny.tokenizer())
    for row in (0, 7, 15):
        ours, theirs = logits_and_contributions(lens, row, range(40, 80))
        factor = ours @ theirs / (theirs @ theirs)
        assert factor > 0
        assert ours == pytest.approx(factor * theirs, rel=1e-3, abs=1e-4 * float(abs(ours).max()))


def test_promoted_and_suppressed_tokens_of_a_planted_expert(tokenized):
    """Expert 2 of layer 1 writes the unembedding of 'q' and against 'z' at every token, whatever it reads."""
    model = tiny.build("olmoe")
    vocabulary = tiny.tokenizer().get_vocab()
    with torch.no_grad():
        experts, unembed = model.model.layers[1].mlp.experts, model.get_output_embeddings().weight
        unembed[vocabulary["q"]] *= 3
        unembed[vocabulary["z"]] = -unembed[vocabulary["q"]]
        wanted = unembed[vocabulary["q"]] / model.model.norm.weight
        gate, up = experts.gate_up_proj[2].chunk(2)
        up.copy_(gate)  # act(x) * x is never negative
        experts.down_proj[2] = wanted[:, None].expand(-1, gate.shape[0])
    lens = Lens(model, tiny.tokenizer())
    kept = capture(lens, tokenized)
    table = exemplar_table(kept, tokenized, lens.tokenizer, explain=COUNTS, score=COUNTS)
    found = logit_lens(lens, kept, table, n_tokens=3)
    here = found[(found.layer == 1) & (found.expert == 2)]
    assert {p[0] for p in here.promoted} == {"q"}
    assert {s[0] for s in here.suppressed} == {"z"}
    own = found[found.position.isna()]
    assert not own.duplicated(["layer", "expert"]).any()
    select = table[(table.split == "select") & table.kind.isin(POSITIVES)]
    counted = select.groupby(["layer", "expert"]).size()
    assert own.set_index(["layer", "expert"]).n_exemplars.to_dict() == counted.to_dict()
    assert len(found) == len(select) + len(own)
    joined = select.merge(found, on=["layer", "expert", *PLACE])
    assert len(joined) == len(select)
    assert here.iloc[0].promoted_logits == sorted(here.iloc[0].promoted_logits, reverse=True)
    mean = np.mean([p[0] for p in here[here.position.notna()].promoted_logits])
    assert here[here.position.isna()].promoted_logits.item()[0] == pytest.approx(mean, rel=1e-3)


def test_the_logit_lens_is_refused_where_it_means_nothing(lens, kept, tokenized, table, monkeypatch):
    bare = capture(lens, tokenized, directions=False)
    with pytest.raises(BadConfig, match="directions=True"):
        logit_lens(lens, bare, table)
    monkeypatch.setattr(lens.model.config, "moe_latent_size", 8, raising=False)
    with pytest.raises(UnsupportedModel, match=r"lens\.edit"):
        logit_lens(lens, kept, table)
