"""What language models would be asked, before anything is captured: calls and input tokens by task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_lens.autointerp.client import TEXTS_PER_CALL
from moe_lens.autointerp.exemplars import NEGATIVES
from moe_lens.autointerp.explain import N_NEGATIVE, N_POSITIVE
from moe_lens.autointerp.score import CONTROL_KINDS
from moe_lens.autointerp.scoring.judge import PER_PROMPT
from moe_lens.capture.exemplars import CONTEXT
from moe_lens.config import prompts_dir

if TYPE_CHECKING:
    from moe_lens.autointerp.endpoint import Name
    from moe_lens.autointerp.pipeline import Asked

BYTES_PER_TOKEN = 4
"""Near for English prose; code and other scripts have up to twice as many tokens."""
_LABEL_TOKENS, _ANSWER_TOKENS = 60, 15
_FRAME_TOKENS = 12
"""Number, mark and strength that stand around a context."""


@dataclass(frozen=True)
class Cost:
    """Calls to one model for one task. Second questions after an unusable reply come on top."""

    task: str
    model: str
    calls: int
    tokens_in: int
    tokens_out: int


def costs(
    asked: Asked,
    n_experts: int,
    n_labels: int,
    *,
    items: int,
    fuzz: bool,
    control: bool,
    facets: int,
    bytes_per_token: float,
) -> list[Cost]:
    """Largest cost by task: every expert used, every label written, nothing in the cache.

    Args:
        n_labels: that scorers judge; facets count one by one.
        bytes_per_token: UTF-8 bytes of the text per token of the model under study, whose tokens make a context.

    Tokens are rough: replies are taken to have 60 for a label and 15 for each judged token, and texts that are no
    English prose can have twice as many as predicted.
    """
    context = math.ceil(CONTEXT * bytes_per_token / BYTES_PER_TOKEN) + _FRAME_TOKENS
    found = []
    if asked.labeller is not None and asked.labeller.model:
        task = "facets" if facets else "explain"
        size = _template_tokens(task) + (N_POSITIVE + N_NEGATIVE) * context
        n_replies = n_experts * max(1, facets)
        found.append(Cost(task, str(asked.labeller), n_experts, n_experts * size, n_replies * _LABEL_TOKENS))
    for scorer in asked.scorers:
        for task, n_items in _judged(scorer, items, fuzz=fuzz, control=control):
            if scorer.kind == "embedding":
                calls, size = math.ceil(n_labels * n_items / TEXTS_PER_CALL), n_labels * n_items * context
                found.append(Cost(task, str(scorer), calls, size, 0))
                continue
            # the two marks of one context go into different prompts
            calls = n_labels * max(2 if task == "fuzz" else 1, math.ceil(n_items / PER_PROMPT))
            size = calls * _template_tokens(task.split()[0]) + n_labels * n_items * context
            found.append(Cost(task, str(scorer), calls, size, n_labels * n_items * _ANSWER_TOKENS))
    return found


def _judged(scorer: Name, items: int, *, fuzz: bool, control: bool) -> Iterator[tuple[str, int]]:
    """Tasks of a model as scorer, and items per label."""
    if scorer.kind == "embedding":
        yield "embedding", items * (2 + len(NEGATIVES))
    if scorer.kind not in ("openai", "gguf"):
        return
    yield "detection", items * (1 + len(NEGATIVES))
    if fuzz:
        yield "fuzz", items * 2
    if control:
        yield "detection (another expert's label)", items * len(CONTROL_KINDS)


def _template_tokens(task: str) -> int:
    """Size of a prompt without examples."""
    return math.ceil((prompts_dir() / f"{task}.md").stat().st_size / BYTES_PER_TOKEN)
