"""From concept spans to token bits: by hand, against a brute-force count, and for each kind of labeller."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.corpus.concepts import builtin_concepts, concept
from moe_lens.corpus.lexing import merged
from moe_lens.corpus.tagging import DocumentTags, Tagger
from moe_lens.corpus.text import Document
from moe_lens.errors import BadConcept

BUILTIN = {c.name: c for c in builtin_concepts()}


def marked(one, text, **fields):
    tags = Tagger([one]).tag(Document("d", text, fields))
    return [text[a:b] for a, b in tags.spans[0]] if tags.in_scope[0] else None


def test_bits_by_hand():
    #        0123456789
    # text   the 42 cats
    concepts = [concept("digits", regex=r"\d+"), concept("fourchar", regex="cats"), concept("never", regex="dog")]
    tags = Tagger(concepts).tag(Document("d", "the 42 cats"))
    start, end = np.array([0, 3, 4, 5, 6, 9, 11, -1]), np.array([3, 5, 4, 6, 9, 11, 11, -1])
    expected = [
        # digits fourchar never
        [0, 0, 0],  # "the"
        [1, 0, 0],  # " 4"
        [0, 0, 0],  # empty span, inside nothing
        [1, 0, 0],  # "2"
        [0, 1, 0],  # " ca"
        [0, 1, 0],  # "ts"
        [0, 0, 0],  # empty at the end
        [0, 0, 0],  # special token
    ]
    assert tags.token_bits(start, end).astype(int).tolist() == expected


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


@given(SPANS, SPANS)
def test_a_token_is_positive_iff_its_characters_overlap_a_match(spans, tokens):
    union = merged([s for s in spans if s[0] < s[1]])
    tokens = [(min(t), max(t)) for t in tokens]
    start, end = np.array([t[0] for t in tokens], int), np.array([t[1] for t in tokens], int)
    bits = DocumentTags(np.array([True]), (union,)).token_bits(start, end)
    characters = {i for a, b in spans for i in range(a, b)}
    assert bits[:, 0].tolist() == [bool(characters & set(range(a, b))) for a, b in tokens]


@given(SPANS)
def test_merged_spans_are_sorted_disjoint_and_cover_the_same(spans):
    out = merged([s for s in spans if s[0] < s[1]]).tolist()
    assert all(a < b for a, b in out)
    assert all(x[1] <= y[0] for x, y in zip(out, out[1:], strict=False))
    assert {i for a, b in out for i in range(a, b)} == {i for a, b in spans for i in range(a, b)}


def test_the_whole_match_is_marked_not_the_group():
    assert marked(concept("x", regex=r"a(b)c"), "zabcz") == ["abc"]


def test_empty_matches_mark_nothing():
    assert marked(concept("x", regex=r"\d*"), "a1b") == ["1"]


def test_document_fields_mark_the_whole_document_and_define_the_scope():
    french = concept("french", field="language", equals="fr")
    assert marked(french, "chat", language="fr") == ["chat"]
    assert marked(french, "cat", language="en") == []
    assert marked(french, "?") is None


PYTHON = 'import re\n@cache\ndef f(x):\n    """Doc."""\n    return g[0x1F] + "s)" # no (\n'

SYNTAX = {
    "syntax_comment": ["# no ("],
    "syntax_docstring": ['"""Doc."""'],
    "syntax_decorator": ["@cache"],
    "syntax_function_name": ["f"],
    "syntax_number": ["0x1F"],
    "syntax_operator": ["+"],
    "syntax_bracket_open": ["(", "["],
    "syntax_bracket_close": [")", "]"],
}


@pytest.mark.parametrize("name", SYNTAX)
def test_lexer_classes_of_python(name):
    assert marked(BUILTIN[name], PYTHON, language="python", kind="code") == SYNTAX[name]


def test_strings_and_keywords_of_python():
    assert "".join(marked(BUILTIN["syntax_string"], PYTHON, language="python")) == '"""Doc.""""s)"'
    assert marked(BUILTIN["syntax_keyword"], PYTHON, language="python") == ["import", "def", "return"]


def test_the_c_preprocessor_is_no_comment():
    c = "#define A 1\n/* why */ int x;\n"
    assert marked(BUILTIN["syntax_comment"], c, language="c") == ["/* why */"]
    assert "define A 1" in "".join(marked(BUILTIN["syntax_preprocessor"], c, language="c"))
    assert marked(BUILTIN["syntax_type"], c, language="c") == ["int"]


def test_brackets_are_single_characters_where_the_lexer_joins_them():
    closing = replace(BUILTIN["syntax_bracket_close"], scope={})
    assert marked(closing, '[{"a": [{}]}],', language="json") == list("}]}]")


def test_lexer_classes_have_no_scope_without_a_language():
    assert marked(BUILTIN["syntax_comment"], "# x", language="fr") is None
    assert marked(BUILTIN["syntax_comment"], "# x") is None
    assert marked(BUILTIN["syntax_comment"], "{}", domain="json", kind="data") is None


def test_lexer_offsets_count_characters_not_bytes():
    assert marked(BUILTIN["syntax_comment"], "x = 'é日🎉'  # ключ\ny", language="python") == ["# ключ"]


SCRIPTS = {
    "script_cyrillic": ("да yes", ["да"]),
    "script_greek": ("λόγος x", ["λόγος"]),
    "script_cjk": ("日本ひらx", ["日本ひら"]),
    "script_kana": ("日本ひらx", ["ひら"]),
    "script_arabic": ("سلام x", ["سلام"]),
    "script_hangul": ("한국 x", ["한국"]),
    "script_latin_diacritics": ("éa ñ да", ["é", "ñ"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name):
    text, spans = SCRIPTS[name]
    assert marked(BUILTIN[name], text) == spans
    assert marked(BUILTIN[name], "plain english") == []


def test_markup_and_layout():
    html = '<p class="x">a <b>c</b></p>'
    assert marked(BUILTIN["markup_tag"], html, domain="html") == ['<p class="x">', "<b>", "</b>", "</p>"]
    assert marked(BUILTIN["markup_text"], html, domain="html") == ["a ", "c"]
    assert marked(BUILTIN["markup_attribute"], html, domain="html") == ['class="x"']
    assert marked(BUILTIN["markup_tag"], html, domain="python") is None
    assert marked(BUILTIN["json_key"], '{"a": "b", "c" : 1}', domain="json") == ['"a"', '"c"']
    assert marked(BUILTIN["latex_command"], r"\emph{a} \% \\", domain="latex") == ["\\emph", "\\%", "\\\\"]
    assert marked(BUILTIN["newline"], "a\n\nb") == ["\n\n"]
    assert marked(BUILTIN["indent"], "a b\n  c d\n") == ["  "]
    assert marked(BUILTIN["line_start"], "a b\n  c d\n") == ["a", "  c"]


@pytest.mark.parametrize(
    "fields",
    [
        {"pos_tags": [["The", "DET"], ["cat", "NOUN"], ["sat", "VERB"], ["cat", "NOUN"]]},
        {"pos_tags": [[["The", "DET"], ["cat", "NOUN"]], [["sat", "VERB"], ["cat", "NOUN"]]]},
        {
            "pos": [
                {"token": w, "tag": t} for w, t in (("The", "DET"), ("cat", "NOUN"), ("sat", "VERB"), ("cat", "NOUN"))
            ]
        },
        {"pos": [{"start": 4, "end": 7, "tag": "NOUN"}, {"start": 12, "end": 15, "label": "NOUN"}]},
        {"tokens": ["The", "cat", "sat", "cat"], "upos": ["DET", "NOUN", "VERB", "NOUN"]},
    ],
)
def test_shapes_of_pos_columns(fields):
    text = "The cat sat cat"
    tags = Tagger([BUILTIN["noun"]]).tag(Document("d", text, {k: json.dumps(v) for k, v in fields.items()}))
    assert tags.in_scope[0]
    assert tags.spans[0].tolist() == [[4, 7], [12, 15]]


@pytest.mark.parametrize(
    "column",
    [
        "not json",
        "[]",
        '["NOUN", "VERB"]',  # no column of tokens beside it
        '[["dog", "NOUN"], ["ran", "VERB"]]',  # words that are not in the text
        '[["The", "DET"]]',  # the first word only: the rest would be false negatives
    ],
)
def test_unusable_pos_columns_leave_the_document_out_of_scope(column):
    assert marked(BUILTIN["noun"], "The cat sat on the mat", pos_tags=column) is None


def test_a_catastrophic_expression_is_reported():
    tagger = Tagger([concept("slow", regex="(a|aa)+$")], timeout=0.1)
    with pytest.raises(BadConcept, match=r"'slow'.*more than 0\.1 s on document 'doc'"):
        tagger.tag(Document("doc", "a" * 100 + "c"))
