"""Shuffled activations keep every count and lose the text; labels made from them say nothing about the expert."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.autointerp.captured import Captured
from moe_lens.autointerp.endpoint import Clients
from moe_lens.autointerp.exemplars import POSITIVES, exemplar_table
from moe_lens.autointerp.labels import LABEL_COLUMNS
from moe_lens.autointerp.lexical import lexical_labels
from moe_lens.autointerp.scoring.items import make_items
from moe_lens.autointerp.scoring.rule import rule_answers
from moe_lens.autointerp.shuffled import _moves, shuffled_exemplars, shuffled_labels, shuffled_routing
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.corpus.batches import tokenize
from moe_lens.corpus.splits import assign_splits
from moe_lens.corpus.text import Corpus
from moe_lens.errors import BadConfig, NoServer
from tests.autointerp.lexical_routing import bundled_tokenizer, from_marks, route
from tests.autointerp.llm_server import Answer, Asked, explanation
from tests.autointerp.planted_tables import EXPERTS, exemplar_rows, lens_rows

PLANTED = {
    "digits": r"\d",
    "after the": r"(?<=\bthe )\S",
    "capitals": r"[A-Z]",
    "near the": r"(?s)\bthe\b.{0,60}",
    "quotes and brackets": r"[\"'(\[{]",
    "line starts": r"(?m)^.",
}
N_EXPERTS = len(PLANTED) + 1
"""The last one gets nearly every token, and has no label."""
WITH_LABELS = [(layer, expert) for layer in (0, 1) for expert in range(len(PLANTED))]
STEP = 3


@cache
def captured() -> Captured:
    """A third of the bundled text, two layers of the same planted routing."""
    corpus = Corpus.of(ml.corpus("bundled:").documents[::STEP], id="a part of the bundled text")
    splits = assign_splits(ml.corpus("bundled:"))[::STEP]
    tokenized = tokenize(corpus, bundled_tokenizer(), [], max_length=128, document_tokens=128, splits=splits)
    router = from_marks(tokenized, list(PLANTED.values()))
    kept = route(TopExemplars(tokenized.splits), tokenized, router, router, n_experts=N_EXPERTS)
    exemplars = exemplar_table(kept, tokenized, bundled_tokenizer())
    return Captured(tokenized, bundled_tokenizer(), kept, exemplars, None, tokenized.n_tokens)


def routing_of(kept: TopExemplars, layer: int = 0) -> pd.DataFrame:
    """Every sampled token with its split, document and experts (a column of sorted tuples)."""
    sample = kept.windows
    length = sample.column("length").numpy()
    chosen = np.sort(sample.column(f"chosen.{layer}").numpy(), axis=1)
    columns = {name: np.repeat(sample.column(name).numpy(), length) for name in ("split", "document", "key")}
    return pd.DataFrame({**columns, "eligible": sample.column("eligible").numpy(), "chosen": list(map(tuple, chosen))})


def routed(table: pd.DataFrame) -> np.ndarray:
    """(token, expert)"""
    return np.array([[e in chosen for e in range(N_EXPERTS)] for chosen in table["chosen"]])


# --- routing ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before() -> pd.DataFrame:
    return routing_of(captured().kept)


@pytest.fixture(scope="module")
def after() -> pd.DataFrame:
    return routing_of(shuffled_routing(captured().kept, seed=1))


def test_every_expert_keeps_its_tokens_and_its_company(before, after) -> None:
    used = before["eligible"] & (before["split"] == 0)
    assert Counter(before["chosen"][used]) == Counter(after["chosen"][used])
    assert (before["chosen"][~used] == after["chosen"][~used]).all(), "another split or special tokens changed"
    assert (before.drop(columns="chosen") == after.drop(columns="chosen")).all(axis=None)


def test_every_expert_keeps_about_its_documents_and_its_bursts(before, after) -> None:
    used = before["eligible"] & (before["split"] == 0)
    was, now = routed(before[used]), routed(after[used])
    document = before["document"][used].to_numpy()
    for e in range(len(PLANTED)):
        n_was, n_now = (len(np.unique(document[table[:, e]])) for table in (was, now))
        assert abs(n_was - n_now) <= 0.1 * n_was, f"expert {e} had {n_was} documents, now {n_now}"
        switches = [(table[1:, e] != table[:-1, e]).mean() for table in (was, now)]
        by_chance = 2 * was[:, e].mean() * (1 - was[:, e].mean())
        ends = 2 / 128  # those of a document, and where it was rotated
        assert abs(switches[0] - switches[1]) <= ends, f"expert {e} lost its bursts"
        assert switches[1] < 0.6 * by_chance or e != list(PLANTED).index("near the"), "not bursty enough to tell"


def test_the_link_between_text_and_expert_is_broken(before, after) -> None:
    used = before["eligible"] & (before["split"] == 0)
    was, now = routed(before[used]), routed(after[used])
    for e in range(N_EXPERTS):
        rate, kept_rate = was[:, e].mean(), now[was[:, e], e].mean()
        assert abs(kept_rate - rate) < 0.05, f"expert {e} gets {kept_rate:.2f} of its own tokens, {rate:.2f} by chance"


def test_documents_of_one_length_change_places_whole_and_rotated() -> None:
    """An expert of the first words of documents would else keep them."""
    document = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 20))
    to, source = _moves(document, np.random.default_rng(1))
    assert sorted(to) == sorted(source) == list(range(600))
    assert (document[to].reshape(30, 20) == np.arange(30)[:, None]).all()
    came_from = document[source].reshape(30, 20)
    assert (came_from == came_from[:, :1]).all()
    assert (came_from[:, 0] == np.arange(30)).mean() < 0.2
    at = [np.flatnonzero(document == d) for d in range(30)]
    stayed = [at[d].tolist().index(i) == n % 20 for n, (d, i) in enumerate(zip(document[source], source, strict=True))]
    assert np.mean(stayed) < 0.3, "places in the document are kept"


def test_a_shuffle_depends_on_seed_and_layer_and_leaves_what_was_captured_alone(before, after) -> None:
    kept = captured().kept
    assert (routing_of(shuffled_routing(kept, seed=1))["chosen"] == after["chosen"]).all()
    assert (routing_of(shuffled_routing(kept, seed=2))["chosen"] != after["chosen"]).any()
    assert (routing_of(shuffled_routing(kept, seed=1), 1)["chosen"] != after["chosen"]).any(), "layers move together"
    assert (routing_of(kept)["chosen"] == before["chosen"]).all()
    assert shuffled_routing(kept).n_visits(0, "select").tolist() == kept.n_visits(0, "select").tolist()


# --- labels -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fooled() -> pd.DataFrame:
    settings = {"experts": WITH_LABELS, "progress": False}
    return pd.concat([shuffled_labels(captured(), seed=seed, **settings).assign(seed=seed) for seed in range(3)])


def right(labels: pd.DataFrame) -> pd.Series:
    """Balanced accuracy of each label's rule, which is its AUROC, between visits and random tokens of validate."""
    items = make_items(captured().exemplars)
    items = items[items["negatives"].isin(("", "random"))]
    found = rule_answers(labels, items, captured().tokenized, progress=False)
    found = found.merge(items[["item", "negatives"]], on="item")
    yes = found.groupby(["layer", "expert", found["negatives"] == ""])["score"].mean().unstack() / 4
    return 0.5 + (yes[True] - yes[False]) / 2


