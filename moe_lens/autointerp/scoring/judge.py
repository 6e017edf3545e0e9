"""``judge(client, labels, items)``: a language model says which marked tokens a label fits, from 0 to 4.

1. Items of a label: all kinds but ``moved`` for detection, positives and ``moved`` for fuzzing (METRICS 1.6).
2. They are dealt into prompts of at most `per_prompt`, in an order that depends on their texts and the seed alone.
   Each prompt holds both classes as far as there are enough, in proportions left to chance, so that neither place
   nor count tells the judge anything. Two marks in one text go into different prompts, of which there are two then.
3. A prompt holds the label and the marked texts, nothing else: not the layer, the expert, its score or the kind.
4. A reply that cannot be used leaves all items of its prompt without a score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from moe_lens.autointerp.client import Reply, Request
from moe_lens.autointerp.labels import KEY, usable
from moe_lens.autointerp.prompts import Prompt, load_prompt, marked, plain
from moe_lens.autointerp.replies import Outcome, ReplySchema
from moe_lens.autointerp.scoring.items import MOVED
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.autointerp.client import Client

Scorer = Literal["detection", "fuzz"]

ANSWER_COLUMNS = (*KEY, "scorer", "control", "item", "score", "outcome")
PER_PROMPT = 20
ABSTAINED = "abstained"
"""Outcome of an item that the judge could not tell; the others are those of ``replies.Outcome``."""


class JudgeQuestion(NamedTuple):
    """One prompt about one label. The prompt's numbers 1, 2, ... are those of `items` in turn."""

    layer: int
    expert: int
    facet: int
    items: Sequence[int]
    request: Request


def judge_requests(
    labels: pd.DataFrame, items: pd.DataFrame, *, scorer: Scorer, per_prompt: int = PER_PROMPT, seed: int = 0
) -> list[JudgeQuestion]:
    """What a judge is asked, label by label. ``Client.predict`` says what the requests would cost.

    Args:
        labels: as from ``label_frame``; rows without a label are passed over.
        items: as from ``make_items``.
        scorer: detection or fuzz.
        per_prompt: items in one prompt, at most; a label's prompts are of equal size, give or take one.
        seed: of the order.

    Raises:
        BadConfig: another scorer, or `per_prompt` below 2.
    """
    if scorer not in ("detection", "fuzz"):
        raise BadConfig(f"there is no judge {scorer!r}: give detection or fuzz")
    if per_prompt < 2:
        raise BadConfig(f"per_prompt={per_prompt}: give 2 or more, one item of each class")
    prompt = load_prompt(scorer)
    prompts_of = {at: deal(rows, per_prompt, seed) for at, rows in _judged(items, scorer).groupby(["layer", "expert"])}
    questions = []
    for layer, expert, facet, label in usable(labels)[[*KEY, "label"]].itertuples(index=False, name=None):
        for rows in prompts_of.get((layer, expert), ()):
            request = fit_request(prompt, label, rows["shown"].tolist())
            questions.append(JudgeQuestion(layer, expert, facet, rows["item"].tolist(), request))
    return questions


def fit_request(prompt: Prompt, label: str, shown: Sequence[str]) -> Request:
    """How well `label` fits each of the marked texts `shown`, which go by the numbers 1, 2, ..."""
    numbers = range(1, len(shown) + 1)
    items = [{"id": number, "text": text} for number, text in zip(numbers, shown, strict=True)]
    return Request(prompt.render(label=plain(label), items=items), ReplySchema.answers(numbers))


