"""Documents and where they come from: ``corpus("bundled:" | path | data-set id) -> Corpus``.

=====================  ====================================================================
source                 one document is
=====================  ====================================================================
``bundled:``           a line of the shipped ``probe.jsonl`` (grouped by its field ``file``)
``x.jsonl``            a line, a JSON object with the text column
``x.txt``              a non-empty line
``x.parquet``          a row with the text column
folder of ``.txt``     a file
other folder, hub id   a row that ``datasets.load_dataset(..., streaming=True)`` yields
=====================  ====================================================================

Every other column becomes a field of the document (see `moe_lens.corpus.readers`). A row with `messages` (or
`conversations`) and no text column is a conversation: see `moe_lens.corpus.chat`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.corpus import readers
from moe_lens.errors import BadCorpus

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("moe_lens")

BUNDLED = "bundled:"


@dataclass(frozen=True)
class Document:
    """One text, what is known about it, and the group that never leaves its side of a split."""

    id: str
    text: str
    fields: Mapping[str, str] = field(default_factory=dict)
    """Columns other than the text. A list column (POS tags, spans) is kept as JSON."""
    group: str = ""
    """Source file, or whatever else must stay in one split. Default: the document's own id."""

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)


@dataclass(frozen=True)
class Corpus:
    """An ordered set of documents with unique ids."""

    id: str
    """Names the source, not this machine's path to it; the split is a function of it and of the groups."""
    documents: tuple[Document, ...]
    sha256: str
    """Over ids and texts, in order."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """How many texts were left out, by reason: ``empty``, ``invalid_utf8``."""
    name: str = ""

    @classmethod
    def of(
        cls, documents: Iterable[Document], *, id: str, skipped: Mapping[str, int] | None = None, name: str = ""
    ) -> Corpus:
        """Build a corpus from documents; a repeated id gets ``#2`` and stays in the group of the first.

        Raises:
            BadCorpus: there is no document.
        """
        docs = _unique(documents)
        if not docs:
            why = f" ({_reasons(skipped)})" if skipped else ""
            raise BadCorpus(
                f"{name or id} has no usable document{why}: give a source with at least one non-empty UTF-8 text"
            )
        return cls(id, docs, fingerprint(docs), dict(skipped or {}), name or id)

    def __len__(self) -> int:
        return len(self.documents)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a document: id, group, number of characters, and the fields."""
        import pandas as pd

        rows = [
            {"id": d.id, "group": d.group, "characters": len(d.text)}
            | {k: v for k, v in d.fields.items() if k not in ("id", "group", "characters") and v[:1] not in "[{"}
            for d in self.documents
        ]
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        from html import escape

        return f"<b>{escape(self.name)}</b>: {len(self):,} documents{self.frame.head(5).to_html(index=False)}"


def fingerprint(documents: Iterable[Document]) -> str:
    """sha256 over ids and texts, each preceded by its length so that no two corpora collide."""
    digest = hashlib.sha256()
    for doc in documents:
        for part in (doc.id.encode(), doc.text.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _unique(documents: Iterable[Document]) -> tuple[Document, ...]:
    seen: dict[str, int] = {}
    out = []
    for doc in documents:
        seen[doc.id] = count = seen.get(doc.id, 0) + 1
        out.append(doc if count == 1 else Document(f"{doc.id}#{count}", doc.text, doc.fields, doc.group))
    return tuple(out)


def _reasons(skipped: Mapping[str, int]) -> str:
    words = {"invalid_utf8": "not UTF-8"}
    return ", ".join(f"{n} {words.get(why, why)}" for why, n in skipped.items())


def corpus(
    source: str | Path | None = None,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    limit: int | None = None,
    seed: int = 0,
) -> Corpus:
    """Read a corpus from the bundled text, a file, a folder, or a data-set id of the Hugging Face hub.

    Args:
        source: ``bundled:`` (also None), a path ending in .jsonl, .txt or .parquet, a folder, or a hub id.
        dataset_config: configuration of a data set, for data sets that have several.
        split: split of a data set; files have none.
        text_column: column that holds the text.
        limit: number of documents. Of a file: that many, spread evenly over the domains in an order that
            `seed` decides. Of a streamed data set: the first ones, and then it is required.
        seed: see `limit`.

    Raises:
        BadCorpus: the source does not exist, cannot be reached, is empty, or is not what its suffix says.

    Texts that are empty or not UTF-8 are left out, counted in ``Corpus.skipped`` and reported in a warning.
    """
    if limit is not None and limit < 1:
        raise BadCorpus(f"limit={limit} leaves no document: give a positive number of documents")
    name = str(source) if source is not None else BUNDLED
    try:
        whole = _read(name, dataset_config, split, text_column, limit)
    except OSError as error:
        raise BadCorpus(
            f"{name} cannot be read ({error.strerror or error}): give a readable file, or a data set id"
        ) from error
    if whole.skipped:
        log.warning("%s: texts left out: %s", name, _reasons(whole.skipped))
    return _limited(whole, limit, seed)


def _read(name: str, dataset_config: str | None, split: str, text_column: str, limit: int | None) -> Corpus:
    skipped: dict[str, int] = {}
    if name in (BUNDLED, "bundled"):
        rows = readers.jsonl(readers.bundled_path(), text_column="text", skipped=skipped)
        return Corpus.of(_documents(rows), id=BUNDLED, skipped=skipped, name=BUNDLED)
    path = Path(name).expanduser()
    reader = readers.for_path(path)
    if reader is not None:
        rows = reader(path, text_column=text_column, skipped=skipped)
        return Corpus.of(_documents(rows), id=f"file:{readers.printable_name(path)}", skipped=skipped, name=name)
    rows = readers.dataset(
        name, config=dataset_config, split=split, text_column=text_column, limit=limit, skipped=skipped
    )
    tail = f":{dataset_config}" if dataset_config else ""
    base = path.name if path.is_dir() else name
    return Corpus.of(_documents(rows), id=f"dataset:{base}{tail}:{split}", skipped=skipped, name=name)


def _documents(rows: Iterable[readers.Row]) -> Iterable[Document]:
    for row in rows:
        group = row.fields.get("group") or row.fields.get("file") or ""
        yield Document(row.fields.get("id") or row.place, row.text, row.fields, group)


def _limited(whole: Corpus, limit: int | None, seed: int) -> Corpus:
    if limit is None or limit >= len(whole):
        return whole
    from moe_lens.corpus.splits import domain_order

    keep = sorted(domain_order(whole, seed=seed)[:limit])
    docs = tuple(whole.documents[i] for i in keep)
    return Corpus(whole.id, docs, fingerprint(docs), whole.skipped, whole.name)
