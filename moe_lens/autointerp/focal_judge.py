"""``make_judge("openai:MODEL", cache=...)``: a language model as the judge of a trial (METRICS 3).

1. The items of a label are dealt into prompts in the words of ``prompts/detection.md``, as many to a prompt and in
   the same kind of order as where labels are scored (`scoring.judge.deal`): it depends on their texts and the seed
   alone, not on the order in which they come.
2. A prompt holds the label and texts with one token marked each. Which expert is on trial, where it is visited and
   how many of the items are visits is not said.
3. Of a reply that cannot be used, and of one that never came, the items have no grade.

From a grade of `FITS` on, a label holds of a token.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd

from moe_lens.autointerp.endpoint import RULE, Clients, Name, check_name, read_name
from moe_lens.autointerp.labels import KEY
from moe_lens.autointerp.prompts import load_prompt, marked
from moe_lens.autointerp.replies import Outcome
from moe_lens.autointerp.scoring.judge import PER_PROMPT, deal, fit_request, grades
from moe_lens.autointerp.scoring.resampled import FITS
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.autointerp.client import Request

__all__ = ["FITS", "PER_PROMPT", "FocalJudge", "make_judge"]
_UNASKED = (Outcome.FAILED, Outcome.BUDGET)


def make_judge(
    name: str,
    *,
    base_url: str | None = None,
    cache: Path | None,
    concurrency: int = 16,
    timeout: float = 60,
    max_calls: int | None = None,
    token_budget: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FocalJudge:
    """The judge that goes by `name`. Its key is read from ``OPENAI_API_KEY``; nobody is called yet.

    Args:
        name: ``openai:MODEL``, or ``gguf:FILE`` for a file that is served on loopback from the first call on.
        base_url: such as ``http://localhost:8000/v1``; by default ``OPENAI_BASE_URL``, or OpenAI itself.
        cache: sqlite file of replies, the same for several judges if need be. A run that was killed repeats no call
            whose reply is in it. None keeps none.
        concurrency: requests on their way at a time.
        timeout: seconds to wait for one reply.
        max_calls, token_budget: calls, and tokens of prompts and replies, after which no call is made.
        seed: of the order of items.

    Raises:
        BadConfig: another kind of name, a key that is missing or impossible, a file that cannot be served, or a
            setting that cannot be used.
    """
    found = read_name(name, option="--judge", without_model=RULE)
    if found.kind == RULE:
        raise BadConfig("rules judge by themselves: leave judge= out, or name a model as openai:MODEL or gguf:FILE")
    check_name(found, base_url)
    clients = Clients(
        base_url=base_url,
        cache=cache,
        max_calls=max_calls,
        token_budget=token_budget,
        concurrency=concurrency,
        timeout=timeout,
    )
    if found.kind != "gguf":
        clients.of(found)  # refuses settings now; a local file would be loaded
    return FocalJudge(found, clients, seed=seed, progress=progress)


class FocalJudge:
    """Grades marked tokens. A local server that it started stops with ``with`` or `close`, or with the process.

    ``answers`` counts items: ok, abstained (the model answered null), unmarked (the token has no characters: nobody
    is asked), and those of ``replies.Outcome`` where the reply to the whole prompt was of no use.
    """

    def __init__(self, name: Name, clients: Clients, *, seed: int = 0, progress: bool = True) -> None:
        self._name, self._clients = name, clients
        self._seed, self._progress = seed, progress
        self.answers: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """``openai:MODEL`` or ``gguf:FILE``."""
        return str(self._name)

    def __call__(self, items: pd.DataFrame) -> Float[ndarray, "item"]:
        """Grades from 0 to 4 in the order of the rows, NaN where there is none.

        Args:
            items: ``layer, expert, facet, label`` say which rows are about the same label; ``context`` is the text
                around a token and ``start, end`` are the characters of the token in it. Other columns are not read.

        Raises:
            BadConfig: a wrong key, address or model, no credit.
            NoServer: the server answered none of the requests so far.
            BadOutput: the cache of replies cannot be read.
            WriteFailed: it cannot be written.

        Does not show where a label holds, but where a language model says so. A judge that is the labeller as well
        shares its blind spots, and reads 32 tokens where the expert could see all that came before.
        """
        found = np.full(len(items), np.nan)
        questions = self._questions(items)
        self.answers["unmarked"] += len(items) - sum(len(asked) for asked, _ in questions)
        if not questions:
            return found
        client = self._clients.of(self._name)
        replies = client.ask_all([request for _, request in questions], progress=self._progress, describe="judge")
        self._clients.check()
        for (asked, _), reply in zip(questions, replies, strict=True):
            given = grades(reply, len(asked))
            found[asked] = [grade for grade, _ in given]
            self.answers.update(outcome for _, outcome in given)
        return found

    def _questions(self, items: pd.DataFrame) -> list[tuple[Sequence[int], Request]]:
        """Rows of `items`, and the request about them."""
        prompt = load_prompt("detection")
        rows = items[[*KEY, "label", "context", "start", "end"]].rename(columns={"context": "text"})
        rows = rows.assign(item=np.arange(len(rows)), positive=False)  # what is a visit, nobody here knows
        rows = rows[(rows["start"] >= 0) & (rows["end"] > rows["start"])]
        texts = zip(rows["text"], rows["start"], rows["end"], strict=True)
        rows["shown"] = [marked(*text) for text in texts]
        return [
            (dealt["item"].tolist(), fit_request(prompt, str(label), dealt["shown"].tolist()))
            for (*_, label), mine in rows.groupby([*KEY, "label"])
            for dealt in deal(mine, PER_PROMPT, self._seed)
        ]

    @property
    def outcomes(self) -> dict[str, int]:
        """Requests by outcome."""
        return self._clients.outcomes

    @property
    def failures(self) -> dict[str, int]:
        """Failed requests by cause."""
        return self._clients.failures

    @property
    def spent(self) -> dict[str, int]:
        """Calls made and tokens of them, in this process."""
        return self._clients.spent

    @property
    def complete(self) -> bool:
        """Whether every request had a reply. If not, the same run asks the rest once more, for what is in the cache."""
        return not any(self.outcomes.get(outcome, 0) for outcome in _UNASKED)

    def close(self) -> None:
        """Stop the local server, if there is one."""
        self._clients.__exit__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
