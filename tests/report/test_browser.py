"""The report in Chromium: what a reader can click, type and read, and that nothing leaves the page."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moe_lens.capture.run import open_run
from moe_lens.report.page import sections_of
from tests.capture import card_runs
from tests.report import made

playwright = pytest.importorskip("playwright.sync_api", reason="the dev extra brings playwright")
CHROMIUM = os.environ.get("MOE_LENS_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no chromium on the PATH: install it, or name one in MOE_LENS_CHROMIUM"
)


@dataclass
class Watched:
    """A page, and everything that it should not have done."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def rows(self, table: str) -> Any:
        return self.page.locator(f"#{table} tbody tr")

    def column(self, table: str, name: str) -> list[str]:
        names = [th.get_attribute("data-name") for th in self.page.locator(f"#{table} th").all()]
        return self.page.locator(f"#{table} tbody td:nth-child({names.index(name) + 1})").all_inner_texts()

    def drawn(self, figure: str) -> Any:
        """The figure, scrolled to and drawn."""
        box = self.page.locator(f"#{figure} .canvas")
        box.scroll_into_view_if_needed()
        self.page.wait_for_selector(f"#{figure} .canvas.drawn .main-svg")
        return box


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def watch(context: Any, url: str) -> Watched:
    seen = Watched(context.new_page())
    seen.page.on("console", lambda message: seen.messages.append(f"{message.type}: {message.text}"))
    seen.page.on("pageerror", lambda error: seen.messages.append(str(error)))

    def pass_on(route: Any) -> None:
        own = route.request.url.split("#")[0] == url.split("#")[0]
        if not own:
            seen.requests.append(route.request.url)
        route.continue_() if own else route.abort()

    seen.page.route(re.compile(r"^(?!data:|blob:)"), pass_on)
    seen.page.goto(url)
    return seen


@pytest.fixture
def open_page(browser: Any, full: Path) -> Iterator[Any]:
    """Opens the report; afterwards: no message on the console, no request but the file, nothing injected."""
    contexts, opened = [], []

    def opening(fragment: str = "", **options: Any) -> Watched:
        contexts.append(browser.new_context(**options))
        opened.append(watch(contexts[-1], f"{(full / 'report.html').as_uri()}{fragment}"))
        return opened[-1]

    yield opening
    for seen in opened:
        assert not seen.messages
        assert not seen.requests
        assert seen.page.evaluate("window.injected") is None
    for context in contexts:
        context.close()


def test_every_section_and_figure_shows(open_page: Any, full: Path) -> None:
    seen = open_page()
    links = [link.get_attribute("href") for link in seen.page.locator("nav a").all()]
    sections = sections_of(open_run(full))
    assert links == [f"#{section.id}" for section in sections]
    for section in sections:
        assert seen.page.locator(f"#{section.id} h2").inner_text() == section.title
        for part in section.parts:
            if part.kind == "figure":
                assert seen.drawn(part.id).locator("svg.main-svg").count()
            elif part.kind == "table":
                assert seen.rows(part.id).count() == len(part.rows), part.id


def test_search_filters_and_sorting(open_page: Any) -> None:
    seen = open_page()
    assert seen.rows("expert-table").count() == 20
    seen.page.fill("#expert-table input[type=search]", made.RIGHT_TO_LEFT)
    assert set(seen.column("expert-table", "top_domain")) == {made.RIGHT_TO_LEFT}
    seen.page.fill("#expert-table input[type=search]", "L2.E3")
    assert seen.column("expert-table", "address") == ["L2.E3"]
    assert seen.page.locator("#expert-table .controls").inner_text().endswith("1 of 20 rows")
    seen.page.fill("#expert-table input[type=search]", "")
    seen.page.select_option("#expert-table [data-filter=layer]", "2")
    assert seen.rows("expert-table").count() == 10
    head = seen.page.locator("#expert-table th[data-name=load_over_even]")
    head.locator("button").click()  # numbers start with the largest
    assert head.get_attribute("aria-sort") == "descending"
    assert seen.column("expert-table", "address")[:2] == ["L2.E1", "L2.E3"]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert seen.column("expert-table", "address")[-1] == "L2.E1"
    seen.page.select_option("#expert-table [data-filter=verdict]", "supported")
    assert seen.column("expert-table", "address") == ["L2.E1"]


def test_addresses_sort_as_numbers(open_page: Any) -> None:
    seen = open_page()
    for _ in range(2):
        seen.page.click("#expert-table th[data-name=address] button")
    assert seen.column("expert-table", "address")[0] == "L2.E9"


