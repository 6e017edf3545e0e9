"""``label_scores(...)``: what answers say about labels, beside what the token id alone would score (METRICS 1.6).

1. Each label, scorer and control is scored once for every kind of negatives, on the items that were judged.
2. Against ``same_token``, positives and negatives are matched: of each token id as many on either side, so that
   every function of the token id alone scores AUROC .5 exactly.
3. AUROC of the graded answers; that of the unigram and bigram baselines on the very same items; the margins.
4. Intervals: documents are drawn with replacement, the same draws for all experts and scores, so that margins, means
   over experts and the difference from shuffled labels are paired.

Where a yes or no is needed, grades of 3 and 4 are yes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.autointerp.labels import KEY
from moe_lens.autointerp.scoring.items import NEGATIVES
from moe_lens.autointerp.scoring.resampled import JUDGES, Resampled
from moe_lens.errors import BadConfig
from moe_lens.stats.classification import Confusion, f1_always_positive
from moe_lens.stats.resampling import document_multiplicities, percentile_interval
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

EMBEDDING = "embedding"
"""The scorer whose scores are similarities: they order items, and no threshold says "fits"."""
NO_CONTROL, SHUFFLED = "none", "shuffled"
_MARGINS = tuple(f"margin_{name}{end}" for name in JUDGES[1:] for end in ("", "_low", "_high"))
SCORE_COLUMNS = (
    "labeller", *KEY, "scorer", "scorer_model", "same_model", "negatives", "control", "n_pos", "n_neg", "n_abstain",
    "n_documents", "balanced_accuracy", "auroc", "f1", "f1_always_yes", "ci_low", "ci_high", "unigram", "bigram",
    *_MARGINS, "coverage", "purity", "status",
)  # fmt: skip
_NAME = ("labeller", "scorer", "negatives", "control")
SUMMARY_COLUMNS = (
    *_NAME, "n_experts", "auroc", "ci_low", "ci_high", "unigram", "bigram", *_MARGINS, "n_above_unigram",
    "n_above_bigram", "n_abstained", "over_shuffled", "over_shuffled_low", "over_shuffled_high",
)  # fmt: skip


def binary_scores(
    truth: Bool[ndarray, "row problem"],
    answer: Bool[ndarray, "row problem"],
    used: Bool[ndarray, "row problem"] | None = None,
) -> pd.DataFrame:
    """Scores of yes-or-no answers, one row per problem.

    Columns ``n_pos, n_neg, precision, recall, false_positive_rate, balanced_accuracy, f1, f1_always_yes``. What is
    undefined is NaN, but precision without a yes is 0.

    Args:
        used: rows that belong to each problem, all by default.

    F1 does not show anything without ``f1_always_yes``, F1 of the answer yes to the same items: 2/3 if half of them
    are positive.
    """
    return _binary(Confusion.count(np.asarray(answer, bool), np.asarray(truth, bool), used))


def _binary(counts: Confusion) -> pd.DataFrame:
    columns = {"n_pos": counts.tp + counts.fn, "n_neg": counts.fp + counts.tn}
    columns |= {name: getattr(counts, name) for name in ("precision", "recall", "false_positive_rate")}
    columns |= {"balanced_accuracy": counts.balanced_accuracy, "f1": counts.f1}
    columns |= {"f1_always_yes": f1_always_positive(counts.prevalence)}
    return pd.DataFrame(columns).astype({"n_pos": np.int64, "n_neg": np.int64})


@dataclass(frozen=True)
class Mean:
    """Mean over the labels that one scorer could score, with its draws. The three are `JUDGES`."""

    name: tuple[str, str, str, str]
    """Labeller, scorer, kind of negatives, control."""
    auroc: Float[ndarray, "judge"]
    draws: Float[ndarray, "judge draw"]
    over_shuffled: float = np.nan
    """Mean over experts of real minus shuffled label."""
    over_shuffled_draws: Float[ndarray, "draw"] | None = None


@dataclass(frozen=True)
class Scores:
    """``frame`` is label_scores.parquet; ``means`` are what `summary` is made of."""

    frame: pd.DataFrame
    means: tuple[Mean, ...]


def label_scores(
    items: pd.DataFrame,
    answers: pd.DataFrame,
    labels: pd.DataFrame,
    baselines: pd.DataFrame,
    scorer_model: Mapping[str, str] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Scores:
    """Scores of labels, one row per (labeller, layer, expert, facet, scorer, negatives, control) (METRICS 1.6).

    Columns
        ``scorer_model``, and ``same_model``: the model that judges also wrote the label. ``n_pos, n_neg`` judged
        items, ``n_abstain`` items without an answer, which no number counts; ``n_documents`` of the judged items.
        ``auroc`` with ``ci_low, ci_high`` (95 %, over documents); ``balanced_accuracy``, ``f1``, and ``f1_always_yes``
        of a judge that says yes to these items; NaN for embeddings, which have no threshold. ``unigram, bigram``:
        AUROC of the baselines on these items; ``margin_*``: label minus baseline with paired intervals. Where
        negatives are random: ``coverage``, the share of positives that fit, and ``purity``, the share of routed
        tokens among all that fit, at the expert's natural rate. ``status``: too_few below 5 judged items or 3
        documents on either side; then there is no number but the counts.

    Kinds of negatives of which a scorer was asked no item have no row.

    Args:
        items: as from ``make_items``; more items than were answered do no harm.
        answers: as in ``label_answers.parquet``; of all scorers and controls.
        labels: as in ``labels.parquet``; the real labels, also where answers are about shuffled ones.
        baselines: as from ``Baselines.scores``.
        scorer_model: model of each scorer, by its name in `answers`.
        draws: bootstrap draws.
        seed: of the draws, and of which items are left out to match token ids.

    Raises:
        BadConfig: two answers of one scorer to one item about one label, or answers to items or about experts that
            are not in the tables.

    A score shows that a label foretells which tokens are routed to the expert, on this text, among the kinds of
    tokens that were sampled: not what the expert does with them, nor that the model needs it (that takes an ablation),
    nor that the label is the best or the only one. With 20 items a side, an AUROC of .7 is two standard errors from
    chance (.092 each, more if documents are alike); of a hundred worthless labels some two or three have an interval
    above .5. Where every draw agrees, as at AUROC 1, the interval has no width and still is not certainty.
    Token ids are matched once, not in every draw: on same_token the unigram table is at .5, and moves a little between
    draws, which makes its margin's interval somewhat wide.
    ``coverage`` is of positives of which half are spread evenly over the score, not of all routed tokens.
    """
    rows = _judged(items, answers, labels, baselines, seed)
    documents, rows["document"] = np.unique(rows["document"].to_numpy(np.int64), return_inverse=True)
    times = document_multiplicities(max(len(documents), 1), draws, seed=seed)[:, : len(documents)]
    times = np.ascontiguousarray(times.T, np.float32)
    frames, means = [], []
    for (labeller, scorer), mine in rows.groupby(["labeller", "scorer"]):
        model = str((scorer_model or {}).get(str(scorer), ""))
        for negatives in NEGATIVES:
            found = {
                str(control): Resampled.of(part, negatives, times)
                for control, part in mine.groupby("control")
                if (part["negatives"] == negatives).any()
            }
            for control, scored in found.items():
                name = str(labeller), str(scorer), negatives, control
                frame = _frame(scored, graded=scorer != EMBEDDING, at_random=negatives == "random")
                frames.append(frame.assign(**dict(zip(_NAME, name, strict=True)), scorer_model=model))
                means.append(_mean(name, scored, found.get(SHUFFLED) if control == NO_CONTROL else None))
    if not frames:
        return Scores(pd.DataFrame(columns=list(SCORE_COLUMNS)), ())
    frame = pd.concat(frames, ignore_index=True)
    written = labels.drop_duplicates(["layer", "expert"]).set_index(["layer", "expert"])["model_id"]
    by = written.loc[pd.MultiIndex.from_frame(frame[["layer", "expert"]])].to_numpy()
    frame["same_model"] = (frame["scorer_model"] == by) & (frame["scorer_model"] != "")
    order = ["labeller", *KEY, "scorer", "control"]
    return Scores(frame[list(SCORE_COLUMNS)].sort_values(order, kind="stable", ignore_index=True), tuple(means))


def _judged(
    items: pd.DataFrame, answers: pd.DataFrame, labels: pd.DataFrame, baselines: pd.DataFrame, seed: int
) -> pd.DataFrame:
    """One row per answer: what `Resampled.of` needs, ``labeller``, ``scorer`` and ``control``.

    Raises:
        BadConfig: see `label_scores`.
    """
    if answers.duplicated([*KEY, "scorer", "control", "item"]).any():
        raise BadConfig("one scorer has two answers to the same item: score the answers of two models one by one")
    about = items[["layer", "expert", "item", "negatives", "token_id", "document"]]
    about = about.assign(turn=_turn(items, seed)).merge(baselines, on="item")
    rows = answers[[*KEY, "scorer", "control", "item", "score"]].merge(about, on=["layer", "expert", "item"])
    who = labels[["layer", "expert", "labeller"]].drop_duplicates(["layer", "expert"])
    rows = rows.merge(who, on=["layer", "expert"])
    if len(rows) < len(answers):
        raise BadConfig(
            f"{len(answers) - len(rows)} answers are about other items or experts than those given: pass the tables "
            "of items, baselines and labels that the answers were made with"
        )
    return rows


def _turn(items: pd.DataFrame, seed: int) -> ndarray:
    """A random order of the items, in which an expert's items do not depend on which others are in the table."""
    place = items[["layer", "expert", "document", "window_char", "position", "negatives"]]
    return pd.util.hash_pandas_object(place.assign(seed=seed), index=False).to_numpy()