@pytest.mark.slow
def test_shuffled_labels_do_not_hold_of_their_experts_and_real_ones_do(fooled) -> None:
    one = captured()
    real = lexical_labels(
        one.kept, one.tokenized, one.tokenizer, one.exemplars[:0], experts=WITH_LABELS, progress=False
    )
    assert right(real).min() > 0.85
    auroc = np.array([right(mine) for _, mine in fooled.groupby("seed")])
    assert auroc.shape == (3, len(WITH_LABELS))
    assert abs(auroc.mean() - 0.5) < 0.05
    assert np.median(np.abs(auroc - 0.5)) < 0.12
    merged = fooled.merge(real, on=["layer", "expert"], suffixes=("", "_real"))
    assert (merged["rule"] != merged["rule_real"]).all()
    assert (merged["n_exemplars"] == merged["n_exemplars_real"]).all(), "an expert lost tokens"


@pytest.mark.slow
def test_left_to_itself_the_labeller_keeps_silent_about_shuffled_routing(fooled) -> None:
    silent = shuffled_labels(captured(), experts=WITH_LABELS, seed=0, insist=False, progress=False)
    assert (silent["status"] == "ok").sum() <= 1
    assert list(fooled.columns) == [*LABEL_COLUMNS, "seed"]
    assert set(fooled["status"]) == {"ok"}
    own = fooled[fooled["seed"] == 0].reset_index(drop=True)
    assert ((own["why"] == "") == (silent["status"] == "ok")).all()
    assert set(fooled["labeller"]) == {"lexical"}
    assert not fooled["label"].str.contains("writes toward").any()


