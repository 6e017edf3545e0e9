"""How results look in Jupyter: the finding as a paragraph, and a compact table under it. Everything is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from moe_lens.plots import number

if TYPE_CHECKING:
    import pandas as pd

# Translucent lines under the page's own text colour: readable on light and on dark pages.
_LINE = "border-bottom:1px solid rgba(128,128,128,.35);"
_CELL = f"{_LINE}padding:2px 10px 2px 0;vertical-align:top;"
_LONG = f"{_CELL}text-align:left;overflow-wrap:break-word;unicode-bidi:isolate;min-width:16em;max-width:36em"
_SHORT = f"{_CELL}text-align:left;white-space:nowrap;unicode-bidi:isolate"
_NUMBER = f"{_CELL}text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"

_WRAPS = 32
"""Characters from which on a column of text may wrap."""


def result_html(finding: str | Sequence[str], *tables: str) -> str:
    """What a result shows of itself: its finding, or several as a list, then tables made by `table_html`."""
    if isinstance(finding, str):
        return f"<p>{escape(finding)}</p>{''.join(tables)}"
    return f"<ul>{''.join(f'<li>{escape(said)}</li>' for said in finding)}</ul>{''.join(tables)}"


def table_html(
    frame: pd.DataFrame, *, headings: Mapping[str, str] | None = None, forms: Mapping[str, str] | None = None
) -> str:
    """A table whose text stands on the left and whose numbers, three digits unless `forms` says more, on the right.

    Args:
        headings: names of columns for people; by default the name with blanks.
        forms: format specification of a column of numbers.
    """
    headings, forms = headings or {}, forms or {}
    styles = {str(name): _style(column) for name, column in frame.items()}
    head = "".join(
        f'<th style="{style}">{escape(headings.get(name, name.replace("_", " ")))}</th>'
        for name, style in styles.items()
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="{style}">{escape(_shown(value, forms.get(name)))}</td>'
            for (name, style), value in zip(styles.items(), row, strict=True)
        )
        + "</tr>"
        for row in frame.itertuples(index=False)
    )
    return f'<table style="border-collapse:collapse;margin:.3em 0 .9em"><tr>{head}</tr>{body}</table>'


def _style(column: pd.Series) -> str:
    lengths = [len(value) for value in column if isinstance(value, str)]
    return _NUMBER if not lengths else _LONG if max(lengths) > _WRAPS else _SHORT


def _shown(value: Any, form: str | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if form is None and not isinstance(value, float):
        return str(value)
    return number(value, form or ".3f")