def test_a_click_on_a_concept_shows_its_best_neurons(open_page: Any) -> None:
    seen = open_page()
    seen.drawn("probing-concepts")
    everything = seen.rows("probing-best").count()
    point = seen.page.locator("#probing-concepts .scatterlayer .trace .points path").first
    box = point.bounding_box()
    seen.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    seen.page.wait_for_function("document.querySelector('#probing-best [data-filter=concept]').value !== ''")
    (concept,) = set(seen.column("probing-best", "concept"))
    assert concept in made.CONCEPTS
    assert 0 < seen.rows("probing-best").count() < everything


def test_choosing_a_layer_draws_it(open_page: Any) -> None:
    seen = open_page()
    box = seen.drawn("routing-domain")
    shade = (
        "Array.from(document.querySelector('#routing-domain .canvas')._fullData[0].z,"
        " (row) => Array.from(row).indexOf(Math.max(...row)))"
    )
    first = seen.page.evaluate(shade)
    seen.page.select_option("[data-choices=routing-domain]", "layer 2")
    assert seen.page.evaluate(shade) != first
    shown = set(box.locator(".ytick text").all_text_contents())
    assert shown == set(made.DOMAINS)  # as text, tags and all


def test_a_fragment_opens_its_card_and_escape_closes_it(open_page: Any) -> None:
    seen = open_page("#L2.E1")
    card = seen.page.locator("#card")
    assert card.is_visible()
    assert card.locator("b").first.inner_text() == "L2.E1"
    assert seen.page.evaluate("document.activeElement.id") == "card"
    assert card.locator(".canvas.drawn").count() == 1  # it was on trial
    seen.page.keyboard.press("Escape")
    assert card.is_hidden()
    assert seen.page.evaluate("location.hash") == "#experts"
    assert seen.page.evaluate("document.activeElement.textContent") == "L2.E1"  # its link in the table


def test_a_link_opens_a_card_and_the_focus_comes_back_to_it(open_page: Any) -> None:
    seen = open_page()
    link = seen.page.locator("#trial-verdicts a", has_text="L2.E3")
    for close in ("keyboard", "button"):
        link.click()
        card = seen.page.locator("#card")
        assert card.locator("b").first.inner_text() == "L2.E3"
        assert seen.page.evaluate("location.hash") == "#L2.E3"
        assert "word9" in card.inner_text()
        if close == "keyboard":
            seen.page.keyboard.press("Escape")
        else:
            card.get_by_role("button", name="Close").click()
        assert card.is_hidden()
        assert seen.page.evaluate("document.activeElement.closest('#trial-verdicts') !== null")


@pytest.mark.parametrize(
    ("fragment", "said"),
    [("#L9.E99", "This run has no card of L9.E99."), ("#L2.E7", "has no exemplars in this run"), ("#nix", None),
     ("#%E0%A4%A", None), ("#L2.E1<img src=x onerror=alert(1)>", None)],
)  # fmt: skip
def test_other_fragments_do_no_harm(open_page: Any, fragment: str, said: str | None) -> None:
    seen = open_page(fragment)
    card = seen.page.locator("#card")
    assert card.is_visible() == (said is not None)
    if said:
        assert said in card.inner_text()


def test_nasty_text_shows_as_text(open_page: Any) -> None:
    seen = open_page("#L2.E1")
    assert seen.page.title() == f"moe-lens: {made.SCRIPT}"
    assert seen.page.locator("h1").inner_text() == made.SCRIPT
    assert made.QUOTES in seen.page.locator(".about").inner_text()
    card = seen.page.locator("#card").inner_text()
    for token in ("<script>alert(1)</script>", "[bold]&", "العربية", "👩‍👩‍👧", "<b>markup</b> &"):
        assert token in card, token
    assert seen.page.locator("#card script, #card img, #card b b").count() == 0
    assert made.SCRIPT + made.QUOTES in seen.column("trial-verdicts", "label")
    assert {made.SCRIPT, made.IMAGE, made.QUOTES, made.RIGHT_TO_LEFT} <= set(seen.column("probing-best", "concept"))
    direction = seen.page.evaluate(
        "[...document.querySelectorAll('#probing-best td')].filter((td) => td.textContent === 'العربية')"
        ".map((td) => getComputedStyle(td).direction)[0]"
    )
    assert direction == "rtl"
    assert seen.page.locator("main img, main iframe, main object").count() == 0
    ours = seen.page.locator("script[type='application/json']").count() + 2  # plotly as text, and the page's own
    drawn = seen.page.evaluate("Number(Boolean(window.Plotly))")  # run once the first figure came near
    assert seen.page.locator("script").count() == ours + drawn


