"""What a trial of labels costs: 32 labels of the bundled MoE with every kind of false label, beside plain passes."""

from __future__ import annotations

import time

import torch

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.trial.job import text_of
from moe_lens.causal.trial.run import MAX_TOKENS
from moe_lens.corpus.text import Corpus
from moe_lens.models.lens import Lens

N_LABELS = 32


def trying_cost(lens: Lens, corpus: Corpus) -> dict[str, float]:
    """Seconds of the default trial on two threads (the goal is 120), and how many plain passes that is."""
    labels = ml.autointerp(lens, corpus, labeller="lexical", document_tokens=128, progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        begin = time.perf_counter()
        trial = ml.validate(lens, corpus, labels, n_labels=N_LABELS, progress=False)
        seconds = time.perf_counter() - begin
        plain = _plain_pass(lens, corpus)
    finally:
        torch.set_num_threads(threads)
    passes = N_LABELS * 2 * len(trial.settings["modes"])
    found = {"seconds": seconds, "plain_pass": plain, "plain_passes": seconds / plain, "passes": passes}
    print(
        f"trial: {N_LABELS} labels, {trial.settings['n_predictions']:,} predictions, {passes} ablated passes in "
        f"{seconds:.0f} s on two threads, the time of {found['plain_passes']:.0f} plain passes",
        flush=True,
    )
    return found


def _plain_pass(lens: Lens, corpus: Corpus) -> float:
    """Seconds of one forward pass with its loss over as many tokens, the faster of two."""
    text = text_of(lens, corpus, document_tokens=None, max_length=256, seed=0)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        Effects(lens, text, max_tokens=MAX_TOKENS, progress=False, max_memory=0)
        times.append(time.perf_counter() - begin)
    return min(times)
