"""``score_labels(...)``: every label before every scorer, beside its baselines and another expert's label.

Rules judge all items. Language models judge a sample of each kind, in the words of ``prompts/detection.md`` and
``prompts/fuzz.md``; of the control, only the kinds that the headline and the base rate need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.autointerp.endpoint import RULE, Clients, Name
from moe_lens.autointerp.labels import usable
from moe_lens.autointerp.scoring.baselines import Baselines
from moe_lens.autointerp.scoring.controls import shuffled
from moe_lens.autointerp.scoring.items import MOVED, make_items, sample_items
from moe_lens.autointerp.scoring.metrics import SHUFFLED, label_scores, summary
from moe_lens.autointerp.scoring.rule import rule_answers

if TYPE_CHECKING:
    from moe_lens.autointerp.captured import Captured

CONTROL_KINDS = ("", "same_token", "random")
"""Items on which a language model judges another expert's label."""
_PLACE = ["item", "negatives", "document", "window_char", "position", "token"]


@dataclass(frozen=True)
class Scoring:
    """What is judged, and how often the documents are drawn."""

    items: int = 20
    """Items of each kind and expert that a language model judges."""
    fuzz: bool = True
    control: bool = True
    draws: int = 1000
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scored:
    """``frame`` is label_scores.parquet, ``summary`` label_summary.parquet, ``answers`` label_answers.parquet."""

    frame: pd.DataFrame
    summary: pd.DataFrame
    answers: pd.DataFrame


def score_labels(
    captured: Captured,
    labels: pd.DataFrame,
    scorers: Sequence[Name],
    clients: Clients,
    scoring: Scoring,
    *,
    progress: bool = True,
) -> Scored:
    """Answers of all scorers and what they come to (METRICS 1.6).

    Raises:
        BadConcept: a rule that takes too long.
        BadConfig: a scorer's server that cannot be used.
    """
    labels = usable(labels)
    mine = captured.exemplars.merge(labels[["layer", "expert"]].drop_duplicates(), on=["layer", "expert"])
    every = make_items(mine, seed=scoring.seed)
    few = sample_items(every, scoring.items, seed=scoring.seed)
    answers = [
        part
        for scorer in scorers
        for part in _answers(scorer, captured, labels, every, few, clients, scoring, progress=progress)
    ]
    table = pd.concat(answers, ignore_index=True)
    items = every[every["item"].isin(table["item"])]
    baselines = Baselines.fit(captured.kept, captured.tokenized).scores(items, captured.tokenized)
    models = {kind: name.model for name in scorers for kind in _kinds(name)}
    scores = label_scores(items, table, labels, baselines, models, draws=scoring.draws, seed=scoring.seed)
    return Scored(scores.frame, summary(scores), table.merge(items[_PLACE], on="item"))


def _kinds(name: Name) -> tuple[str, ...]:
    """Values of the column `scorer` that this scorer gives rise to."""
    return (name.kind,) if name.kind in (RULE, "embedding") else ("detection", "fuzz")


def _answers(
    scorer: Name,
    captured: Captured,
    labels: pd.DataFrame,
    every: pd.DataFrame,
    few: pd.DataFrame,
    clients: Clients,
    scoring: Scoring,
    *,
    progress: bool,
) -> Iterator[pd.DataFrame]:
    """Answers about real and shuffled labels; `few` is the sample of items that models judge."""
    if scorer.kind == RULE:
        ruled = labels[labels["rule"].notna()]
        yield rule_answers(ruled, every, captured.tokenized, progress=progress)
        others = shuffled(ruled, seed=scoring.seed)
        yield rule_answers(others, every, captured.tokenized, control=SHUFFLED, progress=progress)
        return
    others = shuffled(labels, seed=scoring.seed) if scoring.control else labels[:0]
    for_others = few[few["negatives"].isin(CONTROL_KINDS)]
    client = clients.of(scorer)
    if scorer.kind == "embedding":
        from moe_lens.autointerp.scoring.embedding import embedding_answers

        yield embedding_answers(client, labels, few, progress=progress)
        yield embedding_answers(client, others, for_others, control=SHUFFLED, progress=progress)
        return
    from moe_lens.autointerp.scoring.judge import judge

    unmoved = few[few["negatives"] != MOVED]
    yield judge(client, labels, unmoved, scorer="detection", seed=scoring.seed, progress=progress)
    if scoring.fuzz:
        moved = few[few["negatives"].isin(("", MOVED))]
        yield judge(client, labels, moved, scorer="fuzz", seed=scoring.seed, progress=progress)
    yield judge(client, others, for_others, scorer="detection", control=SHUFFLED, seed=scoring.seed, progress=progress)
