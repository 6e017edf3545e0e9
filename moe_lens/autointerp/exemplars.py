"""``exemplar_table(...)``: the tokens that explain an expert, and those that test an explanation.

1. Positives, tokens that the expert was routed: its highest scores, random visits, and visits from every
   stratum of the score (``capture.exemplars.TopExemplars``). A token stands under one kind: the highest scores
   take first, then the random draw, then the strata.
2. Negatives, from the same split: four kinds (METRICS 1.6), for each expert a draw of its own.
3. Each token in its 32-token context, with the characters it covers.

Rows of the select split explain, rows of the validate split score: a document is in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.autointerp.contexts import Contexts, starts
from moe_lens.capture.exemplars import CONTEXT, SPLITS, TopExemplars
from moe_lens.corpus.splits import code_of
from moe_lens.errors import BadConfig
from moe_lens.types import Split, Status

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized

POSITIVES = ("top", "quantile", "random")
NEGATIVES = ("negative_random", "negative_same_token", "negative_near_miss", "negative_other")
COLUMNS = (
    "layer", "expert", "split", "kind", "quantile", "score", "weight", "routed", "document", "window_char", "position",
    "token_id", "token", "text", "char_start", "char_end", "token_starts", "token_ends", "routed_tokens", "status",
)  # fmt: skip


@dataclass(frozen=True)
class ExemplarCounts:
    """How many tokens of each kind an expert is given, per split."""

    top: int = 20
    """Highest scores."""
    quantiles: int = 4
    """Strata of the score."""
    per_quantile: int = 5
    """Visits from each stratum."""
    random: int = 20
    """Visits at random."""
    negatives: int = 20
    """Tokens of each kind of negative."""

    @property
    def positives(self) -> int:
        return self.top + self.quantiles * self.per_quantile + self.random


EXPLAIN = ExemplarCounts()
"""What an expert is explained from."""
SCORE = ExemplarCounts(top=0, negatives=40)
"""What a label is scored on: visits at random and from every stratum of the score, the highest among them."""


def exemplar_table(
    kept: TopExemplars,
    tokenized: Tokenized,
    tokenizer: Any,
    *,
    explain: ExemplarCounts = EXPLAIN,
    score: ExemplarCounts = SCORE,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Exemplars and negatives of every expert, one row per token (METRICS 1.6).

    Columns
        ``layer, expert, split``, and ``kind``: top | quantile | random | negative_random (any token at the natural
        rate, some of them routed) | negative_same_token (the token id of an exemplar, not routed; no more of an
        id than the exemplars have) | negative_near_miss (ranked K+1 to 2K by the router) | negative_other (among
        the highest scores of another expert of the layer, not routed to this one).
        ``score`` (``weight * ||output||``) and router ``weight``: 0 if not routed, NaN for a routed
        negative_random. ``quantile`` of the score among the expert's visits: exact for kind top, else estimated
        from its random visits, NaN for negatives. ``routed``: whether the expert got the token.
        ``document``, ``window_char`` (first character of the model's window), ``position`` (token in that window),
        ``token_id``, ``token``; ``text`` (a context of up to 32 tokens), ``char_start`` and ``char_end`` of the token
        in it. Lists over the tokens of the context: ``token_starts, token_ends`` (characters in `text`, -1 for
        special tokens) and ``routed_tokens`` (which of them the expert got).
        ``status``: too_few if the expert had fewer visits in the split than exemplars were asked for; it then has
        fewer rows. An expert without a visit has negatives only.

    Args:
        kept: filled from batches of `tokenized`.
        explain: tokens of the select split, per expert.
        score: tokens of the validate split, per expert.
        layers: all that were captured by default.
        seed: of the draws of negatives.

    Raises:
        BadConfig: more exemplars are asked for than `kept` keeps, or no stratum.
        BadCorpus: `kept` saw other windows than those of `tokenized`.
        OutOfRange: a layer that was not captured.
    """
    for counts in (explain, score):
        if counts.top > kept.n_top or counts.positives - counts.top > kept.n_sample or counts.quantiles < 1:
            raise BadConfig(
                f"{counts} does not go with n_top={kept.n_top} and n_sample={kept.n_sample} of the capture: ask for at "
                "most that many high scores, that many random and quantile visits together, and one stratum or more"
            )
    contexts = Contexts(tokenized, tokenizer)
    frames = []
    for layer in kept.check_layers(layers):
        for split, counts in zip(SPLITS, (explain, score), strict=True):
            rows, chosen = _Side(kept, layer, split, contexts).draw(counts, seed)
            got = (chosen == rows["expert"].to_numpy(np.int64)[:, None, None]).any(2)
            frames.append(pd.concat([rows, contexts.texts(rows, got)], axis=1))
    if not frames:
        return pd.DataFrame(columns=list(COLUMNS))
    status = exemplar_status(kept, explain=explain, score=score).drop(columns="n_visits")
    table = pd.concat(frames, ignore_index=True).merge(status, how="left", on=["layer", "expert", "split"])
    return _sorted(table)[list(COLUMNS)]


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    order = {name: i for i, name in enumerate((*POSITIVES, *NEGATIVES))}
    best_first = -table["score"].where(table["kind"] == "top", 0)
    table = table.assign(by_kind=table["kind"].map(order), best_first=best_first)
    keys = ["layer", "expert", "split", "by_kind", "best_first", "document", "window_char", "position"]
    return table.sort_values(keys, ignore_index=True)


