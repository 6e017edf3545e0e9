"""``Baselines``: how well the token id, or two of them, foretells routing (METRICS 1.6).

    unigram(t)    = (n(t routed)    + m * base rate)  / (n(t)    + m)
    bigram(p, t)  = (n(p t routed)  + m * unigram(t)) / (n(p t)  + m)

over the eligible tokens of the windows that ``TopExemplars`` kept of the select split: t is the token, p the one before
it in its window. A label that does no better than these says no more than "these tokens" or "these pairs of tokens".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.autointerp.contexts import Contexts
from moe_lens.corpus.splits import code_of
from moe_lens.errors import BadCorpus, OutOfRange
from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from moe_lens.capture.exemplars import TopExemplars
    from moe_lens.corpus.batches import Tokenized


@dataclass(frozen=True)
class Baselines:
    """Tokens of the select split with their routing. Counts are made when they are asked for: only those needed."""

    token_id: Int[ndarray, "token"]
    """Eligible tokens."""
    previous: Int[ndarray, "token"]
    """Id of the token before, in the same window."""
    chosen: Mapping[int, Int[ndarray, "token slot"]]
    """Per layer the experts of every token; numbers from `n_experts` on are empty slots."""
    n_experts: Mapping[int, int]
    strength: float = 1.0
    """m: how many tokens the rate counts for that a rare token or pair falls back to. On the bundled model both
    baselines are at their best near 1."""

    @classmethod
    def fit(cls, kept: TopExemplars, tokenized: Tokenized, *, strength: float = 1.0) -> Baselines:
        """From the windows of the select split that `kept` holds.

        Raises:
            BadCorpus: there are none, or they are not windows of `tokenized`.
        """
        windows = kept.windows
        mine = windows.column("split").numpy() == code_of(Split.SELECT) if windows.parts else np.zeros(0, bool)
        if not mine.any():
            raise BadCorpus(
                "no window of the select split was kept, so there is nothing to fit a baseline on: capture more text, "
                "or keep more window_tokens"
            )
        document, first_char, length = (windows.column(name).numpy() for name in ("document", "first_char", "length"))
        ends = pd.DataFrame({"document": document, "window_char": first_char, "position": length - 1})
        Contexts(tokenized, None).locate(ends)  # refuses other windows than those
        ids = windows.column("input_ids").numpy().astype(np.int64)
        used = np.repeat(mine, length) & windows.column("eligible").numpy()
        chosen = {layer: windows.column(f"chosen.{layer}").numpy()[used] for layer in kept.layers}
        n_experts = {layer: len(kept.n_visits(layer, Split.SELECT)) for layer in kept.layers}
        # the first token of a window is never eligible, so no pair crosses windows
        return cls(ids[used], np.roll(ids, 1)[used], chosen, n_experts, strength)

    def base_rate(self, layer: int) -> Float[ndarray, "expert"]:
        """Share of the tokens that each expert was routed.

        Raises:
            OutOfRange: a layer that was not captured.
        """
        n = self._n_experts(layer)
        visits = np.bincount(self.chosen[layer].reshape(-1), minlength=n)[:n]
        return visits / len(self.token_id)

    def scores(self, items: pd.DataFrame, tokenized: Tokenized) -> pd.DataFrame:
        """Columns ``item, unigram, bigram`` (rates of the item's expert) and ``base_rate``, a row for each item.

        Args:
            items: as from ``make_items``.
            tokenized: what the items were captured from.

        Raises:
            BadCorpus: the items were captured from other windows than those of `tokenized`.
            OutOfRange: a layer that was not captured.

        A rare token or pair has a rate near the one it falls back to. The rates do not show what a longer context
        foretells; that is what a label is asked to add.
        """
        found = Contexts(tokenized, None).locate(items)
        position = found["position"].to_numpy(np.int64)
        at = tokenized.offsets[found["window"]] + position
        ids = tokenized.input_ids[at].astype(np.int64)
        before = np.where(position > 0, tokenized.input_ids[at - 1], -1).astype(np.int64)
        expert, layers = found["expert"].to_numpy(np.int64), found["layer"].to_numpy(np.int64)
        rates = np.full((3, len(found)), np.nan)
        for layer in np.unique(layers).tolist():
            mine = np.flatnonzero(layers == layer)
            rates[:, mine] = self._rates(layer, expert[mine], ids[mine], before[mine])
        names = ("unigram", "bigram", "base_rate")
        return pd.DataFrame({"item": found["item"].to_numpy(), **dict(zip(names, rates, strict=True))})

    def _rates(
        self, layer: int, expert: Int[ndarray, "row"], ids: Int[ndarray, "row"], before: Int[ndarray, "row"]
    ) -> tuple[Float[ndarray, "row"], Float[ndarray, "row"], Float[ndarray, "row"]]:
        """Unigram, bigram and base rate."""
        base = self.base_rate(layer)[expert]
        unigram = self._smoothed(layer, expert, self.token_id, ids, base)
        pairs = _pairs(before, ids), _pairs(self.previous, self.token_id)
        return unigram, self._smoothed(layer, expert, pairs[1], pairs[0], unigram), base

    def _smoothed(
        self,
        layer: int,
        expert: Int[ndarray, "row"],
        seen: Int[ndarray, "token"],
        wanted: Int[ndarray, "row"],
        fallback: Float[ndarray, "row"],
    ) -> Float[ndarray, "row"]:
        """Share of the tokens like `wanted` that `expert` was routed, drawn towards `fallback`."""
        n = self._n_experts(layer)
        values, row = np.unique(wanted, return_inverse=True)
        place = np.minimum(np.searchsorted(values, seen), len(values) - 1)
        known = values[place] == seen
        place, chosen = place[known], self.chosen[layer][known].astype(np.int64)
        total = np.bincount(place, minlength=len(values))
        visited, hits = np.unique((place[:, None] * n + chosen)[chosen < n], return_counts=True)
        key = row * n + expert
        at = np.minimum(np.searchsorted(visited, key), max(len(visited) - 1, 0))
        routed = np.where(visited[at] == key, hits[at], 0) if len(visited) else np.zeros(len(key))
        return (routed + self.strength * fallback) / (total[row] + self.strength)

    def _n_experts(self, layer: int) -> int:
        if layer not in self.n_experts:
            raise OutOfRange(f"layer {layer} was not captured: choose from {', '.join(map(str, self.n_experts))}")
        return self.n_experts[layer]


def _pairs(first: Int[ndarray, "row"], second: Int[ndarray, "row"]) -> Int[ndarray, "row"]:
    """One number for two ids below 2**31; -1 stands for no id."""
    return ((first.astype(np.int64) + 1) << 31) | second
