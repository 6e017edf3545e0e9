"""Autointerp: labels for experts, and scores of labels. ``moe_lens.autointerp(...)`` makes both."""

from moe_lens._callable import make_callable

make_callable(__name__, "moe_lens.autointerp.pipeline", "autointerp")
