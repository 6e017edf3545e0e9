"""The tables as configurations of a Hugging Face data set: ``load_dataset(FOLDER, "labels")``."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import yaml

from moe_lens.capture.run import MANIFEST
from moe_lens.capture.store import write_json
from moe_lens.corpus.readers import bundled_path
from moe_lens.corpus.text import BUNDLED
from moe_lens.report.page import FILE, render
from moe_lens.report.sections.provenance import without_folders

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd

    from moe_lens.capture.run import Run

_SOURCES = "SOURCES.md"
_LICENCES = {
    True: "The text that `exemplars` and other tables quote is that of moe-lens' bundled corpus, under the licences of "
    f"[{_SOURCES}]({_SOURCES}), of which CC-BY-SA 3.0 and CC-BY 4.0 ask for attribution: pass that file on with the "
    "data.",
    False: "`exemplars` and other tables quote the text they were measured on: add a `license:` to the head of this "
    "card that fits that text and what you want for the numbers.",
}
"""By whether the text is the bundled one."""
_CARD = """---
{header}---

# moe-lens: {model}

What the experts of `{model}`{revision} do, measured by [moe-lens](https://pypi.org/project/moe-lens/) {version} on
`{corpus}` ({n_documents:,} documents, seed {seed}).

| table | rows | columns |
|---|---|---|
{tables}

Load one with `datasets.load_dataset("FOLDER_OR_REPO", "TABLE", split="train")`. `manifest.json` holds the settings,
versions and hashes{report}.{empty}

Push it with `hf upload USER/NAME FOLDER . --repo-type dataset` (of `huggingface_hub`, after `hf auth login`).

{licence}

**What these numbers do not show:** where an expert is used is not what the model needs it for; see `validation` for
labels that were put on trial, and read each table's null beside its number.
"""


def write(run: Run, folder: Path) -> None:
    """``data/TABLE.parquet``, the manifest, the report if there is one, and a data set card."""
    (folder / "data").mkdir()
    tables = run.tables()
    for name in _filled(tables):
        shutil.copy(run.path / f"{name}.parquet", folder / "data" / f"{name}.parquet")
    write_json(folder / MANIFEST, without_folders(run.manifest))
    if (run.path / FILE).exists():  # written anew: the tables may have changed since
        (folder / FILE).write_text(render(run), encoding="utf-8")
    if _is_bundled(run):
        bundled = bundled_path().parent
        (folder / "licences").mkdir()
        for path in (bundled / _SOURCES, *sorted((bundled / "licences").iterdir())):
            shutil.copyfile(path, folder / path.relative_to(bundled))
    (folder / "README.md").write_text(_card(run, tables), encoding="utf-8")


def _filled(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Tables with rows: `datasets` cannot load one without any."""
    return {name: table for name, table in tables.items() if len(table)}


def _is_bundled(run: Run) -> bool:
    return run.manifest["corpus"]["id"] == BUNDLED


def _card(run: Run, every: Mapping[str, pd.DataFrame]) -> str:
    manifest, tables = without_folders(run.manifest), _filled(every)
    model, corpus = manifest["model"], manifest["corpus"]
    empty = [f"`{name}`" for name in every if name not in tables]
    licence = {"license": "other", "license_name": "moe-lens-bundled-texts", "license_link": _SOURCES}
    first = "labels" if "labels" in tables else next(iter(tables), None)
    configs: list[dict[str, Any]] = [
        {"config_name": name, "data_files": f"data/{name}.parquet", **({"default": True} if name == first else {})}
        for name in tables
    ]
    header = {
        "pretty_name": f"moe-lens: {model['name']}",
        **(licence if _is_bundled(run) else {}),
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
        empty=f" Tables without rows are left out: {', '.join(empty)}." if empty else "",
        licence=_LICENCES[_is_bundled(run)],
        report=f", `{FILE}` shows it all in a browser" if (run.path / FILE).exists() else "",
    )
