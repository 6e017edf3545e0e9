r"""The 58 concepts of Herbst et al. 2026 ("The Expert Strikes Back"): 16 pos, 10 text, 20 code, 12 latex.

Names, categories and the marking rule (every character of the whole match) are the source's; the
expressions are ours, written to the names, because the package must carry no code of the source. They
are approximations on purpose: ``is_comment`` is what a regular expression can know about comments. Where a
lexer knows better, `bundled_truth` has the true concept (``syntax_comment``).

Two sets have the same positives and share a group: is_frac = is_numerator = is_denominator (the whole match
is marked, not the capture group) and all_digits = contains_digit. So there are 55 distinct concepts.
"""

from __future__ import annotations

from moe_lens.corpus.concepts import Column, Concept, Regex
from moe_lens.types import Granularity

POS_COLUMNS = ("pos_tags", "pos", "upos")
CODE_SCOPE = {"kind": ("code",), "pile_set_name": ("Github",), "redpajama_set_name": ("RedPajamaGithub",)}
LATEX_SCOPE = {
    "domain": ("latex", "tex", "arxiv"),
    "pile_set_name": ("ArXiv",),
    "redpajama_set_name": ("RedPajamaArXiv",),
}
GROUPS = {
    "all_digits": "digits", "contains_digit": "digits",
    "is_frac": "frac", "is_numerator": "frac", "is_denominator": "frac",
}  # fmt: skip

POS = {
    "adjective": "ADJ", "adposition": "ADP", "adverb": "ADV", "auxiliary": "AUX",
    "coordinating_conjunction": "CCONJ", "determiner": "DET", "noun": "NOUN", "numeral": "NUM",
    "particle": "PART", "pronoun": "PRON", "proper_noun": "PROPN", "punctuation": "PUNCT",
    "subordinating_conjunction": "SCONJ", "symbol": "SYM", "verb": "VERB", "other": "X",
}  # fmt: skip

TEXT = {
    "leading_capital": r"(?<![\p{L}\p{N}_])\p{Lu}[\p{L}\p{N}_]*",
    "leading_loweralpha": r"(?<![\p{L}\p{N}_])[a-z][\p{L}\p{N}_]*",
    "all_digits": r"\d+",
    "is_not_ascii": r"[^\x00-\x7F]+",
    # the last blank before a word belongs to the word's token, so it does not make an all-blank token
    "contains_all_whitespace": r"[\r\n\t]+|\s+(?=\s)|\s+\Z",
    "all_capitals": r"(?<![\p{L}\p{N}_])\p{Lu}{2,}(?![\p{L}\p{N}_])",
    "is_not_alphanumeric": r"[^\p{L}\p{N}\s]+",
    "contains_whitespace": r"\s+",
    "contains_capital": r"\p{Lu}+",
    "contains_digit": r"\d+",
}

_ARGS = r"\((?:[^()\n]|\([^()\n]*+\))*+\)"  # one level of parentheses inside, on one line
_WORDS = r"(?:if|elif|for|while|switch|return|catch|except|match|def|function|func|fn|and|or|not|in|is|else|sizeof)"

_PREPROCESSOR = "(?:include|define|undef|ifdef|ifndef|if|elif|else|endif|pragma|import|error)"

CODE = {
    "is_function_def": (
        rf"\b(?:async\s++)?(?:def|function|func|fn|fun|sub)\s++(?:\([^()\n]*+\)\s*+)?[A-Za-z_$][\w$.?!]*+"
        rf"(?:<[^<>\n]*+>)?\s*+(?:{_ARGS})?"
        r"|(?m:^[ \t]*+(?:[A-Za-z_][\w:<>,*&\[\]]*+[ \t*&]++)+?[A-Za-z_]\w*+\s?\([^(){};=]*+\)\s*+(?=\{))"
    ),
    "is_function_call": rf"(?<![\w$.])(?!{_WORDS}\b)[A-Za-z_$][\w$]*+(?:{_ARGS}|\()",
    "is_assignment": (
        r"(?<![\w.])[A-Za-z_$@][\w$.]*+(?:\[[^\[\]\n]*+\])*+[ \t]*+"
        r"(?::=|(?:<<|>>|\*\*|//|[-+*/%&|^])?=(?![=>~]))[^\n;]*+"
    ),
    "is_class_def": (
        r"(?<![\w-])(?:class|struct|interface|trait|enum|impl|module|record)\s++[A-Za-z_]\w*+[^\n{:;]*+"
        r"|\btype\s++\w++\s++(?:struct|interface)\b"
    ),
    "is_import": (
        r"(?m:^[ \t]*+(?:from\s++[\w.]++\s++import\b[^\n]*+|import\b[^\n]++|#[ \t]*+(?:include|import)\b[^\n]++"
        r"|(?:pub\s++)?use\s++[\w:]++[^\n;]*+;|using\s++[\w.:= ]++;|require(?:_relative)?\b[^\n]++"
        r"|package\s++[\w.]++;?))"
        r"|\brequire\(['\"][^'\"\n]*+['\"]\)"
    ),
    "is_comment": (
        r"/\*(?:[^*]|\*(?!/))*+(?:\*/|\Z)|(?<![:\w])//[^\n]*+"
        rf"|(?<![\w$&\"'(\[])#(?![ \t]*+{_PREPROCESSOR}\b|!?\[)[^\n]*+"
    ),
    "is_string_literal": (
        r'"""(?:[^"\\]|\\.|"(?!""))*+"""'
        r"|'''(?:[^'\\]|\\.|'(?!''))*+'''"
        r'|"(?:[^"\\\n]|\\.)*+"'
        r"|(?<!\w)'(?:[^'\\\n]|\\.)*+'"
        r"|`[^`\n]*+`"
    ),
    "is_control_flow": (
        r"\b(?:if|else|elif|elsif|for|foreach|while|until|unless|do|loop|switch|case|default|match|break|continue"
        r"|return|goto|yield|pass)\b"
    ),
    "is_loop": r"\b(?:for|foreach|while|until|do|loop)\b",
    "is_conditional": r"\b(?:if|else|elif|elsif|unless|switch|case|match)\b",
    "is_exception_handling": r"\b(?:try|except|catch|finally|raise|throws?|rescue|ensure|panic|recover)\b",
    "is_array_literal": (
        r"(?<![\w\])])\[(?:[^\[\]\n]|\[[^\[\]\n]*+\])*+\]|(?<==)\s*+\{[^{}=;]*+\}|\[\]\w++\{[^{}]*+\}"
    ),
    "is_method_call": rf"\b[A-Za-z_$][\w$]*+(?:(?:\.|->|::)[A-Za-z_$][\w$]*+)++(?:{_ARGS}|\()",
    "is_lambda": (
        rf"\blambda\b[^:\n]*+:[^\n,)]*+|(?:{_ARGS}|\b[A-Za-z_$][\w$]*+)\s?=>|\bfunction\s*+{_ARGS}"
        rf"|\bfunc{_ARGS}|(?<=[(,=]\s?)(?:move\s)?\|[\w\s,&:]*+\||->\s*+\{{|\[[&=\w, ]*+\]\s?{_ARGS}\s*+(?=\{{)"
    ),
    "is_operator": r"[-+*/%=<>!&|^~]++",
    "is_constant": r"(?<![\w.])[A-Z][A-Z0-9_]++\b",
    "is_boolean": r"\b(?:true|false|True|False|TRUE|FALSE)\b",
    "is_null": r"\b(?:null|None|nil|NULL|nullptr|undefined)\b",
    "is_decorator": rf"(?m:^[ \t]*+@[A-Za-z_][\w.]*+(?:{_ARGS})?)|#!?\[[^\[\]\n]*+\]",
    "is_async": r"\b(?:async|await|asyncio|Promise|Future|coroutine|goroutine)\b|\.then\(|\bgo\s+func\b",
}

