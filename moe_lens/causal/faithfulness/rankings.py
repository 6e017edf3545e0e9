"""Which units matter most? Scores of every routed expert, each a function of documents: ``rank(...)``.

A new ranking from routing sums is one line of `FROM_VISITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.causal.faithfulness.correlation import spearman
from moe_lens.causal.faithfulness.measure import Measured, edit_maker
from moe_lens.causal.faithfulness.scores import top_jaccard
from moe_lens.causal.faithfulness.sets import ranked
from moe_lens.causal.screen import screen
from moe_lens.errors import BadConfig, OutOfRange, nearest
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

    from moe_lens.causal.effects import Effects
    from moe_lens.causal.faithfulness.kept import KeptSets
    from moe_lens.causal.faithfulness.visits import Visits

RANDOM, GRADIENT, LEAVE_ONE_OUT = "random", "gradient", "leave_one_out"


def _per_visit(total: Float[ndarray, "unit"], load: Float[ndarray, "unit"]) -> Float[ndarray, "unit"]:
    return np.divide(total, load, out=np.full(len(load), np.nan), where=load > 0)


def _document_mean(v: Visits, sums: Float[ndarray, "document unit"], times: Float[ndarray, "document"]) -> ndarray:
    return (times / np.maximum(v.n_tokens, 1)) @ sums / max(times.sum(), 1)


FROM_VISITS: dict[str, Callable[[Visits, ndarray], ndarray]] = {
    "load": lambda v, t: t @ v.load,
    "gate_mass": lambda v, t: t @ v.mass,
    "gate_norm": lambda v, t: t @ v.weighted_norm,
    "reap": lambda v, t: _per_visit(t @ v.weighted_norm, t @ v.load),
    "ean": lambda v, t: _per_visit(t @ v.norm, t @ v.load),
    "max_activation": lambda v, t: v.peak[t > 0].max(0),
    "esft_gate": lambda v, t: _document_mean(v, v.mass, t),
    "esft_token": lambda v, t: _document_mean(v, v.load / v.slots, t),
}
"""Rankings made of routing sums, by name; `t` says how often each document counts.

gate_norm is the sum of g ||f||, reap its mean per visit (REAP), ean the mean ||f||, max_activation the largest
|component| of an output, esft_gate and esft_token the mean over documents of the mean gate and of the share of a
token's slots (ESFT; its released script divides by sums over layers, this does not).
"""
KNOWN = (*FROM_VISITS, GRADIENT, LEAVE_ONE_OUT, RANDOM)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of all units; the highest come first."""

    name: str
    of: Callable[[Float[ndarray, "document"]], Float[ndarray, "unit"]] = field(repr=False)
    """Scores, given how often each document of the ranking text counts."""
    n_documents: int
    from_documents: bool = True
    """False where scores were given and cannot be recomputed."""

    @property
    def score(self) -> Float[ndarray, "unit"]:
        return self.of(np.ones(self.n_documents))


def is_file(name: str) -> bool:
    """Whether a ranking is given as a file."""
    return name.lower().endswith(".csv")