def exemplar_status(
    kept: TopExemplars, *, explain: ExemplarCounts = EXPLAIN, score: ExemplarCounts = SCORE
) -> pd.DataFrame:
    """Every captured expert and split, with its eligible visits ``n_visits`` and a status (ok | too_few)."""
    frames = []
    for layer in kept.layers:
        for split, counts in zip(SPLITS, (explain, score), strict=True):
            n = kept.n_visits(layer, split).numpy()
            status = np.where(n < counts.positives, str(Status.TOO_FEW), str(Status.OK))
            columns = {"layer": layer, "expert": np.arange(len(n)), "split": str(split), "n_visits": n}
            frames.append(pd.DataFrame({**columns, "status": status}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["layer", "expert", "split"])


class _Side:
    """One layer and split: its kept visits, its sampled tokens, and what is drawn from them."""

    def __init__(self, kept: TopExemplars, layer: int, split: Split, contexts: Contexts) -> None:
        self.layer, self.split, self.n_top = layer, split, kept.n_top
        self.n_visits = kept.n_visits(layer, split).numpy()
        self.tokens = _SampledTokens(kept, layer, split, contexts)
        visits = kept.visits(layer, split)
        by_score, by_key = kept.places(layer, split)
        names = ("expert", "key", "score", "weight", "document", "position")
        frame = pd.DataFrame({name: getattr(visits, name).numpy() for name in names})
        frame["window_char"] = visits.first_char.numpy()
        frame["by_score"], frame["sampled"] = by_score.numpy(), by_key.numpy() < kept.n_sample
        self.visits = contexts.locate(frame)
        self.chosen = visits.experts.numpy()
        """Experts of every token of the contexts of `visits`."""

    def draw(self, counts: ExemplarCounts, seed: int) -> tuple[pd.DataFrame, Int[ndarray, "row context slot"]]:
        """Every row of the table but for its text, and the experts of the tokens in its context."""
        positives = self._positives(counts)
        frames, chosen = [positives], [self.chosen[positives["row"]]]
        for expert in range(len(self.n_visits)):
            rng = np.random.default_rng([seed, self.layer, code_of(self.split), expert])
            ids = positives["token_id"].to_numpy()[positives["expert"] == expert]
            for kind, at in self.tokens.negatives(expert, ids, counts.negatives, rng):
                frames.append(self.tokens.frame(at).assign(expert=expert, kind=kind))
                chosen.append(self.tokens.chosen_around(at))
            others = self._others(expert, counts, rng)
            frames.append(others.assign(expert=expert, kind="negative_other"))
            chosen.append(self.chosen[others["row"]])
        rows, around = pd.concat(frames, ignore_index=True), np.concatenate(chosen)
        focal = around[np.arange(len(rows)), rows["focal"].to_numpy(np.int64)]
        routed = (focal == rows["expert"].to_numpy(np.int64)[:, None]).any(1)
        for name in ("score", "weight"):
            rows[name] = rows[name].where(rows["kind"].isin(POSITIVES), np.where(routed, np.nan, 0.0))
        return rows.assign(routed=routed, layer=self.layer, split=str(self.split)), around

    def _positives(self, counts: ExemplarCounts) -> pd.DataFrame:
        v = self.visits.assign(row=np.arange(len(self.visits)))
        top, sample = v[v["by_score"] < counts.top], v[v["sampled"]]
        by_expert = sample.groupby("expert")["score"]
        sample = sample.assign(quantile=(by_expert.rank(method="first") - 0.5) / by_expert.transform("size"))
        sample = sample[sample["by_score"] >= counts.top]
        at_random = sample.groupby("expert").cumcount() < counts.random
        rest = sample[~at_random]
        stratum = (rest["quantile"] * counts.quantiles).astype(int).rename("stratum")
        spread = rest[rest.groupby([rest["expert"], stratum]).cumcount() < counts.per_quantile]
        share = 1 - (top["by_score"] + 0.5) / self.n_visits[top["expert"].to_numpy(np.int64)]
        kinds = (top.assign(quantile=share), spread, sample[at_random])
        return pd.concat([part.assign(kind=kind) for kind, part in zip(POSITIVES, kinds, strict=True)])

    def _others(self, expert: int, counts: ExemplarCounts, rng: np.random.Generator) -> pd.DataFrame:
        """High scores of other experts that did not go to this one; a token once, whoever else it scores with."""
        v = self.visits.assign(row=np.arange(len(self.visits)), quantile=np.nan)
        v = v[v["by_score"] < self.n_top]
        focal = self.chosen[v["row"], v["focal"]]
        v = v[~(focal == expert).any(1)].drop_duplicates("key")
        return v.iloc[rng.permutation(len(v))[: counts.negatives]]


class _SampledTokens:
    """Tokens of the sampled windows of one split, with the routing of one layer."""

    def __init__(self, kept: TopExemplars, layer: int, split: Split, contexts: Contexts) -> None:
        sample, code = kept.windows, code_of(split)
        windows = (sample.column("split") == code).numpy()
        length = sample.column("length").numpy()
        tokens = np.repeat(windows, length)
        self.length = np.repeat(length[windows], length[windows])
        first = np.repeat(np.cumsum(length[windows]) - length[windows], length[windows])
        self.position = np.arange(len(first)) - first
        self.chosen, self.passed = (sample.column(f"{name}.{layer}").numpy()[tokens] for name in ("chosen", "passed"))
        self.input_ids = sample.column("input_ids").numpy()[tokens]
        self.eligible = np.flatnonzero(sample.column("eligible").numpy()[tokens])
        self._document = np.repeat(sample.column("document").numpy()[windows], length[windows])
        self._window_char = np.repeat(sample.column("first_char").numpy()[windows], length[windows])
        self._contexts = contexts

    def negatives(
        self, expert: int, ids: Int[ndarray, "exemplar"], n: int, rng: np.random.Generator
    ) -> Iterator[tuple[str, Int[ndarray, "row"]]]:
        """Kind and token numbers of the negatives of one expert; `ids` are the token ids of its exemplars."""
        mixed = rng.permutation(self.eligible)
        yield "negative_random", mixed[:n]
        not_routed = mixed[~(self.chosen[mixed] == expert).any(1)]
        same = not_routed[np.isin(self.input_ids[not_routed], ids)]
        seen = pd.Series(self.input_ids[same])
        wanted = seen.map(pd.Series(ids).value_counts()).to_numpy()
        yield "negative_same_token", same[(seen.groupby(seen).cumcount() < wanted).to_numpy()][:n]
        yield "negative_near_miss", mixed[(self.passed[mixed] == expert).any(1)][:n]

    def frame(self, at: Int[ndarray, "row"]) -> pd.DataFrame:
        """Where the tokens `at` stand."""
        places = {"document": self._document[at], "window_char": self._window_char[at], "position": self.position[at]}
        rows = self._contexts.locate(pd.DataFrame(places))
        return rows.assign(quantile=np.nan, score=np.nan, weight=np.nan)

    def chosen_around(self, at: Int[ndarray, "row"]) -> Int[ndarray, "row context slot"]:
        """Experts of the tokens in the contexts of the tokens `at`."""
        start = starts(self.position[at], self.length[at])
        near = start[:, None] + np.arange(CONTEXT)
        flat = (at - self.position[at])[:, None] + np.minimum(near, self.length[at, None] - 1)
        return np.where((near < self.length[at, None])[..., None], self.chosen[flat], np.iinfo(self.chosen.dtype).max)
