"""Label and score 64 experts over a server that takes 200 ms a reply: sixteen requests at a time against one."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from timing import show, timed

from moe_lens.autointerp.captured import Captured, CaptureSettings, capture_exemplars
from moe_lens.autointerp.client import Client
from moe_lens.autointerp.endpoint import Clients, Name
from moe_lens.autointerp.explain import explain
from moe_lens.autointerp.score import Scoring, score_labels
from moe_lens.autointerp.scoring.items import make_items, sample_items
from moe_lens.autointerp.scoring.judge import judge
from moe_lens.corpus.text import Corpus
from moe_lens.models.lens import Lens

sys.path.append(str(Path(__file__).parents[2]))
from tests.autointerp.llm_server import Answer, Asked, LLMServer, answers, explanation

LATENCY_S = 0.2
CONCURRENCY = 16
GOAL = 0.1
SEQUENTIAL_EXPERTS = 3
"""Experts that are asked about one request at a time; the seconds of all requests are scaled from theirs."""
SCORING = Scoring()


def labelling_cost(lens: Lens, corpus: Corpus) -> dict[str, float]:
    """Whole labelling and scoring either way: what is computed between requests is the same, and counted in both."""
    settings = CaptureSettings(layers=tuple(lens.spec.moe_layers), max_tokens=60_000)
    captured = capture_exemplars(lens, corpus, settings, batch_tokens=4096, run=None, progress=False)
    with LLMServer(_reply) as server, tempfile.TemporaryDirectory() as folder:
        first, alone, whole = (Path(folder) / name for name in ("first.sqlite", "alone.sqlite", "whole.sqlite"))
        _one_at_a_time(captured, 1, server.url, first)  # imports
        few, n_few = timed(lambda: _one_at_a_time(captured, SEQUENTIAL_EXPERTS, server.url, alone))
        together, (n_calls, n_experts) = timed(lambda: _together(captured, server.url, whole))
        computed, _ = timed(lambda: _together(captured, server.url, whole))  # every reply is in the cache
        most = server.most_at_once
    requests = few / n_few * n_calls
    ratios = {"ratio": together / (requests + computed), "ratio_of_requests": (together - computed) / requests}
    show(
        f"labelling: {n_experts} experts, {n_calls} requests of {LATENCY_S * 1000:.0f} ms",
        [
            ("prompts, scores and intervals, without requests", f"{computed:.1f} s", ""),
            (f"with requests one at a time ({n_few} measured, scaled)", f"{requests + computed:.1f} s", ""),
            (f"with {most} at a time", f"{together:.1f} s", ""),
            ("ratio", f"{ratios['ratio']:.3f}", f"{GOAL:.3f}"),
            (f"ratio of the requests alone (1/{CONCURRENCY} is {1 / CONCURRENCY:.3f})",
             f"{ratios['ratio_of_requests']:.3f}", ""),
        ],
    )  # fmt: skip
    return {"computed_s": computed, "requests_s": requests, "together_s": together} | ratios


def _together(captured: Captured, url: str, cache: Path) -> tuple[int, int]:
    """Calls made, and experts labelled."""
    name = Name("openai", "loopback")
    with Clients(
        base_url=url, cache=cache, max_calls=None, reply_tokens=None, concurrency=CONCURRENCY, timeout=60
    ) as clients:
        client = clients.of(name)
        labels = explain(client, captured.exemplars, captured.logit_lens, corpus_name="text", progress=False)
        score_labels(captured, labels, [name], clients, SCORING, progress=False)
        return _calls(client), len(labels)


def _one_at_a_time(captured: Captured, n_experts: int, url: str, cache: Path) -> int:
    """Calls made. They are of the kinds, and as long, as those of the whole."""
    client = Client("loopback", url, cache=cache, concurrency=1)
    exemplars = captured.exemplars
    experts = sorted(set(zip(exemplars["layer"], exemplars["expert"], strict=True)))[:n_experts]
    mine = exemplars[[at in experts for at in zip(exemplars["layer"], exemplars["expert"], strict=True)]]
    labels = explain(client, mine, captured.logit_lens, corpus_name="text", progress=False)
    items = sample_items(make_items(mine), SCORING.items)
    judge(client, labels, items, scorer="detection", progress=False)
    judge(client, labels, items, scorer="fuzz", progress=False)
    return _calls(client)


def _calls(client: Client) -> int:
    """Calls made.

    Raises:
        RuntimeError: a request got no usable reply, so the seconds would mean nothing.
    """
    if sum(client.counts.values()) != client.counts["ok"] + client.counts["cached"]:
        raise RuntimeError(f"requests without a usable reply: {client.counts}")
    return client.calls


def _reply(asked: Asked) -> Answer:
    items = re.search(r"each of the (\d+) items", asked.last)
    if items is None:
        return Answer(explanation(f"label {asked.number}"), delay=LATENCY_S)
    return Answer(answers({i: 3 * (i % 2) for i in range(1, int(items[1]) + 1)}), delay=LATENCY_S)


if __name__ == "__main__":
    import moe_lens as ml

    labelling_cost(ml.load("bundled:tiny-moe"), ml.corpus("bundled:"))
