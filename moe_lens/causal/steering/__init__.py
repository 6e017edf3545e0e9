"""Steering (METRICS 3 item 8): generate with experts suppressed, forced or biased, beside experts of like load.

=============  ======================================================================================
prompts        texts and conversations as token ids
direction      which experts are pushed which way, and what the model allows
meter          next-token KL(clean || steered) along the clean texts
strength       bisection to a common KL
controls       experts of the same layer with like load and gate mass
score          how much of a text a pattern covers; log-probability of a text
contrast       steered against controls: difference, interval over prompts, rank p
run            ``steer(...)``; `result` holds ``Steering``, `figure` its plots
=============  ======================================================================================
"""
