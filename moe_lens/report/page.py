"""``report(run)``: one HTML file that shows a run, with no network and nothing installed but a browser."""

from __future__ import annotations

import hashlib
import importlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.capture.run import Run, open_run
from moe_lens.capture.store import replacing
from moe_lens.errors import BadOutput
from moe_lens.report.claims import Claims
from moe_lens.report.parts import Section, inert, script_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    import jinja2
    import pandas as pd

    from moe_lens.types import ExpertAddress

FILE = "report.html"
SECTIONS = ("front", "routing", "probing", "experts", "trial", "faithfulness", "provenance")
"""Modules of `report.sections`, in the order of the page."""


class ReadOnce(Run):
    """A run whose tables are read once: a thousand cards ask for the same ones."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._frames: dict[str, pd.DataFrame] = {}
        self._by_expert: dict[str, tuple[pd.DataFrame, dict[Any, tuple[int, int]]]] = {}
        self._experts: pd.DataFrame | None = None

    def frame(self, name: str) -> pd.DataFrame:
        if name not in self._frames:
            self._frames[name] = super().frame(name)
        return self._frames[name]

    def of_expert(self, name: str, at: ExpertAddress) -> pd.DataFrame:
        """Rows of one expert, from a table that is sorted once."""
        if name not in self._by_expert:
            table = self.frame(name).sort_values(["layer", "expert"], kind="stable", ignore_index=True)
            strings = table.select_dtypes("string").columns
            table = table.astype(dict.fromkeys(strings, object))  # many small slices of Arrow's are slow
            ends = table.groupby(["layer", "expert"]).size().cumsum()
            places = dict(zip(ends.index, zip([0, *ends], ends, strict=False), strict=True))
            self._by_expert[name] = table, places
        table, places = self._by_expert[name]
        start, stop = places.get((at.layer, at.expert), (0, 0))
        return table.iloc[start:stop]

    def experts(self) -> pd.DataFrame:
        if self._experts is None:
            self._experts = super().experts()
        return self._experts.copy()


def report(run: Run | str | Path, *, out: str | Path | None = None, sections: Sequence[Section] | None = None) -> Path:
    """Write the report of a run.

    The same tables give the same file, byte for byte. Parts that the run does not have are left out, with the command
    that would add them.

    Args:
        run: a run, or its directory.
        out: file to write; ``report.html`` in the run's directory by default.
        sections: what `sections_of` gave for this run, if it was called already.

    Raises:
        BadOutput: no run, a run without any table, or a folder in place of a file.
        WriteFailed: it cannot be written.
    """
    run = run if isinstance(run, Run) else open_run(run)
    path = run.path / FILE if out is None else Path(out)
    if path.is_dir():
        raise BadOutput(f"{path} is a folder: give --out a file, such as {path / FILE}")
    if not table_files(run):
        raise BadOutput(f"{run.path} has no tables yet: run moe-lens probe --model ... -o {run.path} first")
    page = render(run, sections)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def sections_of(run: Run, say: Claims | None = None) -> list[Section]:
    """What the page shows, without the page."""
    run = ReadOnce(run.path)
    say = say or Claims(run)
    modules = [importlib.import_module(f"moe_lens.report.sections.{name}") for name in SECTIONS]
    return [found for module in modules if (found := module.section(run, say)) is not None]


def render(run: Run, sections: Sequence[Section] | None = None) -> str:
    """The page as text."""
    manifest = run.manifest
    return (
        environment()
        .get_template("report.html")
        .render(
            title=f"moe-lens: {manifest['model']['name']}",
            manifest=manifest,
            sections=sections_of(run) if sections is None else sections,
            hashes=table_hashes(run),
            plotly=_plotly(),
        )
    )


def table_hashes(run: Run) -> dict[str, str]:
    """sha256 of every table file, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in table_files(run)}


def table_files(run: Run) -> list[Path]:
    return sorted(run.path.glob("*.parquet"))


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """Templates, with everything escaped that is not marked as HTML: tokens and labels come from strangers."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["script_json"] = script_json
    found.filters["inert"] = inert
    found.globals["asset"] = _asset
    return found


def _asset(name: str) -> Any:
    """A style or script of ours, to be put into the page as it is."""
    from markupsafe import Markup

    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _plotly() -> Any:
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
