"""Causal: what a model's predictions lose when experts are taken away (METRICS 2).

clean pass -> `replay` (run again from the layer an edit changes) -> `scoring` (logits, NLL, KL)
           -> `effects` (`Effects.of(edit)`) ; `screen` ranks the units that deserve an exact pass
`redundancy` of pairs ; rankings: `faithfulness` ; labels: `trial` ; cases: `triggers` ; two prompts: `patching` ;
generation: `steering`
"""
