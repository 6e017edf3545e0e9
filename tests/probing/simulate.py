"""Data in which no neuron knows the concept, with everything that misleads a careless test.

Activations and routing are autocorrelated along each document and differ between documents and sources; labels
come in contiguous runs (``span``), at the start of documents, where activations are special too (``start``), for
whole documents (``document``), or by token type (``type``). On independent tokens a broken null would pass.

One call simulates many independent data sets at once: each is a "concept" with its own labels and activations;
they share document lengths, token ids and routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_lens.probing.exchange import LabelTracks, strata
from moe_lens.probing.nulls import CellColumns
from moe_lens.types import Granularity

KINDS = ("span", "start", "document", "type")
N_EXPERTS, N_MOE_LAYERS, N_TYPES = 3, 2, 60
PERSISTENCE = 0.9
"""Correlation of a neuron's noise between neighbouring tokens."""


@dataclass(frozen=True)
class Simulation:
    tracks: LabelTracks
    columns: CellColumns
    scores: np.ndarray
    """(row, simulation), what ``columns.score`` returns."""

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores and labels (token, simulation) of the dense cell, which every token visits."""
        last = self.columns.offsets[-2]
        return self.scores[last:], self.tracks.labels


def simulate(
    kind: str, *, seed: int, n_simulations: int = 50, n_documents: int = 48, source_effect: float = 1.0,
    effect: float = 0.0,
) -> Simulation:  # fmt: skip
    """Simulate `n_simulations` data sets; `effect` is added to the scores of positives in the cells of layer 0."""
    r = np.random.default_rng([seed, KINDS.index(kind)])
    length = r.integers(40, 90, n_documents)
    offsets = np.append(0, np.cumsum(length))
    document = np.repeat(np.arange(n_documents), length)
    position = np.arange(offsets[-1]) - offsets[document]
    source = (np.arange(n_documents) // 2) % 2
    token_id = _token_ids(r, n_documents, length)
    labels = _labels(r, kind, source * source_effect, length, position, document, token_id, n_simulations)
    scores = [
        _activations(r, kind, source * source_effect, length, position, document, token_id, n_simulations)
        for _ in range(N_MOE_LAYERS + 1)
    ]
    scores[0] += (effect * labels).astype(np.float32)
    tracks = LabelTracks(
        offsets, split=1 + np.arange(n_documents) % 2, stratum=strata(source.tolist(), length),
        length_bin=np.zeros(n_documents, int), token_id=token_id, labels=labels,
        in_scope=np.ones((n_documents, n_simulations), bool),
        names=tuple(f"{kind}{i}" for i in range(n_simulations)),
        granularity=(Granularity.SPAN if kind == "start" else Granularity(kind),) * n_simulations,
    )  # fmt: skip
    experts = [_sticky(r, length, N_EXPERTS, stay=0.8) for _ in range(N_MOE_LAYERS)]
    visits = [(layer, e, np.flatnonzero(x == e)) for layer, x in enumerate(experts) for e in range(N_EXPERTS)]
    visits.append((N_MOE_LAYERS, 0, np.arange(len(token_id))))
    table = np.concatenate([scores[layer][token] for layer, _, token in visits])
    columns = CellColumns(
        np.array([(layer, e) for layer, e, _ in visits]), np.cumsum([0, *(len(token) for _, _, token in visits)]),
        np.concatenate([token for _, _, token in visits]), lambda concept: table[:, concept],
    )  # fmt: skip
    return Simulation(tracks, columns, table)


def _sticky(r: np.random.Generator, length: np.ndarray, n: int, stay: float) -> np.ndarray:
    """A label in range(n) per token that mostly repeats its predecessor and has a favourite in every document."""
    shape = (len(length), int(length.max()))
    favourite = r.integers(0, n, (len(length), 1))
    fresh = np.where(r.random(shape) < 0.5, favourite, r.integers(0, n, shape))
    at = np.where(r.random(shape) >= stay, np.arange(shape[1]), 0)
    value = np.take_along_axis(fresh, np.maximum.accumulate(at, 1), 1)
    return value[np.arange(shape[1]) < length[:, None]]


def _token_ids(r: np.random.Generator, n_documents: int, length: np.ndarray) -> np.ndarray:
    """Types of Zipf-like frequency; each document prefers some of them."""
    weight = 1 / np.arange(2, N_TYPES + 2) * np.exp(r.normal(0, 0.7, (n_documents, N_TYPES)))
    return np.concatenate([r.choice(N_TYPES, n, p=w / w.sum()) for n, w in zip(length, weight, strict=True)])


def _labels(r, kind, source, length, position, document, token_id, n):
    """(token, simulation) labels that know nothing of the activations."""
    n_documents = len(length)
    rate = np.clip(0.35 + 0.2 * source[:, None] + 0.15 * r.normal(size=(n_documents, n)), 0.05, 0.9)
    if kind == "document":
        return (r.random((n_documents, n)) < rate)[document]
    if kind == "type":
        return (r.random((N_TYPES, n)) < 0.35)[token_id]
    if kind == "start":
        run = (5 + r.geometric(1 / 12, (n_documents, n))) * (r.random((n_documents, n)) < 0.3 + rate)
        return position[:, None] < run[document]
    stay = 1 - 1 / 12
    width = int(length.max())
    on = np.empty((n_documents, width, n), bool)
    on[:, 0] = r.random((n_documents, n)) < rate
    for t in range(1, width):
        again = r.random((n_documents, n)) < stay
        on[:, t] = np.where(again, on[:, t - 1], r.random((n_documents, n)) < rate)
    return on[np.arange(width) < length[:, None]]


def _activations(r, kind, source, length, position, document, token_id, n):
    """(token, simulation) scores that know nothing of the labels."""
    n_documents, width = len(length), int(length.max())
    noise = np.empty((n_documents, width, n), np.float32)
    fresh = r.standard_normal((n_documents, width, n), np.float32)
    noise[:, 0] = fresh[:, 0]
    for t in range(1, width):
        noise[:, t] = PERSISTENCE * noise[:, t - 1] + np.float32(np.sqrt(1 - PERSISTENCE**2)) * fresh[:, t]
    out = noise[np.arange(width) < length[:, None]]
    out += (0.6 * r.standard_normal((n_documents, n)) + 0.5 * source[:, None]).astype(np.float32)[document]
    if kind == "start":
        out += (1.5 * np.exp(-position / 10)).astype(np.float32)[:, None]
    if kind == "type":
        out += r.standard_normal((N_TYPES, n)).astype(np.float32)[token_id]
    return out
