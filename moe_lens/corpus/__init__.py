"""Corpus: text, splits, concepts, labelled token batches. ``moe_lens.corpus(...)`` reads one."""

from moe_lens._callable import make_callable

make_callable(__name__, "moe_lens.corpus.text", "corpus")