def _frame(scored: Resampled, *, graded: bool, at_random: bool) -> pd.DataFrame:
    """The columns of the table that are numbers."""
    frame = scored.table.drop(columns=["base_rate", "enough"])
    binary = _binary(scored.confusion)
    for name in ("balanced_accuracy", "f1", "f1_always_yes"):
        frame[name] = binary[name] if graded else np.nan
    frame["coverage"] = frame["purity"] = np.nan
    if graded and at_random:
        frame["coverage"] = binary["recall"]
        routed = scored.table["base_rate"] * binary["recall"]
        frame["purity"] = routed / (routed + (1 - scored.table["base_rate"]) * binary["false_positive_rate"])
    frame[list(JUDGES)] = scored.auroc
    frame = frame.rename(columns={"score": "auroc"})
    frame["ci_low"], frame["ci_high"] = percentile_interval(scored.draws[:, 0].T)
    for judge, name in enumerate(JUDGES[1:], start=1):
        frame[f"margin_{name}"] = frame["auroc"] - frame[name]
        low_high = percentile_interval((scored.draws[:, 0] - scored.draws[:, judge]).T)
        frame[f"margin_{name}_low"], frame[f"margin_{name}_high"] = low_high
    enough = scored.table["enough"]
    numbers = ["balanced_accuracy", "f1", "f1_always_yes", "coverage", "purity"]
    frame.loc[~enough, numbers] = np.nan
    frame["status"] = np.where(enough, str(Status.OK), str(Status.TOO_FEW))
    return frame


