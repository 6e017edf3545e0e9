"""Reads one CSV of the probing tables released with arXiv 2604.02178 into a tidy frame.

A released file holds the probes of one model: a row per (concept, layer, expert, k), the scores on the test
tokens, and the counts of both classes *before* the 75/25 token split. ``Not Enough Samples`` stands in the score
columns of a cell that was not fitted.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.errors import MoELensError
from moe_lens.stats import f1_always_positive, f1_balanced
from moe_lens.types import Role, Status

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

SCORES = ("f1", "recall", "precision")
COUNTS = ("num_positive", "num_negative")
COLUMNS = ("concept", "layer", "expert", "k", *SCORES, *COUNTS)
DENSE = "dense"
NOT_FITTED = ("Not Enough Samples", "", "nan", "NaN")
ROUNDING = 2e-3
"""How far a stored F1 may be from that of the stored recall and precision."""
KEY = ["concept", "layer", "expert", "k"]


class BadPublishedTable(MoELensError):
    """A file that is not one of the released probing tables."""


def read_table(path: Path) -> tuple[pd.DataFrame, str]:
    """The tidy rows of one released file, compressed or not, and the file's sha256.

    Columns: model (the file's name), role, concept, layer, expert, k, n_pos, n_neg (before the split), n_test,
    n_pos_test, tp, fp, prevalence, f1, f1_always_positive, f1_balanced, precision, recall, status.

    Raises:
        BadPublishedTable: unreadable, another format, impossible values, or repeated rows.
    """
    raw, sha256 = _rows(path)
    counts = {name: _whole_numbers(raw[name], path) for name in ("layer", "k", *COUNTS)}
    scores = {name: _scores(raw[name], path) for name in SCORES}
    role, expert = _experts(raw["expert"], path)
    n_pos, n_neg = (counts[name] for name in COUNTS)
    n_pos_test, n_neg_test = split_counts(n_pos, n_neg, scores["recall"], scores["precision"])
    with np.errstate(divide="ignore", invalid="ignore"):
        pi = n_pos / (n_pos + n_neg)
        false_positive_rate = false_positives(scores["recall"] * pi, scores["precision"]) / (1 - pi)
    tp = scores["recall"] * n_pos_test
    frame = pd.DataFrame(
        {
            "model": path.name.removesuffix(".gz").removesuffix(".csv"), "role": role.value,
            "concept": raw["concept"].to_numpy(), "layer": counts["layer"], "expert": expert, "k": counts["k"],
            "n_pos": n_pos, "n_neg": n_neg, "n_test": n_pos_test + n_neg_test, "n_pos_test": n_pos_test,
            "tp": tp, "fp": false_positives(tp, scores["precision"]), "prevalence": pi, "f1": scores["f1"],
            "f1_always_positive": f1_always_positive(pi),
            "f1_balanced": np.where(scores["recall"] == 0, 0.0, f1_balanced(scores["recall"], false_positive_rate)),
            "precision": scores["precision"], "recall": scores["recall"],
            "status": np.where(np.isnan(scores["f1"]), Status.TOO_FEW.value, Status.OK.value),
        }
    )  # fmt: skip
    _check_rates(frame, path)
    if not (frame["status"] == Status.OK.value).any():
        raise BadPublishedTable(f"{path} holds no fitted probe: give a table with scores")
    twice = int(frame.duplicated(KEY).sum())
    if twice:
        raise BadPublishedTable(f"{path} repeats {twice} of its rows: give one row per {', '.join(KEY)}")
    return frame, sha256


def false_positives(tp: Float[ndarray, "row"], precision: Float[ndarray, "row"]) -> Float[ndarray, "row"]:
    """``tp (1 - P) / P``, in the unit of `tp`; NaN at precision 0, where nothing says how many there were."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(precision > 0, tp * (1 - precision) / precision, np.nan)


def split_counts(
    n_pos: Int[ndarray, "row"],
    n_neg: Int[ndarray, "row"],
    recall: Float[ndarray, "row"],
    precision: Float[ndarray, "row"],
) -> tuple[Int[ndarray, "row"], Int[ndarray, "row"]]:
    """Positives and negatives among the test tokens of the source's stratified 75/25 split.

    scikit-learn's ``train_test_split(test_size=.25, stratify=y)`` puts ``ceil(n / 4)`` rows into the test part and
    rounds the classes of the training part by largest remainder; equal remainders are drawn. Then the counts that
    make true and false positives whole numbers are the right ones; where both do, the training part gets the
    positive, as nearly always in the released files.

    Does not show the counts of a table made with another split: there they are an estimate, within one token of
    a quarter of each class.
    """
    n = n_pos + n_neg
    n_test = -(-n // 4)
    floor, remainder = np.divmod(n_pos * (n - n_test), n)
    fewer, more = n_pos - floor - 1, n_pos - floor

    def fits(n_pos_test: Int[ndarray, "row"]) -> ndarray:
        tp = np.nan_to_num(recall) * n_pos_test
        fp = np.nan_to_num(false_positives(tp, precision))
        return (np.abs(tp - np.rint(tp)) < 1e-6) & (np.abs(fp - np.rint(fp)) < 1e-6)

    drawn = np.where(fits(fewer) | ~fits(more), fewer, more)
    n_pos_test = np.where(2 * remainder == n, drawn, np.where(2 * remainder > n, fewer, more))
    return n_pos_test, n_test - n_pos_test


def _rows(path: Path) -> tuple[pd.DataFrame, str]:
    """The file as text columns, whatever its suffix says about compression."""
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        raw = pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False, encoding="utf-8")
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise _damaged(path) from error
        raise BadPublishedTable(f"cannot read {path}: {error.strerror or error}; give a readable .csv.gz") from error
    except (EOFError, zlib.error) as error:
        raise _damaged(path) from error
    except (ValueError, pd.errors.ParserError) as error:  # not UTF-8, empty, ragged rows
        raise BadPublishedTable(f"{path} is no CSV: give a released .csv or .csv.gz as it was downloaded") from error
    missing = [name for name in COLUMNS if name not in raw]
    if missing:
        raise BadPublishedTable(
            f"{path} is no released probing table, it has no column {', '.join(missing)}: "
            f"give a .csv or .csv.gz with {', '.join(COLUMNS)}"
        )
    if not len(raw):
        raise BadPublishedTable(f"{path} holds no row: give a table with at least one probe")
    return raw, hashlib.sha256(data).hexdigest()


def _damaged(path: Path) -> BadPublishedTable:
    return BadPublishedTable(f"{path} is a damaged gzip file: download it again")


def _whole_numbers(column: pd.Series, path: Path) -> Int[ndarray, "row"]:
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    least = 1 if column.name == "k" else 0
    _refuse(column, ~((values >= least) & (values == np.floor(values)) & np.isfinite(values)), path, "a whole number")
    return values.astype(np.int64)


def _scores(column: pd.Series, path: Path) -> Float[ndarray, "row"]:
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    known = (values >= 0) & (values <= 1)
    _refuse(column, ~(known | column.isin(NOT_FITTED).to_numpy()), path, f"a number from 0 to 1 or {NOT_FITTED[0]!r}")
    return values


def _check_rates(frame: pd.DataFrame, path: Path) -> None:
    """Refuse fitted rows that no probe can have produced."""
    both = (frame["n_pos"] > 0) & (frame["n_neg"] > 0)
    p, r = frame["precision"], frame["recall"]
    agrees = ((frame["f1"] - (2 * p * r / (p + r)).fillna(0)).abs() <= ROUNDING) & ((p > 0) == (r > 0))
    wrong = ((frame["status"] == Status.OK.value) & ~(both & agrees)).to_numpy()
    if wrong.any():
        raise BadPublishedTable(
            f"{path} has scores in row {int(np.argmax(wrong)) + 2} that its recall, precision and counts rule out: "
            f"give the table as it was released"
        )


def _experts(column: pd.Series, path: Path) -> tuple[Role, Int[ndarray, "row"]]:
    dense = (column == DENSE).to_numpy()
    if dense.all():
        return Role.DENSE, np.zeros(len(column), np.int64)
    if dense.any():
        raise BadPublishedTable(f"{path} mixes dense layers with experts: give one model a file")
    return Role.MOE, _whole_numbers(column, path)


def _refuse(column: pd.Series, wrong: ndarray, path: Path, expected: str) -> None:
    if wrong.any():
        at = int(np.argmax(wrong))
        raise BadPublishedTable(
            f"{path} has {column.iloc[at]!r} as {column.name} in row {at + 2}: write {expected}, or give another file"
        )
