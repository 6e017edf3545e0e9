"""Each of the 58 concepts on one example that it marks and one that it does not."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from moe_lens.corpus.concepts import Column, builtin_concepts
from moe_lens.corpus.source58 import CONCEPTS, POS
from moe_lens.corpus.tagging import Tagger
from moe_lens.corpus.text import Document

BY_NAME = {c.name: c for c in CONCEPTS}


def marked(name: str, text: str, **fields: str) -> list[str]:
    tags = Tagger([BY_NAME[name]]).tag(Document("d", text, fields))
    assert tags.in_scope.all()
    return [text[a:b] for a, b in tags.spans[0]]


# name: (text, what is marked in it, text in which nothing is)
EXAMPLES = {
    "leading_capital": ("the Cat and mY Ärger", ["Cat", "Ärger"], "the cat, mY 3A"),
    "leading_loweralpha": ("The cat's 3a", ["cat", "s"], "THE Cat 3a"),
    "all_digits": ("a 12, b3", ["12", "3"], "none here"),
    "is_not_ascii": ("naïve 日本", ["ï", "日本"], "plain ascii"),
    "contains_all_whitespace": ("a b  c\n\td ", [" ", "\n\t", " "], "a b c"),
    "all_capitals": ("NASA and Xml and A", ["NASA"], "Nasa and A"),
    "is_not_alphanumeric": ("a, b_c!?", [",", "_", "!?"], "ab 12 ñ"),
    "contains_whitespace": ("a b\n\nc", [" ", "\n\n"], "abc"),
    "contains_capital": ("aBCd É", ["BC", "É"], "abcd é"),
    "contains_digit": ("a1 22", ["1", "22"], "abc"),
    "is_function_def": ("x = 1\ndef add(a, b):", ["def add(a, b)"], "call(add, b)"),
    "is_function_call": ("y = add(a, (b)) + 1", ["add(a, (b))"], "if (a) return b"),
    "is_assignment": ("total += 3; go", ["total += 3"], "a == b <= c != d >= e"),
    "is_class_def": ("class Foo(Bar):\n", ["class Foo(Bar)"], "the first-class seats"),
    "is_import": ("from os import path\nx", ["from os import path"], "to import goods is dear"),
    "is_comment": ("x = 1  # why\n", ["# why"], "#include <stdio.h>\nhttp://a.b"),
    "is_string_literal": ('print(\'a\', "b\\"c")', ["'a'", '"b\\"c"'], "don't print"),
    "is_control_flow": ("if x: return y", ["if", "return"], "notify the iffy returner"),
    "is_loop": ("for x in y: pass", ["for"], "before if x"),
    "is_conditional": ("if x:\nelif y:\nelse:", ["if", "elif", "else"], "for x in diff"),
    "is_exception_handling": ("try:\nexcept E:", ["try", "except"], "the country retry"),
    "is_array_literal": ("x = [1, [2, 3]]", ["[1, [2, 3]]"], "x[3] = f()[0]"),
    "is_method_call": ("a.b.run(1) + c", ["a.b.run(1)"], "run(1) + a.b"),
    "is_lambda": ("f = lambda x: x + 1", ["lambda x: x + 1"], "f = x + 1"),
    "is_operator": ("a += b", ["+="], "a, b"),
    "is_constant": ("MAX_SIZE and Max", ["MAX_SIZE"], "max_size, X"),
    "is_boolean": ("x = True or false", ["True", "false"], "truely isTrue"),
    "is_null": ("x = None, null", ["None", "null"], "nonesuch MaybeNone nullable"),
    "is_decorator": ("@cached(1)\ndef f(): pass", ["@cached(1)"], "me@example.org"),
    "is_async": ("async def f(): await g", ["async", "await"], "asynchronous waits"),
    "is_superscript": ("$x^2 + y^{ab}$", ["^2", "^{ab}"], r"a\^o and x_2"),
    "is_subscript": (r"$x_2 + y_{a_b} + z_\alpha$", ["_2", "_{a_b}", r"_\alpha"], r"snake\_case x^2"),
    "is_inline_math": (r"so $x + 1$ and \(y\) cost \$5", ["$x + 1$", r"\(y\)"], r"it costs \$5 or \$6"),
    "is_display_math": (
        "a $$x$$ b \\begin{align*}y\\end{align*} \\[z\\]",
        ["$$x$$", "\\begin{align*}y\\end{align*}", "\\[z\\]"],
        "inline $x$ \\begin{center}y\\end{center}",
    ),
    "is_math": ("a $x$ and $$y$$", ["$x$", "$$y$$"], "costs \\$5"),
    "is_denominator": (r"\frac{a}{b_{c}}", [r"\frac{a}{b_{c}}"], r"\sqrt{a}{b}"),
    "is_numerator": (r"\dfrac {a}{b}", [r"\dfrac {a}{b}"], r"a/b"),
    "is_frac": (r"x = \tfrac12", [r"\tfrac12"], r"\fraction of"),
    "is_author": (r"\author[1]{A. {\'E} B}", [r"\author[1]{A. {\'E} B}"], r"the author {A}, \authors"),
    "is_title": (r"\title{On $x$}", [r"\title{On $x$}"], r"the title {x} \titlepage"),
    "is_reference": (
        r"see \cite[p. 2]{ab} and \eqref{e}",
        [r"\cite[p. 2]{ab}", r"\eqref{e}"],
        r"\label{e} \preface{x}",
    ),
    "is_abstract": (
        "\\begin{abstract}We \\emph{do}.\\end{abstract} More",
        ["\\begin{abstract}We \\emph{do}.\\end{abstract}"],
        "the abstract says \\begin{center}",
    ),
}

MORE = [
    ("is_function_def", "static int add(int a, int b) {\n", ["static int add(int a, int b) "]),
    ("is_function_def", "func (s *T) Run(x int) error {", ["func (s *T) Run(x int)"]),
    ("is_function_def", "pub fn new<T>(x: T) -> Self {", ["fn new<T>(x: T)"]),
    ("is_function_def", "function go(a) { run(a); }", ["function go(a)"]),
    ("is_class_def", "type Point struct {", ["type Point struct"]),
    ("is_class_def", "pub trait Shape: Sized {", ["trait Shape"]),
    ("is_import", '#include <a.h>\nuse std::io;\nimport "fmt"', ["#include <a.h>", "use std::io;", 'import "fmt"']),
    ("is_comment", "a /* b\n c */ d // e\n", ["/* b\n c */", "// e"]),
    ("is_string_literal", '"""a "b" c""" `d`', ['"""a "b" c"""', "`d`"]),
    ("is_lambda", "xs.map(x => x + 1)", ["x =>"]),
    ("is_decorator", "#[derive(Debug)]\nstruct A;", ["#[derive(Debug)]"]),
    ("is_abstract", "\\begin{abstract}cut off", ["\\begin{abstract}cut off"]),
]  # fmt: skip


def test_the_names_and_categories_are_the_sources():
    assert Counter(c.category for c in CONCEPTS) == {"pos": 16, "text": 10, "code": 20, "latex": 12}
    assert len(BY_NAME) == 58
    assert set(EXAMPLES) | set(POS) == set(BY_NAME)
    assert all(c.collection == "source58" for c in CONCEPTS)
    assert len({c.name for c in builtin_concepts()}) == len(builtin_concepts())


def test_the_three_duplicates_share_groups_and_positives():
    groups: dict[str, list[str]] = {}
    for c in CONCEPTS:
        if c.group:
            groups.setdefault(c.group, []).append(c.name)
    assert groups == {"digits": ["all_digits", "contains_digit"], "frac": ["is_denominator", "is_numerator", "is_frac"]}
    for names in groups.values():
        assert len({BY_NAME[n].labeller for n in names}) == 1
    assert len({c.labeller for c in CONCEPTS}) == 55


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    text, spans, other = EXAMPLES[name]
    assert marked(name, text) == spans
    assert marked(name, other) == []


@pytest.mark.parametrize(("name", "text", "spans"), MORE)
def test_other_languages(name, text, spans):
    assert marked(name, text) == spans


@pytest.mark.parametrize("name", POS)
def test_part_of_speech(name):
    tag = POS[name]
    rest = "NOUN" if tag == "VERB" else "VERB"
    column = json.dumps([["one", tag], ["two", rest], ["one", rest]])
    assert marked(name, "one two one", pos_tags=column) == ["one"]
    assert marked(name, "one two one", pos_tags=json.dumps([[w, rest] for w in ("one", "two", "one")])) == []
    assert isinstance(BY_NAME[name].labeller, Column)


def test_scope_of_each_category():
    def scoped(name, **fields):
        return BY_NAME[name].in_scope(Document("d", "x", fields))

    for name in (n for n, c in BY_NAME.items() if c.category == "code"):
        assert scoped(name)
        assert scoped(name, kind="code")
        assert scoped(name, pile_set_name="Github")
        assert not scoped(name, kind="natural")
        assert not scoped(name, pile_set_name="ArXiv")
    for name in (n for n, c in BY_NAME.items() if c.category == "latex"):
        assert scoped(name)
        assert scoped(name, domain="latex", kind="markup")
        assert scoped(name, pile_set_name="ArXiv")
        assert not scoped(name, domain="python")
    for name in (n for n, c in BY_NAME.items() if c.category == "text"):
        assert scoped(name, kind="natural", domain="fr")
    for name in POS:
        assert not scoped(name)
        assert scoped(name, upos='["NOUN"]')


HOSTILE = ["(", "{", "[", "a ", "$", '"', "\\", "_", "a=", "x(", "\\frac{", " ", "a.b", "'", "/*", "<a ", "|a"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_expression_blows_up_on_hostile_text(piece):
    Tagger(builtin_concepts(), timeout=2.0).tag(Document("d", piece * 3001, {"language": "python"}))
