"""Tables that hold rows of several labellers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from moe_lens.capture.run import Run


def replace_rows(run: Run, name: str, rows: pd.DataFrame, *, labeller: str) -> None:
    """Write `rows` into the table `name` in place of the earlier ones of `labeller`; those of others stay."""
    if run.has(name):
        before = run.frame(name)
        others = before[before["labeller"] != labeller]
        if len(others):
            rows = pd.concat([others, rows], ignore_index=True) if len(rows) else others
    run.write(name, rows)
