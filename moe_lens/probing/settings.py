"""Settings of one probing run, and the minimum sizes below which a cell says ``too_few``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_K = (1, 2, 4, 8, 16, 32, 64)
BEST_CELLS = 8
"""Cells per (concept, role) that are fitted at k > 1, chosen by select-split AUROC at k = 1."""


@dataclass(frozen=True)
class Minimum:
    """Smallest class sizes of one split: tokens of each class, and documents each class must come from."""

    tokens: int
    documents: int


MINIMUM_SELECT = Minimum(tokens=50, documents=10)
MINIMUM_EVAL = Minimum(tokens=25, documents=5)


@dataclass(frozen=True)
class ProbeSettings:
    """Everything that can change a number of a probing run, beside model and corpus."""

    k: tuple[int, ...] = DEFAULT_K
    rank: str = "standardised"
    """Neuron ranking, see ``select.neuron_scores``."""
    max_rows: int = 2000
    """Rows used to fit one probe."""
    max_length: int = 256
    """Tokens per window."""
    max_tokens: int | None = None
    document_tokens: int | None = None
    """Tokens read from the start of each document, all of them by default."""
    batch_tokens: int = 4096
    all_cells: bool = False
    """Fit k > 1 in every cell instead of the best eight per concept."""
    seed: int = 0
    """Of the document split and of the row keys."""
    n_resamples: int = 1000
    """Bootstrap samples of documents behind every interval."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