def judge(
    client: Client,
    labels: pd.DataFrame,
    items: pd.DataFrame,
    *,
    scorer: Scorer,
    control: str = "none",
    per_prompt: int = PER_PROMPT,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The judge's answers, a row per label and item: ``ANSWER_COLUMNS``.

    ``score`` is 0 to 4, NaN where there is none: ``outcome`` is then abstained (the judge answered null) or says
    what was wrong with the reply to the whole prompt (invalid, refused, failed, budget, ...).

    Args: as ``judge_requests``; `control` is what the table says about the labels: none, or shuffled for those that
        ``controls.shuffled`` gave to other experts.

    Raises:
        BadConfig: a setting that cannot be used; a wrong key, address or model.
        BadOutput: the cache of replies cannot be read.
        WriteFailed: it cannot be written.

    A judge shares its blind spots with a labeller of the same model; its answers are not a person's.
    """
    questions = judge_requests(labels, items, scorer=scorer, per_prompt=per_prompt, seed=seed)
    requests = [question.request for question in questions]
    replies = client.ask_all(requests, progress=progress, describe=scorer)
    rows = [
        (question.layer, question.expert, question.facet, scorer, control, item, score, outcome)
        for question, reply in zip(questions, replies, strict=True)
        for item, (score, outcome) in zip(question.items, grades(reply, len(question.items)), strict=True)
    ]
    return answer_frame(rows)


def answer_frame(rows: Sequence[tuple[object, ...]]) -> pd.DataFrame:
    """A table of answers (``ANSWER_COLUMNS``), sorted by label and item."""
    frame = pd.DataFrame(rows, columns=list(ANSWER_COLUMNS))
    frame = frame.astype({**dict.fromkeys((*KEY, "item"), "int64"), "score": "float32"})
    return frame.sort_values([*KEY, "item"], ignore_index=True)


def grades(reply: Reply, n: int) -> list[tuple[float, str]]:
    """Score and outcome of every item of a prompt."""
    if reply.status is not Outcome.OK:
        return [(np.nan, str(reply.status))] * n
    scores = reply.value.scores
    found = [scores[number] for number in range(1, n + 1)]
    return [(np.nan, ABSTAINED) if score is None else (float(score), str(Outcome.OK)) for score in found]


def _judged(items: pd.DataFrame, scorer: Scorer) -> pd.DataFrame:
    """The items that a scorer asks about, with what is shown of them."""
    moved, positive = items["negatives"] == MOVED, items["negatives"] == ""
    rows = items[~moved] if scorer == "detection" else items[moved | positive]
    texts = zip(rows["text"], rows["char_start"], rows["char_end"], strict=True)
    shown = [marked(*text) for text in texts]
    return rows[["layer", "expert", "item", "text"]].assign(shown=shown, positive=positive[rows.index])


def deal(rows: pd.DataFrame, per_prompt: int, seed: int) -> list[pd.DataFrame]:
    """The items of one expert in prompts, each in the order in which they are shown.

    Args:
        rows: ``item, text, shown`` (the text with its mark), and ``positive``, so that each prompt gets some of both.
    """
    rows = rows.sort_values(["shown", "item"])
    content = "\n".join(rows["shown"]).encode()
    rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(content).digest()[:8])])
    text = rng.permutation(rows["text"].nunique())[pd.factorize(rows["text"])[0]]
    order = np.lexsort((rng.permutation(len(rows)), text))  # marks in the same text are neighbours
    n_prompts = max(-(-len(rows) // per_prompt), 2 if rows["text"].duplicated().any() else 1)
    prompt = np.empty(len(rows), np.int64)
    prompt[order] = rng.permutation(n_prompts)[np.arange(len(rows)) % n_prompts]
    prompt = _with_both_classes(prompt, rows["positive"].to_numpy(bool), rng)
    return [rows.iloc[rng.permutation(np.flatnonzero(prompt == number))] for number in range(n_prompts)]


def _with_both_classes(
    prompt: Int[ndarray, "item"], positive: Bool[ndarray, "item"], rng: np.random.Generator
) -> Int[ndarray, "item"]:
    """`prompt`, items exchanged until each prompt holds both classes, or as many as there are enough items for."""
    prompt = prompt.copy()
    for wanted in (positive, ~positive):
        counts = np.bincount(prompt, weights=wanted, minlength=prompt.max(initial=-1) + 1)
        for poor in np.flatnonzero(counts == 0):
            rich = int(counts.argmax())
            if counts[rich] < 2:
                break
            given = rng.choice(np.flatnonzero((prompt == rich) & wanted))
            taken = rng.choice(np.flatnonzero((prompt == poor) & ~wanted))
            prompt[given], prompt[taken] = poor, rich
            counts[[poor, rich]] += (1, -1)
    return prompt