_BRACES = r"\{(?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.)*+\})*+\})*+\}"  # two levels of braces inside
_ENVIRONMENTS = r"(?:equation|align|alignat|gather|multline|eqnarray|flalign|displaymath|math)\*?"
_INLINE = (
    r"(?<![\\$])\$(?!\$)(?:[^$\\\n]|\\.|\n(?![ \t]*+\n))++\$(?!\$)"
    r"|(?<!\\)\\\((?:[^\\]|\\(?!\)))*+\\\)"
)
_DISPLAY = (
    r"(?<!\\)\$\$(?:[^$\\]|\\.|\$(?!\$))++\$\$|(?<!\\)\\\[(?:[^\\]|\\(?!\]))*+\\\]"
    rf"|\\begin\{{({_ENVIRONMENTS})\}}(?:[^\\]|\\(?!end\{{\1\}}))*+\\end\{{\1\}}"
)
_SCRIPT = rf"(?:{_BRACES}|\\[A-Za-z]++|[^\s{{}}\\^_$])"
_FRAC = rf"\\[dtc]?frac\s*+(?:{_BRACES}\s*+{_BRACES}|\d\s?\d)"

LATEX = {
    "is_superscript": rf"(?<!\\)\^{_SCRIPT}",
    "is_subscript": rf"(?<!\\)_{_SCRIPT}",
    "is_inline_math": _INLINE,
    "is_display_math": _DISPLAY,
    "is_math": f"{_DISPLAY}|{_INLINE}",
    "is_denominator": _FRAC,
    "is_numerator": _FRAC,
    "is_frac": _FRAC,
    "is_author": rf"\\author\b\s*+(?:\[[^\]\n]*+\])?\s*+{_BRACES}",
    "is_title": rf"\\title\b\s*+(?:\[[^\]\n]*+\])?\s*+{_BRACES}",
    "is_reference": (
        r"\\(?:[Cc]ref|[cC]ite[A-Za-z]*+|(?:eq|auto|page|name|v)?ref|bibitem|nocite|footcite|parencite|textcite)\*?"
        r"(?:\[[^\]\n]*+\])*+\{[^{}\n]*+\}"
    ),
    "is_abstract": (
        rf"\\begin\{{abstract\}}(?:[^\\]|\\(?!end\{{abstract\}}))*+(?:\\end\{{abstract\}}|\Z)|\\abstract\s*+{_BRACES}"
    ),
}


def _regex(category: str, name: str, pattern: str, scope: dict[str, tuple[str, ...]]) -> Concept:
    words = name.removeprefix("is_").replace("_", " ")
    return Concept(
        name, category, Regex(pattern), None, scope, GROUPS.get(name), f"{category}: {words}", "source58"
    )  # fmt: skip


def _pos(name: str, tag: str) -> Concept:
    words = name.replace("_", " ")
    return Concept(
        name, "pos", Column(POS_COLUMNS, (tag,)), Granularity.SPAN, doc=f"part of speech: {words} ({tag})",
        collection="source58",
    )  # fmt: skip


CONCEPTS: tuple[Concept, ...] = (
    *(_pos(n, tag) for n, tag in POS.items()),
    *(_regex("text", n, p, {}) for n, p in TEXT.items()),
    *(_regex("code", n, p, CODE_SCOPE) for n, p in CODE.items()),
    *(_regex("latex", n, p, LATEX_SCOPE) for n, p in LATEX.items()),
)
