"""The page: complete, the same every time, and honest about what a run lacks."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

import moe_lens as ml
from moe_lens.capture.card import expert_card
from moe_lens.capture.run import open_run
from moe_lens.errors import BadOutput
from moe_lens.report.claims import Claims
from moe_lens.report.page import ReadOnce, render, report, sections_of, table_hashes
from moe_lens.report.parts import Answers, Unanswered
from moe_lens.report.sections import front
from tests.report import made

ALL = ["findings", "routing", "probing", "experts", "trial", "faithfulness", "provenance"]


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def page_of(folder: Path, *names: str) -> str:
    return render(open_run(made.write_run(folder, *names)))


def without_scripts(page: str) -> str:
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)


def test_every_section_is_there_and_says_something(full: Path) -> None:
    sections = sections_of(open_run(full))
    assert [section.id for section in sections] == ALL
    assert all(part.kind != "missing" for section in sections for part in section.parts)


def test_the_same_tables_give_the_same_bytes(full: Path, mine: Path) -> None:
    (mine / "report.html").unlink()
    assert report(mine).read_bytes() == (full / "report.html").read_bytes()


def test_the_page_asks_for_nothing_outside_itself(full: Path) -> None:
    page = (full / "report.html").read_text(encoding="utf-8")
    for tag, attributes in Elements(page).found:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("#", "data:")), (tag, value)
    (policy,) = (a["content"] for t, a in Elements(page).found if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_no_text_of_a_run_becomes_an_element(full: Path) -> None:
    page = (full / "report.html").read_text(encoding="utf-8")
    found = Elements(page).found
    not_run = ("application/json", "text/html")  # rows, and cards that are put into the page when they are opened
    assert [a for t, a in found if t == "script" and a.get("type") not in not_run] == [
        {"type": "text/plain", "id": "plotly"},
        {},
    ]
    for card in re.findall(r'<script type="text/html" data-card="L\d+\.E\d+">(.*?)</script>', page, re.DOTALL):
        inside = {tag for tag, _ in Elements(card).found}
        assert not inside & {"script", "img", "iframe", "style", "link", "object"}
    assert not [t for t, a in found if t in ("img", "iframe") or any(name.startswith("on") for name in a)]
    assert made.SCRIPT not in page
    assert "&lt;script&gt;window.injected = 1&lt;/script&gt;" in page  # the model's name
    assert "&#34;it&#39;s&#34; &lt;b&gt;&amp;amp;" in page  # the corpus


def test_the_page_is_small(full: Path) -> None:
    plotly = len(get_plotlyjs().encode())
    assert plotly < (full / "report.html").stat().st_size < plotly + 500_000


@pytest.mark.parametrize(
    ("tables", "commands"),
    [
        (("routing",), ["probe", "autointerp", "validate", "faithfulness"]),
        (("probe", "comparison"), ["probe", "autointerp", "validate", "faithfulness"]),
        (("routing", "exemplars"), ["probe", "autointerp", "validate", "faithfulness"]),
        (("routing", "labels", "label_scores", "label_summary", "label_answers", "exemplars"), ["validate"]),
        (("routing", "validation"), ["probe", "autointerp", "faithfulness"]),
        (("routing", "labels"), ["validate"]),
        (tuple(made.faithfulness()), ["probe", "validate"]),
    ],
    ids=str,
)
def test_missing_parts_name_the_command_that_adds_them(
    tmp_path: Path, tables: tuple[str, ...], commands: list[str]
) -> None:
    page = without_scripts(page_of(tmp_path / "run", *tables))
    named = set(re.findall(r"moe-lens (\w+) ", " ".join(re.findall(r"<code>(.*?)</code> adds it", page))))
    assert named.issuperset(commands)
    for section in ALL:
        assert f'<section id="{section}"' in page or section == "trial"


def test_nothing_is_missing_from_a_full_run(full: Path) -> None:
    assert "adds it." not in without_scripts((full / "report.html").read_text(encoding="utf-8"))


def test_every_figure_and_table_has_rows_and_a_source(full: Path) -> None:
    names = {path.stem for path in full.glob("*.parquet")} | {"manifest"}
    for section in sections_of(open_run(full)):
        for part in section.parts:
            if part.kind in ("figure", "table"):
                assert len(part.rows), part.id
                for source in part.source.split(", "):
                    assert source == "the files themselves" or source.partition(".")[0] in names, part.id


def test_every_figure_has_titles_on_its_axes(full: Path) -> None:
    bare = {"probing-waterfall", "trial-expert", "faithfulness-curves", "faithfulness-alignment"}
    for section in sections_of(open_run(full)):
        for part in section.parts:
            if part.kind == "figure" and part.id not in bare:  # these name their columns or rows on the axis
                layout = part.plot["layout"]
                assert layout["xaxis"]["title"]["text"], part.id
                assert layout["yaxis"]["title"]["text"], part.id


def test_a_card_read_from_memory_is_the_card_of_the_run(full: Path) -> None:
    plain, fast = open_run(full), ReadOnce(full)
    for address in ("L2.E1", "L2.E3"):
        assert expert_card(fast, address, n=4)._repr_html_() == expert_card(plain, address, n=4)._repr_html_()


def test_the_report_goes_where_it_is_told(full: Path, tmp_path: Path) -> None:
    path = ml.report(str(full), out=tmp_path / "deep" / "page.html")
    assert path.read_bytes() == (full / "report.html").read_bytes()


def test_hashes_are_those_of_the_files(full: Path) -> None:
    page = (full / "report.html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="hashes">(.*?)</script>', page)
    assert json.loads(found) == table_hashes(open_run(full))
    assert set(json.loads(found)) == {path.name for path in full.glob("*.parquet")}


@pytest.mark.parametrize(
    "tables", [(), *((name,) for name in made.tables()), ("waterfall", "validation"), ("labels", "probe")]
)
def test_the_front_page_holds_with_any_tables(tmp_path: Path, tables: tuple[str, ...]) -> None:
    run = open_run(made.write_run(tmp_path / "run", *tables))
    (answers,) = front.section(run, Claims(run)).parts
    assert isinstance(answers, Answers)
    assert len(answers.answers) == 4
    for answer in answers.answers:
        assert answer.command if isinstance(answer, Unanswered) else answer.headline


def test_bars_of_the_front_page_are_the_numbers_beside_them(full: Path) -> None:
    run = open_run(full)
    say = Claims(run)
    gap, labels, experts, _ = front.section(run, say).parts[0].answers
    shown = [re.sub(r"<[^>]+>", "", strip.said) for strip in gap.strips]
    widths = np.array([strip.pieces[0].width for strip in gap.strips])
    values = np.array([float(text.split()[0].replace("−", "-")) for text in shown])
    np.testing.assert_allclose(widths / widths[0], np.abs(values) / values[0], atol=0.01)
    verdicts = {piece.kind: piece.width for piece in labels.strips[0].pieces}
    assert verdicts == {"supported": 25.0, "routing-only": 25.0, "underpowered": 25.0, "undecided": 25.0}
    assert [strip.pieces[0].width for strip in experts.strips] == pytest.approx([100, 75, 50, 25])


@pytest.mark.parametrize("table", ["exemplars", "comparison", "label_scores", "routing_fields", "coactivation"])
def test_a_table_that_was_not_passed_on_leaves_one_line_and_the_rest(mine: Path, table: str) -> None:
    (mine / f"{table}.parquet").unlink()
    found = [part for section in sections_of(open_run(mine)) for part in section.parts]
    assert [part.kind for part in found].count("missing") >= 1
    assert "expert-table" in {getattr(part, "id", "") for part in found}
    assert "adds it." in without_scripts(report(mine).read_text(encoding="utf-8"))


def test_a_damaged_table_is_named_with_what_to_do(mine: Path) -> None:
    (mine / "labels.parquet").write_text("junk")
    with pytest.raises(BadOutput, match=r"labels\.parquet is damaged: put its copy back"):
        report(mine)


@pytest.mark.parametrize(("supported", "said"), [(0, "None of their intervals reaches"), (9, "All of their intervals")])
def test_false_labels_that_do_as_well_are_called_so(mine: Path, supported: int, said: str) -> None:
    kinds = [("real", 9, 10), ("frequent-token", supported, 10)]
    rows = [
        {"label_kind": kind, "layer": 0, "expert": i, "facet": 0, "verdict": "supported" if i < yes else "refuted"}
        for kind, yes, n in kinds
        for i in range(n)
    ]
    pd.DataFrame(rows).to_parquet(mine / "validation.parquet")
    answer = front.section(open_run(mine), Claims(open_run(mine))).parts[0]
    assert isinstance(answer, Answers)
    assert said in " ".join(map(str, answer.answers[1].said))


def test_the_front_page_has_the_signs_of_the_waterfall(mine: Path) -> None:
    run = open_run(mine)
    table = run.frame("waterfall")
    at = (table["metric"] == "f1_balanced") & (table["group"] == "__mean__") & (table["order"] == "forward")
    row = table[at & (table["k"] == table["k"].min()) & (table["step"] == "search")].iloc[0]
    answer = front.section(run, Claims(run)).parts[0].answers[0]
    said = [re.sub("<[^>]+>", "", str(strip.said)) for strip in answer.strips if strip.name.startswith("search")]
    numbers = [f"{-row[name]:+.3f}".replace("-", "−") for name in ("value", "ci_high", "ci_low")]
    assert said == ["{} [{}, {}]".format(*numbers)]
