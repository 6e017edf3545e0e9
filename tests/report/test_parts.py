"""Parts of a page: text cannot become markup, and rows arrive whole."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from moe_lens import plots
from moe_lens.report.parts import Cards, Figure, Table, columns_of, inert, script_json
from tests.report import made


@given(st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_json_in_a_script_reads_back_and_cannot_end_the_element(value: object) -> None:
    text = script_json(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")


@pytest.mark.parametrize("nasty", ["</script><script>alert(1)</script>", "<!--<script>", "]]>", made.QUOTES])
def test_nasty_text_in_json_stays_text(nasty: str) -> None:
    text = script_json({nasty: [nasty]})
    assert "<" not in text
    assert json.loads(text) == {nasty: [nasty]}


def test_no_infinity_gets_into_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("inf"))


def test_rows_keep_missing_values_lists_and_whole_counts() -> None:
    rows = pd.DataFrame(
        {
            "n": [12345678.0, np.nan],
            "x": [0.12345678, 1e-9],
            "list": [np.array([1, 2]), None],
            "t": pd.array([1, None], "Int64"),
        }
    )
    assert columns_of(rows)["columns"] == {
        "n": [12345678, None], "x": [0.123457, 1e-9], "list": [[1, 2], None], "t": [1, None]
    }  # fmt: skip


def figure_of(title: str, subtitle: str = "") -> Figure:
    figure = go.Figure()
    plots.layout(figure, title, subtitle, width=800, height=400, above=30)
    return Figure.of("f", figure, rows=pd.DataFrame(), source="")


def test_titles_become_text_and_leave_only_the_room_above_the_plot() -> None:
    found = figure_of("a title &lt;i&gt; that is long enough to be broken into several lines by the layout of figures")
    assert found.title.endswith("of figures")
    assert "<i>" in found.title  # characters, which the template escapes
    assert "<br>" not in found.title
    assert "title" not in found.plot["layout"]
    assert found.plot["layout"]["margin"]["t"] == pytest.approx(30, abs=1)


def test_of_a_subtitle_only_breaks_bold_and_colours_stay() -> None:
    subtitle = (
        "a<br>b <span style='color:#E69F00'>■</span> <b>c</b> &lt;i&gt; <script>x</script> <a href='//y'>z</a> "
        "<span style='color:red' onclick='x'>d</span>"
    )
    shown = figure_of("t", subtitle).subtitle
    assert isinstance(shown, Markup)
    assert shown.startswith('a<br>b <span style="color:#E69F00">■</span> <b>c</b> &lt;i&gt;')
    for gone in ("<script", "href", "onclick", "red"):
        assert gone not in shown


def test_styles_of_cards_become_classes_and_text_stays() -> None:
    html = Markup('<p style="color:red">style=&quot;x&quot;</p><p style="color:red">b</p><i style="top:0">c</i>')
    cards = Cards.of("c", "", {"L0.E1": html}, source="")
    assert cards.cards["L0.E1"] == '<p class="c0">style=&quot;x&quot;</p><p class="c0">b</p><i class="c1">c</i>'
    assert cards.css == ".c0{color:red}.c1{top:0}"


@pytest.mark.parametrize("nasty", ["</script>", "</SCRIPT x", "<script>alert(1)", "<!-- ", "a</scriPt"])
def test_cards_cannot_end_the_element_they_are_kept_in(nasty: str) -> None:
    assert "<" not in inert(nasty)
    assert inert(f"<p>{nasty}</p>").startswith("<p>")


def test_intervals_that_a_table_does_not_have_are_left_out() -> None:
    rows = pd.DataFrame({"gap": [1.0], "low": [0.5], "high": [1.5]})
    table = Table("t", "", rows, "", intervals={"gap": ("low", "high"), "moe": ("moe_low", "moe_high")})
    assert table.to_dict()["intervals"] == {"gap": ["low", "high"]}
    assert set(table.to_dict()["columns"]) == {"gap", "low", "high"}  # the download has all
