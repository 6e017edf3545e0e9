"""Evaluation rows made by hand or drawn at random, run through the real scoring and the real arms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from moe_lens.capture.rows import Rows
from moe_lens.probing.arms import ModelScores, Scanned, collect, winner_keys
from moe_lens.probing.evaluate import Evaluator
from moe_lens.probing.fit import Probe, TwoPart
from moe_lens.types import Granularity, Split, Status


@dataclass(frozen=True)
class Concept:
    name: str
    group: str | None = None
    category: str = "test"
    granularity: Granularity = Granularity.SPAN


class Table:
    """What arms read of a token table."""

    def __init__(self, document: np.ndarray, labels: np.ndarray, in_scope: np.ndarray | None = None) -> None:
        self.document, self.labels = torch.from_numpy(document), torch.from_numpy(labels)
        self.in_scope = torch.ones_like(self.labels) if in_scope is None else torch.from_numpy(in_scope)
        self.eligible = torch.ones(len(document), dtype=torch.bool)


class Store:
    """What arms read of a row store: neuron ``c`` of a cell belongs to concept ``c``."""

    def __init__(self, tokens: Table, visits: dict[tuple[int, int], np.ndarray], h: dict[int, np.ndarray]) -> None:
        self.tokens, self.visits, self.h = tokens, visits, h

    def rows(self, layer: int, expert: int) -> Rows:
        token = torch.from_numpy(self.visits[layer, expert])
        h = torch.from_numpy(self.h[layer]).float()[token]
        return Rows(token, h, torch.ones(len(token)), token)


def scores(
    store: Store, split: list[Split], names: list[str], *, role: str = "moe", threshold: float = 0.0, d_ff: int = 8,
    k: int = 1,
) -> ModelScores:  # fmt: skip
    """Score one probe per cell and concept, that says yes above `threshold`, and let every arm collect."""
    addresses = sorted(store.visits)
    layers = {layer for layer, _ in addresses}
    width = torch.arange(len(names))
    columns = {a: width.repeat(1 + max(e for b, e in addresses if b == a), 1) for a in layers}
    evaluator = Evaluator(store, columns, split)  # type: ignore[arg-type]
    probes = [
        Probe(
            *at,
            c,
            k,
            Status.OK,
            np.array([c]),
            np.ones(1),
            -threshold,
            100,
            50,
            0.5,
            TwoPart(np.ones(1), -threshold, 0.0),
        )
        for at in addresses
        for c in range(len(names))
    ]
    cells = pd.DataFrame([row for at in addresses for row in evaluator.score(*at, [p for p in probes if _at(p, at)])])
    cells["concept"] = [names[c] for c in cells.concept]
    scanned = Scanned(evaluator, probes, cells, addresses, names, len(split))
    wanted, counts = winner_keys(cells), {}
    for at, mine in scanned.usable_probes.items():
        for probe, found in zip(mine, evaluator.document_counts(mine, len(split)), strict=True):
            if (key := (*at, names[probe.concept], k)) in wanted:
                counts[key] = found
    return ModelScores(role, 0, d_ff, cells, counts, collect(scanned))


def _at(probe: Probe, address: tuple[int, int]) -> bool:
    return (probe.layer, probe.expert) == address


def alike(
    *, role: str, n_concepts: int, n_experts: int, seed: int, n_layers: int = 2, n_documents: int = 60,
    length: int = 40, separation: float = 1.2, prevalence: float = 0.4,
) -> tuple[ModelScores, np.ndarray]:  # fmt: skip
    """A model in which every neuron of every cell detects its concept equally well, and its test documents.

    Labels, activations and routing are independent from token to token, as ``homogeneous`` assumes.
    """
    r = np.random.default_rng([seed, n_experts])
    document = np.repeat(np.arange(n_documents), length)
    labels = np.random.default_rng(seed).random((len(document), n_concepts)) < prevalence  # the same in both models
    split = [Split.VALIDATE if i % 2 else Split.TEST for i in range(n_documents)]
    visits, h = {}, {}
    for layer in range(n_layers):
        h[layer] = r.standard_normal(labels.shape, np.float32) + np.float32(separation) * labels
        chosen = r.integers(0, n_experts, len(document))
        visits |= {(layer, e): np.flatnonzero(chosen == e) for e in range(n_experts)}
    names = [f"c{i}" for i in range(n_concepts)]
    store = Store(Table(document, labels), visits, h)
    return scores(store, split, names, role=role, threshold=separation / 2), np.arange(0, n_documents, 2)
