"""Name every source: `SOURCES.md`, and the licence texts that must travel with quoted text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moe_lens.organisms.corpus import Document
from moe_lens.organisms.extract import read_text
from moe_lens.organisms.sources import SOURCES, Source

LICENCE_FILES = (
    "[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*",
    "*/[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*",
    "COPYING*",
    "*/COPYING*",
    "*/COPYRIGHT*",
    "usr/share/doc/*/copyright",
)
NO_LINES_FROM = frozenset(
    {"texlive-latex-base", "texlive-latex-recommended", "texlive-latex-extra", "texlive-latex-base-doc"}
)
"""Their copyright file lists hundreds of authors of other packages; each LaTeX file names its own."""
MAX_LINES = 6

_INTRO = """\
# Sources of the bundled corpus and weights

`probe.jsonl` quotes these packages; `../tiny-moe` and `../tiny-dense` were trained on them (other files of the
same packages). Each document of the probe set names its package, its file and its licence. All texts were
adapted: files were cleaned (markup, licence headers and untranslated paragraphs removed) and cut into documents.

Only public-domain, CC0, permissive, WordNet, LPPL, CC-BY and CC-BY-SA text was read; where a work is offered
under several licences the arm below was chosen. The licence texts are in `licences/`.

- Text from *The Debian Administrator's Handbook* (domains `{handbook}`) is Copyright its authors and translators,
  used under the Creative Commons Attribution-ShareAlike 3.0 licence. The documents made from it are adaptations
  and are offered under the same licence.
- Text from caniuse-db is Copyright Alexis Deveria and the caniuse.com contributors, used under the Creative
  Commons Attribution 4.0 licence; it was cut into documents.
- WordNet glosses: WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. See `licences/WordNet.txt`.
- LaTeX files are quoted in part and are not the works of the same name that are distributed under the LPPL.

"""


def copyright_lines(source: Source, folder: Path) -> list[str]:
    """The first copyright lines that the package's own licence file states."""
    if source.name in NO_LINES_FROM:
        return []
    lines: dict[str, None] = {}
    for pattern in LICENCE_FILES:
        for path in sorted(folder.glob(pattern)):
            for line in read_text(path).splitlines() if path.is_file() else ():
                line = re.sub(r"\s+", " ", line.strip(" *#/\t"))
                if re.match(r"(?i)copyright\b.*(\d{4}|\(c\)|©)", line) and len(line) < 160:
                    lines[line] = None
        if lines:
            break
    return list(lines)[:MAX_LINES]


def sources_markdown(probe: Sequence[Document], train: Sequence[Document], folders: dict[str, Path]) -> str:
    """The whole of SOURCES.md."""
    in_probe = Counter(d.source for d in probe)
    in_train: Counter[str] = Counter()
    for document in train:
        in_train[document.source] += len(document.text.encode())
    handbook = ", ".join(sorted({d.domain for d in probe if d.source == "debian-handbook"}))
    parts = [_INTRO.format(handbook=handbook)]
    parts.append(
        "| package | registry | licence | read | training text | probe documents |\n|---|---|---|---|---|---|\n"
    )
    for s in SOURCES:
        parts.append(
            f"| {s.name} {s.version} | {s.kind} | {s.licence} | {s.reads} "
            f"| {in_train[s.name] / 1e6:.2f} MB | {in_probe[s.name]} |\n"
        )
    parts.append("\n## Attribution\n\n")
    for s in SOURCES:
        parts.append(f"- **{s.name}**: {s.attribution}. Archive SHA-256 `{s.sha256}`.\n")
        parts += [f"  - {line}\n" for line in copyright_lines(s, folders[s.name])]
    return "".join(parts)


def licence_texts(folders: dict[str, Path]) -> dict[str, str]:
    """File name -> text of every licence that a source is used under (from the CC0 SPDX list and WordNet itself)."""
    texts: dict[str, str] = {}
    for licence in sorted({part for s in SOURCES for part in s.licence.split(" OR ")}):
        path = folders["spdx-license-list"] / "package/licenses" / f"{licence}.json"
        if path.exists():
            texts[f"{licence}.txt"] = json.loads(read_text(path))["licenseText"].rstrip() + "\n"
    texts["WordNet.txt"] = read_text(folders["wordnet-base"] / "usr/share/doc/wordnet-base/copyright")
    return texts


def write_notices(probe: Sequence[Document], train: Sequence[Document], folders: dict[str, Path], out: Path) -> None:
    """``SOURCES.md`` and ``licences/`` beside the probe set."""
    (out / "licences").mkdir(parents=True, exist_ok=True)
    (out / "SOURCES.md").write_text(sources_markdown(probe, train, folders), encoding="utf-8")
    for name, text in licence_texts(folders).items():
        (out / "licences" / name).write_text(text, encoding="utf-8")
