"""``python -m tests.report.screenshot RUN OUT.png``: the front page of a run's report, under 300 kB."""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from moe_lens.report.page import report
from tests.report.test_browser import CHROMIUM

WIDTH, LARGEST = 1080, 300_000


def screenshot(run: Path, out: Path) -> None:
    page_path = report(run)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.goto(page_path.resolve().as_uri())
        page.locator("#findings").wait_for()
        bottom = page.locator("#findings").bounding_box()
        assert bottom is not None
        page.set_viewport_size({"width": WIDTH, "height": int(bottom["y"] + bottom["height"])})
        page.wait_for_timeout(400)
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out)
        browser.close()
    if out.stat().st_size > LARGEST:
        raise SystemExit(f"{out} has {out.stat().st_size:,} bytes, more than {LARGEST:,}")


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
