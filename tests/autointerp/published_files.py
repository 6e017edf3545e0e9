"""Small files of the format in which arXiv 2604.02178 released labels and judgements, and a server that replays one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.autointerp.llm_server import Answer, Asked, answers, explanation

NO, YES = 0, 4
"""Grades that stand for the release's 0 and 1."""


def expert(
    number: int, label: str | None, truth: Sequence[int], answered: Sequence[int], metrics: Sequence[float]
) -> dict[str, Any]:
    """One expert of a full file. Its negatives are those of every other expert, its positives its own.

    Args:
        metrics: recall, precision, F1, accuracy.
    """
    snippets = [f" own** text** {number}.{i}" if yes else f" shared** text** {i}" for i, yes in enumerate(truth)]
    listed = "".join(
        f'<example id="{i}">\n    <snippet>{text}</snippet>\n</example>' for i, text in enumerate(snippets, start=1)
    )
    shown = "".join(f'<example id="{i}">\n    <snippet>\n    x\n    </snippet>\n</example>\n' for i in (1, 2))
    names = ("recall", "precision", "f1_score", "accuracy")
    return {
        "hypothesis": label,
        "explainer_prompt": f"<context>Expert {number}.\n</context>\n<data>\n{shown}</data>",
        "scores": list(answered),
        "labels": list(truth),
        "metrics": dict(zip(names, metrics, strict=True)),
        "scorer_prompt": f"<hypothesis>\n{label or 'No hypothesis'}\n</hypothesis>\n<examples>\n{listed}\n</examples>",
    }


HALF = (1, 0, 1, 0)
FULL = {
    "0": expert(0, "Closing brackets.", HALF, (1, 0, 1, 0), (1.0, 1.0, 1.0, 1.0)),
    "1": expert(1, "Everything.", HALF, (1, 1, 1, 1), (1.0, 0.5, 2 / 3, 0.5)),
    "2": expert(2, "Nothing.", HALF, (0, 0, 0, 0), (0.0, 0.0, 0.0, 0.5)),
    "3": expert(3, "One of\n  three.", HALF, (1, 1, 0, 1), (0.5, 1 / 3, 0.4, 0.25)),
    "4": expert(4, None, HALF, (), (0.0, 0.0, 0.0, 0.0)),
}


def write_full(folder: Path, content: Mapping[str, Any] = FULL, *, name: str = "Small-MoE_L9") -> Path:
    """A file of one layer, with prompts."""
    path = folder / f"{name}_auto_interp.json"
    path.write_text(json.dumps(content))
    return path


def write_summary(folder: Path, layers: Mapping[str, Mapping[str, Any]]) -> Path:
    """The file of all layers, without prompts."""
    path = folder / "labels_and_scores.json"
    short = {
        place: {at: {name: entry[name] for name in ("hypothesis", "scores", "labels", "metrics")}
                for at, entry in content.items()}
        for place, content in layers.items()
    }  # fmt: skip
    path.write_text(json.dumps(short))
    return path


class Replay:
    """What the source's language model said, to whoever sends its prompts again; other prompts are turned down.

    Where the release has no hypothesis or no answers, the server refuses, as content filters do.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._said = {}
        for entry in content.values():
            label = entry["hypothesis"]
            self._said[entry["explainer_prompt"]] = None if label is None else explanation(label)
            grades = {i: YES if score else NO for i, score in enumerate(entry["scores"], start=1)}
            self._said[entry["scorer_prompt"]] = answers(grades) if grades else None

    def __call__(self, asked: Asked) -> Answer:
        if asked.last not in self._said:
            return Answer.error(404, "this prompt is not in the release")
        said = self._said[asked.last]
        return Answer(None, refusal="blocked") if said is None else Answer(said)
