"""``make bench``: what capture, probing, labelling, ablation and trials cost, as ratios inside one run.

One thread a side; some fifteen minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import torch
from ablating import ablating_cost
from capturing import capture_cost, exemplar_cost, true_width_layer, wide_model
from labelling import labelling_cost
from probing import probing_cost
from sklearn.exceptions import ConvergenceWarning
from timing import seconds
from trying import trying_cost

import moe_lens as ml
from moe_lens.corpus.batches import tokenize
from moe_lens.corpus.concepts import concepts_for


def start_up() -> dict[str, float]:
    """Seconds of ``import moe_lens`` and ``moe-lens --help``, the fastest of five whole processes."""
    found = {}
    for name, command in {
        "import": [sys.executable, "-c", "import moe_lens"],
        "help": [sys.executable, "-m", "moe_lens", "--help"],
        "python": [sys.executable, "-c", "pass"],
    }.items():
        found[name] = min(seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(5))  # noqa: B023
        print(f"start-up: {name:7s} {found[name]:.2f} s", flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # counted and printed instead
    lens, corpus = ml.load("bundled:tiny-moe"), ml.corpus("bundled:")
    tokenized = tokenize(corpus, lens.tokenizer, concepts_for(corpus, None), limit_tokens=60_000)
    results: dict[str, object] = {
        "start_up": start_up(),
        "bundled": capture_cost(lens, tokenized, "bundled:tiny-moe"),
    }
    fifty_eight = tokenize(corpus, lens.tokenizer, concepts_for(corpus, None)[:58], limit_tokens=60_000)
    results["wide"] = capture_cost(wide_model(), fifty_eight, "2-layer OLMoE, H 512, 64 experts, top-8, d_ff 256")
    results["exemplars"] = {
        "bundled": exemplar_cost(lens, "bundled:tiny-moe", n_batches=16),
        "true width": exemplar_cost(true_width_layer(), "one layer of OLMoE-1B-7B, bfloat16", n_batches=1, rounds=3),
    }
    results["labelling"] = labelling_cost(lens, corpus)
    results["probing"] = probing_cost(lens, tokenized)
    results["ablating"] = ablating_cost(tokenized)
    results["trying"] = trying_cost(lens, corpus)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
