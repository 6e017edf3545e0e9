"""``equal_random_tokens`` and ``equal_router_tokens``: the same search in both models (METRICS 1.3, item 4).

scores = equal_candidates(lens, baseline, tokenized, tokenized_baseline, settings)   # run: reads both models
joint = equal_arms(scores, times)                                                    # arms: for `compare(joint=...)`

pairing   which experts, neurons and tokens stand against which
rows      the activations of both models on one split, and what a pair of cells may use of them
probes    rank, fit and score one cell
"""

from moe_lens.probing.equal.arms import equal_arms
from moe_lens.probing.equal.run import equal_candidates
from moe_lens.probing.equal.scores import CHOICES, EqualScores

__all__ = ["CHOICES", "EqualScores", "equal_arms", "equal_candidates"]