@pytest.mark.slow
def test_experts_are_chosen_and_do_not_change_each_other(fooled) -> None:
    own = fooled[(fooled["seed"] == 0)].drop(columns="seed").set_index(["layer", "expert"], drop=False)
    some = shuffled_labels(captured(), experts=[(1, 3), (1, 0)], seed=0, progress=False)
    pd.testing.assert_frame_equal(some.set_index(["layer", "expert"], drop=False), own.loc[[(1, 0), (1, 3)]])
    assert shuffled_labels(captured(), experts=[], progress=False).empty


# --- examples for a language model ------------------------------------------------------------------------------


def test_examples_change_owners_within_layer_and_kind_and_keep_their_marks() -> None:
    rows = exemplar_rows()
    found = shuffled_exemplars(rows, seed=3)
    select = rows[rows["split"] == "select"]
    own = ["layer", "expert", "split", "kind", "quantile", "score", "weight", "routed", "status"]
    pd.testing.assert_frame_equal(found[own], select[own])
    at = zip(found["text"], found["char_start"], found["char_end"], found["token"], strict=True)
    assert all(text[a:b] == token for text, a, b, token in at)
    place = ["layer", "kind", "document", "position", "token_id", "text"]
    same, places = (t[place].sort_values(place, ignore_index=True) for t in (found, select))
    pd.testing.assert_frame_equal(same, places)
    in_layer_0 = found["layer"] == 0
    stayed = found["document"].isin(select.loc[select["expert"] == 0, "document"])[in_layer_0 & (found["expert"] == 0)]
    assert 0.3 < stayed.mean() < 0.7, "two experts share the layer: half stay by chance"
    assert (shuffled_exemplars(rows, seed=4)["document"] != found["document"]).any()


@pytest.mark.usefixtures("api_key")
def test_a_language_model_labels_shuffled_examples(serve) -> None:
    rows = exemplar_rows()

    def behave(asked: Asked) -> Answer:
        return Answer(explanation(f"label {len(asked.last)}"))

    server = serve(behave)
    one = captured()
    tables: Any = Captured(one.tokenized, None, one.kept, rows, lens_rows(), 0)
    with Clients(base_url=server.url, cache=None, concurrency=4, timeout=10) as clients:
        settings = {"labeller": "openai:m", "clients": clients, "progress": False}
        found = shuffled_labels(tables, experts=EXPERTS[:3], **settings)
    assert found[["layer", "expert"]].to_numpy().tolist() == [list(at) for at in EXPERTS[:3]]
    assert set(found["status"]) == {"ok"}
    assert set(found["labeller"]) == {"openai:m"}
    positives = rows[rows["kind"].isin(POSITIVES) & (rows["split"] == "select")]
    owner = {f"d{document}": (a, b) for document, a, b in positives[["document", "layer", "expert"]].to_numpy()}
    for asked in server.asked:
        shown = Counter(owner.get(word) for word in asked.last.split())
        owners = {at for at in shown if at is not None}
        assert len(owners) == 2, "examples of one expert alone, or of another layer"
        assert not any(f"up{a}x{b}" in asked.last for a, b in EXPERTS), "what experts write is real"


@pytest.mark.usefixtures("api_key")
def test_a_server_that_answers_nothing_is_said_so(serve) -> None:
    server = serve(lambda asked: Answer.error(503))
    with Clients(base_url=server.url, cache=None, concurrency=4, timeout=10) as clients, pytest.raises(NoServer):
        shuffled_labels(captured(), experts=[(0, 0)], labeller="openai:m", clients=clients, progress=False)


def test_a_labeller_that_nobody_speaks_for_is_refused() -> None:
    with pytest.raises(BadConfig, match="clients="):
        shuffled_labels(captured(), labeller="openai:m")
    with pytest.raises(BadConfig, match="--labeller cannot be 'rule'"):
        shuffled_labels(captured(), labeller="rule")
