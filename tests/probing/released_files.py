"""Small files of the format in which arXiv 2604.02178 released its probing tables."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HEADER = "concept,layer,expert,k,f1,recall,precision,num_positive,num_negative"
NOT_FITTED = "Not Enough Samples"


@dataclass(frozen=True)
class Cell:
    """One probe by what happened on its test tokens; the file holds four times its counts."""

    layer: int
    expert: int | str
    tp: int | None
    fp: int | None
    n_pos: int
    n_neg: int
    concept: str = "is_digit"
    k: int = 1

    @property
    def f1(self) -> float:
        assert self.tp is not None
        assert self.fp is not None
        return 2 * self.tp / (self.tp + self.fp + self.n_pos)

    def line(self) -> str:
        at = f"{self.concept},{self.layer},{self.expert},{self.k}"
        counts = f"{4 * self.n_pos},{4 * self.n_neg}"
        if self.tp is None or self.fp is None:
            return f"{at},{NOT_FITTED},{NOT_FITTED},{NOT_FITTED},{counts}"
        precision = self.tp / (self.tp + self.fp) if self.tp else 0.0
        return f"{at},{self.f1!r},{self.tp / self.n_pos!r},{precision!r},{counts}"


def release(path: Path, cells: Iterable[Cell]) -> Path:
    """Write a table, compressed where the name says so."""
    text = "\n".join([HEADER, *(cell.line() for cell in cells)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


MOE = (
    Cell(0, 0, 8, 2, 10, 10),  # F1 .8, balanced .8
    Cell(0, 1, 4, 0, 10, 10),  # F1 8/14
    Cell(1, 0, 10, 1, 20, 5),  # F1 20/31; a probe that always says yes has 40/45 here
    Cell(1, 1, None, None, 10, 10),
)
DENSE = (Cell(0, "dense", 6, 2, 10, 10), Cell(1, "dense", 9, 9, 10, 10))  # F1 12/18 and 18/28


def both(folder: Path) -> list[Path]:
    """A small MoE and a small dense model."""
    return [release(folder / "small-moe.csv.gz", MOE), release(folder / "small-dense.csv.gz", DENSE)]
