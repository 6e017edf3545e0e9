"""``moe-lens autointerp --from-published FILE``: released labels and judgements beside their nulls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lens.errors import BadConfig


def show(file: Path, flags: Mapping[str, Any], *, json: bool) -> None:
    """Print the released scores, layer by layer, with always-yes and intervals beside them.

    Raises:
        BadConfig: an option that does not go with released labels, or no file of the released format.
    """
    from moe_lens.autointerp.published import published_controls, published_finding, published_scores
    from moe_lens.cli import terminal

    for name in (name for name, value in flags.items() if value not in (None, [], False)):
        raise BadConfig(f"--from-published reads finished labels: leave out --{name.replace('_', '-')}")
    controls, scores = published_controls(file), published_scores(file)
    finding = published_finding(scores)
    if json:
        found = {"finding": finding, "layers": controls.to_dict("records"), "labels": scores.to_dict("records")}
        terminal.print_json(found)
        return
    rows = [
        [
            row["model"],
            str(row["layer"]),
            str(row["n_experts"]),
            terminal.number(row["f1"]),
            terminal.interval(row["ci_low"], row["ci_high"]),
            terminal.number(row["f1_always_yes"]),
            str(row["n_no_better"]),
            str(row["n_ci_above"]),
        ]
        for row in controls.to_dict("records")
    ]
    terminal.table(
        "Released F1 of labels, mean over experts",
        ["model", ">layer", ">experts", ">F1", ">95 % interval", ">always yes", ">no better", ">above"],
        rows,
        note="no better: labels that score no more than a judge who always says yes; above: labels whose own 95 % "
        "interval, from 20 answers, lies above it",
    )
    terminal.say(finding)
