"""Labels exchanged as they could have fallen if no neuron knew the concept (METRICS 1.3, item 7).

``span``      whole label tracks change places between documents of one stratum, positions kept
``document``  whole documents change places within a stratum
``type``      the concept is permuted over token types within frequency bins

Activations, routing and the order of tokens stay as they are. Tokens are never shuffled: neighbouring tokens
share labels and activations, and shuffling compares the data with a world in which they do not.

**Tracks of unequal length.** Let sigma be the permutation of a stratum's documents. The token at position t of
document d gets the label at position t of sigma(d). Where that document is too short, its track is read on,
mirrored at its end, for a quarter of its length; beyond that, sigma(sigma(d)) takes over, and so on. So every
position gets its label from a uniformly drawn document that reaches about as far: prevalence stays as it is along
the document, and starts stay at the start (tiling a short track would move them into the middle; truncating it
would lose positives). A change of donors cuts runs of labels, which makes the null too narrow; mirroring repeats
them, which makes it too wide. Measured on runs of 12 tokens in documents of 40 to 90, rejection at 5 %: .060 with
donors changed at once, .043 with mirroring only, .051 as here (16,000 data sets of `tests/probing/simulate.py`).

A stratum of one document has nobody to exchange with: its track is shifted circularly by a random amount.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.errors import BadConcept, BadConfig
from moe_lens.types import Granularity

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.capture.tokens import TokenTable


@dataclass(frozen=True)
class LabelTracks:
    """Concept labels of the validate and test tokens, document by document, each in reading order."""

    offsets: Int[ndarray, "document+1"]
    """Tokens of document ``d`` are ``offsets[d]:offsets[d + 1]``; its positions count from 0."""
    split: Int[ndarray, "document"]
    """Code of the document's split (``corpus.splits``): nothing is exchanged between splits."""
    stratum: Int[ndarray, "document"]
    """Source x length bin, see `strata`."""
    length_bin: Int[ndarray, "document"]
    """Length bin alone: stratum of document concepts that a source decides."""
    token_id: Int[ndarray, "token"]
    labels: Bool[ndarray, "token concept"]
    in_scope: Bool[ndarray, "document concept"]
    """Documents on which the concept is defined; nothing is exchanged across that border."""
    names: tuple[str, ...]
    granularity: tuple[Granularity, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.token_id)

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def document(self) -> Int[ndarray, "token"]:
        """Document of every token."""
        return np.repeat(np.arange(self.n_documents), np.diff(self.offsets))

    @cached_property
    def scope_of(self) -> Int[ndarray, "concept"]:
        """Concepts defined on the same documents have the same number."""
        return np.unique(self.in_scope, axis=1, return_inverse=True)[1].reshape(-1)

    def exchangeable(self, concept: int) -> Int[ndarray, "document"]:
        """Stratum in which the documents of one concept change places, split and scope included.

        A document concept that never varies inside the strata that hold most documents (a language, where the
        source decides it) is exchanged within length bins instead.
        """
        scope = self.in_scope[:, concept]
        within = _number(self.stratum, self.split, scope)
        if self.granularity[concept] == Granularity.DOCUMENT:
            label = self.labels[self.offsets[:-1], concept]
            if _mixed(within, label)[scope].mean() < 0.5:
                within = _number(self.length_bin, self.split, scope)
        return within


