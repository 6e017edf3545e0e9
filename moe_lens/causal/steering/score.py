"""What is scored: the share of a text that a pattern covers, or the log-probability of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.causal.steering.meter import Reading, predictions
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.causal.steering.prompts import Prompt
    from moe_lens.models.lens import Lens


@dataclass(frozen=True)
class Goal:
    """What to look for in texts: a pattern, or a text that might follow the prompt, or nothing."""

    pattern: re.Pattern[str] | None = None
    text: str | None = None

    def scores(self, lens: Lens, prompts: Sequence[Prompt], texts: Sequence[str]) -> Float[ndarray, "prompt"]:
        """Score of what was written after each prompt, for the model as it is now; NaN where nothing is looked for."""
        if self.text is not None:
            return log_p(lens, prompts, target_ids(lens, self.text))
        if self.pattern is not None:
            return np.array([covered(text, self.pattern) for text in texts])
        return np.full(len(texts), np.nan)


def goal_of(target: str | re.Pattern[str] | None, target_text: str | None) -> Goal:
    """What to score; the expression is compiled.

    Raises:
        BadConfig: two targets, an empty one, or an expression that does not compile.
    """
    if target is not None and target_text is not None:
        raise BadConfig("there are two targets: give a regular expression or a text, not both")
    if "" in (target, target_text):
        raise BadConfig("the target is empty: give at least one character")
    if target is None or isinstance(target, re.Pattern):
        return Goal(target, target_text)
    try:
        return Goal(re.compile(target))
    except re.error as error:
        raise BadConfig(f"the target {target!r} is no regular expression ({error}): correct or escape it") from error


def covered(text: str, pattern: re.Pattern[str]) -> float:
    """Share of the characters of `text` that lie in a match; 0 for an empty text."""
    return sum(match.end() - match.start() for match in pattern.finditer(text)) / max(len(text), 1)


def target_ids(lens: Lens, text: str) -> tuple[int, ...]:
    """Tokens of a target text, without special ones.

    Raises:
        BadConfig: it has none.
    """
    ids = tuple(lens.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise BadConfig(f"the target text {text!r} has no tokens: give another one")
    return ids


def log_p(lens: Lens, prompts: Sequence[Prompt], target: tuple[int, ...]) -> Float[ndarray, "prompt"]:
    """Mean log-probability of the target's tokens, nats, written right after each prompt.

    Runs the model as it is at the call, so inside `Lens.edit` it is that of the edited one.
    """
    readings = []
    for prompt in prompts:
        first = len(prompt.ids) - 1
        readings.append(Reading((*prompt.ids, *target), tuple(range(first, first + len(target)))))
    found = np.zeros(len(prompts))
    for number, log_probabilities in predictions(lens, readings):
        found[number] = float(log_probabilities[range(len(target)), list(target)].double().mean())
    return found
