"""Capture: consumers of expert taps, and the run directory. ``moe_lens.capture(...)`` runs one."""

from moe_lens._callable import make_callable

make_callable(__name__, "moe_lens.capture.run", "capture")
