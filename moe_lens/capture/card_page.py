"""``ExpertCard`` as HTML for notebooks. Everything that is shown came from a text or a model, and is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from moe_lens.capture.shading import Mark, pieces, routed_spans

if TYPE_CHECKING:
    from moe_lens.capture.card import ExpertCard

# Translucent colours under the page's own text colour: readable on light and on dark pages.
_FAINT, _FULL = 0.14, 0.6
_FOCAL = "border-radius:3px;padding:0 1px;"
_ROUTED = "text-decoration:underline;text-decoration-color:rgba(128,128,128,.9);text-underline-offset:3px;"
_DIM = "opacity:.7;"
_TABLE = "border-collapse:collapse;text-align:left;margin:.2em 0 .6em"
_CELL = "text-align:left;vertical-align:top;padding:1px 10px 1px 0;"
_NUMBER = f"{_CELL}white-space:nowrap;font-variant-numeric:tabular-nums;{_DIM}"
# isolate: a text that reads from right to left turns round itself, not its neighbours
_TEXT = f"{_CELL}white-space:break-spaces;overflow-wrap:anywhere;unicode-bidi:isolate;font-family:monospace;"


def card_html(card: ExpertCard) -> str:
    """A title, the facts as a table, and each group of exemplars with its tokens shaded by score."""
    facts = "".join(
        f'<tr><td style="{_NUMBER}">{escape(name)}</td>'
        f'<td style="{_CELL}overflow-wrap:anywhere;unicode-bidi:isolate">{escape(text)}</td></tr>'
        for name, text in card.facts()
    )
    groups = "".join(
        f'<tr><td colspan="2" style="{_CELL}padding-top:.6em;{_DIM}">{escape(name)}</td></tr>'
        + "".join(_row(row, card.largest_score) for row in rows.itertuples())
        for name, rows in card.groups.items()
    )
    legend = "shaded: the token, by score; underlined: other tokens that the expert got"
    return (
        f'<div><b>{escape(card.address)}</b> <span style="{_DIM}">{legend}</span>'
        f'<table style="{_TABLE}">{facts}</table><table style="{_TABLE}">{groups}</table></div>'
    )


def _row(row: Any, largest: float) -> str:
    score = f"{row.score:.3g}" if row.routed else ""
    return (
        f'<tr><td style="{_NUMBER}" title="{escape(_where(row))}">{score}</td>'
        f'<td dir="auto" style="{_TEXT}">{_shaded(row, largest)}</td></tr>'
    )


def _where(row: Any) -> str:
    weight = f", router weight {row.weight:.3g}" if row.routed else ", not routed"
    return f"document {row.document}, token {row.position} of the window{weight}"


def _shaded(row: Any, largest: float) -> str:
    shown = []
    for piece in pieces(row.text, row.char_start, row.char_end, routed_spans(row)):
        style = _style(piece.mark, row.score / largest if row.routed and largest > 0 else None)
        text = escape(piece.text)
        shown.append(f'<span style="{style}">{text}</span>' if style else text)
    return "".join(shown)


def _style(mark: Mark, share: float | None) -> str:
    if mark is Mark.ROUTED:
        return _ROUTED
    if mark is Mark.PLAIN:
        return ""
    if share is None:
        return f"{_FOCAL}outline:1px dashed rgba(128,128,128,.9)"
    return f"{_FOCAL}background:rgba(255,140,0,{_FAINT + (_FULL - _FAINT) * share:.2f})"
