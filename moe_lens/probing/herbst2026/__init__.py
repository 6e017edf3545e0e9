"""``--protocol herbst2026``: the probing protocol of arXiv 2604.02178 as its released code runs it (METRICS 1.3).

Its numbers stay in tables of their own, because tokens, split and selection are others than in the rest of moe-lens:

    1. `sampling`: texts of 300 characters; all tokens that overlap a match, as many others of the same text.
    2. `cells`: in every (layer, expert) a shuffled 75/25 split of its routed tokens, the k neurons of largest mean
       difference, a logistic regression on raw features, F1 on the 25 %.
    3. `result`: the best cell by that very F1, and what else could have produced it.

Where this is not the source's code to the letter
    The regular expressions of `corpus.source58` are ours; text is what the user gives, not the Pile.
    One forward pass serves the texts of all concepts; the source runs each concept, and each text twice. The tokens
    sampled are those of a source run with one concept (``-c NAME``); with ``-c all`` its random numbers run on
    from one concept to the next.
    Probes are fitted to the optimum. The source stops saga after 500 steps, converged or not: on cells of the bundled
    MoE it always is at k=1 and in a fifth of the fits at k=64, and F1 differs by .001 and .007 on average.
    Texts longer than the model reads are cut at the end, and a k above the width of an expert is refused.
    Its hooks fail on several families and feed gpt-oss and pythia other features than the paper says; these are
    the paper's neurons everywhere: the input of the down-projection, not weighted by the router.
"""

from moe_lens.probing.herbst2026.protocol import herbst2026
from moe_lens.probing.herbst2026.result import Herbst2026

__all__ = ["Herbst2026", "herbst2026"]
