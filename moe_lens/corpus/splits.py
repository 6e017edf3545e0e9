"""The one document split of the whole product (METRICS 1.1).

    1. Documents that must stay together form a unit: one source file (``group``), exact duplicates up to
       whitespace, case and digits, and near-duplicates by MinHash over shingles of 48 bytes.
    2. Units are ordered by sha256(corpus id, unit id, seed) within strata of the field ``domain``.
    3. Each stratum is cut 50 / 25 / 25 into select, validate and test, by number of documents.

No step looks at the order of the documents, so permuting them changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Int, UInt64
    from numpy import ndarray

    from moe_lens.corpus.text import Corpus, Document

SPLITS = tuple(Split)
"""Split of each code: 0 select, 1 validate, 2 test."""
_CUTS = np.array([0.5, 0.75])

_SHINGLE = 48
"""Bytes of a shingle: about eight English words, so that chance agreement is out of the question."""
_READS = 1 << 20
"""Bytes of a document that the comparison reads."""
_BINS = 32
_BANDS = 8
_ALIKE = 0.6
"""Share of equal MinHash bins (an estimate of Jaccard similarity) from which two documents are one unit."""
_EMPTY = np.uint64(2**64 - 1)


def code_of(split: Split | str) -> int:
    """Integer code of a split."""
    return SPLITS.index(Split(split))


def assign_splits(corpus: Corpus, *, seed: int = 0) -> Int[ndarray, "document"]:
    """Split code of every document: 0 select, 1 validate, 2 test.

    A stratum of three or more units has all three splits; a single unit goes where its hash says.
    Near-duplicate detection finds documents of similar length that share most of their text; a short
    quotation inside a long document is not found.
    """
    unit = units(corpus)
    domain = _unit_domains(corpus, unit)
    keys = {u: _hash(corpus.id, u, seed) for u in set(unit)}
    size = Counter(unit)
    strata: dict[str, list[str]] = defaultdict(list)
    for u in sorted(size, key=lambda u: (keys[u], u)):
        strata[domain[u]].append(u)
    code: dict[str, int] = {}
    for members in strata.values():
        for u, c in zip(members, _cut([size[u] for u in members], keys[members[0]]), strict=True):
            code[u] = c
    return np.array([code[u] for u in unit], dtype=np.int8)


def _cut(sizes: list[int], first_key: int) -> list[int]:
    """Codes of units in hash order: where the middle of the unit falls on the way from 0 to 1."""
    if len(sizes) == 1:
        return [int(np.searchsorted(_CUTS, first_key / 2**256, side="right"))]
    for weights in (np.array(sizes, dtype=np.float64), np.ones(len(sizes))):
        middle = (np.cumsum(weights) - weights / 2) / weights.sum()
        codes = np.searchsorted(_CUTS, middle, side="right")
        if len(set(codes.tolist())) == 3:
            break  # a giant group can swallow a split; then units are counted instead of documents
    return codes.tolist()


def _hash(corpus_id: str, key: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{corpus_id}\0{key}\0{seed}".encode()).digest(), "big")


def domain_order(corpus: Corpus, *, seed: int = 0, codes: Sequence[int] | None = None) -> list[int]:
    """Documents in hash order, one from every domain in turn; with `codes`, also from every split (2:1:1).

    A prefix of this order is the fair small sample of the corpus: it has every domain and split.
    """
    strata: dict[tuple[int, str], list[tuple[int, str, int]]] = defaultdict(list)
    for i, doc in enumerate(corpus.documents):
        code = 0 if codes is None else int(codes[i])
        strata[code, doc.fields.get("domain", "")].append((_hash(corpus.id, doc.id, seed), doc.id, i))
    ranked = []
    for (code, _), members in strata.items():
        a_turn = 2 if codes is not None and code == 0 else 1
        ranked += [(rank // a_turn, key, i) for rank, (key, _, i) in enumerate(sorted(members))]
    return [i for _, _, i in sorted(ranked)]


def units(corpus: Corpus) -> list[str]:
    """Name of the unit of every document: the least group id among all that are tied together."""
    docs = corpus.documents
    parent: dict[str, str] = {d.group: d.group for d in docs}

    def find(g: str) -> str:
        while parent[g] != g:
            parent[g] = g = parent[parent[g]]
        return g

    def tie(a: str, b: str) -> None:
        a, b = find(a), find(b)
        if a != b:
            parent[max(a, b)] = min(a, b)

    for a, b in _duplicates(docs):
        tie(docs[a].group, docs[b].group)
    return [find(d.group) for d in docs]


def _unit_domains(corpus: Corpus, unit: list[str]) -> dict[str, str]:
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for u, doc in zip(unit, corpus.documents, strict=True):
        votes[u][doc.fields.get("domain", "")] += 1
    return {u: min(c, key=lambda d: (-c[d], d)) for u, c in votes.items()}


_DIGITS = str.maketrans("123456789", "000000000")


def _duplicates(docs: Sequence[Document]) -> list[tuple[int, int]]:
    """Pairs that are duplicates or near-duplicates; enough of them to connect every set of duplicates."""
    pairs: list[tuple[int, int]] = []
    first: dict[str, int] = {}
    kept: list[int] = []
    signatures: list[UInt64[ndarray, "bin"]] = []
    for i in sorted(range(len(docs)), key=lambda i: docs[i].id):
        text = " ".join(docs[i].text.lower().split()).translate(_DIGITS)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in first:
            pairs.append((first[key], i))
            continue
        first[key] = i
        signature = _minhash(text.encode())
        if signature is not None:
            kept.append(i)
            signatures.append(signature)
    return pairs + [(kept[a], kept[b]) for a, b in _near(signatures)]


def _near(signatures: list[UInt64[ndarray, "bin"]]) -> list[tuple[int, int]]:
    """Pairs of similar signatures, found by equal bands and verified on all bins."""
    if len(signatures) < 2:
        return []
    table = np.stack(signatures)
    pairs: set[tuple[int, int]] = set()
    width = _BINS // _BANDS
    for band in range(_BANDS):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        part = np.ascontiguousarray(table[:, band * width : (band + 1) * width])
        for i, row in enumerate(part):
            if (row != _EMPTY).all():
                buckets[row.tobytes()].append(i)
        for bucket in buckets.values():
            members = np.array(bucket)
            for a in bucket if len(bucket) <= 64 else bucket[:64]:  # boilerplate: compare with 64 of them
                alike = (table[members] == table[a]).mean(1) >= _ALIKE
                pairs.update((min(a, b), max(a, b)) for b in members[alike].tolist() if a != b)
    return sorted(pairs)


_MULTIPLIER = 0x9E3779B97F4A7C15


@lru_cache(maxsize=4)
def _power_tables(size: int) -> tuple[UInt64[ndarray, "size"], UInt64[ndarray, "size"]]:
    """Powers of the multiplier and of its inverse modulo 2^64."""
    tables = []
    for base in (_MULTIPLIER, pow(_MULTIPLIER, -1, 2**64)):
        steps = np.full(size, base, np.uint64)
        steps[0] = 1
        tables.append(np.cumprod(steps, dtype=np.uint64))
    return tables[0], tables[1]


def _minhash(data: bytes) -> UInt64[ndarray, "bin"] | None:
    """One-permutation MinHash of all shingles, None for a text too short to have a meaningful one."""
    data = data[:_READS]
    n = len(data) - _SHINGLE + 1
    if n < _SHINGLE:
        return None
    powers, inverse = (t[: len(data)] for t in _power_tables(max(4096, 1 << (len(data) - 1).bit_length())))
    prefix = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((np.frombuffer(data, np.uint8).astype(np.uint64) + np.uint64(1)) * powers, out=prefix[1:])
    hashes = (prefix[_SHINGLE:] - prefix[:n]) * inverse[:n]
    hashes ^= hashes >> np.uint64(31)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(29)
    out = np.full(_BINS, _EMPTY, np.uint64)
    np.minimum.at(out, (hashes >> np.uint64(59)).astype(np.int64), hashes)
    return out
