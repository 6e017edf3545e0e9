"""``verify(run)``: is the report what the tables say?

1. The tables are the files that the report was written from (sha256).
2. Every claim in the page is taken from them (or from the manifest) again, and reads as the page shows it: all
   numbers in the sentences of the sections and of the front page.
3. All the rest of the page is made again, and is the same: figures with the numbers in their titles, tables, cards,
   words. A difference there is named by its part of the page, not number by number.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.capture.run import Run, open_run
from moe_lens.errors import BadOutput
from moe_lens.report.claims import Claim, Claims
from moe_lens.report.page import FILE, render, table_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Verification:
    """What was checked, and every difference found."""

    n_tables: int
    n_claims: int
    problems: tuple[str, ...]
    path: Path
    """Of the run."""

    @property
    def is_ok(self) -> bool:
        return not self.problems

    def finding(self) -> str:
        """In a sentence."""
        if self.is_ok:
            return (
                f"{self.n_tables} tables and {self.n_claims} numbers of the report agree, and so do its figures, "
                "rows, cards and other words."
            )
        n = len(self.problems)
        return (
            f"{n} difference{'s' if n > 1 else ''} between the report and its tables: {self.problems[0]}. If the "
            f"tables are right, write the report again with moe-lens report {self.path}."
        )

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.is_ok, "tables": self.n_tables, "claims": self.n_claims, "problems": list(self.problems)}


def verify(run: Run | str | Path) -> Verification:
    """Check the report of a run against its tables.

    It does not show that the tables are right: they are what commands wrote.

    Raises:
        BadOutput: no run, or a run without a report.
    """
    run = run if isinstance(run, Run) else open_run(run)
    path = run.path / FILE
    if not path.exists():
        raise BadOutput(f"{run.path} has no {FILE}: write it with moe-lens report {run.path}")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise BadOutput(f"{path} cannot be read: write it again with moe-lens report {run.path}") from error
    page = _Page()
    page.feed(text)
    hashes = page.hashes()
    say, now = Claims(run), table_hashes(run)
    unreadable = _unreadable(say, now)
    gone = {name for name in hashes if name not in now} | set(unreadable)  # each is said once
    there = [(claim, shown) for claim, shown in page.claims if f"{claim.table}.parquet" not in gone]
    problems = _tables(hashes, now) + list(unreadable.values()) + page.unreadable + _claims(there, say)
    if not problems and (made := render(run)) != text:
        problems.append(
            f"{_place(made, text)} is not what the tables give: {FILE} was edited, or written by another moe-lens"
        )
    return Verification(len(hashes), len(page.claims), tuple(problems), run.path)


def _tables(written: dict[str, str], now: dict[str, str]) -> list[str]:
    problems = [f"{name} is gone: put it back" for name in written if name not in now]
    problems += [f"{name} is not in the report, it was added later" for name in now if name not in written]
    return problems + [
        f"{name} changed after the report was written" for name in written if name in now and now[name] != written[name]
    ]


def _unreadable(say: Claims, names: Iterable[str]) -> dict[str, str]:
    """Files that hold no table any more, with what to do about each."""
    problems = {}
    for name in names:
        try:
            say.table(name.removesuffix(".parquet"))
        except BadOutput as error:
            problems[name] = str(error)
    return problems


def _claims(claims: Sequence[tuple[Claim, str]], say: Claims) -> list[str]:
    problems = []
    for claim, shown in claims:
        try:
            expected = claim.text(say.number(claim))
        except BadOutput as error:
            problems.append(str(error))
        except (TypeError, ValueError, AttributeError, KeyError):  # a claim that somebody wrote by hand
            problems.append(f"the report says {shown}, which nobody can take from {claim.table}")
        else:
            if shown != expected:
                problems.append(f"the report says {shown} where {claim.source} is {expected}")
    return problems


def _place(made: str, found: str) -> str:
    """The part of the page in which two pages begin to differ, in words."""
    low, high = 0, min(len(made), len(found))
    while low < high:  # the longest beginning that they share
        middle = (low + high + 1) // 2
        low, high = (middle, high) if made[:middle] == found[:middle] else (low, middle - 1)
    same = made[:low]
    part = _last(r'\bid="(?:data-|h-)?([a-z]+(?:-[a-z]+)*)"', same)
    card = _last(r'"(L\d+\.E\d+)"', same)
    if part and card and part[1].startswith("card") and card.start() > part.start():
        return f"the card of {card[1]}"
    return f"the part {part[1]!r} of the page" if part else "the head of the page"


def _last(pattern: str, text: str) -> re.Match[str] | None:
    found = None
    for found in re.finditer(pattern, text):  # noqa: B007
        pass
    return found


class _Page(HTMLParser):
    """Claims and hashes of a report."""

    def __init__(self) -> None:
        super().__init__()
        self.claims: list[tuple[Claim, str]] = []
        self.unreadable: list[str] = []
        self._claim: Claim | None = None
        self._hashes = ""
        self._in_hashes = False

    def hashes(self) -> dict[str, str]:
        try:
            return json.loads(self._hashes)
        except ValueError as error:
            raise BadOutput(
                f"{FILE} names no tables: it is no report of moe-lens, or it was edited; write it again"
            ) from error

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "data" and given.get("class") == "claim":
            try:
                self._claim = Claim.from_json(given.get("data-claim") or "{}")
            except BadOutput as error:
                self.unreadable.append(str(error))
                return
            self.claims.append((self._claim, ""))
        self._in_hashes = tag == "script" and given.get("id") == "hashes"

    def handle_endtag(self, tag: str) -> None:
        if tag == "data":
            self._claim = None
        self._in_hashes = False

    def handle_data(self, data: str) -> None:
        if self._claim is not None:
            claim, shown = self.claims[-1]
            self.claims[-1] = claim, shown + data
        elif self._in_hashes:
            self._hashes += data
