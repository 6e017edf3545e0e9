"""``make_items(exemplars)``: what a judge of a label is asked, one marked token at a time (METRICS 1.6).

An item shows one token in its context and asks whether the label fits it. Only one token is marked, so that the
share of marked tokens gives nothing away. Positives were routed to the expert, negatives were not:

random      any token, at the natural rate, those that were routed left out
same_token  the token id of a positive: nothing that the id alone says can tell the two apart
near_miss   ranked next by the router, K+1 to 2K
other       a high score of another expert of the layer
moved       a positive's own context with the mark at another token (fuzzing)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from moe_lens.autointerp.exemplars import POSITIVES
from moe_lens.errors import BadConfig
from moe_lens.types import Split

MOVED = "moved"
NEGATIVES = ("random", "same_token", "near_miss", "other", MOVED)
"""Kinds of negatives, each scored by itself against the same positives."""
_EXPERT = ["layer", "expert"]
_CONTEXT = ["document", "window_char", "text"]


def make_items(exemplars: pd.DataFrame, *, n_per_kind: int | None = None, seed: int = 0) -> pd.DataFrame:
    """The validate rows of `exemplars` as items, one row each (METRICS 1.6).

    The columns of `exemplars`, and ``item`` (a number, unique in the table) and ``negatives``: the kind of negative,
    ``""`` for positives. A moved item has the place, characters and token of its new mark, and token_id -1.

    Args:
        exemplars: as from ``exemplar_table``; rows of the select split are left out, since labels come from them.
        n_per_kind: items of each kind per expert, all by default (see `sample_items`).
        seed: of where marks move, and of the sample. What an expert gets does not depend on which others are there.

    Raises:
        BadConfig: `n_per_kind` is below 1.

    Kinds are of equal size by construction: items do not show how often the expert is used.
    """
    rows = exemplars[exemplars["split"] == str(Split.VALIDATE)]
    positive = rows["kind"].isin(POSITIVES)
    rows = rows.assign(negatives=rows["kind"].str.removeprefix("negative_").mask(positive, ""))
    rows = rows[positive | ~rows["routed"]].reset_index(drop=True)
    parts = [rows[rows["negatives"] == kind] for kind in ("", *NEGATIVES[:-1])]
    moved = [_moved(mine, _rng(seed, at)) for at, mine in parts[0].groupby(_EXPERT)]
    items = pd.concat([*parts, *moved]).sort_values(_EXPERT, kind="stable", ignore_index=True)
    items["item"] = np.arange(len(items))
    return items if n_per_kind is None else sample_items(items, n_per_kind, seed=seed)


def sample_items(items: pd.DataFrame, n: int, *, seed: int = 0) -> pd.DataFrame:
    """At most `n` items of each kind per expert, drawn at random; they keep their numbers.

    same_token has only token ids of the positives that were drawn, since others cannot be matched with a positive;
    marks are moved in the contexts of these positives.

    Raises:
        BadConfig: `n` is below 1.
    """
    if n < 1:
        raise BadConfig(f"{n} items per kind and expert were asked for: give 1 or more")
    parts = [_sample(mine, n, _rng(seed, at)) for at, mine in items.groupby(_EXPERT)]
    return pd.concat(parts).sort_index() if parts else items


def _rng(seed: int, at: Any) -> np.random.Generator:
    layer, expert = at
    return np.random.default_rng([seed, int(layer), int(expert)])


def _sample(rows: pd.DataFrame, n: int, rng: np.random.Generator) -> pd.DataFrame:
    """Items of one expert, at most `n` of each kind."""
    kinds = {kind: rows[rows["negatives"] == kind] for kind in ("", *NEGATIVES)}
    kinds = {kind: mine.iloc[rng.permutation(len(mine))] for kind, mine in kinds.items()}
    positives = kinds[""][:n]
    kinds["same_token"] = same_ids(kinds["same_token"], positives)
    contexts = positives[_CONTEXT].drop_duplicates()
    moved = kinds[MOVED]
    kinds[MOVED] = moved[pd.MultiIndex.from_frame(moved[_CONTEXT]).isin(pd.MultiIndex.from_frame(contexts))]
    return pd.concat([mine[:n] for mine in kinds.values()])


def same_ids(rows: pd.DataFrame, others: pd.DataFrame, on: str = "token_id") -> pd.DataFrame:
    """`rows` in their order, at most as many of each id in the column `on` as `others` has."""
    wanted = rows[on].map(others[on].value_counts()).fillna(0)
    return rows[rows.groupby(on).cumcount() < wanted]


def _moved(positives: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Positives with the mark elsewhere; without those whose mark could go nowhere."""
    places = [_elsewhere(row, rng) for row in positives.itertuples()]
    kept = [i for i, place in enumerate(places) if place is not None]
    moved = positives.iloc[kept]
    position, start, end = np.array([places[i] for i in kept], np.int64).reshape(-1, 3).T
    text = zip(moved["text"], start, end, strict=True)
    return moved.assign(
        negatives=MOVED, routed=False, score=0.0, weight=0.0, quantile=np.nan, position=position, token_id=-1,
        char_start=start, char_end=end, token=[whole[a:b] for whole, a, b in text],
    )  # fmt: skip


def _elsewhere(row: Any, rng: np.random.Generator) -> tuple[int, int, int] | None:
    """Position and characters of a random token of the context that could be marked instead.

    Not one that was routed, nor a special token, nor one that shares characters with the marked one, nor the first
    of the window, of which no statistic is taken. None where there is no such token, or where several tokens have
    the marked characters, so that it is not certain which one was marked.
    """
    starts, ends = np.asarray(row.token_starts), np.asarray(row.token_ends)
    focal = np.flatnonzero((starts == row.char_start) & (ends == row.char_end))
    if len(focal) != 1:
        return None
    first = row.position - int(focal[0])
    apart = (ends <= row.char_start) | (starts >= row.char_end)
    fits = ~np.asarray(row.routed_tokens, bool) & (starts >= 0) & (ends > starts) & apart
    if first == 0:
        fits[np.flatnonzero(starts >= 0)[0]] = False
    places = np.flatnonzero(fits)
    if not len(places):
        return None
    at = int(rng.choice(places))
    return first + at, int(starts[at]), int(ends[at])
