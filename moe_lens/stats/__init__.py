"""Statistics on plain numpy arrays; no model, no torch.

================  =====================================================================================
classification    confusion counts, F1, AUROC and average precision of many problems at once
resampling        bootstrap over whole documents (and concept groups), percentile and BCa intervals
testing           permutation p-values, max-T, Holm, Benjamini-Hochberg, Wilson intervals
power             null standard error of AUROC, smallest detectable AUROC and paired effect
================  =====================================================================================
"""

from moe_lens.stats.classification import Confusion, f1_always_positive, f1_balanced, ranking_scores
from moe_lens.stats.power import (
    auroc_null_se,
    design_effect,
    detectable_auroc,
    detectable_effect,
    documents_needed,
)
from moe_lens.stats.resampling import (
    Bootstrap,
    average_over_groups,
    bca_interval,
    cluster_bootstrap,
    document_multiplicities,
    document_weights,
    percentile_interval,
)
from moe_lens.stats.testing import benjamini_hochberg, holm, max_t, permutation_p, wilson_interval

__all__ = [
    "Bootstrap",
    "Confusion",
    "auroc_null_se",
    "average_over_groups",
    "bca_interval",
    "benjamini_hochberg",
    "cluster_bootstrap",
    "design_effect",
    "detectable_auroc",
    "detectable_effect",
    "document_multiplicities",
    "document_weights",
    "documents_needed",
    "f1_always_positive",
    "f1_balanced",
    "holm",
    "max_t",
    "percentile_interval",
    "permutation_p",
    "ranking_scores",
    "wilson_interval",
]
