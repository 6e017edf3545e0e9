"""Small tables to score, made by hand or by lot, and a captured corpus to make items from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import moe_lens as ml
from moe_lens.autointerp.exemplars import ExemplarCounts, exemplar_table
from moe_lens.autointerp.labels import label_frame
from moe_lens.autointerp.scoring.items import NEGATIVES
from moe_lens.autointerp.scoring.metrics import Scores, label_scores
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.capture.stream import stream
from moe_lens.corpus.batches import Tokenized, batches, tokenize
from moe_lens.models.lens import Lens
from tests.models import tiny

N_EXPERTS = 6


@dataclass(frozen=True)
class Captured:
    """Exemplars of a tiny model on byte soup, for which every window was kept."""

    tokenized: Tokenized
    kept: TopExemplars
    exemplars: pd.DataFrame

    def token(self, row: Any) -> int:
        """Where the corpus has the marked token of a row."""
        t = self.tokenized
        windows = np.flatnonzero(t.document == row.document)
        begins = [t.char_start[t.offsets[w] : t.offsets[w + 1]] for w in windows]
        (at,) = [w for w, start in zip(windows, begins, strict=True) if start[start >= 0].min() == row.window_char]
        return int(t.offsets[at]) + row.position

    def experts(self, layer: int) -> dict[tuple[int, int, int], set[int]]:
        """Experts of every token by document, first character of the window, and position."""
        names = ("document", "first_char", "length", f"chosen.{layer}")
        *place, chosen = (self.kept.windows.column(name).tolist() for name in names)
        places, chosen = zip(*place, strict=True), iter(chosen)
        return {(d, c, p): set(next(chosen)) for d, c, n in places for p in range(n)}


def captured(folder: Path) -> Captured:
    """Letters of one and two bytes in windows of 40 tokens, with a BOS before each."""
    lens = Lens(tiny.build("olmoe"), tiny.tokenizer(), name="tiny-olmoe")
    r = np.random.default_rng(0)
    texts = ["".join(r.choice(list("aaabbbcdeé 12"), 55)) for _ in range(40)]
    path = folder / "soup.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)))
    tokenized = tokenize(ml.corpus(str(path)), lens.tokenizer, [], max_length=40, add_bos=True)
    kept = TopExemplars(tokenized.splits, n_top=4, n_sample=30)
    with torch.no_grad():
        stream(lens, batches(tokenized, split=None, tokens_per_batch=512), [kept], progress=False)
    counts = ExemplarCounts(top=0, quantiles=2, per_quantile=5, random=8, negatives=15)
    explain = ExemplarCounts(top=4, quantiles=2, per_quantile=2, random=4)
    return Captured(tokenized, kept, exemplar_table(kept, tokenized, lens.tokenizer, explain=explain, score=counts))


@dataclass(frozen=True)
class Tables:
    """What `label_scores` takes."""

    items: pd.DataFrame
    answers: pd.DataFrame
    labels: pd.DataFrame
    baselines: pd.DataFrame

    def score(self, scorer_model: Mapping[str, str] | None = None, **settings: Any) -> Scores:
        return label_scores(self.items, self.answers, self.labels, self.baselines, scorer_model, **settings)

    def answered(self, **columns: Any) -> Tables:
        """The same items, answered otherwise."""
        return Tables(self.items, self.answers.assign(**columns), self.labels, self.baselines)

    def and_answered(self, **columns: Any) -> Tables:
        """Answered a second time, otherwise."""
        again = self.answered(**columns).answers
        return Tables(self.items, pd.concat([self.answers, again]), self.labels, self.baselines)


def tables(rows: Iterable[Mapping[str, Any]] | pd.DataFrame, scorer: str = "detection") -> Tables:
    """One item and answer per row; a row says what differs from: expert 0, a positive, in a document of its own."""
    given = pd.DataFrame(rows)
    empty: dict[str, Any] = {"layer": 0, "expert": 0, "negatives": "", "token_id": 7, "window_char": 0, "position": 1}
    empty |= {"document": np.arange(len(given)), "score": 0.0, "unigram": 0.5, "bigram": 0.5, "base_rate": 0.25}
    for name, value in empty.items():
        if name not in given:
            given[name] = value
    given["item"] = given["position"] = np.arange(len(given))
    columns = ["layer", "expert", "item", "negatives", "token_id", "document", "window_char", "position"]
    answers = given[["layer", "expert", "item", "score"]].assign(facet=0, scorer=scorer, control="none", outcome="ok")
    experts = given[["layer", "expert"]].drop_duplicates().to_dict("records")
    written = [{**at, "label": "a label", "labeller": "openai:m", "model_id": "m"} for at in experts]
    baselines = given[["item", "unigram", "bigram", "base_rate"]]
    return Tables(given[columns], answers, label_frame(written), baselines)


def drawn(seed: int, *, n_experts: int = 3, n_documents: int = 12, per_kind: int = 15) -> Tables:
    """Items of all kinds at random, graded a little better than by lot."""
    r = np.random.default_rng(seed)
    kinds = np.tile(np.repeat(["", *NEGATIVES], per_kind), n_experts)
    n = len(kinds)
    score = np.clip(r.integers(0, 5, n) + (kinds == ""), 0, 4).astype(np.float32)
    columns = {"expert": np.repeat(np.arange(n_experts), n // n_experts), "negatives": kinds, "score": score}
    columns |= {"document": r.integers(0, n_documents, n), "token_id": r.integers(0, 6, n)}
    columns |= {"unigram": r.integers(0, 4, n) / 4, "bigram": r.random(n)}
    return tables(pd.DataFrame(columns))