def strata(
    source: Sequence[Hashable], length: Int[ndarray, "document"], *, smallest: int = 16, most: int = 8
) -> Int[ndarray, "document"]:
    """Source x length bin: bins of about equal count by length within each source; equal lengths share a bin.

    Args:
        length: in any unit; characters, where two models with different tokenizers must get the same strata.
        smallest: a source is cut only as far as about this many documents a bin remain. In a stratum of n
            documents one in n keeps its own labels, which costs power.
        most: bins per source.
    """
    number = np.unique(np.asarray(source), return_inverse=True)[1].reshape(-1)
    order = np.lexsort((length, number))
    by_length, by_source = length[order], number[order]
    new = np.ones(len(order), bool)
    new[1:] = (by_length[1:] != by_length[:-1]) | (by_source[1:] != by_source[:-1])
    size = np.bincount(number)
    start = np.cumsum(size) - size
    rank = np.empty(len(order), np.int64)
    rank[order] = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0)) - start[by_source]
    n_bins = np.clip(size // smallest, 1, most)
    return number * most + rank * n_bins[number] // size[number]


def frequency_bins(count: Int[ndarray, "type"], *, smallest: int = 10) -> Int[ndarray, "type"]:
    """Bin token types by octave of frequency, from the rare end; a bin with fewer than `smallest` joins the next.

    The most frequent types, of which an octave holds few, thus share a bin.
    """
    octave = np.floor(np.log2(np.maximum(count, 1))).astype(np.int64)
    members = np.bincount(octave)
    bins, current = np.zeros(len(members), np.int64), 0
    for i in range(len(members)):
        bins[i] = current
        enough = members[bins == current].sum() >= smallest and members[i + 1 :].sum() >= smallest
        current += int(enough)
    return bins[octave]


@dataclass(frozen=True)
class ExchangedLabels:
    """A block of permutations of the labels, as the token from which each label is taken."""

    tracks: LabelTracks
    document_keys: Float[ndarray, "permutation document"]
    shifts: Float[ndarray, "permutation document"]
    type_keys: Float[ndarray, "permutation type"]
    _last: dict[tuple[bytes, Granularity], Int[ndarray, "token permutation"]] = field(default_factory=dict, repr=False)
    _kept: dict[tuple[bytes, Granularity, int], float] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.document_keys)

    def labels(self, concept: int) -> Bool[ndarray, "token permutation"]:
        """Exchanged labels of one concept. Meaningful only where the concept is in scope."""
        return np.ascontiguousarray(self.tracks.labels[:, concept]).take(self.sources(concept))

    def sources(self, concept: int) -> Int[ndarray, "token permutation"]:
        """Token whose label each token gets. Concepts of one granularity and stratification share them."""
        within, kind = self._within(concept), self.tracks.granularity[concept]
        key = (within.tobytes(), kind)
        if key not in self._last:
            self._last.clear()  # one block of sources in memory at a time
            by_kind = {Granularity.SPAN: self._tracks, Granularity.DOCUMENT: self._documents}
            self._last[key] = by_kind.get(kind, self._types)(within).astype(np.int64)  # what `take` reads fastest
        return self._last[key]

    def kept(self, concept: int) -> float:
        """Mean share of tokens in scope whose label comes from their own place (document concepts: document)."""
        t = self.tracks
        key = (self._within(concept).tobytes(), t.granularity[concept], int(t.scope_of[concept]))
        if key not in self._kept:
            own = np.arange(t.n_tokens)
            if t.granularity[concept] == Granularity.DOCUMENT:
                own = t.offsets[t.document]
            scope = t.in_scope[t.document, concept]
            same = self.sources(concept)[scope] == own[scope, None]
            self._kept[key] = float(same.mean()) if scope.any() else 1.0
        return self._kept[key]

    def _within(self, concept: int) -> ndarray:
        t = self.tracks
        is_type = t.granularity[concept] == Granularity.TYPE
        return t.in_scope[:, concept] if is_type else t.exchangeable(concept)

    def _documents(self, within: Int[ndarray, "document"]) -> Int[ndarray, "token permutation"]:
        t = self.tracks
        donor = _permuted_within(within, self.document_keys).T
        return t.offsets[:-1].astype(np.int32)[donor][t.document]

    def _tracks(self, within: Int[ndarray, "document"]) -> Int[ndarray, "token permutation"]:
        t, sigma = self.tracks, _permuted_within(within, self.document_keys).T
        length, start = np.diff(t.offsets).astype(np.int32), t.offsets[:-1].astype(np.int32)
        reach = length + length // 4
        position = np.arange(t.n_tokens, dtype=np.int32) - start[t.document]
        donor = sigma[t.document]
        token, column = np.nonzero(reach[donor] <= position[:, None])
        while len(token):
            following = sigma[donor[token, column], column]
            donor[token, column] = following
            short = reach[following] <= position[token]
            token, column = token[short], column[short]
        out = start[donor] + np.minimum(position[:, None], 2 * length[donor] - 1 - position[:, None])
        alone = np.flatnonzero((np.bincount(within)[within] == 1)[t.document])
        d = t.document[alone]
        shift = (self.shifts.T * length[:, None]).astype(np.int32)[d]
        out[alone] = start[d][:, None] + (position[alone][:, None] + shift) % length[d][:, None]
        return out

    def _types(self, in_scope: Bool[ndarray, "document"]) -> Int[ndarray, "token permutation"]:
        """The i-th occurrence of a type gets the label of the donor type's i-th occurrence, counted in a circle."""
        t = self.tracks
        here = np.flatnonzero(in_scope[t.document])
        every = np.unique(t.token_id)
        types, kind, count = np.unique(t.token_id[here], return_inverse=True, return_counts=True)
        by_type = here[np.argsort(kind, kind="stable")].astype(np.int32)
        first = np.cumsum(count) - count
        occurrence = np.empty(len(here), np.int64)
        occurrence[np.argsort(kind, kind="stable")] = np.arange(len(here)) - np.repeat(first, count)
        keys = self.type_keys[:, np.searchsorted(every, types)]
        donor = _permuted_within(frequency_bins(count), keys).T[kind]
        out = np.repeat(np.arange(t.n_tokens, dtype=np.int32)[:, None], len(self), axis=1)
        out[here] = by_type[first[donor] + occurrence[:, None] % count[donor]]
        return out


