"""What a `Trial` says about tables whose numbers we wrote: verdicts, finding, page, JSON and the two figures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens.causal.trial.result import Trial
from moe_lens.causal.trial.table import VALIDATION_COLUMNS
from moe_lens.cli import render_trial
from moe_lens.errors import OutOfRange

SETTINGS = {"model": "m", "corpus": "c", "n_predictions": 900, "n_documents": 40, "horizon": 1, "delta": 0.02}


def rows(expert: int, verdict: str, *, kind: str = "real", label: str = "digits", **more: Any) -> list[dict[str, Any]]:
    """One label under the two modes that vote, and under one that does not."""
    need = {"zero": 0.3, "mean_off": 0.2, "mean": 0.0} | more.pop("need", {})
    shared = {
        "label_kind": kind, "layer": 1, "expert": expert, "facet": 0, "label": label, "verdict": verdict,
        "exclusive": "exclusive", "basis": "co-selected", "load": 100 + expert, "lift": 2.0, "n_docs_z1r1": 33,
        "auroc_routing": 0.8, "auroc_routing_low": 0.7, "auroc_routing_high": 0.85, "contrast": 0.05,
        "exclusivity": 0.15, "exclusivity_low": 0.05, "exclusivity_high": 0.25, "abstained": 0.0, "q": 0.01,
        **more,
    }  # fmt: skip
    return [
        {**shared, "mode": mode, "need": value, "need_low": value - 0.1, "need_high": value + 0.1}
        for mode, value in need.items()
    ]


def trial(*labels: list[dict[str, Any]], **settings: Any) -> Trial:
    table = pd.DataFrame([row for label in labels for row in label]).reindex(columns=list(VALIDATION_COLUMNS))
    counts = [name for name in table if name.startswith(("n_", "load"))]
    return Trial(table.fillna(dict.fromkeys(counts, 0)), {**SETTINGS, **settings})


@pytest.fixture
def found() -> Trial:
    nothing = {"need": dict.fromkeys(("zero", "mean_off", "mean"), np.nan), "exclusivity": np.nan}
    return trial(
        rows(7, "underpowered", **nothing),
        rows(3, "supported", label="a | b\nand a very long label " + "x" * 90),
        rows(4, "routing-only", need={"zero": -0.01, "mean_off": 0.4}),
        rows(3, "supported", kind="topic", label="documents of x", specificity=0.04),
        rows(4, "refuted", kind="topic", label="documents of y"),
        rows(3, "undecided", kind="shuffled", label="noise"),
    )


def test_a_label_is_shown_in_the_mode_where_it_is_needed_least_among_those_that_vote(found: Trial) -> None:
    verdicts = found.verdicts.set_index("address")
    assert list(verdicts.index) == ["L1.E3", "L1.E4", "L1.E7"]  # supported first, underpowered last
    assert verdicts["mode"].iloc[:2].tolist() == ["mean_off", "zero"]
    assert verdicts["need"].iloc[:2].tolist() == [0.2, -0.01]


def test_the_finding_counts_every_label_and_the_false_ones(found: Trial) -> None:
    said = found.finding()
    assert said.startswith("1 of 3 labels on trial are supported")
    assert "(33%, 95 % interval 6% to 79%)" in said
    assert "1 routing-only, 0 refuted, 1 underpowered, 0 undecided" in said
    assert "of false labels supported: topic 1 of 2, shuffled 0 of 1." in said
    assert said.count(".") == said.count("L1.") + 1  # one sentence


def test_a_sample_is_declared_as_one(found: Trial) -> None:
    sample = Trial(found.frame, {**SETTINGS, "is_sample": True, "n_labels": 64})
    assert "(a sample of 64 labels that holds experts of all loads)" in sample.finding()
    assert "sample" not in found.finding()


def test_the_page_has_a_line_for_every_label_and_no_broken_cell(found: Trial) -> None:
    page = found.to_markdown()
    lines = [line for line in page.splitlines() if line.startswith("| L1.E")]
    assert [line.split(" | ")[0] for line in lines] == ["| L1.E3", "| L1.E4", "| L1.E7"] * 2
    assert "a \\| b and a very long label" in page
    assert "nan" not in page
    assert "| real | 1 | 1 | 0 | 0 | 1 | 33% [6%, 79%] |" in page


def test_statistics_that_a_trial_lacks_take_no_column(found: Trial) -> None:
    assert "kappa |" not in found.to_markdown()
    assert "kappa |" in trial(rows(3, "supported", kappa_judge=0.9)).to_markdown()


def test_json_holds_plain_values(found: Trial) -> None:
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["address"] for row in plain["labels"]] == ["L1.E3", "L1.E4", "L1.E7"]
    assert plain["labels"][2]["need"] is None
    assert len(plain["false_labels"]) == 3


def test_all_labels_with_a_number_are_in_the_plane_and_the_others_are_named(found: Trial) -> None:
    figure = found.plot()
    drawn = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data}
    assert drawn["supported (1)"] == [(0.8, pytest.approx(np.arcsinh(10)))]
    assert drawn["routing-only (1)"] == [(0.8, pytest.approx(np.arcsinh(-0.5)))]
    assert len(drawn["false labels (3)"]) == 3
    assert "underpowered" not in "".join(drawn)
    assert "1 without a number is left out" in figure.layout.title.subtitle.text
    ticks = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    assert ticks["20"] == pytest.approx(np.arcsinh(1))
    assert ticks["200"] == pytest.approx(np.arcsinh(10))


def test_a_plane_of_nothing_says_so() -> None:
    empty = trial(rows(7, "underpowered", need=dict.fromkeys(("zero", "mean_off", "mean"), np.nan)))
    assert "No label has enough tokens" in empty.plot().layout.title.text


def values(figure: Any, panel: int, *, is_open: bool) -> list[float]:
    """Needs of the real label in one panel, open or filled dots."""
    colour = "#FFFFFF" if is_open else "#0072B2"
    axis = "x" if panel == 1 else f"x{panel}"
    at = [t for t in figure.data if t.xaxis == axis and t.marker.color == colour and t.marker.line.color == "#0072B2"]
    return [float(x) for trace in at for x in trace.x]


def test_one_expert_is_drawn_inside_and_outside_its_label(found: Trial) -> None:
    figure = found.plot("L1.E3")
    assert values(figure, 1, is_open=False) == pytest.approx([300, 200])  # zero, mean_off; mean has no vote
    assert values(figure, 1, is_open=True) == pytest.approx([150, 50])
    names = figure.layout.yaxis.ticktext
    assert len(names) == 3
    assert "its label" in names[0]
    outside = next(t for t in figure.data if t.marker.color == "#FFFFFF" and t.marker.line.color == "#0072B2")
    low, high = outside.x[0] - outside.error_x.arrayminus[0], outside.x[0] + outside.error_x.array[0]
    assert (low, high) == pytest.approx((50, 250))  # need minus the bounds of the exclusivity


def test_experts_of_like_load_have_a_panel_where_there_are_any(found: Trial) -> None:
    titles = [found.plot("L1.E3").layout[f"xaxis{i}"].title.text for i in ("", 2, 3)]
    assert titles == ["need, mnat per token", "contrast, mnat per token", "routing AUROC"]
    figure = found.plot("L1.E4")
    assert figure.layout.xaxis2.title.text == "routing AUROC"
    assert "No expert of like load" in figure.layout.title.subtitle.text


def test_an_expert_that_was_not_on_trial_is_refused(found: Trial) -> None:
    with pytest.raises(OutOfRange, match=r"L0.E1 was not on trial"):
        found.plot("L0.E1")


def test_the_terminal_shows_one_line_a_label_and_the_rest_as_a_number(
    found: Trial, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_trial, "N_SHOWN", 2)
    render_trial.trial(found)
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("L1.")] == ["L1.E3", "L1.E4"]
    assert "1 more labels with --details" in " ".join(out.split())
    assert "200 [100, 300]" in out
    assert "a | b and a" in out
    assert "…" in out
    assert max(map(len, out.splitlines()[:8])) <= 100
