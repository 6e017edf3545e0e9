"""Labels on trial (METRICS 3): does a label say where its expert is visited, and is the expert needed there?

=============  ======================================================================================
claims         labels as claims, checked; ``Case``: what a judge said of one at every token
judge          tokens that a rule or concept marks; what a ``Judge`` object is
hearing        claims before the judge: which tokens it is asked about, agreement of two judges
nulls          false labels that stand trial beside the real ones
matching       experts of like load: controls, strata, samples
measured       one expert under one ablation mode, and an expert chosen beside it at the same tokens
kept           finished measurements in a folder, for a trial that was killed
cells          tokens by (marked, routed): contrasts, AUROCs, lift, specificity
need           need and exclusivity with intervals and p from a bootstrap over documents
assignment     do labels fit their own experts better than others? one p a layer
verdict        the rule, in its order; q; shares with Wilson intervals
table          one row per label and mode
run            ``validate(...)``; `result` holds ``Trial``
=============  ======================================================================================
"""
