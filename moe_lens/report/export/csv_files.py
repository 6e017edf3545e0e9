"""Every table as CSV; lists as JSON, so that they can be read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moe_lens.capture.run import MANIFEST
from moe_lens.capture.store import write_json
from moe_lens.report.sections.provenance import without_folders

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from moe_lens.capture.run import Run


_README = """# moe-lens: {model}

One CSV file for each table of a run of moe-lens {version} on `{corpus}`: UTF-8, commas, a line of headings. A cell that
is a list (neurons, tokens) is JSON; an empty cell is a missing value. `manifest.json` holds settings, versions and
hashes.

Read one with `pandas.read_csv("labels.csv", keep_default_na=False, na_values=[""])`: the tokens `NA` and `null` are
text. The folder has no folders of the machine that made it in it and can be passed on as it is; `exemplars.csv` quotes
the text that the run read.
"""


def write(run: Run, folder: Path) -> None:
    """``TABLE.csv`` for each table, UTF-8, the manifest, and how to read them."""
    for name, table in run.tables().items():
        lists_as_json(table).to_csv(folder / f"{name}.csv", index=False, encoding="utf-8")
    manifest = without_folders(run.manifest)
    write_json(folder / MANIFEST, manifest)
    readme = _README.format(
        model=manifest["model"]["name"], version=manifest["packages"]["moe-lens"], corpus=manifest["corpus"]["id"]
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def lists_as_json(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the cells of list columns as JSON text."""
    names = [str(name) for name in table.columns]
    return table.assign(**{name: table[name].map(_json) for name in names if table[name].map(_is_list).any()})


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or type(value).__name__ == "ndarray"


def _json(value: Any) -> Any:
    if not _is_list(value):
        return value
    return json.dumps(value.tolist() if hasattr(value, "tolist") else list(value), ensure_ascii=False)
