"""Tokenised corpora and labelled batches: ``tokenize(...) -> Tokenized``, ``batches(...) -> Batches``.

1. Conversations are rendered with the tokenizer's chat template (`moe_lens.corpus.chat`). Documents are tokenised
   whole, with character offsets, without special tokens beside those that a template writes.
2. Token spans are made comparable between tokenizers: a blank that trimmed offsets leave out belongs to
   the token after it.
3. Concept spans become token bits (`moe_lens.corpus.tagging`).
4. Token sequences are cut into windows, never inside a character, and special tokens are added.
5. Windows are kept flat, one after the other; batches pad and unpack them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.corpus.chat import rendered
from moe_lens.corpus.concepts import Concept
from moe_lens.corpus.splits import SPLITS, assign_splits, code_of, domain_order
from moe_lens.corpus.tagging import Tagger
from moe_lens.corpus.text import Corpus
from moe_lens.corpus.windows import (
    WindowBuilder,
    Windows,
    added_specials,
    document_windows,
    require_offsets,
    special_ids,
)
from moe_lens.errors import BadConfig, BadCorpus
from moe_lens.types import Granularity, Split, TokenBatch

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Int, UInt8
    from numpy import ndarray


@dataclass(frozen=True)
class Tokenized:
    """All windows of a corpus, flat: window ``w`` is ``offsets[w]:offsets[w + 1]`` of every token array."""

    corpus: Corpus
    """What was tokenised; its conversations are in this tokenizer's chat template."""
    concepts: tuple[Concept, ...]
    """Granularities filled in."""
    splits: Int[ndarray, "document"]
    """Split code of every document of the corpus, 0 select, 1 validate, 2 test."""
    pad_id: int
    max_length: int
    offsets: Int[ndarray, "window+1"]
    document: Int[ndarray, "window"]
    input_ids: Int[ndarray, "token"]
    char_start: Int[ndarray, "token"]
    """-1 on special tokens."""
    char_end: Int[ndarray, "token"]
    eligible: Bool[ndarray, "token"]
    """False on special tokens and on the first token of every window, whether or not a BOS precedes it."""
    packed_labels: UInt8[ndarray, "token byte"]
    """Concept bits, `np.packbits` along the concepts."""
    in_scope: Bool[ndarray, "window concept"]

    def __len__(self) -> int:
        return len(self.document)

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows, special ones included."""
        return len(self.input_ids)

    @cached_property
    def window_split(self) -> Int[ndarray, "window"]:
        """Split code of every window."""
        return self.splits[self.document]

    @cached_property
    def window_of(self) -> Int[ndarray, "token"]:
        """Window of every token."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @cached_property
    def document_lengths(self) -> Int[ndarray, "document"]:
        """Tokens read of every document of the corpus, special ones included."""
        return np.bincount(self.document, np.diff(self.offsets), len(self.corpus)).astype(np.int64)

    def labels(self, start: int = 0, stop: int | None = None) -> Bool[ndarray, "token concept"]:
        """Concept bits of tokens ``start:stop``."""
        bits = np.unpackbits(self.packed_labels[start:stop], axis=1, count=len(self.concepts))
        return bits.view(bool)

    def label(self, concept: int) -> Bool[ndarray, "token"]:
        """Bits of one concept, False out of scope."""
        return (self.packed_labels[:, concept >> 3] >> (7 - (concept & 7)) & 1).astype(bool)

    def counts(self) -> pd.DataFrame:
        """Eligible tokens per concept and split: ``positives``, ``tokens`` in scope, ``documents`` with positives."""
        import pandas as pd

        code = self.window_split[self.window_of]
        doc = self.document[self.window_of]
        rows = []
        for c, concept in enumerate(self.concepts):
            seen = self.eligible & self.in_scope[self.window_of, c]
            hit = seen & self.label(c)
            tokens = np.bincount(code[seen], minlength=3)
            positives = np.bincount(code[hit], minlength=3)
            with_hit = np.bincount(self.splits[np.unique(doc[hit])], minlength=3)
            for k, split in enumerate(SPLITS):
                numbers = int(positives[k]), int(tokens[k]), int(with_hit[k])
                rows.append((concept.name, concept.category, str(concept.granularity), str(split), *numbers))
        columns = ["concept", "category", "granularity", "split", "positives", "tokens", "documents"]
        return pd.DataFrame(rows, columns=columns)

    def _repr_html_(self) -> str:
        from html import escape

        head = f"{self.n_tokens:,} tokens in {len(self):,} windows, {len(self.concepts)} concepts"
        return f"<b>{escape(self.corpus.name)}</b>: {head}{self.counts().head(12).to_html(index=False)}"


