"""Run directories with every table that a report reads, full of text that a page could take for something else.

Exemplars, labels and their scores are those of `card_runs` (expert 1 of layer 2 gets every nasty token). The trial, the
waterfall and the faithfulness tables are made by the library's own code from numbers written down here.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_lens.causal.faithfulness.kept import SetEffect
from moe_lens.causal.faithfulness.sets import Bins
from moe_lens.causal.faithfulness.tables import Case, Tabulator
from moe_lens.probing.compare import MEAN
from moe_lens.probing.waterfall import waterfall
from moe_lens.stats import Bootstrap
from tests.capture import card_runs
from tests.capture.card_runs import LAYER
from tests.causal.trial import test_result as trials

LAYERS = (1, LAYER)
EXPERTS = range(10)
SCRIPT, QUOTES, RIGHT_TO_LEFT = "<script>window.injected = 1</script>", '"it\'s" <b>&amp;', "العربية"
IMAGE = "<img src=x onerror='window.injected = 1'>"
DOMAINS = (SCRIPT, QUOTES, RIGHT_TO_LEFT)
CONCEPTS = ("digits", SCRIPT, QUOTES, RIGHT_TO_LEFT, IMAGE)
RANKINGS = ("load", "gradient")
MODES = ("mean_off", "mask_refill_keep")
BINS = Bins((0.25, 0.5, 1.0))
_N_DOCUMENTS = 12


def routing() -> pd.DataFrame:
    """Two layers; in layer 2 as `card_runs`, with the columns of a real run."""
    own = card_runs.routing().assign(
        n_tokens=1000, n_documents=8, max_output=3.0, router_margin=0.2, load_entropy=1.2, load_cv=0.9
    )
    even = own.assign(layer=1, load=70, load_share=0.1, gate_mass=35.0, load_entropy=np.log(10), load_cv=0.0)
    return pd.concat([even, own], ignore_index=True)


def routing_fields() -> pd.DataFrame:
    """Every domain with an expert of its own, and one kind."""
    rows = [
        {"field": field, "value": value, "layer": layer, "expert": expert, "n_documents": 9 - i, "n_tokens": 100,
         "visits": 60, "share": 0.1, "lift": 4.0 if expert == i + layer else 0.5}
        for field, values in (("domain", DOMAINS), ("kind", ("code",)))
        for i, value in enumerate(values) for layer in LAYERS for expert in EXPERTS
    ]  # fmt: skip
    return pd.DataFrame(rows)


def coactivation() -> pd.DataFrame:
    rows = [
        {"layer": layer, "expert": a, "other": b, "count": 5, "lift": 0.5 * layer * (1 + (a == 0)), "lift_null": 0.5,
         "jaccard": 0.1}
        for layer in LAYERS for a, b in combinations(EXPERTS, 2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def probe() -> pd.DataFrame:
    """Concept i is read best by the neuron i of expert 1; two probes had too few tokens."""
    rows = [
        {"model": "m" if role == "moe" else "twin", "role": role, "protocol": "moe-lens", "seed": 0, "layer": layer,
         "expert": expert, "concept": concept, "category": f"category {i % 2}", "granularity": "span", "k": k,
         "neurons": list(range(i, i + k)), "sign": [1] * k, "n_test": 90, "n_pos_test": 30, "prevalence": 1 / 3,
         "f1": 0.6, "f1_balanced": 0.9 - 0.1 * (expert != 1), "f1_always_positive": 0.5, "auroc": 0.8 + i / 100,
         "auroc_validate": 0.8 - i / 100, "f1_balanced_validate": 0.9 - 0.1 * (expert != 1) - i / 100, "status": "ok"}
        for role, cells in (("moe", [(a, e) for a in LAYERS for e in (1, 3)]), ("dense", [(LAYER, 0)]))
        for layer, expert in cells for i, concept in enumerate(CONCEPTS) for k in (1, 8)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    table.loc[[0, 3], "status"] = "too_few"
    table.loc[[0, 3], ["f1", "f1_balanced", "auroc", "f1_balanced_validate"]] = np.nan
    return table


def comparison() -> pd.DataFrame:
    """Of concept i the MoE is i hundredths ahead."""
    rows = []
    for arm in ("raw", "held_out", "null"):
        for metric in ("f1", "f1_balanced", "auroc"):
            for k in (1,) if arm == "null" else (1, 8):
                for i, concept in enumerate((MEAN, *CONCEPTS)):
                    moe, dense = 0.7 + 0.01 * i + 0.1 * (arm == "raw"), 0.7
                    rows.append({
                        "arm": arm, "concept": concept, "k": k, "metric": metric, "moe": moe, "moe_low": moe - 0.05,
                        "moe_high": moe + 0.05, "chance_moe": 0.5, "one_cell_moe": np.nan, "n_cells_moe": 4,
                        "dense": dense, "dense_low": dense - 0.05, "dense_high": dense + 0.05, "chance_dense": 0.5,
                        "one_cell_dense": np.nan, "n_cells_dense": 1, "gap": moe - dense, "ci_low": moe - dense - 0.02,
                        "ci_high": moe - dense + 0.02, "p_value": 0.01, "q_value": 0.02 if i else np.nan,
                        "status": "ok",
                    })  # fmt: skip
    return pd.DataFrame(rows)


def steps() -> pd.DataFrame:
    """+0.2 of gap: 0.05 is search, 0.1 routing, 0.05 left, with documents that agree."""
    means = {"raw": 0.2, "search": 0.05, "held_out": 0.15, "equal_random_tokens": 0.15, "equal_router_tokens": 0.05}
    r = np.random.default_rng(0)
    noise = r.normal(0, 0.001, 60)
    gaps = {
        arm: {name: Bootstrap(np.float64(mean), mean + noise, (mean + noise[:20] / 10,)) for name in CONCEPTS}
        for arm, mean in means.items()
    }
    counts: dict[str, dict[str, float]] = {"raw": {"n_cells_moe": 20, "n_cells_dense": 1}}
    return waterfall(gaps, group_of={}, counts=counts)


def validation() -> pd.DataFrame:
    """Expert 1 supported and with a false label, 3 routing-only, 4 underpowered, 5 undecided."""
    of = trials.trial(
        trials.rows(1, "supported", label=SCRIPT + QUOTES),
        trials.rows(1, "refuted", kind="topic", label=IMAGE),
        trials.rows(3, "routing-only", label=RIGHT_TO_LEFT),
        trials.rows(4, "underpowered", n_docs_z1=4, n_docs_r1=12),
        trials.rows(5, "undecided"),
        trials.rows(3, "supported", kind="topic", label="documents of x"),
    )
    return of.frame.assign(layer=LAYER, split="test", routing="live", judge="rule", positions="all")


class _Nats:
    """Stands in for the measurement: without experts of a set the model loses their sum, with a factor a document."""

    n_tokens = np.full(_N_DOCUMENTS, 50.0)
    layer = np.array([LAYER] * 4)
    loss = np.array([0.4, 0.3, 0.2, 0.1])

    def of(self, mode: str, removed: np.ndarray) -> SetEffect:
        factor = np.linspace(0.5, 1.5, _N_DOCUMENTS)
        lost = self.n_tokens * factor * self.loss[removed].sum() * (1 + (mode == MODES[1]))
        return SetEffect(lost, lost / 2, 0, float("nan"), 0)


def faithfulness() -> dict[str, pd.DataFrame]:
    """Four experts: the gradient orders them as the loss does, the load the other way round."""
    r = np.random.default_rng(1)

    def sets(order: Any) -> np.ndarray:
        return np.stack([np.isin(range(4), order[:n]) for n in (1, 2, 4)])

    def case(ranking: str, order: list[int]) -> Case:
        drawn = np.stack([sets(r.permutation(4)) for _ in range(6)])
        return Case(ranking, "included", np.ones(4, bool), sets(order), {"random": drawn}, np.full(3, np.nan))

    cases = [case("load", [3, 2, 1, 0]), case("gradient", [0, 1, 2, 3])]
    made = Tabulator(_Nats(), BINS, draws=50, seed=0)  # type: ignore[arg-type]
    constant = {"routing": "live", "universe": "global", "axis": "count"}
    units = pd.DataFrame(
        {"layer": LAYER, "expert": range(4), "load": [10, 20, 30, 40], "gate_mass": [5.0, 10, 15, 20],
         "max_output": 2.0, "is_super": False, "score_load": [10.0, 20, 30, 40], "score_gradient": _Nats.loss}
    )  # fmt: skip
    alignment = pd.DataFrame(
        [{"layer": layer, "importance": "gradient", "routing": name, "spearman": rho, "spearman_low": rho - 0.1,
          "spearman_high": min(1.0, rho + 0.1), "n_units": 4}
         for layer in (1, LAYER, None) for name, rho in (("load", -0.8), ("gate_mass", 0.5))]
    )  # fmt: skip
    return {
        "faithfulness": made.frame(MODES, cases, constant), "faithfulness_gaps": made.gaps(MODES, cases),
        "faithfulness_draws": made.draws(MODES, cases),
        "faithfulness_circuit": made.circuit(MODES, cases, ends=True), "faithfulness_units": units,
        "faithfulness_alignment": alignment,
        **{f"faithfulness_{name}": pd.DataFrame({"ranking": pd.Series(dtype=str)})
           for name in ("naopc", "agreement", "stability", "churn", "routing")},
    }  # fmt: skip


def labels() -> pd.DataFrame:
    """Those of `card_runs`, the refused one without a label of its own."""
    return card_runs.labels()


def label_summary() -> pd.DataFrame:
    return pd.DataFrame([{"labeller": "openai:m", "scorer": "detection", "negatives": "same_token", "control": "none",
                          "n_experts": 1, "auroc": 0.62, "ci_low": 0.55, "ci_high": 0.69, "unigram": 0.5,
                          "bigram": 0.66, "n_above_bigram": 0}])  # fmt: skip


def label_scores() -> pd.DataFrame:
    return card_runs.label_scores().assign(unigram=0.5, bigram=0.66)


def label_answers() -> pd.DataFrame:
    return pd.DataFrame([{"layer": LAYER, "expert": 1, "facet": 0, "labeller": "openai:m", "score": 3.0}])


def logit_lens() -> pd.DataFrame:
    table = card_runs.logit_lens()
    return table.assign(
        promoted_logits=[[1.0] * len(found) for found in table["promoted"]],
        suppressed_logits=[[-1.0] * len(found) for found in table["suppressed"]],
    )


def tables() -> dict[str, pd.DataFrame]:
    """Every table that the report reads."""
    return {
        "routing": routing(), "routing_fields": routing_fields(), "coactivation": coactivation(), "probe": probe(),
        "comparison": comparison(), "waterfall": steps(), "exemplars": card_runs.exemplars(), "labels": labels(),
        "label_scores": label_scores(), "label_summary": label_summary(), "label_answers": label_answers(),
        "logit_lens": logit_lens(), "validation": validation(), **faithfulness(),
    }  # fmt: skip


def manifest() -> dict[str, Any]:
    scored = {"shares": BINS.shares, "rounding": BINS.rounding, "include_zero": BINS.include_zero,
              "aggregate": BINS.aggregate}  # fmt: skip
    return {
        "schema_version": 1, "created": "2026-01-02T03:04:05+00:00", "command_line": ["moe-lens", "probe"],
        "identity_hash": "0", "model": {"name": SCRIPT, "revision": None, "dtype": "float32"},
        "corpus": {"id": QUOTES, "sha256": "1", "n_documents": 1234}, "seed": 0, "packages": {"moe-lens": "0.1.0"},
        "python": "3.11", "prompts": {"explain.md": "abc"},
        "commands": {
            "validate": {"state": "done", "settings": {**trials.SETTINGS, "is_sample": True, "n_labels": 9}},
            "faithfulness": {"state": "done", "bins": scored, "notes": ["with 6 random sets p is coarse"],
                             "n_documents": _N_DOCUMENTS, "n_tokens": 600, "n_passes": 30, "reference": "r",
                             "noise": {"nll": 0.0, "kl": 0.0, "mean_nll": 0.0}},
        },
    }  # fmt: skip


def write_run(folder: Path, *names: str) -> Path:
    """A run with the tables `names`, all by default; none for the name "nothing"."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest()), encoding="utf-8")
    for name, table in tables().items():
        if name in names or not names:
            table.to_parquet(folder / f"{name}.parquet")
    return folder
