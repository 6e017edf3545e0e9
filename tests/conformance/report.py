"""The README's table of families and claims, made from a run: `python -m tests.conformance.report README.md`.

Each test of `FILES` is one claim about one family. A cell is "yes" when all its
tests passed, "no" when one failed, "n/a" when one was skipped (the reason is printed under the table).
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.conformance.zoo import ZOO
from tests.conformance.zoo_adapters import ADAPTED

BEGIN, END = "<!-- conformance:begin -->", "<!-- conformance:end -->"
BLOCK = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)

CLAIMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "spec": (
        "inspect", "`moe_lens.inspect` gives the numbers of the config",
        ("test_inspect_says_what_the_config_says",),
    ),
    "float32": (
        "fp32", "tapped float32 logits equal native ones bit for bit, for `grouped_mm` and for `eager`",
        ("test_tapped_logits_are_bit_equal_to_native",),
    ),
    "bfloat16": (
        "bf16", "the same in bfloat16",
        ("test_tapped_bfloat16_logits_are_bit_equal_to_native",),
    ),
    "rows": (
        "rows", "activations and outputs equal a row-by-row computation from the weights",
        ("test_rows_equal_a_row_by_row_computation",),
    ),
    "sum": (
        "sum", "weighted outputs plus the shared expert equal the output of the MoE block",
        ("test_weighted_outputs_and_shared_expert_sum_to_the_block",),
    ),
    "router": (
        "router", "router logits, experts and weights are what the router returned",
        ("test_routing_is_what_the_router_returned", "test_router_logits_explain_the_choice"),
    ),
    "undo": (
        "undo", "after exit, also by an exception, the model computes what it did before, bit for bit",
        ("test_everything_is_restored_after_exit_and_after_an_exception",),
    ),
    "padding": (
        "padding", "left or right padding changes no row of a real token; one text and one token work",
        (
            "test_padding_changes_no_row_of_a_real_token", "test_a_batch_of_one_text_is_bit_equal_to_native",
            "test_an_expert_without_tokens_has_no_rows_and_breaks_nothing",
        ),
    ),
    "cache": (
        "cache", "`generate` with a KV cache gives the same tokens, and rows equal to one full pass",
        ("test_generation_with_a_cache_gives_the_same_tokens_and_the_same_rows",),
    ),
    "autograd": (
        "grad", "`torch.inference_mode` works, and gradients of experts and routers equal native ones within 1e-5",
        ("test_inference_mode_is_bit_equal_to_native", "test_gradients_of_experts_and_routers_are_the_native_ones"),
    ),
    "zero": (
        "zero", "ablating experts equals zeroing their down-projections, bit for bit",
        ("test_zero_ablation_equals_zeroed_down_projection",),
    ),
    "refill": (
        "refill", "`mask_refill` equals a model whose router row and expert were deleted",
        ("test_mask_refill_equals_a_model_without_the_router_row_and_the_expert",),
    ),
}  # fmt: skip
"""claim -> column head, sentence, test functions."""

FAMILIES = {**ZOO, **ADAPTED}
FILES = ("test_families.py", "test_battery.py", "test_edits.py", "test_adapters.py")

_RANK = {"passed": 0, "skipped": 1, "failed": 2}
_WORD = {"passed": "yes", "skipped": "n/a", "failed": "no"}


class Collector:
    """A pytest plugin that keeps the worst outcome per family and claim."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}
        self.reasons: dict[str, set[str]] = defaultdict(set)
        self.n_tests = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        match = re.search(r"::(test_\w+)\[([\w.]+)", report.nodeid)
        claim = match and next((c for c, (_, _, tests) in CLAIMS.items() if match[1] in tests), None)
        if not claim or not match or match[2].split("-")[0] not in FAMILIES:
            return
        key, self.n_tests = (match[2].split("-")[0], claim), self.n_tests + 1
        self.cells[key] = max(self.cells.get(key, "passed"), report.outcome, key=_RANK.__getitem__)
        if report.outcome == "skipped":
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")].add(FAMILIES[key[0]].title)


def table(collector: Collector) -> str:
    """The block between the markers."""
    heads = [head for head, _, _ in CLAIMS.values()]
    lines = [
        BEGIN,
        f"{len(FAMILIES)} families of transformers {transformers.__version__}, {collector.n_tests} tests on tiny "
        "random checkpoints; written by `make conformance`.",
        "",
        "| family | " + " | ".join(heads) + " |",
        "|---|" + ":-:|" * len(heads),
    ]
    for name, family in sorted(FAMILIES.items(), key=lambda item: item[1].title.lower()):
        outcomes = [collector.cells.get((name, claim)) for claim in CLAIMS]
        lines.append("| " + " | ".join([family.title, *(_WORD[o] if o else "" for o in outcomes)]) + " |")
    lines += ["", *(f"- **{head}**: {sentence}" for head, sentence, _ in CLAIMS.values())]
    if collector.reasons:
        lines += [f"- **n/a** for {_listed(names)}: {reason}" for reason, names in sorted(collector.reasons.items())]
    lines += [f"- {family.title}: {family.note}" for family in FAMILIES.values() if family.note]
    return "\n".join([*lines, END])


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) if len(names) <= 3 else f"{len(names)} families"


def rewrite(text: str, block: str) -> str:
    """`text` with its block replaced.

    Raises:
        ValueError: `text` has no markers.
    """
    if not BLOCK.search(text):
        raise ValueError(f"no place for the table: put {BEGIN} and {END} on lines of their own")
    return BLOCK.sub(lambda _: block, text)


def titles_in(text: str) -> list[str]:
    """Family titles of the table in `text`, in order; empty when there is no table."""
    match = BLOCK.search(text)
    rows = re.findall(r"^\| (.+?) \|", match[0], re.MULTILINE) if match else []
    return rows[1:]


def main(target: str) -> int:
    """Run the claims and rewrite the block in `target`; the exit status is pytest's."""
    file = Path(target)
    rewrite(file.read_text(encoding="utf-8"), "")  # refuse before the minutes of testing
    collector, here = Collector(), Path(__file__).parent
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, *(str(here / name) for name in FILES)], [collector])
    file.write_text(rewrite(file.read_text(encoding="utf-8"), table(collector)), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "README.md"))