def check_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of rankings and paths of CSV files, without repeats.

    Raises:
        BadConfig: an unknown name, a missing file, or nothing to score.
    """
    given = [names] if isinstance(names, str) else names
    found = tuple(dict.fromkeys(name if is_file(name) else name.replace("-", "_") for name in given))
    for name in found:
        if is_file(name) and not Path(name).is_file():
            raise BadConfig(f"{name} is not there: give the path of a CSV with layer, expert, score")
        if not is_file(name) and name not in KNOWN:
            raise BadConfig(f"unknown ranking {name!r}{nearest(name, KNOWN)}: use {', '.join(KNOWN)} or a CSV file")
    called = [_name(name) for name in found]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise BadConfig(f"two rankings would be called {twice!r}: rename the file")
    if not set(found) - {RANDOM}:
        raise BadConfig("random is the control of other rankings: name one more, such as load")
    return found


def rank(
    names: Sequence[str],
    effects: Effects,
    v: Visits,
    *,
    member: Bool[ndarray, "unit"] | None = None,
    kept: KeptSets | None = None,
) -> dict[str, Ranking]:
    """Score all units on the ranking text.

    ``random`` is a control and gives nothing here. leave_one_out is by zero.

    Args:
        member: units that leave_one_out zeroes, one at a time; the others get NaN. None means all.
        kept: effects of single units that an earlier process measured.

    Raises:
        BadConfig: an unknown ranking, or a CSV that is none.
        OutOfRange: a CSV that names an expert the model does not have.
    """
    found: dict[str, Ranking] = {}
    n = len(v.n_tokens)
    for name in check_names(names):
        if name in FROM_VISITS:
            found[name] = Ranking(name, lambda t, make=FROM_VISITS[name]: make(v, t), n)
        elif name == GRADIENT:
            rises = screen(effects).by_document
            found[name] = Ranking(name, lambda t, rises=rises: rises @ t, n)
        elif name == LEAVE_ONE_OUT:
            rises = _leave_one_out(effects, v, member, kept)
            found[name] = Ranking(name, lambda t, rises=rises: rises @ t, n)
        elif name != RANDOM:
            score = read_scores(Path(name), v.units)
            found[_name(name)] = Ranking(_name(name), lambda _t, s=score: s, n, from_documents=False)
    return found


def check_files(names: Sequence[str], units: Sequence[ExpertAddress]) -> None:
    """Read the files among `names` before any pass.

    Raises:
        BadConfig, OutOfRange: as `read_scores`.
    """
    for name in names:
        if name not in KNOWN:
            read_scores(Path(name), units)


def _name(given: str) -> str:
    return given if given in KNOWN else Path(given).stem


def read_scores(path: Path, units: Sequence[ExpertAddress]) -> Float[ndarray, "unit"]:
    """A user's ranking: a CSV with the columns layer, expert, score. Experts that it leaves out come last.

    Raises:
        BadConfig: missing columns, a score that is no number, or an expert named twice.
        OutOfRange: an expert that the model does not have.
    """
    try:
        table = pd.read_csv(path)
        if missing := [name for name in ("layer", "expert", "score") if name not in table]:
            raise ValueError(f"it has no column {missing[0]}")
        rows = table[["layer", "expert", "score"]].astype({"layer": int, "expert": int, "score": float})
    except Exception as error:  # whatever pandas makes of the file
        why = str(error).strip().partition("\n")[0]
        raise BadConfig(f"{path} is no ranking ({why}): give a CSV with the columns layer, expert, score") from error
    if rows["score"].isna().any() or not len(rows):
        raise BadConfig(f"{path} has {int(rows['score'].isna().sum())} of {len(rows)} scores empty: give numbers")
    at = {(unit.layer, unit.expert): i for i, unit in enumerate(units)}
    score = np.full(len(units), np.nan)
    for layer, expert, value in rows.itertuples(index=False):
        if (layer, expert) not in at:
            raise OutOfRange(f"{path} ranks L{layer}.E{expert}, which is no routed expert of the model: remove it")
        if not np.isnan(score[at[layer, expert]]):
            raise BadConfig(f"{path} ranks L{layer}.E{expert} twice: keep one row")
        score[at[layer, expert]] = value
    return score


def _leave_one_out(
    effects: Effects, v: Visits, member: Bool[ndarray, "unit"] | None, kept: KeptSets | None
) -> Float[ndarray, "unit document"]:
    """Rise of the NLL summed over the predictions of each document."""
    maker = edit_maker("zero", v.units, v.layer, reference=None, effects=effects)
    measured = Measured(effects, v.units, {"zero": maker}, quantities=(), kept=kept)
    single = np.eye(len(v.units), dtype=bool)
    chosen = np.arange(len(v.units)) if member is None else np.flatnonzero(member)
    measured.run((("zero", single[unit]) for unit in chosen), describe="leave one out")
    rises = np.full((len(v.units), len(measured.documents)), np.nan)
    for unit in chosen:
        rises[unit] = measured.of("zero", single[unit]).nll
    return rises


def stability(rankings: Sequence[Ranking], *, share: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """Does a ranking come out alike from two random halves of the documents? (METRICS 5)

    Columns: ranking, spearman over all units, top_jaccard of the highest `share` of them, n_top, n_documents. NaN for
    given scores and for fewer than 4 documents. A stable ranking need not be a faithful one: load is very stable.
    """
    rows = []
    for ranking in rankings:
        n = ranking.n_documents
        row = {"ranking": ranking.name, "spearman": np.nan, "top_jaccard": np.nan, "n_top": 0, "n_documents": n}
        if ranking.from_documents and n >= 4:
            half = np.isin(np.arange(n), np.random.default_rng(seed).permutation(n)[: n // 2])
            a, b = (ranking.of(times.astype(np.float64)) for times in (half, ~half))
            n_top = max(1, round(share * len(a)))
            row["spearman"] = float(spearman(*(np.nan_to_num(x, nan=-np.inf) for x in (a, b))))
            row["top_jaccard"] = top_jaccard(ranked(a)[:n_top], ranked(b)[:n_top])
            row["n_top"] = n_top
        rows.append(row)
    return pd.DataFrame(rows)
