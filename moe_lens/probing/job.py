"""One probing request, part by part: each model under each seed, then the arms that need both models.

A part that a killed run finished is read back. Tokenises once per (tokenizer, seed).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from moe_lens.capture.run import Run, digest, tokenizer_hash, write_routing
from moe_lens.corpus.batches import Tokenized, tokenize
from moe_lens.corpus.splits import code_of
from moe_lens.probing import parts
from moe_lens.probing.arms import Estimates, ModelScores
from moe_lens.probing.equal import EqualScores, equal_arms, equal_candidates
from moe_lens.probing.polysemanticity import Polysemanticity, polysemanticity
from moe_lens.probing.scan import scan
from moe_lens.probing.settings import ProbeSettings
from moe_lens.stats import document_weights
from moe_lens.types import Role, Split

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    from moe_lens.corpus.concepts import Concept
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

log = logging.getLogger("moe_lens")
T = TypeVar("T")
EQUAL_K = (1, 8)
"""Numbers of neurons at which the ``equal_*`` arms are drawn (METRICS 1.3, item 4)."""


@dataclass
class Job:
    """What to probe, on what, how."""

    lens: Lens
    baseline: Lens | None
    corpus: Corpus
    concepts: list[Concept]
    settings: ProbeSettings
    layers: list[LayerSpec]
    cells: tuple[tuple[int, int], ...] | None
    max_memory: int | None
    progress: bool
    run: Run | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    _tokenized: dict[tuple[str, int], Tokenized] = field(default_factory=dict)

    def request(self, splits: int) -> dict[str, Any]:
        """What was asked for, as stored in the manifest and compared on resume."""
        return {
            **self.settings.to_dict(),
            "k": list(self.settings.k),
            "splits": splits,
            "baseline": self.baseline.name if self.baseline else None,
            "concepts": [c.name for c in self.concepts],
            "concept_definitions": digest([repr(c) for c in self.concepts]),
            "layers": [layer.layer for layer in self.layers],
            "experts": [list(cell) for cell in self.cells] if self.cells else None,
        }

    def tokenized(self, lens: Lens, seed: int) -> Tokenized:
        """The corpus in the tokens of `lens`; models of one tokenizer share it, others read the same documents."""
        key = (tokenizer_hash(lens.tokenizer), seed)
        if key not in self._tokenized:
            limit, documents = self.settings.max_tokens, None
            if lens is not self.lens and limit is not None:  # another tokenizer reads the same documents
                limit, documents = None, np.unique(self.tokenized(self.lens, seed).document).tolist()
            self._tokenized[key] = tokenize(
                self.corpus, lens.tokenizer, self.concepts, max_length=self.settings.max_length,
                limit_tokens=limit, document_tokens=self.settings.document_tokens, documents=documents, seed=seed,
            )  # fmt: skip
        return self._tokenized[key]

    def test_documents(self, seed: int) -> Int[ndarray, "document"]:
        """Test documents that `lens` read, as numbered in the corpus."""
        tokenized = self.tokenized(self.lens, seed)
        read = np.unique(tokenized.document)
        return read[tokenized.splits[read] == code_of(Split.TEST)]

    @property
    def equal_k(self) -> tuple[int, ...]:
        """Numbers of neurons of the ``equal_*`` arms: those of METRICS 1.3 that were asked for, else the smallest."""
        return tuple(k for k in self.settings.k if k in EQUAL_K) or self.settings.k[:1]

    @property
    def draws_cells(self) -> bool:
        """Whether the ``equal_*`` arms can be run: they need a dense baseline."""
        models = [m for m in (self.lens, self.baseline) if m is not None]
        return self.settings.draws > 0 and len(models) == 2 and not all(m.spec.is_moe for m in models)

    def scores(self, lens: Lens, role: Role, seed: int, *, is_baseline: bool = False) -> ModelScores:
        """Scan one model."""
        layers = list(lens.spec.layers) if is_baseline else self.layers
        settings = replace(self.settings, seed=seed)

        def compute() -> ModelScores:
            found = scan(
                lens, self.tokenized(lens, seed), settings, layers=layers, role=role,
                experts=None if is_baseline else self.cells, max_memory=self.max_memory, progress=self.progress,
            )  # fmt: skip
            self._note(lens.name, seed, found.n_tokens, found.n_passes)
            if self.run is not None and not is_baseline and seed == self.settings.seed:
                write_routing(self.run, found.routing, self.corpus)
            return found.scores

        name = f"{'baseline' if is_baseline else 'model'}-{seed}"
        return self._part(name, compute, partial(parts.read_model, role=role, seed=seed), parts.write_model)

    def equal(self, seed: int) -> EqualScores:
        """Random draws of equal cells in both models."""
        baseline = self.baseline
        assert baseline is not None

        def compute() -> EqualScores:
            found = equal_candidates(
                self.lens, baseline, self.tokenized(self.lens, seed), self.tokenized(baseline, seed),
                replace(self.settings, seed=seed), layers=[layer.layer for layer in self.layers],
                draws=self.settings.draws, k=self.equal_k, seed=seed, max_memory=self.max_memory,
                progress=self.progress,
            )  # fmt: skip
            self._note(f"{self.lens.name} and {baseline.name}", seed, found.n_tokens, found.n_passes)
            return found

        return self._part(f"equal-{seed}", compute, EqualScores.read, lambda path, found: found.write(path))

    def equal_estimates(self, seed: int) -> dict[str, dict[str, Estimates]]:
        """The ``equal_*`` arms under the weights of all arms; ``..._raw`` where the cell is chosen on test."""
        scores, documents = self.equal(seed), self.test_documents(seed)
        n_resamples = self.settings.n_resamples
        weights = document_weights(len(documents), n_resamples, seed=seed)
        weights = weights[:, np.isin(documents, scores.documents)]
        left_out = len(weights) - n_resamples
        found = equal_arms(scores, weights, n_jackknife=left_out)
        raw = equal_arms(scores, weights, n_jackknife=left_out, cell_choice="test")
        return {**found, **{f"{arm}_raw": both for arm, both in raw.items()}}

    def polysemanticity(self) -> Polysemanticity:
        """Neurons and the concept groups they serve, under the first seed."""
        seed, baseline = self.settings.seed, self.baseline
        if baseline is not None and baseline.spec.is_moe:
            log.warning("%s is an MoE: its neurons are not compared, only those of %s", baseline.name, self.lens.name)
            baseline = None

        def compute() -> Polysemanticity:
            found = polysemanticity(
                self.lens, self.tokenized(self.lens, seed), baseline=baseline,
                tokenized_baseline=self.tokenized(baseline, seed) if baseline is not None else None,
                settings=self.settings, layers=[layer.layer for layer in self.layers], seed=seed,
                max_memory=self.max_memory, progress=self.progress,
            )  # fmt: skip
            self.log.append({"part": "neurons", "seed": seed})
            return found

        return self._part("neurons", compute, parts.read_neurons, parts.write_neurons)

    def _part(
        self, name: str, compute: Callable[[], T], read: Callable[[Path], T | None], write: Callable[[Path, T], None]
    ) -> T:
        """Read a finished part back, or compute and store it."""
        path = self.run.partial("probe") / name if self.run is not None else None
        if path is not None and (stored := read(path)) is not None:
            return stored
        started = time.perf_counter()
        found = compute()
        self.log[-1]["seconds"] = round(time.perf_counter() - started, 2)
        if path is not None:
            write(path, found)
        return found

    def _note(self, model: str, seed: int, n_tokens: int, n_passes: int) -> None:
        self.log.append({"model": model, "seed": seed, "tokens_forwarded": n_tokens, "select_passes": n_passes})
