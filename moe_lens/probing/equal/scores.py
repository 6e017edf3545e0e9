"""What the ``equal_*`` arms found: the chosen cells of both models, and what their intervals are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.capture.store import replacing, write_table
from moe_lens.errors import OutOfRange

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

CHOICES = ("validate", "test")
"""How a cell is chosen: by validate AUROC, or by the very test score that is reported."""


@dataclass(frozen=True)
class EqualScores:
    """The chosen cell of every arm, draw, concept and k in both models, scored on test."""

    frame: pd.DataFrame
    """One row per (arm, draw, concept, k, role, choice, metric): value, chance, the cell and its neurons, drawn rows
    per split, and between how many cells and neurons it was chosen. ``choice`` is ``validate`` (highest validate
    AUROC) or ``test`` (highest test value of that metric). Equal on both roles: ``n_cells`` and ``n_neurons``.
    ``entry`` numbers `counts`, -1 where nothing could be scored."""
    counts: Float[ndarray, "entry document count"]
    """Columns ``document_sums.COUNTS``; float32, 24 bytes per entry and document."""
    documents: Int[ndarray, "document"]
    """The test documents that both models read, as numbered in the corpus."""
    seed: int
    draws: int
    n_tokens: int
    """Tokens that went through either model, summed over passes."""
    n_passes: int
    """Groups of layers: passes of each model over each split."""

    def chosen(self, choice: str) -> pd.DataFrame:
        """The rows of one choice that carry numbers.

        Raises:
            OutOfRange: `choice` is not one of ``CHOICES``.
        """
        if choice not in CHOICES:
            raise OutOfRange(f"unknown choice of cells {choice!r}: give one of {', '.join(CHOICES)}")
        return self.frame[(self.frame.choice == choice) & (self.frame.entry >= 0)]

    def write(self, path: str | Path) -> None:
        """Write ``<path>.npz`` and then ``<path>.parquet``, each atomically: with the latter, all is there."""
        with replacing(Path(f"{path}.npz")) as temporary, open(temporary, "wb") as handle:
            np.savez(
                handle, counts=self.counts, documents=self.documents, seed=self.seed, draws=self.draws,
                n_tokens=self.n_tokens, n_passes=self.n_passes,
            )  # fmt: skip
        write_table(Path(f"{path}.parquet"), self.frame)

    @classmethod
    def read(cls, path: str | Path) -> EqualScores | None:
        """What `write` wrote; None where it did not come to its end."""
        if not Path(f"{path}.parquet").exists():
            return None
        frame = pd.read_parquet(f"{path}.parquet")
        for name in ("neurons", "sign"):
            frame[name] = [values.tolist() for values in frame[name]]
        with np.load(f"{path}.npz") as stored:
            sizes = {name: int(stored[name]) for name in ("seed", "draws", "n_tokens", "n_passes")}
            return cls(frame, stored["counts"], stored["documents"], **sizes)
