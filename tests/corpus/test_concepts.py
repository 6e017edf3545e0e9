"""Definitions of concepts: by hand, from YAML, by name for a corpus, and what bad ones are told."""

from __future__ import annotations

import pytest

import moe_lens as ml
from moe_lens.corpus.concepts import (
    FieldEquals,
    Regex,
    TokenClass,
    builtin_concepts,
    concept,
    concepts_for,
    field_concepts,
    load_concepts,
)  # fmt: skip
from moe_lens.corpus.lexing import LEXERS, language_of
from moe_lens.corpus.text import Corpus, Document
from moe_lens.errors import BadConcept, UnknownConcept
from moe_lens.types import Granularity


@pytest.fixture(scope="module")
def mixed() -> Corpus:
    docs = [
        Document(f"{domain}{i}", f"text {i}", {"domain": domain, "kind": kind, "language": language})
        for domain, kind, language, n in [
            ("fr", "natural", "fr", 25), ("python", "code", "python", 25), ("c++", "code", "c++", 25),
            ("rare", "natural", "en", 3),
        ]
        for i in range(n)
    ]  # fmt: skip
    return Corpus.of(docs, id="mixed")


def test_each_kind_of_labeller():
    assert concept("digits", regex=r"\d").labeller == Regex(r"\d")
    assert ml.concept("digits", regex=r"\d", granularity="type").granularity is Granularity.TYPE
    french = concept("french", field="language", equals=["fr", "fr_CA"], category="language")
    assert french.labeller == FieldEquals("language", ("fr", "fr_CA"))
    assert (french.granularity, french.category) == (Granularity.DOCUMENT, "language")
    comments = concept("c", token_class=["Comment", "String.Doc", "Token.Number"])
    assert comments.labeller == TokenClass(("Comment", "Literal.String.Doc", "Literal.Number"))
    assert comments.granularity is Granularity.SPAN


