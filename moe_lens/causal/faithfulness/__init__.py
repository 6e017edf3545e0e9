"""Faithfulness: do rankings of experts say which ones the model needs? (METRICS 2)

`sets` (bins, universes) and `scores` (set-function maths) know no model; `settings` checks what is asked for, `visits`
and `rankings` score experts on one text, `controls` draws sets to beat, `measure` ablates on another (`kept` on disk),
`tables` puts intervals on it, `alignment` and `beside` say what it goes with; `run.faithfulness` does all of it, and
`directory` writes and reads it.
"""
