"""Reading corpora: what each format yields, and what each bad input is told."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_lens as ml
from moe_lens.corpus import readers
from moe_lens.corpus.splits import assign_splits
from moe_lens.corpus.text import Corpus, Document, corpus, fingerprint
from moe_lens.errors import BadCorpus


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def write_parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_jsonl_keeps_fields_and_groups_by_file(tmp_path):
    path = write_jsonl(
        tmp_path / "c.jsonl",
        [
            {"id": "a", "text": "one", "domain": "fr", "file": "f1", "n": 3, "ok": True, "none": None},
            {"id": "b", "text": "two", "domain": "de", "group": "g", "file": "f1"},
            {"text": "three"},
        ],
    )
    c = corpus(path)
    assert [d.id for d in c.documents] == ["a", "b", "c.jsonl:3"]
    assert [d.group for d in c.documents] == ["f1", "g", "c.jsonl:3"]
    assert c.documents[0].fields == {"id": "a", "domain": "fr", "file": "f1", "n": "3", "ok": "True"}
    assert (len(c), c.id, dict(c.skipped)) == (3, "file:c.jsonl", {})
    assert list(c.frame.columns[:3]) == ["id", "group", "characters"]
    assert c.frame["characters"].tolist() == [3, 3, 5]


def test_nested_records_are_flattened_and_lists_of_words_kept(tmp_path):
    path = write_jsonl(
        tmp_path / "c.jsonl",
        [{"text": "x y", "meta": {"pile_set_name": "Github"}, "pos_tags": [["x", "X"]], "vector": [0.5, 1.0]}],
    )
    assert corpus(path).documents[0].fields == {"pile_set_name": "Github", "pos_tags": '[["x", "X"]]'}


def test_the_package_itself_is_the_verb(tmp_path):
    (tmp_path / "t.txt").write_text("one\n")
    assert len(ml.corpus(tmp_path / "t.txt")) == 1


def test_txt_is_one_document_a_line(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufefffirst\r\n\n  \nzweite Größe\n".encode())
    assert [d.text for d in corpus(path).documents] == ["first", "zweite Größe"]


def test_a_folder_of_txt_is_one_document_a_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "sub" / "a.txt").write_text("one")
    (tmp_path / "empty.txt").write_text("\n")
    c = corpus(tmp_path)
    assert [(d.id, d.text) for d in c.documents] == [("b.txt", "two\nlines"), ("sub/a.txt", "one")]
    assert c.skipped == {"empty": 1}


def test_parquet_with_another_text_column(tmp_path):
    path = write_parquet(tmp_path / "c.parquet", {"content": ["a", None, "c"], "language": ["fr", "de", "fr"]})
    c = corpus(path, text_column="content")
    assert [(d.text, d.fields["language"]) for d in c.documents] == [("a", "fr"), ("c", "fr")]
    assert c.skipped == {"empty": 1}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_that_datasets_reads(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [f"document {i}" for i in range(7)]
    if kind == "jsonl":
        write_jsonl(folder / "train.jsonl", [{"body": t, "language": "en"} for t in texts])
    else:
        write_parquet(folder / "train.parquet", {"body": texts, "language": ["en"] * 7})
    c = corpus(folder, text_column="body", limit=5)
    assert [d.text for d in c.documents] == texts[:5]
    assert c.documents[0].fields == {"language": "en"}
    assert len(corpus(folder, text_column="body")) == 7
    with pytest.raises(BadCorpus, match=r"no column 'text'.*body"):
        corpus(folder)
    with pytest.raises(BadCorpus, match=r"cannot open the data set .*split 'nosuch'"):
        corpus(folder, text_column="body", split="nosuch")


def test_configurations_of_a_data_set(tmp_path):
    folder = tmp_path / "set"
    for config in ("aa", "bb"):
        (folder / config).mkdir(parents=True)
        write_jsonl(folder / config / "train.jsonl", [{"text": f"text of {config}"}])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: aa\n  data_files: aa/*.jsonl\n- config_name: bb\n  data_files: bb/*.jsonl\n---\n"
    )
    assert corpus(folder, dataset_config="bb").documents[0].text == "text of bb"
    assert corpus(folder, dataset_config="bb").id == "dataset:set:bb:train"
    with pytest.raises(BadCorpus, match=r"(?s)aa.*bb.*dataset_config"):
        corpus(folder)
    with pytest.raises(BadCorpus, match="configuration 'cc'"):
        corpus(folder, dataset_config="cc")


def test_class_labels_become_names():
    from datasets import ClassLabel, Features, List, Value

    features = Features({"text": Value("string"), "upos": List(ClassLabel(names=["NOUN", "VERB"]))})
    names = readers._class_names(features)
    assert readers._with_names([1, 0, -1], names["upos"]) == ["VERB", "NOUN", -1]


def test_a_hub_id_offline_says_what_to_do():
    with pytest.raises(BadCorpus, match="limit=2000"):
        corpus("someone/some-set")
    with pytest.raises(BadCorpus, match=r"cannot open the data set 'someone/some-set'.*local \.jsonl"):
        corpus("someone/some-set", limit=3)


def test_invalid_utf8_and_empty_texts_are_counted(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n{"text": " "}\n{"text": "\\ud800"}\n\n{"text": null}\n')
    c = corpus(path)
    assert [d.text for d in c.documents] == ["ok"]
    assert c.skipped == {"invalid_utf8": 2, "empty": 2}


@pytest.mark.parametrize("column", ["id", "domain", "file", "\\udfff"])
def test_a_lone_surrogate_in_a_column_leaves_the_text_out(tmp_path, column):
    """Hashes and tables cannot take it."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "ok"}\n{"text": "x", "%s": "\\ud800"}\n' % column)  # noqa: UP031
    c = corpus(path)
    assert ([d.text for d in c.documents], c.skipped) == (["ok"], {"invalid_utf8": 1})


