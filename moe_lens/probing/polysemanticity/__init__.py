"""Polysemanticity of single neurons, MoE and dense (METRICS 1.4).

========  ===========================================================================================
auroc     AUROC of every neuron by ranks and one product, with documents as clusters
groups    concepts that agree form one group
cells     which rows every cell is scored on: equally many in both models
neurons   participation ratio, detected groups, selectivity of every neuron
compare   MoE against dense, matched on firing rate, jackknife over folds of documents
measure   the whole of it: ``polysemanticity(lens, tokenized, baseline=...)``
result    ``Polysemanticity``; its figure is in ``figure``
========  ===========================================================================================
"""

from moe_lens.probing.polysemanticity.auroc import neuron_aurocs
from moe_lens.probing.polysemanticity.groups import concept_groups
from moe_lens.probing.polysemanticity.measure import polysemanticity
from moe_lens.probing.polysemanticity.result import Polysemanticity

__all__ = ["Polysemanticity", "concept_groups", "neuron_aurocs", "polysemanticity"]
