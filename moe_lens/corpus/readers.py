"""Readers: files and data sets to rows of text and fields. One function a format.

Fields are strings. Numbers and booleans are written out; a nested record such as the Pile's
``{"meta": {"pile_set_name": "Github"}}`` is flattened to its innermost names; a list of words, tags or
spans is kept as JSON, and class labels in it are replaced by their names. A row without the text column but with
a list of messages is a conversation (see `moe_lens.corpus.chat`).

Texts that cannot be read as UTF-8 (in a column as in the text) and empty ones are left out and counted by reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any

from moe_lens.corpus import chat
from moe_lens.errors import BadCorpus, nearest

SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Row:
    """One text with its columns, and where it was found (``corpus.jsonl:17``)."""

    place: str
    text: str
    fields: dict[str, str] = field(default_factory=dict)


Reader = Callable[..., Iterable[Row]]


def bundled_path() -> Path:
    """The shipped corpus.

    Raises:
        BadCorpus: this installation was built without it.
    """
    path = Path(str(resources.files("moe_lens") / "bundled" / "corpus" / "probe.jsonl"))
    if not path.is_file():
        raise BadCorpus(f"this installation has no bundled corpus ({path}): reinstall moe-lens, or give a file")
    return path


def for_path(path: Path) -> Reader | None:
    """The reader of an existing file or folder of texts; None when `path` is left to ``datasets``.

    Raises:
        BadCorpus: `path` looks like a file but does not exist, or has a suffix that is not read.
    """
    if path.is_dir():
        return text_folder if any(path.rglob("*.txt")) else None
    if path.is_file():
        by_suffix: dict[str, Reader] = {".jsonl": jsonl, ".txt": lines, ".parquet": parquet}
        if path.suffix.lower() not in by_suffix:
            raise BadCorpus(f"{path}: cannot read {path.suffix or 'a file without suffix'!r}, give {_suffixes()}")
        return by_suffix[path.suffix.lower()]
    if path.suffix.lower() in SUFFIXES or path.is_absolute() or str(path).startswith(".") or len(path.parts) > 2:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadCorpus(f"{path}: no such file or folder{nearest(path.name, siblings)}")
    return None


def _suffixes() -> str:
    return "a " + ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]} file, or a folder of .txt files"


def _count(skipped: dict[str, int], reason: str) -> None:
    skipped[reason] = skipped.get(reason, 0) + 1


def _decoded(raw: bytes, skipped: dict[str, int]) -> str | None:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        _count(skipped, "invalid_utf8")
        return None
    return text.removeprefix("\ufeff")


def _usable(text: str, skipped: dict[str, int], fields: Mapping[str, str] | None = None) -> bool:
    if not text.strip():
        _count(skipped, "empty")
        return False
    if not all(map(_is_unicode, chain([text], *(fields or {}).items()))):
        _count(skipped, "invalid_utf8")
        return False
    return True


def _is_unicode(text: str) -> bool:
    """False with a lone surrogate, which JSON can spell and no tokenizer, hash or table can take."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable_name(path: Path) -> str:
    """The file's name with question marks for bytes that are not UTF-8."""
    return path.name.encode("utf-8", "replace").decode()


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BadCorpus(f"{path} is UTF-16: save it as UTF-8")
    known = {b"PAR1": "a parquet file", b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "zstd-compressed"}
    kind = "gzip-compressed" if head[:2] == b"\x1f\x8b" else known.get(head)
    if kind:
        raise BadCorpus(f"{path} is {kind}, not text: unpack it or give it its proper suffix")


def lines(path: Path, *, text_column: str, skipped: dict[str, int]) -> Iterator[Row]:
    """A .txt file, one document a non-empty line (blank lines are no documents and are not counted)."""
    _check_magic(path)
    name = printable_name(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = _decoded(raw.rstrip(b"\r\n"), skipped)
            if text is not None and text.strip():
                yield Row(f"{name}:{number}", text)


def text_folder(path: Path, *, text_column: str, skipped: dict[str, int]) -> Iterator[Row]:
    """A folder, one document a .txt file, in the order of their names."""
    for file in sorted(p for p in path.rglob("*.txt") if p.is_file()):
        _check_magic(file)
        text = _decoded(file.read_bytes(), skipped)
        if text is not None and _usable(text, skipped):
            yield Row(file.relative_to(path).as_posix().encode("utf-8", "replace").decode(), text)


def jsonl(path: Path, *, text_column: str, skipped: dict[str, int]) -> Iterator[Row]:
    """A .jsonl file, one JSON object a line.

    Raises:
        BadCorpus: a line is not a JSON object or has no text column; names the file and the line.
    """
    _check_magic(path)
    name = printable_name(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            decoded = _decoded(raw, skipped)
            if decoded is None or not decoded.strip():
                continue
            row = _json_row(decoded, f"{path}, line {number}", f"{name}:{number}", text_column, skipped)
            if row is not None:
                yield row


def _json_row(line: str, where: str, place: str, text_column: str, skipped: dict[str, int]) -> Row | None:
    try:
        record = _parsed(line, where)
        if not isinstance(record, dict):
            raise BadCorpus(f'{where}: a JSON object is needed, such as {{"{text_column}": "..."}}')
        return _row(record, where, place, text_column, skipped)
    except RecursionError:
        raise BadCorpus(f"{where}: lists or objects are nested too deeply; flatten them") from None


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg} at column {error.colno})"
        raise BadCorpus(f"{where}: {what}; a .jsonl file holds one JSON object a line") from None
    except ValueError:  # of int(), which reads 4,300 digits at most
        raise BadCorpus(f"{where}: a number has too many digits; write it as text") from None


