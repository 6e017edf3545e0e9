"""One document's tokens: comparable character spans, windows, special tokens, concept bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.corpus.tagging import Tagger
from moe_lens.corpus.text import Corpus, Document
from moe_lens.errors import UnsupportedModel

if TYPE_CHECKING:
    from jaxtyping import Bool, Int, UInt8
    from numpy import ndarray

_CHUNK = 64
"""Documents tokenised at a time."""


@dataclass(frozen=True)
class Windows:
    """The windows of one document."""

    input_ids: Int[ndarray, "token"]
    char_start: Int[ndarray, "token"]
    char_end: Int[ndarray, "token"]
    eligible: Bool[ndarray, "token"]
    packed: UInt8[ndarray, "token byte"]
    lengths: Int[ndarray, "window"]
    in_scope: Bool[ndarray, "concept"]

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class WindowBuilder:
    """Turns one tokenised document into labelled windows."""

    tagger: Tagger
    room: int
    """Text tokens of a window."""
    before: list[int]
    after: list[int]
    special_ids: frozenset[int]
    most: int | None = None
    """Tokens taken from the start of a document, all by default."""

    def build(self, document: Document, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Windows:
        """Windows of a document that was tokenised whole, without special tokens."""
        token = np.array(ids[: self.most], np.int64)
        start, end = whole_spans(document.text, np.array(spans[: self.most], np.int64).reshape(-1, 2))
        cut = self.most is not None and len(token) < len(ids)
        tags = self.tagger.tag(document, until=int(end.max(initial=0)) if cut else None)
        special = np.isin(token, list(self.special_ids))
        start[special], end[special] = -1, -1
        packed = np.packbits(tags.token_bits(start, end), axis=1)
        bounds = window_bounds(start, end, self.room)
        # a window's arrays, special tokens around it; -1 in `at` means a special token added here
        front, back = len(self.before), len(self.after)
        at = [np.r_[np.full(front, -1), np.arange(a, b), np.full(back, -1)] for a, b in bounds if b - a > 1]
        if not at:
            return self._nothing(packed.shape[1], tags.in_scope)
        index = np.concatenate(at)
        lengths = np.array([len(w) for w in at])
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        added = index < 0
        input_ids = token[index]
        around = np.concatenate([np.r_[self.before, np.zeros(n - front - back), self.after] for n in lengths])
        input_ids[added] = around[added].astype(np.int64)
        char_start, char_end, bits = start[index], end[index], packed[index]
        char_start[added], char_end[added], bits[added] = -1, -1, 0
        eligible = char_start >= 0
        eligible[first + front] = False
        return Windows(
            input_ids.astype(np.int32), char_start.astype(np.int32), char_end.astype(np.int32),
            eligible, bits, lengths, tags.in_scope,
        )  # fmt: skip

    @staticmethod
    def _nothing(width: int, in_scope: Bool[ndarray, "concept"]) -> Windows:
        none = np.zeros(0, np.int32)
        return Windows(none, none, none, none.astype(bool), np.zeros((0, width), np.uint8), none, in_scope)


def document_windows(
    corpus: Corpus, tokenizer: Any, order: Sequence[int], builder: WindowBuilder
) -> Iterator[tuple[int, Windows]]:
    """(document index, its windows) in the given order."""
    for at in range(0, len(order), _CHUNK):
        chunk = order[at : at + _CHUNK]
        coded = tokenizer(
            [corpus.documents[i].text for i in chunk],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        for i, ids, spans in zip(chunk, coded["input_ids"], coded["offset_mapping"], strict=True):
            yield i, builder.build(corpus.documents[i], ids, spans)


def whole_spans(text: str, spans: Int[ndarray, "token 2"]) -> tuple[Int[ndarray, "token"], Int[ndarray, "token"]]:
    """Start and end of each token; blanks that trimmed offsets leave out go to the token after them.

    Some byte-level tokenizers report " the" as [1, 4), some as [0, 4): left alone, the same text would have
    other ``contains_whitespace`` tokens in the MoE than in its dense baseline.
    """
    start, end = spans[:, 0].copy(), spans[:, 1].copy()
    if not len(start):
        return start, end
    reached = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
    gap = np.flatnonzero(start > reached)
    for i in gap.tolist():
        if text[reached[i] : start[i]].isspace():
            start[i] = reached[i]
    return start, end


def window_bounds(start: Int[ndarray, "token"], end: Int[ndarray, "token"], room: int) -> list[tuple[int, int]]:
    """Successive windows of at most `room` tokens; a cut inside a character moves to the character's start."""
    n, a, out = len(start), 0, []
    while a < n:
        b = min(a + room, n)
        cut = b
        while a < cut < n and start[cut] >= 0 and start[cut] < end[cut - 1]:
            cut -= 1
        b = cut if cut > a else b
        out.append((a, b))
        a = b
    return out


def require_offsets(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot say which characters a token stands for.

    Raises:
        UnsupportedModel: it is written in Python (a "slow" one), which transformers gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} reports no character offsets, which concept labels need: "
            "use the model's fast tokenizer (a tokenizer.json beside the weights)"
        )


def added_specials(tokenizer: Any, add_bos: bool) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    before, after = full[:at], full[at + len(bare) :]
    bos = tokenizer.bos_token_id
    if add_bos and bos is not None and bos not in before:
        before = [bos, *before]
    return list(before), list(after)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that are never text. The unknown token stands for text, unless it doubles as BOS, EOS or PAD."""
    ids = set(tokenizer.all_special_ids)
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = tokenizer.unk_token_id
    return frozenset(ids - ({unknown} - roles))
