"""Figures of the comparison with a dense model, drawn from its tables alone (plotly, imported on the first call).

============  ======================================================================================
waterfall     where the gap goes, step by step
against_k     mean score of the best probe against the number of neurons
scatter       one dot per concept, dense against MoE
============  ======================================================================================
"""

from moe_lens.probing.figures.against_k import against_k
from moe_lens.probing.figures.scatter import scatter
from moe_lens.probing.figures.waterfall import waterfall

__all__ = ["against_k", "scatter", "waterfall"]
