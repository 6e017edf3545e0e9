"""Concepts with ground truth beyond the source's 58: lexer classes, scripts, markup tags, layout.

Lexer classes (category ``syntax``) come from pygments on documents whose ``language`` or ``domain`` names a
language. Scripts are functions of the token string. Concepts of whole documents (``domain_fr``) depend on the
corpus and are made by `moe_lens.corpus.concepts.field_concepts`.
"""

from __future__ import annotations

from moe_lens.corpus.concepts import Concept, Regex, TokenClass
from moe_lens.types import Granularity

_CODE = {"kind": ("code",)}
_TAGGED = {"domain": ("html", "xml", "svg")}
_JSON = {"domain": ("json",)}

SYNTAX: dict[str, tuple[TokenClass, str]] = {
    "syntax_comment": (TokenClass(("Comment",), excluding=("Comment.Preproc", "Comment.PreprocFile")), "comments"),
    "syntax_preprocessor": (TokenClass(("Comment.Preproc", "Comment.PreprocFile")), "lines for the C preprocessor"),
    "syntax_string": (TokenClass(("Literal.String",)), "string and character literals, docstrings included"),
    "syntax_docstring": (TokenClass(("Literal.String.Doc", "Comment.Special")), "documentation strings"),
    "syntax_keyword": (TokenClass(("Keyword",)), "keywords, type keywords and keyword constants included"),
    "syntax_type": (TokenClass(("Keyword.Type", "Name.Class")), "built-in types, names of classes"),
    "syntax_function_name": (TokenClass(("Name.Function",)), "names of functions where they are defined or called"),
    "syntax_builtin": (TokenClass(("Name.Builtin",)), "names that the language predefines"),
    "syntax_decorator": (TokenClass(("Name.Decorator",)), "decorators and annotations"),
    "syntax_number": (TokenClass(("Literal.Number",)), "number literals"),
    "syntax_operator": (TokenClass(("Operator",)), "operators, word operators included"),
    "syntax_bracket_open": (TokenClass(("Punctuation", "Operator"), "([{"), "opening brackets outside strings"),
    "syntax_bracket_close": (TokenClass(("Punctuation", "Operator"), ")]}"), "closing brackets outside strings"),
}

SCRIPTS = {
    "script_cyrillic": (r"\p{Cyrillic}+", "Cyrillic letters"),
    "script_greek": (r"\p{Greek}+", "Greek letters"),
    "script_cjk": (r"[\p{Han}\p{Hiragana}\p{Katakana}]+", "Chinese characters and kana"),
    "script_kana": (r"[\p{Hiragana}\p{Katakana}]+", "Japanese kana"),
    "script_arabic": (r"\p{Arabic}+", "Arabic letters"),
    "script_hangul": (r"\p{Hangul}+", "Korean letters"),
    "script_latin_diacritics": (r"(?:(?=\p{Latin})[^\x00-\x7F])+", "Latin letters beyond a-z"),
}

MARKUP = {
    "markup_tag": (r"<[/!?]?[A-Za-z][^<>]*+>", "HTML and XML tags", _TAGGED),
    "markup_attribute": (r"(?<=\s)[A-Za-z_:][\w:.-]*+=(?:\"[^\"<>]*+\"|'[^'<>]*+')", "attributes in tags", _TAGGED),
    "markup_text": (r"(?<=>)[^<>]++(?=<)", "text between tags", _TAGGED),
    "json_key": (r'"(?:[^"\\\n]|\\.)*+"(?=\s*:)', "keys of JSON objects", _JSON),
    "latex_command": (r"\\(?:[A-Za-z@]++|.)", "LaTeX commands", {"domain": ("latex", "tex", "arxiv")}),
}

LAYOUT = {
    "newline": (r"[\r\n]+", "line breaks"),
    "indent": (r"(?m:^[ \t]++(?=\S))", "blanks at the start of a line"),
    "line_start": (r"(?m:^[ \t]*+\S++)", "first word of a line with its indent"),
}


def _syntax(name: str, rule: TokenClass, doc: str) -> Concept:
    return Concept(name, "syntax", rule, Granularity.SPAN, _CODE, doc=doc, collection="bundled")


def _regex(name: str, category: str, pattern: str, doc: str, scope: dict[str, tuple[str, ...]]) -> Concept:
    granularity = Granularity.TYPE if category == "script" else None
    return Concept(name, category, Regex(pattern), granularity, scope, doc=doc, collection="bundled")


CONCEPTS: tuple[Concept, ...] = (
    *(_syntax(n, rule, doc) for n, (rule, doc) in SYNTAX.items()),
    *(_regex(n, "script", p, doc, {}) for n, (p, doc) in SCRIPTS.items()),
    *(_regex(n, "markup", p, doc, scope) for n, (p, doc, scope) in MARKUP.items()),
    *(_regex(n, "layout", p, doc, {}) for n, (p, doc) in LAYOUT.items()),
)
