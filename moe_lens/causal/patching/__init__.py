"""Patching: which experts carry the difference between two prompts (``ml.patch``, METRICS 2.3).

`prompts` (tokens, alignment, target against foil) -> `copies` (one prompt many times, patched otherwise in each copy)
         -> `plan` (experts, layers, positions, coalitions, controls) -> `run` (`patch`) -> `result` (`Patching`)
"""
