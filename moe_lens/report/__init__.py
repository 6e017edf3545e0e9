"""Report: one offline HTML file from a run directory, and the check that its numbers are those of the tables.

=========  ====================================================================================================
parts      what a section is made of: figures, tables, cards, notes on what is missing
claims     numbers in sentences, each with the table and rows it came from
sections   one module per section, ``section(run, say) -> Section | None``
page       ``report(run)``: the sections in one file
verify     ``verify(run)``: tables rehashed, every claim taken from them again
templates  the page, its style and its script
=========  ====================================================================================================
"""

from moe_lens._callable import make_callable

make_callable(__name__, "moe_lens.report.page", "report")