def tokenize(
    corpus: Corpus,
    tokenizer: Any,
    concepts: Sequence[Concept],
    *,
    splits: Int[ndarray, "document"] | None = None,
    max_length: int = 256,
    limit_tokens: int | None = None,
    document_tokens: int | None = None,
    documents: Sequence[int] | None = None,
    add_bos: bool = False,
    seed: int = 0,
) -> Tokenized:
    """Tokenise and label a corpus.

    Args:
        tokenizer: a fast Hugging Face tokenizer (labels need its character offsets).
        splits: split code per document, default `assign_splits(corpus, seed=seed)`.
        max_length: tokens of a window, special ones included.
        limit_tokens: stop at this many tokens. Whole documents, one from each domain and split in turn; a larger
            limit only adds documents. At least one document is always taken.
        document_tokens: read at most this many tokens of each document. Tokens of one document are alike, so many
            short documents tell more than a few long ones.
        documents: take only these documents (for a second model that must read what the first one read).
        add_bos: put a BOS before each window also where the tokenizer itself adds none but has one.
        seed: of the split, and of the order in which `limit_tokens` takes documents.

    Raises:
        UnsupportedModel: the tokenizer reports no character offsets.
        BadConfig: `max_length` leaves no room for text, or a limit is too small.
        BadCorpus: no document yields two tokens, or the chat template refuses a conversation.
    """
    require_offsets(tokenizer)
    before, after = added_specials(tokenizer, add_bos)
    room = max_length - len(before) - len(after)
    if room < 2:
        raise BadConfig(
            f"max_length={max_length} leaves no room for text: give at least {len(before) + len(after) + 2}"
        )
    if document_tokens is not None and document_tokens < 2:
        raise BadConfig(f"document_tokens={document_tokens}: give 2 or more, the first token of a text is never scored")
    if limit_tokens is not None and limit_tokens < 1:
        raise BadConfig(f"limit_tokens={limit_tokens}: give a positive number of tokens")
    codes = assign_splits(corpus, seed=seed) if splits is None else np.asarray(splits)
    order = list(range(len(corpus))) if limit_tokens is None else domain_order(corpus, seed=seed, codes=codes.tolist())
    if documents is not None:
        wanted = set(documents)
        order = [i for i in order if i in wanted]
    corpus = rendered(corpus, tokenizer, order, bos=tokenizer.bos_token if tokenizer.bos_token_id in before else "")
    builder = WindowBuilder(Tagger(concepts), room, before, after, special_ids(tokenizer), document_tokens)
    taken: dict[int, Windows] = {}
    total = 0
    for i, windows in document_windows(corpus, tokenizer, order, builder):
        if limit_tokens is not None and taken and total + windows.n_tokens > limit_tokens:
            break
        if windows.n_tokens:
            taken[i] = windows
            total += windows.n_tokens
    if not taken:
        raise BadCorpus(f"{corpus.name}: no document is longer than one token, so there is nothing to probe")
    whole = _joined(corpus, tuple(concepts), codes.astype(np.int8), _pad_id(tokenizer), max_length, taken)
    return replace(whole, concepts=_detected(whole))


def _pad_id(tokenizer: Any) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id or 0)  # any id will do, padding is masked


def _joined(
    corpus: Corpus,
    concepts: tuple[Concept, ...],
    codes: Int[ndarray, "document"],
    pad_id: int,
    max_length: int,
    taken: dict[int, Windows],
) -> Tokenized:
    """Windows of all documents, in the order of the corpus."""
    order = sorted(taken)
    done = [taken[i] for i in order]
    per_document = [len(w.lengths) for w in done]
    return Tokenized(
        corpus,
        concepts,
        codes,
        pad_id,
        max_length,
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([w.lengths for w in done]))]),
        document=np.repeat(np.array(order, np.int64), per_document),
        input_ids=np.concatenate([w.input_ids for w in done]),
        char_start=np.concatenate([w.char_start for w in done]),
        char_end=np.concatenate([w.char_end for w in done]),
        eligible=np.concatenate([w.eligible for w in done]),
        packed_labels=np.concatenate([w.packed for w in done]),
        in_scope=np.repeat(np.stack([w.in_scope for w in done]), per_document, axis=0),
    )


