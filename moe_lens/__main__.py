"""``python -m moe_lens`` is the ``moe-lens`` command (``accelerate launch -m moe_lens probe ...`` needs it)."""

from moe_lens.cli.app import entry

entry()
