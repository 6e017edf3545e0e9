"""The tables as configurations of a Hugging Face data set: ``load_dataset(FOLDER, "labels")``."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import yaml

from moe_lens.capture.run import MANIFEST
from moe_lens.capture.store import write_json
from moe_lens.report.page import FILE, render
from moe_lens.report.sections.provenance import without_folders

if TYPE_CHECKING:
    from pathlib import Path

    from moe_lens.capture.run import Run

_CARD = """---
{header}---

# moe-lens: {model}

What the experts of `{model}`{revision} do, measured by [moe-lens](https://pypi.org/project/moe-lens/) {version} on
`{corpus}` ({n_documents:,} documents, seed {seed}).

| table | rows | columns |
|---|---|---|
{tables}

Load one with `datasets.load_dataset("FOLDER_OR_REPO", "TABLE")`. `manifest.json` holds the settings, versions and
hashes{report}.

The licence of this data is yours to choose: `exemplars` and other tables quote the text they were measured on.

**What these numbers do not show:** where an expert is used is not what the model needs it for; see `validation` for
labels that were put on trial, and read each table's null beside its number.
"""


def write(run: Run, folder: Path) -> None:
    """``data/TABLE.parquet``, the manifest, the report if there is one, and a data set card."""
    (folder / "data").mkdir()
    for name in run.tables():
        shutil.copy(run.path / f"{name}.parquet", folder / "data" / f"{name}.parquet")
    write_json(folder / MANIFEST, without_folders(run.manifest))
    if (run.path / FILE).exists():  # written anew: the tables may have changed since
        (folder / FILE).write_text(render(run), encoding="utf-8")
    (folder / "README.md").write_text(_card(run), encoding="utf-8")


def _card(run: Run) -> str:
    manifest, tables = run.manifest, run.tables()
    model, corpus = manifest["model"], manifest["corpus"]
    first = "labels" if "labels" in tables else next(iter(tables), None)
    configs: list[dict[str, Any]] = [
        {"config_name": name, "data_files": f"data/{name}.parquet", **({"default": True} if name == first else {})}
        for name in tables
    ]
    header = {
        "pretty_name": f"moe-lens: {model['name']}",
        "tags": ["interpretability", "mixture-of-experts", "moe-lens"],
        **({"base_model": model["name"]} if ":" not in model["name"] and model["name"].count("/") == 1 else {}),
        "configs": configs,
    }
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        model=model["name"],
        revision=f" (revision `{model['revision']}`)" if model.get("revision") else "",
        version=manifest["packages"]["moe-lens"],
        corpus=corpus["id"],
        n_documents=corpus["n_documents"],
        seed=manifest["seed"],
        tables="\n".join(f"| {name} | {len(t):,} | {', '.join(map(str, t.columns))} |" for name, t in tables.items()),
        report=f", `{FILE}` shows it all in a browser" if (run.path / FILE).exists() else "",
    )
