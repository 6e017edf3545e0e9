"""Faithfulness: do rankings of experts say which ones the model needs? (METRICS 2)

`sets` (bins, universes) and `scores` (set-function maths) know no model; `visits` and `rankings` score experts on one
text, `controls` draws sets to beat, `measure` ablates on another, `tables` puts intervals on it, `alignment` compares
with routing; `run.faithfulness` does all of it.
"""
