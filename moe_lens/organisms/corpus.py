"""Clean, chunk and split pieces into train / eval / probe documents; no source file is on two sides.

1. Every split key (a source file; a page in all its translations) goes to one side, chosen by the hash of the
   key inside its group, so that adding a package does not move another package's files.
2. Pieces are cut into documents at line ends; exact duplicates are dropped.
3. Train is capped per domain and register; the probe set is stratified by register, then by file.
4. A held-out document most of whose long lines also occur in training text is dropped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from moe_lens.organisms.extract import Piece

log = logging.getLogger(__name__)

Side = Literal["train", "eval", "probe"]
SIDES: tuple[Side, ...] = ("train", "eval", "probe")
WIDE_SCRIPTS = frozenset({"zh", "ja", "ko"})


@dataclass(frozen=True)
class Document:
    """One line of a corpus file."""

    id: str
    text: str
    domain: str
    kind: str
    language: str
    register: str
    source: str
    file: str
    licence: str


@dataclass(frozen=True)
class CorpusConfig:
    domain_bytes: int = 1_700_000
    """Most training bytes of one domain."""
    register_bytes: int = 1_300_000
    """Most training bytes of one register of one domain."""
    train_characters: int = 3000
    min_characters: int = 200
    probe_documents: int = 32
    """Of one domain."""
    probe_documents_per_file: int = 4
    probe_min_characters: int = 400
    probe_min_documents: int = 10
    """A domain with fewer held-out documents is trained on but not in the probe set."""
    eval_documents: int = 36
    eval_documents_per_file: int = 4
    seen_line_share: float = 0.5
    """A held-out document with a larger share of its long lines seen in training is dropped."""


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def assign_sides(pieces: Iterable[Piece]) -> dict[str, Side]:
    """Split key -> side. Groups (one package's natural text; one package's code of one language) are split apart."""
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    owner: dict[str, str] = {}
    train_only = set()
    for piece in pieces:
        family = piece.split_key.split(":", 1)[0]
        group = owner.setdefault(piece.split_key, family if piece.kind == "natural" else f"{family}/{piece.domain}")
        groups[group][piece.split_key] = None
        if piece.train_only:
            train_only.add(piece.split_key)
    sides: dict[str, Side] = dict.fromkeys(train_only, "train")
    for keys in groups.values():
        ordered = sorted((key for key in keys if key not in train_only), key=_hash)
        count = len(ordered)
        n_probe = max(round(0.08 * count), min(14, count // 4), min(1, count // 3))
        n_eval = max(round(0.04 * count), min(7, count // 6), min(1, count // 4))
        for position, key in enumerate(ordered):
            sides[key] = "probe" if position < n_probe else "eval" if position < n_probe + n_eval else "train"
    return sides


_COMMENT_HEADER = re.compile(r"\A(?:\s*(?:/\*.*?\*/|(?://|#|%|;)[^\n]*\n))+", re.S)


def strip_header(text: str) -> str:
    """Drop a leading comment block that is a licence notice: it would repeat in every file."""
    match = _COMMENT_HEADER.match(text)
    if match and re.search(r"copyright|licen[cs]e", match[0], re.I):
        return text[match.end() :].lstrip("\n")
    return text


def chunk(text: str, size: int, minimum: int) -> Iterator[str]:
    """Cut at line ends into chunks of at most ``size`` characters; an overlong line is cut hard."""
    lines: list[str] = []
    length = 0
    for line in text.split("\n"):
        for start in range(0, max(1, len(line)), size):
            part = line[start : start + size]
            if length + len(part) > size and lines:
                if length >= minimum:
                    yield "\n".join(lines).strip("\n")
                lines, length = [], 0
            lines.append(part)
            length += len(part) + 1
    if length >= minimum:
        yield "\n".join(lines).strip("\n")


def _long_lines(text: str) -> list[int]:
    return [hash(line.strip()) for line in text.split("\n") if len(line.strip()) >= 30]


def _documents(piece: Piece, side: Side, config: CorpusConfig) -> Iterator[Document]:
    size, minimum = config.train_characters, config.min_characters
    if side == "probe":
        size, minimum = 1000 + _hash(piece.file) % 1800, config.probe_min_characters
    if piece.language in WIDE_SCRIPTS:
        size, minimum = size // 2, minimum // 2
    text = piece.text if piece.kind == "natural" else strip_header(piece.text)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text.replace("\x00", "")))
    for number, part in enumerate(chunk(text, size, minimum)):
        name = f"{piece.domain}/{piece.source}/{piece.file}/{number}"
        yield Document(
            f"{piece.domain}-{_hash(name):016x}",
            part,
            piece.domain,
            piece.kind,
            piece.language,
            piece.register,
            piece.source,
            piece.file,
            piece.licence,
        )


def _spread(documents: list[Document], limit: int, per_file: int) -> list[Document]:
    """At most ``limit`` documents, taken in turn over registers and over files, at most ``per_file`` a file."""
    queues: dict[str, dict[str, list[Document]]] = defaultdict(lambda: defaultdict(list))
    for document in sorted(documents, key=lambda d: _hash("spread", d.id)):
        if len(queues[document.register][document.file]) < per_file:
            queues[document.register][document.file].append(document)
    ranked = {
        register: [files[f][i] for i in range(per_file) for f in sorted(files, key=_hash) if i < len(files[f])]
        for register, files in queues.items()
    }
    chosen: list[Document] = []
    for position in range(max(map(len, ranked.values()), default=0)):
        chosen += [ranked[register][position] for register in sorted(ranked) if position < len(ranked[register])]
    return chosen[:limit]


def split_documents(pieces: list[Piece], config: CorpusConfig | None = None) -> dict[Side, list[Document]]:
    """The three sides as lists of documents."""
    config = config or CorpusConfig()
    sides = assign_sides(pieces)
    pool: dict[Side, dict[str, list[Document]]] = {side: defaultdict(list) for side in SIDES}
    seen: set[str] = set()
    used: Counter[str] = Counter()
    seen_lines: set[int] = set()
    # training first, in hashed file order, so that a cap keeps many files rather than the first ones
    for piece in sorted(pieces, key=lambda p: (SIDES.index(sides[p.split_key]), _hash("order", p.domain, p.file))):
        side = sides[piece.split_key]
        domain, stratum = piece.domain, f"{piece.domain}\x1f{piece.register}"
        if side == "train" and (used[domain] >= config.domain_bytes or used[stratum] >= config.register_bytes):
            continue
        for document in _documents(piece, side, config):
            fingerprint = re.sub(r"\W+", "", document.text)[:400]
            if len(fingerprint) < 60 or fingerprint in seen:
                continue
            lines = _long_lines(document.text)
            if side == "train":
                size = len(document.text.encode())
                if used[domain] + size > config.domain_bytes or used[stratum] + size > config.register_bytes:
                    break
                used[domain] += size
                used[stratum] += size
                seen_lines.update(lines)
            elif lines and sum(line in seen_lines for line in lines) > config.seen_line_share * len(lines):
                continue
            seen.add(fingerprint)
            pool[side][domain].append(document)
    limits: dict[Side, tuple[int, int]] = {
        "eval": (config.eval_documents, config.eval_documents_per_file),
        "probe": (config.probe_documents, config.probe_documents_per_file),
    }
    result: dict[Side, list[Document]] = {"train": [d for docs in pool["train"].values() for d in docs]}
    for side, (limit, per_file) in limits.items():
        result[side] = [d for domain in sorted(pool[side]) for d in _spread(pool[side][domain], limit, per_file)]
    per_domain = Counter(d.domain for d in result["probe"])
    result["probe"] = [d for d in result["probe"] if per_domain[d.domain] >= config.probe_min_documents]
    result["train"].sort(key=lambda d: _hash("train order", d.id))
    return result


def write_jsonl(documents: Iterable[Document], path: Path) -> None:
    """One document a line; written aside and renamed, so a reader never sees half a file."""
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as out:
        for document in documents:
            out.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
    temporary.replace(path)


def read_jsonl(path: Path) -> list[Document]:
    with path.open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def build_corpus(folders: dict[str, Path], out: Path, config: CorpusConfig | None = None) -> dict[Side, list[Document]]:
    """Extract, split and write ``train.jsonl``, ``eval.jsonl``, ``probe.jsonl`` under ``out``."""
    from moe_lens.organisms.extract import extract

    out.mkdir(parents=True, exist_ok=True)
    split = split_documents(list(extract(folders)), config)
    for side, documents in split.items():
        write_jsonl(documents, out / f"{side}.jsonl")
        log.info("%s: %d documents, %.1f MB", side, len(documents), sum(len(d.text.encode()) for d in documents) / 1e6)
    return split
