"""Named errors. Each message says what was wrong with the input, in the user's words, and what to do.

The CLI prints the message as one sentence on stderr and exits with ``exit_code``:
2 when the input was wrong, 1 when a run failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoELensError(Exception):
    """Base of every error that moe-lens raises on purpose."""

    exit_code = 2


class ModelNotFound(MoELensError):
    """The name is neither a bundled model, a folder with a config.json, nor a reachable hub id."""


class NotAnMoE(MoELensError):
    """A dense model was given where a Mixture-of-Experts model is needed."""


class UnsupportedModel(MoELensError):
    """The architecture, its quantisation or the installed transformers cannot be tapped."""


class UnknownConcept(MoELensError):
    """A concept name that no built-in or user file defines."""


class BadConcept(MoELensError):
    """A concept definition that cannot be used (bad regular expression, missing keys)."""


class OutOfRange(MoELensError):
    """A layer, expert or neuron address outside the model."""


class BadCorpus(MoELensError):
    """A corpus that is empty, unreadable, or not what its suffix says."""


class BadOutput(MoELensError):
    """An output directory that holds another run, or cannot be written."""


class BadConfig(MoELensError):
    """A setting that is unknown or has an impossible value."""


class NoServer(MoELensError):
    """A language model's server did not answer any request."""

    exit_code = 1


class Underpowered(MoELensError):
    """A run that finished, with too little text behind it to say anything."""

    exit_code = 1


class WriteFailed(MoELensError):
    """Writing a result failed (disk full, permissions). Nothing that was there before is damaged."""


class MemoryLimit(MoELensError):
    """The smallest possible piece of the job does not fit into --max-memory."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` when something in `known` resembles `word`, else ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