@pytest.mark.parametrize("part", ["probing-best", "routing-domain", "trial-plane"])
def test_download_gives_the_rows(open_page: Any, full: Path, tmp_path: Path, part: str) -> None:
    seen = open_page(accept_downloads=True)
    with seen.page.expect_download() as waited:
        seen.page.click(f"[data-rows={part}]")
    assert waited.value.suggested_filename == f"{part}.csv"
    waited.value.save_as(tmp_path / "rows.csv")
    (rows,) = (p.rows for s in sections_of(open_run(full)) for p in s.parts if getattr(p, "id", "") == part)
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(rows)
    assert list(found[0]) == list(rows.columns)
    text = rows.select_dtypes("string").columns[0]
    assert [row[text] for row in found] == rows[text].fillna("").tolist()


def test_the_theme_button_goes_round_and_redraws(open_page: Any) -> None:
    seen = open_page(color_scheme="light")
    seen.drawn("routing-load")
    ground = "getComputedStyle(document.body).backgroundColor"
    paper = "document.querySelector('#routing-load .canvas').layout.paper_bgcolor"
    button, found = seen.page.locator("#theme"), []
    for _ in range(4):
        found.append((button.get_attribute("aria-label"), seen.page.evaluate(ground), seen.page.evaluate(paper)))
        button.click()
    names, grounds, papers = zip(*found, strict=True)
    assert [name.rpartition(": ")[2] for name in names] == ["as the system", "light", "dark", "as the system"]
    assert grounds[0] == grounds[1] == grounds[3] == "rgb(255, 255, 255)"
    assert grounds[2] == "rgb(23, 23, 22)"
    assert papers[0] == papers[3] == "#ffffff"
    assert papers[2] == "#171716"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_figures_are_colours(open_page: Any, scheme: str) -> None:
    """A colour that Plotly cannot read falls back to its own palette, green dots first."""
    seen = open_page(color_scheme=scheme)
    for figure in ("probing-waterfall", "trial-plane", "faithfulness-curves"):
        seen.drawn(figure)
        found = seen.page.evaluate(
            "(name) => document.querySelector(`#${name} .canvas`).data.flatMap((trace) => [trace.fillcolor, "
            "...[trace.marker, trace.line, trace.error_y].flatMap((part) => part ? part.color : [])])"
            ".filter((colour) => typeof colour === 'string').map((colour) => [colour, CSS.supports('color', colour)])",
            figure,
        )
        assert found
        assert all(known for _, known in found), found


def test_the_keyboard_alone_reaches_headings_and_cards(open_page: Any) -> None:
    seen = open_page()
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.textContent") == "Skip to the findings"
    seen.page.locator("#expert-table select").last.focus()
    seen.page.keyboard.press("Tab")  # the box that scrolls
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.closest('th').dataset.name") == "address"
    seen.page.keyboard.press("Enter")
    assert seen.page.locator("#expert-table th[data-name=address]").get_attribute("aria-sort") == "ascending"
    columns = seen.page.locator("#expert-table th").count()
    for _ in range(columns):
        seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.textContent") == "L1.E0"
    seen.page.keyboard.press("Enter")
    assert seen.page.locator("#card").is_visible()
    assert seen.page.evaluate("document.activeElement.id") == "card"


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_never_scrolls_sideways(open_page: Any, width: int) -> None:
    seen = open_page("#L2.E1", viewport={"width": width, "height": 900})
    for canvas in seen.page.locator("main figure .canvas").all():
        canvas.scroll_into_view_if_needed()
    wide = seen.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    out = seen.page.evaluate(
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, #card, .js-plotly-plot') "
        "&& e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert out == []


def test_a_run_with_little_opens_too(browser: Any, tmp_path: Path) -> None:
    from moe_lens.report.page import report

    path = report(made.write_run(tmp_path / "run", "routing"))
    context = browser.new_context()
    seen = watch(context, f"{path.as_uri()}#L2.E1")
    seen.drawn("routing-load")
    assert seen.rows("expert-table").count() == 20
    assert seen.page.locator("#expert-table tbody a").count() == 0
    assert (seen.messages, seen.requests) == ([], [])
    context.close()


@pytest.mark.slow
def test_the_page_opens_quickly(open_page: Any) -> None:
    """Under 2 s on an idle machine; wide, because this one may not be."""
    seen = open_page("#routing")
    seen.page.wait_for_selector("#routing-load .canvas.drawn")
    milliseconds = seen.page.evaluate("performance.now()")
    assert milliseconds < 10_000


def test_the_hand_made_run_holds_what_these_tests_look_for() -> None:
    assert "<script>alert(1)</script>" in card_runs.NASTY
    assert made.RIGHT_TO_LEFT in card_runs.NASTY