def _detected(tokenized: Tokenized) -> tuple[Concept, ...]:
    """Concepts with granularity; ``type`` iff the token decides the label, 99 % of the time.

    Over tokens that occur at least twice: guessing each token's more frequent label may be wrong for at most
    1 % of the rarer class (1 % of all occurrences would call every rare concept a type).
    """
    if all(c.granularity is not None for c in tokenized.concepts):
        return tokenized.concepts
    ids = tokenized.input_ids.astype(np.int64)
    out = []
    for c, concept in enumerate(tokenized.concepts):
        if concept.granularity is None:
            seen = tokenized.eligible & tokenized.in_scope[tokenized.window_of, c]
            total = np.bincount(ids[seen])
            positive = np.bincount(ids[seen & tokenized.label(c)], minlength=len(total))
            positive, total = positive[total > 1], total[total > 1]
            wrong = np.minimum(positive, total - positive).sum()
            rarer = min(positive.sum(), (total - positive).sum())
            decided = rarer > 0 and wrong <= 0.01 * rarer
            concept = replace(concept, granularity=Granularity.TYPE if decided else Granularity.SPAN)
        out.append(concept)
    return tuple(out)


@dataclass(frozen=True)
class Batches:
    """Batches of a tokenised corpus; iterate any number of times, ``len()`` for a progress bar."""

    tokenized: Tokenized
    groups: tuple[Int[ndarray, "window"], ...]
    """Windows of each batch."""

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[TokenBatch]:
        for windows in self.groups:
            yield self._batch(windows)

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return int(sum(np.diff(self.tokenized.offsets)[w].sum() for w in self.groups))

    def _batch(self, windows: Int[ndarray, "window"]) -> TokenBatch:
        import torch

        t = self.tokenized
        lengths = np.diff(t.offsets)[windows]
        position = np.arange(lengths.max())
        real = position[None] < lengths[:, None]
        index = np.where(real, t.offsets[windows][:, None] + position[None], 0)
        labels = np.unpackbits(t.packed_labels[index], axis=2, count=len(t.concepts)).view(bool)
        return TokenBatch(
            input_ids=torch.from_numpy(np.where(real, t.input_ids[index], t.pad_id).astype(np.int64)),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            document=torch.from_numpy(t.document[windows].astype(np.int64)),
            char_start=torch.from_numpy(np.where(real, t.char_start[index], -1).astype(np.int64)),
            char_end=torch.from_numpy(np.where(real, t.char_end[index], -1).astype(np.int64)),
            eligible=torch.from_numpy(real & t.eligible[index]),
            labels=torch.from_numpy(labels & real[..., None]),
            in_scope=torch.from_numpy(t.in_scope[windows]),
        )


def batches(tokenized: Tokenized, *, split: Split | str | None = None, tokens_per_batch: int = 4096) -> Batches:
    """Batches of the windows of one split (None: all), right-padded, longest windows first.

    Longest first means that the batch that needs most memory comes first. A window longer than
    `tokens_per_batch` is a batch of its own.

    Raises:
        BadConfig: `tokens_per_batch` is not positive.
    """
    if tokens_per_batch < 1:
        raise BadConfig(f"tokens_per_batch={tokens_per_batch}: give a positive number")
    windows = np.arange(len(tokenized))
    if split is not None:
        windows = windows[tokenized.window_split == code_of(split)]
    lengths = np.diff(tokenized.offsets)[windows]
    windows = windows[np.argsort(-lengths, kind="stable")]
    groups = []
    at = 0
    while at < len(windows):
        longest = int(tokenized.offsets[windows[at] + 1] - tokenized.offsets[windows[at]])
        many = max(1, tokens_per_batch // longest)
        groups.append(windows[at : at + many])
        at += many
    return Batches(tokenized, tuple(groups))
