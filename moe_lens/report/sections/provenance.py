"""Where the numbers come from: manifest, versions, seeds, prompts, hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.report.parts import Part, Section, Table

if TYPE_CHECKING:
    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_LONG = 200
"""Characters of a setting from which on only its beginning is shown; the manifest has all of it."""


def section(run: Run, say: Claims) -> Section:
    """Everything that the manifest says, flat, and the hash of every table."""
    from moe_lens.report.page import table_hashes

    manifest = without_folders(run.manifest)
    rows = [(name, value) for name, value in _flat(manifest) if not name.startswith("prompts.")]
    facts = pd.DataFrame(rows, columns=["name", "value"])
    prompts = pd.DataFrame(sorted(manifest.get("prompts", {}).items()), columns=["prompt", "sha256"])
    files = [
        (name, len(say.table(name.removesuffix(".parquet"))), sha) for name, sha in sorted(table_hashes(run).items())
    ]
    tables = pd.DataFrame(files, columns=["table", "rows", "sha256"])
    parts: list[Part] = [
        Table("provenance-manifest", "Model, text, settings, versions", facts, "manifest.json", search=True),
        Table("provenance-tables", "Tables", tables, "the files themselves", forms={"rows": ","}),
        Table("provenance-prompts", "Prompts", prompts, "manifest.json"),
    ]
    lead = (
        "Every command that added to this run, with its settings. moe-lens verify rehashes the tables and takes every "
        "underlined number from them again."
    )
    return Section("provenance", "Provenance", lead, tuple(parts))


def without_folders(value: Any) -> Any:
    """A manifest to pass on: of a path on this machine only the last part is left."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted names with text."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in _flat(inner, f"{name}.{key}" if name else str(key))]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(name, text if len(text) <= _LONG else f"{text[:_LONG]}…")]
