"""The split is by source file, deterministic, and says what it claims."""

from __future__ import annotations

import pytest

from moe_lens.organisms import corpus
from moe_lens.organisms.extract import Piece, html_paragraphs, looks_english
from moe_lens.organisms.sources import ALLOWED_LICENCES, BY_NAME, SOURCES


def piece(
    number: int,
    *,
    language: str = "de",
    key: str | None = None,
    domain: str | None = None,
    train_only: bool = False,
    text: str | None = None,
) -> Piece:
    lines = [
        f"Zeile {number}-{language}-{line}: " + " ".join(f"wort{number * 37 + line * 11 + k}" for k in range(9))
        for line in range(30)
    ]
    return Piece(
        domain or language,
        "natural",
        language,
        "handbook",
        "debian-handbook",
        f"{language}/page{number}.html",
        text or "\n".join(lines),
        key or f"handbook:page{number}.html",
        train_only,
    )


@pytest.fixture(scope="module")
def split():
    pieces = [piece(n, language=language) for n in range(60) for language in ("de", "fr")]
    return corpus.split_documents(pieces)


def test_no_source_file_is_on_two_sides(split) -> None:
    files = {side: {(d.source, d.file) for d in documents} for side, documents in split.items()}
    assert all(files.values())
    assert not files["train"] & files["eval"]
    assert not files["train"] & files["probe"]
    assert not files["eval"] & files["probe"]


def test_translations_of_one_page_stay_on_one_side(split) -> None:
    side_of = {}
    for side, documents in split.items():
        for document in documents:
            assert side_of.setdefault(document.file.split("/")[1], side) == side


def test_split_does_not_depend_on_the_order_of_pieces() -> None:
    pieces = [piece(n) for n in range(40)]
    assert corpus.assign_sides(pieces) == corpus.assign_sides(pieces[::-1])


def test_train_only_pieces_are_never_held_out() -> None:
    pieces = [piece(n, train_only=n < 10) for n in range(40)]
    sides = corpus.assign_sides(pieces)
    assert {sides[p.split_key] for p in pieces[:10]} == {"train"}


def test_ids_are_unique(split) -> None:
    ids = [d.id for documents in split.values() for d in documents]
    assert len(ids) == len(set(ids))


def test_a_held_out_document_seen_in_training_is_dropped() -> None:
    pieces = [piece(n) for n in range(40)]
    sides = corpus.assign_sides(pieces)
    trained = next(p for p in pieces if sides[p.split_key] == "train")
    held = next(n for n, p in enumerate(pieces) if sides[p.split_key] == "probe")
    pieces[held] = piece(held, text="Ein neuer Anfang.\n" + trained.text)
    documents = corpus.split_documents(pieces)["probe"]
    assert pieces[held].file not in {d.file for d in documents}


def test_caps_bound_a_domain() -> None:
    config = corpus.CorpusConfig(domain_bytes=20_000, register_bytes=15_000)
    train = corpus.split_documents([piece(n) for n in range(60)], config)["train"]
    assert 10_000 < sum(len(d.text.encode()) for d in train) <= 15_000


def test_chunks_cover_the_text_and_keep_their_size() -> None:
    text = "\n".join(f"line {n} " + "x" * (n % 50) for n in range(400))
    parts = list(corpus.chunk(text, 500, 1))
    assert "\n".join(parts) == text
    assert max(map(len, parts)) <= 520


def test_licence_headers_are_stripped_and_other_comments_kept() -> None:
    assert corpus.strip_header("// Copyright 2020 X\n// licence\n\npackage a\n") == "package a\n"
    assert corpus.strip_header("// Package a does b.\npackage a\n").startswith("// Package a")


def test_documents_round_trip_through_jsonl(split, tmp_path) -> None:
    corpus.write_jsonl(split["probe"], tmp_path / "probe.jsonl")
    assert corpus.read_jsonl(tmp_path / "probe.jsonl") == split["probe"]


def test_every_source_has_an_allowed_licence_and_a_full_hash() -> None:
    assert len(BY_NAME) == len(SOURCES)
    for source in SOURCES:
        assert source.licence in ALLOWED_LICENCES, source.name
        assert len(bytes.fromhex(source.sha256)) == 32
        assert source.attribution


def test_html_paragraphs_drop_code_and_tags() -> None:
    page = '<head><title>t</title></head><p>Ein <b>Satz</b> &amp; mehr.</p><pre>code</pre><div class="para">Zwei.</div>'
    assert html_paragraphs(page) == ["Ein Satz & mehr.", "Zwei."]


def test_untranslated_paragraphs_are_recognised() -> None:
    assert looks_english("It is one of the first things that you will be asked for by an installer")
    assert not looks_english("Dies ist einer der ersten Absätze, die in der Anleitung stehen")