def _mean(name: tuple[str, str, str, str], scored: Resampled, shuffled: Resampled | None) -> Mean:
    if shuffled is None:
        return Mean(name, *scored.mean())
    return Mean(name, *scored.mean(), *scored.mean_over(shuffled))


def summary(scores: Scores) -> pd.DataFrame:
    """Means over experts, one row per (labeller, scorer, negatives, control).

    Columns
        ``n_experts`` with a score (in facets mode their facets are averaged as if each were an expert's label);
        mean ``auroc`` with its interval over documents; means of ``unigram, bigram`` and of the margins;
        ``n_above_unigram, n_above_bigram``: experts of which a label has a margin whose interval lies above 0;
        ``n_abstained`` items, positives included; ``over_shuffled``: mean AUROC of the real minus the shuffled label,
        over experts that have both, with its interval; NaN in rows that are a control or have none.

    The intervals speak of these experts on other documents, not of other experts. Some 2.5 % of experts are above a
    baseline that is just as good by chance alone; experts with too few items are left out, and they are the rare ones.
    """
    rows = []
    for mean in scores.means:
        mine = scores.frame
        for column, value in zip(_NAME, mean.name, strict=True):
            mine = mine[mine[column] == value]
        row: dict[str, Any] = dict(zip(_NAME, mean.name, strict=True))
        row |= {"n_experts": _n_experts(mine, mine["status"] == str(Status.OK)), "n_abstained": mine["n_abstain"].sum()}
        row |= dict(zip(("auroc", *JUDGES[1:]), mean.auroc, strict=True))
        row["ci_low"], row["ci_high"] = percentile_interval(mean.draws[0])
        for judge, name in enumerate(JUDGES[1:], start=1):
            margin = f"margin_{name}"
            row[margin] = mean.auroc[0] - mean.auroc[judge]
            row[f"{margin}_low"], row[f"{margin}_high"] = percentile_interval(mean.draws[0] - mean.draws[judge])
            row[f"n_above_{name}"] = _n_experts(mine, mine[f"{margin}_low"] > 0)
        row["over_shuffled"] = mean.over_shuffled
        if mean.over_shuffled_draws is not None:
            row["over_shuffled_low"], row["over_shuffled_high"] = percentile_interval(mean.over_shuffled_draws)
        rows.append(row)
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def _n_experts(rows: pd.DataFrame, which: pd.Series) -> int:
    return len(rows.loc[which, ["layer", "expert"]].drop_duplicates())