def exchange_labels(
    tracks: LabelTracks, *, n_permutations: int, seed: int, block: int = 128
) -> Iterator[ExchangedLabels]:
    """Exchange the labels `n_permutations` times, each concept in the way of its granularity.

    Permutation i is the same whatever the size of a block, and all concepts that share strata share it, so that
    what concepts have in common stays. Two models get the same permutations of documents if their tracks list
    the same documents in the same strata.

    Raises:
        BadConcept: a document concept whose label changes inside a document.
        BadConfig: no permutation, or no token.

    Documents are taken to be exchangeable within a stratum: that is wrong where a few files or authors supply many
    of them. Under ``type`` the neuron has seen the same token types on select, so one chosen among many for this
    very set of types beats the permuted sets by chance: in a simulation where each neuron prefers random types,
    p <= .05 in 8 % of concepts with one candidate neuron, 27 % with 8, 48 % with 64. A small p of a ``type``
    concept then says that the neuron tells these types apart, not that it knows what they have in common.
    """
    if n_permutations < 1 or block < 1:
        raise BadConfig(f"{n_permutations} permutations in blocks of {block}: give positive numbers")
    if not tracks.n_tokens:
        raise BadConfig("the validate and test splits hold no token: give a larger corpus or a larger --max-tokens")
    _check_documents(tracks)
    documents, shifts, types = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    n_types = len(np.unique(tracks.token_id))
    for start in range(0, n_permutations, block):
        n = min(block, n_permutations - start)
        shape = (n, tracks.n_documents)
        yield ExchangedLabels(tracks, documents.random(shape), shifts.random(shape), types.random((n, n_types)))


def _check_documents(tracks: LabelTracks) -> None:
    for c, kind in enumerate(tracks.granularity):
        if kind != Granularity.DOCUMENT:
            continue
        label = tracks.labels[:, c]
        differs = (label != label[tracks.offsets[:-1]][tracks.document]) & tracks.in_scope[tracks.document, c]
        if differs.any():
            raise BadConcept(
                f"concept {tracks.names[c]!r} is declared as a property of documents, but its label changes inside "
                "one: declare granularity span"
            )


def _permuted_within(
    stratum: Int[ndarray, "unit"], keys: Float[ndarray, "permutation unit"]
) -> Int[ndarray, "permutation unit"]:
    """A uniform permutation of the units inside each stratum, from uniform keys: unit -> donor."""
    number = np.unique(stratum, return_inverse=True)[1].reshape(-1)
    out = np.empty(keys.shape, np.int32)
    out[:, np.argsort(number, kind="stable")] = np.argsort(number + keys, axis=1)
    return out


def _number(*columns: ndarray) -> Int[ndarray, "unit"]:
    """Number the distinct combinations."""
    table = np.stack([np.asarray(c, np.int64) for c in columns], 1)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)


def _mixed(stratum: Int[ndarray, "unit"], label: Bool[ndarray, "unit"]) -> Bool[ndarray, "unit"]:
    """Units whose stratum holds both labels."""
    share = np.bincount(stratum, label) / np.maximum(np.bincount(stratum), 1)
    return ((share > 0) & (share < 1))[stratum]


def label_tracks(
    tokens: TokenTable,
    *,
    splits: Int[ndarray, "corpus_document"],
    stratum: Int[ndarray, "corpus_document"],
    length_bin: Int[ndarray, "corpus_document"],
    names: Sequence[str],
    granularity: Sequence[Granularity],
) -> tuple[LabelTracks, Int[ndarray, "table_token"]]:
    """Tracks of the eligible tokens of a token table, and each table token's number in them (-1: not eligible).

    Tokens are put in order of document and character; tokens inside one character stay in stream order.

    Args:
        splits, stratum, length_bin: of every document of the corpus, by its index.
    """
    document, char = tokens.document.numpy(), tokens.char_start.numpy()
    kept = np.flatnonzero(tokens.eligible.numpy())
    kept = kept[np.lexsort((char[kept], document[kept]))]
    number = np.full(len(document), -1, np.int64)
    number[kept] = np.arange(len(kept))
    ids, first = np.unique(document[kept], return_index=True)
    tracks = LabelTracks(
        offsets=np.append(first, len(kept)), split=np.asarray(splits)[ids], stratum=stratum[ids],
        length_bin=length_bin[ids], token_id=tokens.input_ids.numpy()[kept], labels=tokens.labels.numpy()[kept],
        in_scope=tokens.in_scope.numpy()[kept[first]], names=tuple(names), granularity=tuple(granularity),
    )  # fmt: skip
    return tracks, number
