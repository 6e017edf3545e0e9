"""The lexical labeller: labels without a language model, each with a rule that can be executed."""

from moe_lens.autointerp.lexical.labeller import lexical_labels

__all__ = ["lexical_labels"]