def parquet(path: Path, *, text_column: str, skipped: dict[str, int]) -> Iterator[Row]:
    """A .parquet file, one document a row.

    Raises:
        BadCorpus: the file is not parquet or has no text column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        why = str(error).split(". ")[0]
        raise BadCorpus(f"{path} is not a parquet file ({why}): write it again, or give it its proper suffix") from None
    name = printable_name(path)
    try:
        for number, record in enumerate(_records(file, skipped), 1):
            if record is None:
                continue
            row = _row(record, f"{path}, row {number}", f"{name}:{number}", text_column, skipped)
            if row is not None:
                yield row
    except (pa.ArrowException, OSError) as error:
        raise BadCorpus(f"{path} is damaged ({str(error).split('. ')[0]}): write or download it again") from None


def _records(file: Any, skipped: dict[str, int]) -> Iterator[dict[str, Any] | None]:
    """Rows of a parquet file, None for one whose text is not UTF-8."""
    for batch in file.iter_batches(batch_size=1024):
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            for i in range(len(batch)):
                try:
                    yield batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    _count(skipped, "invalid_utf8")
                    yield None


def dataset(
    name: str, *, config: str | None, split: str, text_column: str, limit: int | None, skipped: dict[str, int]
) -> Iterator[Row]:
    """A data set of the hub, or a local folder that ``datasets`` reads, streamed.

    Raises:
        BadCorpus: unknown data set, configuration, split or text column; no network; no `limit` on a hub id.
    """
    if limit is None and not Path(name).is_dir():
        raise BadCorpus(f"{name} is streamed from the hub: say how many documents to take, e.g. limit=2000")
    import datasets

    what = f"the data set {name!r}" + (f", configuration {config!r}" if config else "") + f", split {split!r}"
    # `datasets` raises a dozen unrelated types here (hub, http, fsspec, builder); each means "not readable"
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        records = iter(stream)
        first = next(records, None)
    except Exception as error:
        raise BadCorpus(f"cannot open {what}: {_reason(error)}; {_fix(name, error)}") from None
    labels = _class_names(getattr(stream, "features", None))

    whole = [] if first is None else chain([first], records)
    rows = (_dataset_row(record, name, number, labels, text_column, skipped) for number, record in enumerate(whole, 1))
    return islice((row for row in rows if row is not None), limit)


def _dataset_row(
    record: dict[str, Any],
    name: str,
    number: int,
    labels: dict[str, list[str]],
    text_column: str,
    skipped: dict[str, int],
) -> Row | None:
    named = {k: _with_names(v, labels[k]) if k in labels else v for k, v in record.items()}
    return _row(named, f"{name}, row {number}", f"{Path(name).name}:{number}", text_column, skipped)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def _fix(name: str, error: Exception) -> str:
    text = str(error).lower()
    if "config" in text and ("pick one" in text or "available" in text):
        return "give one of these as dataset_config"
    if "split" in text:
        return "give one of the data set's splits"
    if Path(name).is_dir():
        return "the folder needs .txt files, or .jsonl or .parquet files that `datasets` can read"
    return "check the spelling and the network (HF_HUB_OFFLINE unset), or give a local .jsonl, .txt or .parquet file"


def _class_names(features: Any) -> dict[str, list[str]]:
    """Names of class labels by column, also of lists of class labels (the ``upos`` of treebanks)."""
    out: dict[str, list[str]] = {}
    for key, feature in (features or {}).items():
        while hasattr(feature, "feature") and not isinstance(feature, dict):
            feature = feature.feature
        names = getattr(feature, "names", None)
        if names:
            out[key] = list(names)
    return out


def _with_names(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_with_names(v, names) for v in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _row(record: dict[str, Any], where: str, place: str, text_column: str, skipped: dict[str, int]) -> Row | None:
    if (column := chat.conversation_column(record, text_column)) is not None:
        return _conversation(record, where, place, column, skipped)
    if text_column not in record:
        raise BadCorpus(
            f"{where}: no column {text_column!r}{nearest(text_column, record)}; "
            f"its columns are {', '.join(map(str, record))}: name the one that holds the text with text_column"
        )
    text = record[text_column]
    if text is None:
        _count(skipped, "empty")
        return None
    if not isinstance(text, str):
        raise BadCorpus(f"{where}: column {text_column!r} holds {type(text).__name__}, not text: name another column")
    fields = _fields({k: v for k, v in record.items() if k != text_column})
    return Row(place, text, fields) if _usable(text, skipped, fields) else None


def _conversation(record: dict[str, Any], where: str, place: str, column: str, skipped: dict[str, int]) -> Row | None:
    try:
        text, fields = chat.read_messages(record[column])
    except BadCorpus as error:
        raise BadCorpus(f"{where}: {error}") from None
    fields = {**_fields({k: v for k, v in record.items() if k != column}), **fields}
    return Row(place, text, fields) if _usable(text, skipped, fields) else None


def _fields(record: dict[str, Any]) -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, str | bool | int | float):
            out[str(key)] = str(value)
        elif isinstance(value, dict) and not any(isinstance(v, list) for v in value.values()):
            for inner, text in _fields(value).items():
                out.setdefault(inner, text)
        elif isinstance(value, list | dict) and _keeps(value):
            out[str(key)] = json.dumps(value, ensure_ascii=False)
    return out


def _keeps(value: Any) -> bool:
    """Lists of words, tags or records are kept; vectors of numbers are not."""
    while isinstance(value, list):
        if not value:
            return False
        value = value[0]
    return isinstance(value, str | dict)
