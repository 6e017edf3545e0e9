"""Where the numbers come from: manifest, versions, seeds, prompts, hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from moe_lens.config import prompt_hashes, prompts_dir
from moe_lens.report.parts import Part, Prose, Section, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_LONG = 200
"""Characters of a setting from which on the table has only its beginning; the whole stands below it."""
_MODELS = ("openai:", "gguf:")
_ASKED = ("detection", "fuzz")
"""Scorers that ask a language model, each in the words of the prompt of its name."""


def section(run: Run, say: Claims) -> Section:
    """Everything that the manifest says, flat, the hash of every table, and the prompts that were used."""
    from moe_lens.report.page import table_hashes

    manifest = without_folders(run.manifest)
    rows = [(name, value) for name, value in _flat(manifest) if not name.startswith("prompts.")]
    facts = pd.DataFrame([(name, _cut(value)) for name, value in rows], columns=["name", "value"])
    hashes = sorted(table_hashes(run).items())
    files = [(name, len(say.table(name.removesuffix(".parquet"))), sha) for name, sha in hashes]
    tables = pd.DataFrame(files, columns=["table", "rows", "sha256"])
    parts: list[Part] = [Table("provenance-manifest", "Model, text, settings, versions", facts, "manifest.json",
                               search=True)]  # fmt: skip
    if long := [f"{name}\n{value}" for name, value in rows if len(value) > _LONG]:
        parts.append(_folded("Long settings in full", "\n\n".join(long)))
    parts.append(Table("provenance-tables", "Tables", tables, "the files themselves", forms={"rows": ","}))
    parts += _prompts(manifest.get("prompts", {}), used_prompts(run, say))
    lead = (
        "Every command that added to this run, with its settings. moe-lens verify rehashes the tables and takes every "
        "underlined number from them again."
    )
    return Section("provenance", "Provenance", lead, tuple(parts))


def used_prompts(run: Run, say: Claims) -> set[str]:
    """Names of the prompt files in whose words a language model was asked, as the tables tell."""
    names = {sha: name for name, sha in run.manifest.get("prompts", {}).items()}
    found: set[str] = set()
    if run.has("labels") and "prompt_hash" in (labels := say.table("labels")):
        found |= {names[sha] for sha in labels["prompt_hash"].dropna().unique() if sha in names}
    if run.has("label_scores"):
        found |= {f"{scorer}.md" for scorer in _ASKED if (say.table("label_scores")["scorer"] == scorer).any()}
    if run.has("validation") and any(str(name).startswith(_MODELS) for name in say.table("validation")["judge"]):
        found.add("detection.md")
    return found


def _prompts(hashes: Mapping[str, str], used: set[str]) -> list[Part]:
    """The prompts' hashes, and the text of those that were used; of another version only the hash is known."""
    table = pd.DataFrame(
        [(name, "yes" if name in used else "no", sha) for name, sha in sorted(hashes.items())],
        columns=["prompt", "used", "sha256"],
    )
    parts: list[Part] = [Table("provenance-prompts", "Prompts", table, "manifest.json")]
    if not used:
        parts.append(Prose("No language model was asked in this run, so none of the prompts was used."))
    for name in sorted(used):
        if prompt_hashes().get(name) == hashes.get(name):
            text = (prompts_dir() / name).read_text(encoding="utf-8")
        else:
            text = "The run used another version of this prompt than the moe-lens that wrote this page has."
        parts.append(_folded(f"{name}, sha256 {hashes.get(name, 'unknown')}", text))
    return parts


def _folded(title: str, text: str) -> Prose:
    """Text that opens on a click, as it stands."""
    return Prose(
        Markup('<details><summary>{}</summary><pre style="white-space:pre-wrap">{}</pre></details>').format(title, text)
    )


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
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"
