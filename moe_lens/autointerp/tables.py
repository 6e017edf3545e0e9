"""Tables that several commands add rows to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from moe_lens.capture.run import Run


def add_rows(run: Run, name: str, rows: pd.DataFrame, key: Sequence[str]) -> None:
    """Write `rows` into the table `name`; earlier rows with the same `key` give way, all others stay."""
    if run.has(name) and len(rows):
        before = run.frame(name)
        mine = set(rows[list(key)].itertuples(index=False, name=None))
        stays = [at not in mine for at in before[list(key)].itertuples(index=False, name=None)]
        if any(stays):
            rows = pd.concat([before[stays], rows], ignore_index=True)
    run.write(name, rows)
