"""Where kept tokens stand in the corpus: their windows, their 32-token contexts, the characters of those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from moe_lens.capture.exemplars import CONTEXT, context_start
from moe_lens.errors import BadCorpus

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized


def starts(position: Int[ndarray, "row"], length: Int[ndarray, "row"]) -> Int[ndarray, "row"]:
    """`context_start` of arrays."""
    return context_start(torch.tensor(position), torch.tensor(length)).numpy()


class Contexts:
    """Contexts of tokens that are named by document, first character of the window and position in it."""

    def __init__(self, tokenized: Tokenized, tokenizer: Any) -> None:
        self.tokenized = tokenized
        self.tokenizer = tokenizer
        start = tokenized.char_start.astype(np.int64)
        never = np.iinfo(np.int64).max
        first_char = np.minimum.reduceat(np.where(start >= 0, start, never), tokenized.offsets[:-1])
        self._window = {
            at: w for w, at in enumerate(zip(tokenized.document.tolist(), first_char.tolist(), strict=True))
        }
        self._length = np.diff(tokenized.offsets)
        self._names: dict[int, str] = {}

    def locate(self, rows: pd.DataFrame) -> pd.DataFrame:
        """`rows` with the window's number, the token's place in its context (`focal`) and its `token_id`.

        Raises:
            BadCorpus: a row stands in a window that the corpus does not have.
        """
        places = zip(rows["document"].tolist(), rows["window_char"].tolist(), strict=True)
        window = np.array([self._window.get(at, -1) for at in places], np.int64)
        position = rows["position"].to_numpy(np.int64)
        if (window < 0).any() or (position >= self._length[window]).any():
            raise BadCorpus(
                "the exemplars were captured from other windows than these: tokenize with the same corpus, tokenizer "
                "and max_length as for the capture"
            )
        ids = self.tokenized.input_ids[self.tokenized.offsets[window] + position]
        return rows.assign(window=window, focal=position - starts(position, self._length[window]), token_id=ids)

    def texts(self, rows: pd.DataFrame, got: Bool[ndarray, "row context"]) -> pd.DataFrame:
        """The text columns of located rows; `got` says which tokens of each context the expert was routed."""
        first = (rows["position"] - rows["focal"]).to_numpy(np.int64)
        window = rows["window"].to_numpy(np.int64)
        length = np.minimum(CONTEXT, self._length[window] - first)
        first = first + self.tokenized.offsets[window]
        found = [
            self._text(*place, got[i])
            for i, place in enumerate(zip(rows["document"], first, length, rows["focal"], strict=True))
        ]
        names = ("text", "char_start", "char_end", "token_starts", "token_ends", "routed_tokens")
        columns = dict(zip(names, zip(*found, strict=True), strict=True)) if found else dict.fromkeys(names, ())
        frame = pd.DataFrame({name: list(column) for name, column in columns.items()}, index=rows.index)
        frame = frame.astype({"char_start": np.int64, "char_end": np.int64})  # no rows: no type to go by
        frame.insert(0, "token", [self.name(i) for i in rows["token_id"].tolist()])
        return frame

    def name(self, token_id: int) -> str:
        """What the tokenizer makes of one id."""
        if token_id not in self._names:
            self._names[token_id] = self.tokenizer.decode([token_id])
        return self._names[token_id]

    def _text(
        self, document: int, first: int, length: int, focal: int, got: Bool[ndarray, "context"]
    ) -> tuple[str, int, int, ndarray, ndarray, ndarray]:
        at = slice(first, first + length)
        start, end = self.tokenized.char_start[at].astype(np.int64), self.tokenized.char_end[at].astype(np.int64)
        real = start >= 0
        lowest, highest = start[real].min(), end[real].max()
        text = self.tokenized.corpus.documents[document].text[lowest:highest]
        start, end = np.where(real, start - lowest, -1), np.where(real, end - lowest, -1)
        return text, int(start[focal]), int(end[focal]), start, end, got[:length]
