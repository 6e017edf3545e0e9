"""The README's table says what the run said, about the families of the zoo and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conformance import report, test_battery, test_edits, test_families

README = Path(__file__).parents[2] / "README.md"


def outcome(test: str, result: str, reason: str = "") -> SimpleNamespace:
    return SimpleNamespace(
        nodeid=f"tests/conformance/test_families.py::{test}", outcome=result, when="call",
        longrepr=("file", 1, f"Skipped: {reason}"),
    )  # fmt: skip


@pytest.fixture
def collector() -> report.Collector:
    collector = report.Collector()
    rows, cache = "test_rows_equal_a_row_by_row_computation", report.CLAIMS["cache"][2][0]
    for native in ("grouped_mm", "eager"):
        collector.pytest_runtest_logreport(outcome(f"{rows}[olmoe-{native}]", "passed"))
    collector.pytest_runtest_logreport(outcome(f"{rows}[mixtral-grouped_mm]", "failed"))
    collector.pytest_runtest_logreport(outcome(f"{rows}[mixtral-eager]", "passed"))
    collector.pytest_runtest_logreport(outcome(f"{cache}[mixtral]", "skipped", "it has none"))
    collector.pytest_runtest_logreport(outcome("test_of_something_else[olmoe]", "failed"))
    return collector


def test_a_cell_is_the_worst_outcome_of_its_tests(collector):
    assert collector.cells == {
        ("olmoe", "rows"): "passed",
        ("mixtral", "rows"): "failed",
        ("mixtral", "cache"): "skipped",
    }
    assert collector.n_tests == 5


def test_an_error_in_a_fixture_counts_as_a_failure():
    collector = report.Collector()
    broken = outcome("test_rows_equal_a_row_by_row_computation[olmoe-eager]", "failed")
    broken.when = "setup"
    collector.pytest_runtest_logreport(broken)
    assert collector.cells == {("olmoe", "rows"): "failed"}


def test_the_table_has_a_row_per_family_and_the_reasons(collector):
    block = report.table(collector)
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in block.splitlines() if "|" in line
    }
    column = list(report.CLAIMS).index("rows")
    assert rows["OLMoE"][column] == "yes"
    assert rows["Mixtral"][column] == "no"
    assert "n/a" in rows["Mixtral"]
    assert "it has none" in block
    assert report.titles_in(block) == sorted((f.title for f in report.FAMILIES.values()), key=str.lower)


def test_only_the_block_between_the_markers_is_rewritten(collector, tmp_path):
    before = f"# title\n\n{report.BEGIN}\nold | table\n{report.END}\n\nrest \\1\n"
    after = report.rewrite(before, report.table(collector))
    assert after.startswith("# title\n\n<!--")
    assert after.endswith("-->\n\nrest \\1\n")
    assert "old" not in after
    assert report.rewrite(after, report.table(collector)) == after


def test_a_file_without_markers_is_refused_before_anything_runs(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("# title\n")
    with pytest.raises(ValueError, match="conformance:begin"):
        report.main(str(file))


def test_every_claim_names_tests_that_exist():
    known = {name for module in (test_families, test_battery) for name in vars(module) if name.startswith("test_")}
    named = [test for _, _, tests in report.CLAIMS.values() for test in tests]
    edits = {name for name in vars(test_edits) if name.startswith("test_")}
    assert known <= set(named) <= known | edits
    assert len(named) == len(set(named))


def test_the_readme_lists_the_families_of_the_zoo():
    text = README.read_text(encoding="utf-8")
    assert report.titles_in(text) == sorted((f.title for f in report.FAMILIES.values()), key=str.lower)
