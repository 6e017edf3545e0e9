"""What a section of the report is made of. Text in it is escaped when it is shown, unless it is `Markup`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

if TYPE_CHECKING:
    import plotly.graph_objects as go

_NO_CSS = Markup("")
_TAG = re.compile(r"<[^>]+>")
_COLOUR = re.compile(r"""<span style=["']color: ?(#[0-9A-Fa-f]{3,6});?["']>""")
_STYLE = re.compile(r'style="([^"]*)"')
_BREAK = re.compile(r"<br\s*/?>")
_SCRIPT = re.compile(r"<(?=/?script|!--)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Figure:
    """A plot with its title in HTML, the rows behind it, and the table these are from."""

    id: str
    """Letters, digits and ``-``; unique in the page."""
    title: str
    subtitle: str | Markup
    plot: Mapping[str, Any]
    """``data`` and ``layout`` of plotly."""
    rows: pd.DataFrame
    source: str
    """Names of tables, for the reader."""
    choices: Mapping[str, Mapping[str, Any]] | None = None
    """Other plots in this one's place, by the name in the menu (the layer of a heat map); `plot` is the first."""
    choice: str = "show"
    """What the menu is called."""
    picks: tuple[str, str] | None = None
    """Table and its filter that a click on a point sets to the point's ``customdata``."""
    rows_of: str | None = None
    """Another part with the same rows, which the page then holds once."""

    kind = "figure"

    @classmethod
    def of(cls, id: str, figure: go.Figure, *, rows: pd.DataFrame, source: str, least: int = 560) -> Figure:
        """A figure of the library: its title and subtitle become HTML, which wraps on a narrow page.

        Args:
            least: pixels from which on it scrolls rather than shrinks.
        """
        plot = json.loads(str(figure.to_json()))
        layout = plot["layout"]
        title = layout.pop("title", {})
        margin, above = layout.get("margin", {}), _title_height(title)
        margin["t"] = max(16, margin.get("t", 0) - above)
        if "height" in layout:
            layout["height"] -= above
        layout.pop("template", None)
        width = layout.pop("width", None)
        if width:
            layout["meta"] = {"width": width, "least": min(least, width)}
        text = _plain_text(title.get("text", ""))
        return cls(id, text, _shown(title.get("subtitle", {}).get("text", "")), plot, rows, source)

    def to_dict(self) -> dict[str, Any]:
        """What the page's script needs."""
        rows = columns_of(self.rows) if self.rows_of is None else {"rows_of": self.rows_of}
        return {"plot": self.plot, "choices": self.choices, "picks": self.picks, **rows}


@dataclass(frozen=True, eq=False)
class Table:
    """A table that can be sorted and, with `search`, filtered. Cells are text, numbers or `Markup`."""

    id: str
    title: str
    rows: pd.DataFrame
    source: str
    headings: Mapping[str, str] | None = None
    """Names of columns for people."""
    forms: Mapping[str, str] | None = None
    """Format specification of a column of numbers."""
    search: bool = False
    filters: Sequence[str] = ()
    """Columns with a menu of their values."""
    links: str | None = None
    """Column whose cells are links to fragments of the same name (``L7.E12``)."""
    intervals: Mapping[str, tuple[str, str]] | None = None
    """Column to those of its interval's ends, which are shown in its cells and are no columns of their own; the
    download keeps all three."""

    kind = "table"

    def to_dict(self) -> dict[str, Any]:
        shown = {name: (self.headings or {}).get(name, name.replace("_", " ")) for name in self.rows.columns}
        return {
            **columns_of(self.rows), "headings": shown, "forms": dict(self.forms or {}), "filters": list(self.filters),
            "links": self.links, "search": self.search,
            "intervals": {
                name: list(ends) for name, ends in (self.intervals or {}).items() if {name, *ends} <= set(self.rows)
            },
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Cards:
    """One piece of HTML for each address, opened by its fragment (``#L7.E12``)."""

    id: str
    title: str
    cards: Mapping[str, Markup]
    source: str
    css: Markup = _NO_CSS

    kind = "cards"

    @classmethod
    def of(cls, id: str, title: str, cards: Mapping[str, Markup], *, source: str) -> Cards:
        """Cards whose inline styles, which notebooks need, become classes: a third of the size."""
        names: dict[str, str] = {}

        def name(found: re.Match[str]) -> str:
            return f'class="{names.setdefault(found[1], f"c{len(names)}")}"'

        small = {address: Markup(_STYLE.sub(name, html)) for address, html in cards.items()}
        css = "".join(f".{short}{{{style}}}" for style, short in names.items())
        return cls(id, title, small, source, Markup(css))


@dataclass(frozen=True)
class Prose:
    """A paragraph, escaped unless it is `Markup`."""

    text: str | Markup

    kind = "prose"


@dataclass(frozen=True)
class Missing:
    """A part that the run does not have, and the command that would add it."""

    what: str
    command: str

    kind = "missing"


@dataclass(frozen=True)
class Piece:
    """A part of a bar, in per cent of the strip's width."""

    start: float
    width: float
    kind: str
    """Class of the style sheet, which colours it."""
    name: str
    """What it stands for, shown on hover."""
    text: Markup = _NO_CSS
    """Its number, shown in the bar."""


@dataclass(frozen=True)
class Strip:
    """A bar with its name on the left and its numbers on the right."""

    name: str | Markup
    pieces: tuple[Piece, ...]
    said: Markup
    zero: float | None = None
    """Where zero is, in per cent, if bars go both ways."""


@dataclass(frozen=True)
class Answer:
    """A question, one line that answers it, bars to look at, the sentences that go with it, and where to read on."""

    question: str
    headline: Markup
    said: tuple[Markup, ...]
    links: tuple[tuple[str, str], ...] = ()
    """Sections with what they show."""
    strips: tuple[Strip, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()
    """Classes of pieces with their names."""

    @property
    def is_counts(self) -> bool:
        """Are there numbers inside the bars?"""
        return any(piece.text for strip in self.strips for piece in strip.pieces)


@dataclass(frozen=True)
class Unanswered:
    """A question, and the command that would answer it."""

    question: str
    command: str


@dataclass(frozen=True)
class Answers:
    """Questions with what the run says to each, or the command that would."""

    answers: tuple[Answer | Unanswered, ...]

    kind = "answers"


Part = Figure | Table | Cards | Prose | Answers | Missing


@dataclass(frozen=True, eq=False)
class Section:
    """A heading with a sentence under it, and its parts."""

    id: str
    title: str
    lead: str | Markup
    parts: tuple[Part, ...]


def columns_of(rows: pd.DataFrame) -> dict[str, Any]:
    """Rows by column, as JSON has them: None where there is no value."""
    plain = rows.astype(object).where(rows.notna(), None)
    return {"columns": {str(name): [_plain(value) for value in plain[name]] for name in plain.columns}}


def script_json(value: Any) -> Markup:
    """JSON inside a ``<script>`` element: nothing in it can end the element or start another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def inert(html: str) -> Markup:
    """HTML inside a ``<script>`` element that is no program: nothing in it can end the element or start another."""
    return Markup(_SCRIPT.sub("&lt;", html))


def _plain(value: Any) -> Any:
    if isinstance(value, float):  # a whole number is a count of a column that has gaps
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")
    if isinstance(value, list | tuple) or type(value).__name__ == "ndarray":
        return [_plain(v) for v in value]
    return (
        value.item() if hasattr(value, "item") else value if isinstance(value, str | int | bool | None) else str(value)
    )


def _title_height(title: Mapping[str, Any]) -> int:
    """Pixels that `plots.layout` keeps for the title and its subtitle."""
    subtitle = title.get("subtitle", {})
    sizes = [(one.get("text") or "", one.get("font", {}).get("size", 0)) for one in (title, subtitle)]
    lines = sum(1.3 * size * (1 + len(_BREAK.findall(text))) for text, size in sizes)
    return round(title.get("pad", {}).get("t", 0) + lines)


def _plain_text(html: str) -> str:
    """A title without its tags and with its entities as characters."""
    return unescape(_TAG.sub("", _BREAK.sub(" ", html)))


def _shown(html: str) -> Markup:
    """Plotly's little HTML: line breaks, bold and coloured pieces stay, other tags go, all else is text."""
    out, at = Markup(""), 0
    for tag in _TAG.finditer(html):
        out += unescape(html[at : tag.start()])
        if _BREAK.fullmatch(tag[0]):
            out += Markup("<br>")
        elif found := _COLOUR.fullmatch(tag[0]):
            out += Markup('<span style="color:{}">').format(found[1])
        elif tag[0] in ("</span>", "<b>", "</b>"):
            out += Markup(tag[0])
        at = tag.end()
    return out + unescape(html[at:])
