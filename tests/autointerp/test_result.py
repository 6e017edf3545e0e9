"""What ``Labels`` says about its tables."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from moe_lens.autointerp.labels import label_frame
from moe_lens.autointerp.result import Labels
from moe_lens.autointerp.scoring.metrics import SCORE_COLUMNS, SUMMARY_COLUMNS
from moe_lens.errors import BadOutput, OutOfRange


def scores(*rows: tuple[int, float, float, float]) -> pd.DataFrame:
    """Expert, AUROC, that of the pair table, lower end of the margin; the headline of a rule."""
    places = {"labeller": "lexical", "layer": 0, "facet": 0, "scorer": "rule", "scorer_model": "", "same_model": False}
    filled = [
        {**places, "negatives": "same_token", "control": "none", "status": "ok", "expert": expert, "auroc": auroc,
         "ci_low": auroc - 0.1, "ci_high": auroc + 0.1, "bigram": bigram, "unigram": 0.5,
         "margin_bigram": auroc - bigram, "margin_bigram_low": low, "n_abstain": 0}
        for expert, auroc, bigram, low in rows
    ]  # fmt: skip
    return pd.DataFrame(filled, columns=list(SCORE_COLUMNS))


def means(*rows: dict) -> pd.DataFrame:
    base = {"labeller": "lexical", "scorer": "rule", "negatives": "same_token", "control": "none"}
    base |= {
        "n_experts": 2,
        "auroc": 0.7,
        "ci_low": 0.6,
        "ci_high": 0.8,
        "unigram": 0.5,
        "bigram": 0.55,
        "n_above_bigram": 1,
    }
    return pd.DataFrame([base | row for row in rows], columns=list(SUMMARY_COLUMNS))


@pytest.fixture
def labels() -> Labels:
    named = [{"layer": 0, "expert": e, "label": f"label <{e}>", "labeller": "lexical"} for e in (0, 1)]
    silent = {"layer": 0, "expert": 2, "labeller": "lexical", "status": "abstained", "why": "nothing separates"}
    return Labels(
        labels=label_frame([*named, silent]),
        scores=scores((0, 0.8, 0.5, 0.1), (1, 0.6, 0.6, -0.2)),
        summary=means({}, {"control": "shuffled", "auroc": 0.51}),
        answers=pd.DataFrame(),
        exemplars=pd.DataFrame(),
    )


def test_every_label_has_a_row_and_only_scored_ones_a_number(labels: Labels) -> None:
    frame = labels.frame
    assert frame["address"].tolist() == ["L0.E0", "L0.E1", "L0.E2"]
    assert frame["auroc"].fillna(-1).tolist() == [0.8, 0.6, -1]


def test_the_finding_names_what_would_give_the_same_number(labels: Labels) -> None:
    said = labels.finding()
    for part in ("2 of 3 experts have a label (lexical)", "mean AUROC of 0.700 [0.600, 0.800]", "token pairs 0.550",
                 "of tokens 0.500", "another expert's label 0.510",
                 "1 of 2 surely predict routing better"):  # fmt: skip
        assert part in said
    assert "wrote them" not in said


def test_a_model_that_judges_itself_is_named(labels: Labels) -> None:
    own = Labels(labels.labels, labels.scores.assign(same_model=True), labels.summary, labels.answers, labels.exemplars)
    assert "rule, the model that wrote them, which favours them, gives" in own.finding()


def test_without_scores_there_is_no_number(labels: Labels) -> None:
    empty = Labels(labels.labels, scores(), means()[:0], labels.answers, labels.exemplars)
    assert "but none could be scored on tokens of the same id" in empty.finding()
    assert empty.frame["auroc"].isna().all()
    figure: Any = empty.plot()
    assert len(figure.data) == 0


def test_the_figure_counts_only_labels_that_are_surely_better(labels: Labels) -> None:
    figure: Any = labels.plot()
    assert "1 of 2 labels" in figure.layout.title.text.replace("<br>", " ")
    assert [tuple(dots.y) for dots in figure.data[1:]] == [(0.8, 0.6)]


def test_labels_are_text_in_a_page(labels: Labels) -> None:
    assert "label &lt;0&gt;" in labels._repr_html_()
    assert "label <0>" not in labels._repr_html_()


def test_one_label_by_address(labels: Labels) -> None:
    assert labels.label("L0.E1") == "label <1>"
    assert labels.label("0:2") is None
    with pytest.raises(OutOfRange, match=r"L5\.E0 was not labelled"):
        labels.label("L5.E0")
    with pytest.raises(BadOutput, match="pass out="):
        labels["L0.E1"]


def test_counts_and_plain_values(labels: Labels) -> None:
    assert labels.counts == {"ok": 2, "abstained": 1}
    found = labels.to_dict()
    assert found["run"] is None
    assert [row["address"] for row in found["labels"]] == ["L0.E0", "L0.E1", "L0.E2"]