def test_bom_crlf_and_nul_are_read(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\u0000b"}\r\n{"text": "c"}\r\n\r\n')
    assert [d.text for d in corpus(path).documents] == ["a\0b", "c"]
    path = tmp_path / "c.txt"
    path.write_bytes(b"\xef\xbb\xbfa\0b\r\nc\r\n\r\n")
    assert [d.text for d in corpus(path).documents] == ["a\0b", "c"]


def test_what_is_left_out_is_said_once(tmp_path, caplog):
    path = tmp_path / "c.txt"
    path.write_bytes(b"fine\ncaf\xe9\nfine too\ncaf\xe9\n")
    corpus(path)
    assert [r.getMessage() for r in caplog.records] == [f"{path}: texts left out: 2 not UTF-8"]
    caplog.clear()
    path.write_text("fine\n")
    corpus(path)
    assert not caplog.records


def test_a_parquet_row_that_is_not_utf8_is_left_out(tmp_path):
    import pyarrow as pa

    texts = pa.array([b"one", b"caf\xe9", b"three"]).view(pa.string())
    path = write_parquet(tmp_path / "c.parquet", {"text": texts})
    c = corpus(path)
    assert [(d.id, d.text) for d in c.documents] == [("c.parquet:1", "one"), ("c.parquet:3", "three")]
    assert c.skipped == {"invalid_utf8": 1}


def test_names_that_are_not_utf8_still_make_a_corpus(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("one\n")
    (tmp_path / "folder.txt").mkdir()
    assert (corpus(tmp_path / name).id, len(corpus(tmp_path / name))) == ("file:caf?.txt", 1)
    assert [d.id for d in corpus(tmp_path).documents] == ["caf?.txt"]


PIECES = st.sampled_from([
    b'{"text": "a b"}', b'{"text":', b'"', b"}", b"\r", b"\xff", b"\xef\xbb\xbf", b"\0", b"NaN", b"1e999", b"[" * 3000,
    b"9" * 5000, b'{"text": "\\ud800"}', b'{"id": "\\udfff", "text": "x"}', b'{"text": "x", "a": {"\\ud800": 1}}',
    b'{"text": "x", "tags": ["\\ud800"]}', b'{"text": "x", "a": ' + b'{"a":' * 980 + b"1" + b"}" * 981,
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": [{"role": 1, "content": null}]}',
    b'{"messages": [{"role": "user", "content": {"a": 1}}]}', b'{"messages": [{"role": "user", "content": "hi"}]}',
])  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
@given(st.lists(st.one_of(PIECES, st.just(b"\n"), st.binary(max_size=12)), max_size=8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_a_reader_raise_anything_but_bad_corpus(tmp_path, suffix, pieces):
    path = tmp_path / f"soup{suffix}"
    path.write_bytes(b"".join(pieces))
    try:
        c = corpus(path)
    except BadCorpus:
        return
    assert len(assign_splits(c)) == len(c.frame) == len(c)
    fingerprint(c.documents)


BAD_FILES = {
    "notjson.jsonl": (b'{"text": "a"}\n{"text": \n', r"notjson\.jsonl, line 2: not JSON .*one JSON object a line"),
    "list.jsonl": (b'["a"]\n', r"line 1: a JSON object is needed"),
    "nocolumn.jsonl": (b'{"texts": "a"}\n', r"line 1: no column 'text', did you mean 'texts'\?.*text_column"),
    "number.jsonl": (b'{"text": 3}\n', r"holds int, not text"),
    "fake.parquet": (b"this is text", r"fake\.parquet is not a parquet file"),
    "zip.txt": (gzip.compress(b"hello"), r"gzip-compressed, not text"),
    "zip.jsonl": (gzip.compress(b"{}"), r"gzip-compressed"),
    "parquet.txt": (b"PAR1xxxx", r"is a parquet file, not text"),
    "wide.txt": ("hallo".encode("utf-16"), r"UTF-16: save it as UTF-8"),
    "empty.txt": (b"", r"no usable document"),
    "empty.jsonl": (b"", r"no usable document"),
    "blank.jsonl": (b'{"text": " "}\n', r"no usable document \(1 empty\)"),
    "bytes.txt": (b"\xff\xfa\n\xfb\n", r"no usable document \(2 not UTF-8\)"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"line 1: a number has too many digits"),
    "deep.jsonl": (b"[" * 100_000, r"line 1: lists or objects are nested too deeply"),
    "table.csv": (b"a,b\n", r"cannot read '\.csv', give a \.jsonl, \.txt or \.parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_with_the_fix(tmp_path, name):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadCorpus, match=message):
        corpus(tmp_path / name)


def test_parquet_without_the_text_column(tmp_path):
    path = write_parquet(tmp_path / "c.parquet", {"content": ["a"]})
    with pytest.raises(BadCorpus, match=r"no column 'text'.*its columns are content"):
        corpus(path)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("{}")
    with pytest.raises(BadCorpus, match=r"no such file.*did you mean 'corpus\.jsonl'"):
        corpus(tmp_path / "corpsu.jsonl")


def test_limit_must_be_positive(tmp_path):
    (tmp_path / "t.txt").write_text("one\n")
    with pytest.raises(BadCorpus, match="limit=0"):
        corpus(tmp_path / "t.txt", limit=0)


def test_limit_of_a_file_reaches_every_domain_and_grows_by_adding(tmp_path):
    records = [{"id": str(i), "text": f"t {i}", "domain": "big" if i < 90 else f"d{i % 5}"} for i in range(100)]
    path = write_jsonl(tmp_path / "c.jsonl", records)
    small, larger = corpus(path, limit=12), corpus(path, limit=30)
    assert len(small) == 12
    assert {d.fields["domain"] for d in small.documents} == {"big", "d0", "d1", "d2", "d3", "d4"}
    assert {d.id for d in small.documents} < {d.id for d in larger.documents}
    assert {d.id for d in corpus(path, limit=12, seed=1).documents} != {d.id for d in small.documents}


def test_repeated_ids_become_unique_and_stay_together():
    c = Corpus.of([Document("a", "x"), Document("a", "y"), Document("b", "z")], id="t")
    assert [d.id for d in c.documents] == ["a", "a#2", "b"]
    assert [d.group for d in c.documents] == ["a", "a", "b"]


def test_sha256_depends_on_ids_and_texts_and_not_on_their_boundary():
    def sha(*pairs):
        return fingerprint(Document(i, t) for i, t in pairs)

    assert sha(("a", "bc")) != sha(("ab", "c"))
    assert sha(("a", "b"), ("c", "d")) != sha(("a", "bc"), ("", "d"))
    assert sha(("a", "b")) == sha(("a", "b"))


def test_bundled_corpus(monkeypatch, tmp_path):
    path = write_jsonl(tmp_path / "probe.jsonl", [{"id": "a", "text": "x", "domain": "fr", "file": "f"}])
    monkeypatch.setattr(readers, "bundled_path", lambda: path)
    assert corpus("bundled:").id == corpus().id == "bundled:"
    assert corpus().documents[0].group == "f"
