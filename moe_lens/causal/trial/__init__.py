"""Labels on trial (METRICS 3): does a label say where its expert is visited, and is the expert needed there?

=============  ======================================================================================
judge          tokens that a label marks: its rule, run on whole documents
nulls          false labels that stand trial beside the real ones
matching       experts of like load: controls, strata, samples
measured       one expert under one ablation mode, and an expert chosen beside it at the same tokens
cells          tokens by (marked, routed): contrasts, AUROCs, lift, specificity
need           need and exclusivity with intervals and p from a bootstrap over documents
assignment     do labels fit their own experts better than others? one p a layer
verdict        the rule, in its order; q; shares with Wilson intervals
table          one row per label and mode
run            ``validate(...)``; `result` holds ``Trial``
=============  ======================================================================================
"""
