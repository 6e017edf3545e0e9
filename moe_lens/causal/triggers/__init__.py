"""Trigger-target cases (METRICS 3, preamble): does an expert raise a target after a trigger, as its label says?

=============  ======================================================================================
cases          reading them, trigger and target among the tokens, defects of each case
direct         the clean model: routing at the trigger, direct logit attribution, its rank, matched controls
measure        ablation at the trigger alone: the expert, experts chosen beside it, matched controls
statistics     experts from cases: intervals over texts, p, q, outcome
run            ``trigger_target(...)``; `result` holds ``Triggers``
=============  ======================================================================================
"""