BAD = [
    ({"name": "x"}, "no labeller"),
    ({"name": "x", "regex": "a", "field": "f", "equals": "v"}, "regex and field: give exactly one"),
    ({"name": "x", "field": "f"}, "field and equals go together"),
    ({"name": "x", "equals": "f", "regex": "a"}, "field and equals go together"),
    ({"name": "x", "regex": "(a"}, r"bad regular expression '\(a'"),
    ({"name": "x", "regex": ""}, "is empty"),
    ({"name": "x", "regex": "^$"}, "only the empty string"),
    ({"name": "x", "token_class": "Coment"}, r"no token class 'Coment', did you mean 'Comment'"),
    ({"name": "x", "regex": "a", "granularity": "spam"}, "one of type, span, document, did you mean 'span'"),
    ({"name": "a b", "regex": "a"}, "concept name 'a b'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_definitions(arguments, message):
    with pytest.raises(BadConcept, match=message):
        concept(**arguments)


def test_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "- name: ip\n  category: network\n  regex: '\\b(?:\\d{1,3}\\.){3}\\d{1,3}\\b'\n"
        "- name: french\n  field: language\n  equals: fr\n"
        "- name: docs\n  token_class: String.Doc\n  scope: {language: python}\n  granularity: span\n  doc: docstrings\n"
    )
    ip, french, docs = load_concepts(path)
    assert ip == concept("ip", category="network", regex=r"\b(?:\d{1,3}\.){3}\d{1,3}\b")
    assert french.labeller == FieldEquals("language", ("fr",))
    assert dict(docs.scope) == {"language": ("python",)}
    assert docs.doc == "docstrings"


BAD_YAML = [
    ("a: [", "is not YAML"),
    ("name: x", "a list of concepts is needed"),
    ("[]", "a list of concepts is needed"),
    ("- regex: a", r"entry 1 \(no name\): the key 'name' is missing"),
    ("- name: ok\n  regex: a\n- name: bad\n  regx: a", r"entry 2 \(bad\): unknown key 'regx', did you mean 'regex'"),
    ("- name: bad\n  regex: '(a'", r"entry 1 \(bad\): concept 'bad': bad regular expression"),
    ("- name: x\n  regex: a\n- name: x\n  regex: b", "entry 2: the name 'x' is taken"),
    ("- name: is_frac\n  regex: a", "the name 'is_frac' is taken"),
    ("- just text", "entry 1: a mapping with the key name is needed"),
    ("- name: x\n  regex: a\n  scope: python", "scope is a mapping"),
    ("- name: norwegian\n  field: language\n  equals: no", r"\(norwegian\): YAML reads no.* put the value in quotes"),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
def test_bad_yaml_names_the_entry(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BadConcept, match=message):
        load_concepts(path)


def test_a_missing_yaml_file(tmp_path):
    with pytest.raises(BadConcept, match="no such file of concepts"):
        load_concepts(tmp_path / "none.yaml")


def test_field_concepts_need_documents_on_both_sides(mixed):
    names = [c.name for c in field_concepts(mixed)]
    assert names == [
        "domain_cpp", "domain_fr", "domain_python", "kind_code", "kind_natural",
        "language_cpp", "language_fr", "language_python",
    ]  # fmt: skip


def test_a_field_that_hardly_varies_is_no_concept():
    docs = [Document(f"d{i}", "x", {"language": "en" if i < 40 else "fr"}) for i in range(45)]
    assert field_concepts(Corpus.of(docs, id="t")) == ()


def test_none_means_everything_that_applies_once(mixed):
    names = [c.name for c in concepts_for(mixed)]
    assert len(names) == len(set(names))
    assert {"contains_digit", "is_loop", "syntax_comment", "script_greek", "domain_fr", "kind_code"} <= set(names)
    assert "noun" not in names  # no POS column
    assert "is_frac" not in names  # no LaTeX
    assert "language_fr" not in names  # the same documents as domain_fr


def test_names_categories_collections_files_and_objects(mixed, tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("- name: ip\n  regex: a\n")
    mine = concept("mine", regex="b")
    found = [c.name for c in concepts_for(mixed, ["language_fr", "text", path, mine, "contains_digit"])]
    assert found[0] == "language_fr"
    assert found[1:11] == [c.name for c in builtin_concepts() if c.category == "text"]
    assert found[11:] == ["ip", "mine"]
    assert [c.name for c in concepts_for(mixed, "is_loop")] == ["is_loop"]
    assert len(concepts_for(mixed, ["source58"])) == 30
    assert [c.name for c in concepts_for(mixed, str(path))] == ["ip"]


def test_unknown_names_suggest_the_nearest(mixed):
    with pytest.raises(UnknownConcept, match="'is_frak', did you mean 'is_frac'"):
        concepts_for(mixed, ["is_frak"])
    with pytest.raises(UnknownConcept, match="'latx', did you mean 'latex'"):
        concepts_for(mixed, ["latx"])


def test_what_the_corpus_cannot_label_is_refused(mixed):
    with pytest.raises(BadConcept, match=r"'noun' is not defined on any document of mixed.*pos_tags"):
        concepts_for(mixed, ["noun"])
    with pytest.raises(BadConcept, match=r"none of the 12 concepts of 'latex' apply.*domain in"):
        concepts_for(mixed, ["latex"])
    with pytest.raises(BadConcept, match="field 'author'"):
        concepts_for(mixed, [concept("x", field="author", equals="me")])
    with pytest.raises(BadConcept, match="two different concepts are named 'x'"):
        concepts_for(mixed, [concept("x", regex="a"), concept("x", regex="b")])


def test_natural_languages_are_not_programming_languages():
    for code in ("cs", "sv", "pl", "fr", "sl", "hy", "io", "ur", "en"):
        assert code not in LEXERS
    assert language_of(Document("d", "", {"language": "en", "domain": "html"})) == "html"
    assert language_of(Document("d", "", {"language": "Rust"})) == "rust"
    assert language_of(Document("d", "", {"language": "fr"})) is None


def test_every_lexer_exists():
    from pygments.lexers import get_lexer_by_name

    for alias in set(LEXERS.values()):
        get_lexer_by_name(alias)


def test_plain_text_without_any_field_has_its_default_concepts(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("".join(f"line {i} of a plain text, 1{i}\n" for i in range(40)), encoding="utf-8")
    names = {c.name for c in concepts_for(ml.corpus(str(path)))}
    assert {"contains_digit", "is_import", "newline"} <= names
