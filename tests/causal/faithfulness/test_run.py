"""The whole run on tiny models: identities, planted truth, controls, intervals, tables, figure, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau

import moe_lens as ml
from moe_lens.causal.effects import Effects
from moe_lens.causal.faithfulness.measure import Measured
from moe_lens.causal.faithfulness.plan import predict_passes, seconds_per_pass
from moe_lens.causal.faithfulness.result import Faithfulness, clearest_first
from moe_lens.causal.faithfulness.run import faithfulness
from moe_lens.causal.faithfulness.sets import Bins
from moe_lens.causal.faithfulness.tables import SCORES
from moe_lens.errors import BadConfig, BadCorpus, NotAnMoE
from moe_lens.models.lens import Lens
from moe_lens.stats import cluster_bootstrap, document_multiplicities
from tests.causal.small import plain_effect, some_text
from tests.models import tiny

TEXT = replace(some_text(lengths=(30, 21, 30, 9, 26, 14, 18, 25)), splits=np.array([0, 0, 0, 0, 2, 2, 2, 2], np.int8))
QUICK: dict[str, Any] = {"n_random": 4, "n_matched": 2, "draws": 50, "progress": False}


def tiny_lens(**changes: Any) -> Lens:
    return Lens(tiny.build("olmoe", **changes), tiny.tokenizer(), name="olmoe")


@pytest.fixture(scope="module")
def found() -> Faithfulness:
    bins = Bins((0.1, 0.5, 1.0), include_zero=True)
    return faithfulness(tiny_lens(), TEXT, bins=bins, modes=("zero", "mask_refill_keep"), naopc=3, **QUICK)


def own(result: Faithfulness, **at: Any) -> pd.DataFrame:
    rows = result.frame[result.frame["control"] == "none"]
    for name, value in at.items():
        rows = rows[rows[name] == value]
    return rows.reset_index(drop=True)


def test_o6_at_the_full_share_everything_is_lost_and_nothing_is_missing(found):
    lens = tiny_lens()
    test = Effects(lens, TEXT, split="test", progress=False)
    everything = ml.zero([f"L{layer}.E{e}" for layer in (0, 1) for e in range(6)])
    wanted = plain_effect(lens, TEXT, test.text.token, everything)
    last = own(found, bin=1.0)
    assert (last[[name for name in SCORES if name.startswith("sufficiency")]] == 0).all(axis=None)
    assert last["comprehensiveness_kl"].tolist() == pytest.approx([wanted["kl"].mean()] * 6, abs=1e-4)
    logp = (wanted["nll"] - wanted["nll_clean"]).mean()
    assert last["comprehensiveness_logp"].tolist() == pytest.approx([logp] * 6, abs=1e-4)
    assert last["layers_emptied"].tolist() == [0] * 6
    assert last["n_units"].tolist() == [12] * 6


def test_aopc_is_the_mean_of_the_bins_and_of_the_zero_bin(found):
    for ranking in ("load", "gradient"):
        rows = own(found, ranking=ranking, mode="zero")
        bins, area = rows[rows["quantity"] == "bin"], rows[rows["quantity"] == "aopc"].iloc[0]
        assert area["comprehensiveness_kl"] == pytest.approx(bins["comprehensiveness_kl"].sum() / 4)
        nothing = bins["comprehensiveness_kl"].iloc[-1]
        assert area["sufficiency_kl"] == pytest.approx((bins["sufficiency_kl"].sum() + nothing) / 4)
    assert found.bins.include_zero
    assert set(found.frame["include_zero"]) == {True}
    assert set(found.frame["rounding"]) == {"ceil"}


def test_o2_over_all_sizes_a_ranking_is_as_comprehensive_as_its_reverse_is_sufficient(tmp_path):
    lines = {"up": [], "down": []}
    for i, (layer, expert) in enumerate((at, e) for at in (0, 1) for e in range(6)):
        lines["up"].append(f"{layer},{expert},{i}")
        lines["down"].append(f"{layer},{expert},{-i}")
    for name, rows in lines.items():
        (tmp_path / f"{name}.csv").write_text("layer,expert,score\n" + "\n".join(rows))
    names = [str(tmp_path / f"{name}.csv") for name in lines]
    bins = Bins(tuple((k + 1) / 12 for k in range(12)), include_zero=True)
    result = faithfulness(tiny_lens(), TEXT, rankings=names, modes=["zero"], bins=bins, **{**QUICK, "n_matched": 0})
    area = own(result, quantity="aopc").set_index("ranking")
    for metric in ("kl", "logp"):
        assert area.loc["up", f"comprehensiveness_{metric}"] == pytest.approx(
            area.loc["down", f"sufficiency_{metric}"], abs=1e-6
        )
    assert result.stability["spearman"].isna().all()


def test_a_ranking_by_effect_beats_random_sets_where_two_experts_do_all_the_work():
    lens = tiny_lens()
    with torch.no_grad():
        for layer, kept in ((0, 4), (1, 2)):
            others = [e for e in range(6) if e != kept]
            lens.model.model.layers[layer].mlp.experts.down_proj[others] *= 1e-3
    options = {**QUICK, "n_random": 20}
    result = faithfulness(lens, TEXT, rankings=["gate_norm", "random"], bins=[1 / 6], modes=["zero"], **options)
    gap = result.gaps[(result.gaps["quantity"] == "aopc") & (result.gaps["control"] == "random")]
    gap = gap[gap["super_experts"] == "included"].set_index("score")
    row = own(result, quantity="bin", super_experts="included").iloc[0]
    assert row["n_units"] == 2
    assert row["sufficiency_kl"] < 0.01 * row["comprehensiveness_kl"]
    for score in ("comprehensiveness_kl", "sufficiency_kl"):
        assert gap.loc[score, "gap"] > 0
        assert gap.loc[score, "low"] > 0
        assert gap.loc[score, "p"] <= 2 / 21  # a random draw may be the same two
    assert "gate_norm" in result.finding()


def test_controls_are_measured_on_sets_of_their_own(found):
    at = found.draws[(found.draws["ranking"] == "load") & (found.draws["mode"] == "zero")]
    first = at[(at["control"] == "random") & (at["bin"] == 0.5)]
    assert len(first) == 4
    assert first["comprehensiveness_kl"].nunique() > 1
    mean = found.frame[(found.frame["ranking"] == "load") & (found.frame["mode"] == "zero")]
    mean = mean[(mean["control"] == "random") & (mean["bin"] == 0.5)].iloc[0]
    assert mean["comprehensiveness_kl"] == pytest.approx(first["comprehensiveness_kl"].mean())
    row = own(found, ranking="load", mode="zero", bin=0.5).iloc[0]
    as_good = (first["comprehensiveness_kl"] >= row["comprehensiveness_kl"]).sum()
    assert row["comprehensiveness_kl_p"] == pytest.approx((1 + as_good) / 5)
    as_low = (first["sufficiency_kl"] <= row["sufficiency_kl"]).sum()
    assert row["sufficiency_kl_p"] == pytest.approx((1 + as_low) / 5)


def test_a_gap_is_better_minus_worse_on_both_sides(found):
    sign = np.where(found.gaps["score"].str.startswith("comprehensiveness"), 1, -1)
    np.testing.assert_allclose(found.gaps["gap"], sign * (found.gaps["value"] - found.gaps["control_value"]), atol=1e-9)


def test_intervals_are_those_of_a_bootstrap_over_documents(found, monkeypatch):
    kept: list[Measured] = []
    real = Measured.__init__
    monkeypatch.setattr(Measured, "__init__", lambda self, *a, **k: kept.append(self) or real(self, *a, **k))
    result = faithfulness(tiny_lens(), TEXT, rankings=["load"], modes=["zero"], bins=[0.5], **QUICK)
    measured = kept[0]
    chosen = np.isin(np.arange(12), np.argsort(-result.units["load"].to_numpy(), kind="stable")[:6])
    sums = np.stack([measured.of("zero", chosen).kl, measured.n_tokens], axis=1)
    times = document_multiplicities(4, 50, seed=0)
    boot = cluster_bootstrap(sums, lambda c: c[..., 0] / c[..., 1], times=times)
    row = own(result, quantity="bin").iloc[0]
    assert row["comprehensiveness_kl"] == pytest.approx(float(boot.estimate))
    low, high = boot.percentile()
    assert (row["comprehensiveness_kl_low"], row["comprehensiveness_kl_high"]) == pytest.approx((low, high))


def test_rankings_are_made_on_other_documents_than_they_are_scored_on(found):
    select = int(TEXT.eligible[np.isin(TEXT.document[TEXT.window_of], [0, 1, 2, 3])].sum())
    assert found.units["load"].sum() == select * 2 * 2
    assert found.n_documents == 4


def test_naopc_lies_between_its_limits(found):
    rows = found.naopc
    assert len(rows) == 3 * 2 * 2
    assert rows["naopc"].between(-1e-9, 1 + 1e-9).all()
    assert (rows["aopc"] >= rows["low"] - 1e-9).all()
    assert rows.groupby(["mode", "score"])[["low", "high"]].nunique().max(axis=None) == 1
    assert rows["width"].isna().all()


def test_more_candidates_are_searched_by_two_beams():
    options = {**QUICK, "naopc": 9, "n_matched": 0, "draws": 0}
    result = faithfulness(tiny_lens(), TEXT, rankings=["load"], modes=["zero"], bins=[0.5], **options)
    assert result.naopc["width"].tolist() == [5, 10] * 2
    span = (result.naopc["high"] - result.naopc["low"]).to_numpy().reshape(2, 2)
    assert (span[:, 1] >= span[:, 0] - 1e-9).all()
    assert result.frame["comprehensiveness_kl_low"].isna().all()


def test_leave_one_out_brings_its_agreement():
    result = faithfulness(tiny_lens(), TEXT, rankings=["load", "leave_one_out"], modes=["zero"], bins=[0.5], **QUICK)
    assert result.agreement["ranking"].tolist() == ["load"]
    exact = kendalltau(result.units["score_load"], result.units["score_leave_one_out"]).statistic
    assert result.agreement["kendall"].iloc[0] == pytest.approx(exact)
    assert set(result.alignment["importance"]) == {"leave_one_out", "gradient"}


def test_super_experts_are_left_alone_in_the_second_half_of_the_table():
    lens = tiny_lens()
    with torch.no_grad():
        lens.model.model.layers[0].mlp.experts.down_proj[3] *= 1000
    result = faithfulness(lens, TEXT, rankings=["max_activation", "random"], modes=["zero"], bins=[1.0], **QUICK)
    assert result.super_experts == ["L0.E3"]
    rows = own(result, quantity="bin").set_index("super_experts")
    assert rows["n_units"].to_dict() == {"included": 12, "excluded": 11}
    assert rows.loc["excluded", "comprehensiveness_kl"] != rows.loc["included", "comprehensiveness_kl"]
    assert rows.loc["excluded", "sufficiency_kl"] == 0
    assert any("L0.E3 writes extreme outputs" in said for said in result.findings())


@pytest.mark.parametrize(
    "options",
    [{"universe": "per-layer"}, {"axis": "gate-mass"}, {"routing": "frozen"}, {"bins": "mib"}, {"n_random": 0}],
)
def test_every_option_runs_and_is_stored(options):
    result = faithfulness(tiny_lens(), TEXT, modes=["zero"], **{**QUICK, "bins": [0.2, 0.5], **options})
    for name in options.keys() & {"universe", "axis", "routing"}:
        assert set(result.frame[name]) == {options[name]}
    assert result.frame[list(SCORES)].notna().all(axis=None)
    if "universe" in options:
        assert own(result, bin=0.5)["n_layers"].tolist() == [2, 2, 2]
    if options.get("bins") == "mib":
        assert own(result, bin=0.001)["n_units"].tolist() == [0, 0, 0]
        assert set(result.frame["rounding"]) == {"truncate"}
    assert result.churn.empty is (options.get("routing") == "frozen")
    if options.get("n_random") == 0:
        assert "no random control" in result.finding()


def test_the_prediction_is_an_upper_bound_of_passes():
    options: dict[str, Any] = {
        "bins": [0.2, 0.5], "modes": ["zero", "mean_off"], "n_random": 4, "n_matched": 2, "naopc": 3,
    }  # fmt: skip
    lens = tiny_lens()
    result = faithfulness(lens, TEXT, progress=False, draws=10, **options)
    predicted = predict_passes(lens.spec, **options)
    found = predicted.by_purpose
    assert result.n_passes <= sum(
        found[name] for name in ("sets of rankings", "random sets", "load-matched sets", "naopc")
    )
    assert found["sets of rankings"] == 2 * 2 * 2 * 3 + 2
    assert found["random sets"] == 4 * 2 * 2 * 2 * 3
    assert predicted.total == sum(found.values())
    exact = predict_passes(lens.spec, rankings=["load", "leave_one_out"], modes="zero", bins=[0.5])
    assert exact.by_purpose["leave one out"] == 2 * 12
    assert exact.by_purpose["random sets"] == 20 * 2 * 1 * 2  # the control of every ranking, named or not
    assert predict_passes(lens.spec, n_random=0).by_purpose["random sets"] == 0
    assert 0 < seconds_per_pass(lens, TEXT, max_tokens=100) < 10
    with pytest.raises(NotAnMoE, match="no routed experts"):
        predict_passes(Lens(tiny.build("llama"), None).spec)


def test_the_text_behind_means_is_named_and_none_where_none_is_used(found):
    options = {"rankings": ["load"], "bins": [0.2], **QUICK}
    one, other = (
        faithfulness(tiny_lens(), TEXT, modes=["mean_off"], splits=(split, "test"), **options).reference
        for split in ("select", None)
    )
    assert len(one) == len(other) == 16
    assert one != other
    assert found.reference == ""


def test_a_run_repeats_itself():
    a, b = (faithfulness(tiny_lens(), TEXT, modes=["zero"], bins=[0.2], **QUICK) for _ in range(2))
    for name in ("frame", "gaps", "alignment", "stability"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name))


def test_a_corpus_is_tokenised_by_documents():
    lens = tiny_lens()
    lines = [f"{i} {'the quick brown fox jumps over it ' * 2}" for i in range(40)]
    corpus = ml.corpus.text.Corpus.of([ml.corpus.text.Document(str(i), line) for i, line in enumerate(lines)], id="x")
    result = faithfulness(lens, corpus, modes=["zero"], bins=[0.2], max_tokens=200, **QUICK)
    assert 2 <= result.n_documents <= 4


def test_the_figure_has_a_line_for_each_ranking_a_band_and_both_scores(found):
    figure = found.plot()
    names = [trace.name for trace in figure.data if trace.mode == "lines+markers"]
    assert names == ["load", "gate_norm", "gradient"] * 4
    bands = [trace.name for trace in figure.data if trace.fill == "toself"]
    matched = (found.draws["control"] == "load-matched").any()
    assert bands == [None, "load-matched"] * 4 if matched else [None] * 4
    assert ("range of sets of like load" in figure.layout.title.subtitle.text) == matched
    text = " ".join(annotation.text for annotation in figure.layout.annotations)
    assert "<b>zero</b>" in text
    assert "gate_norm" in text
    assert "3 rankings" in figure.layout.title.text
    assert "4 documents" in figure.layout.title.subtitle.text


def test_the_figure_of_alignment_has_a_line_for_each_routing_number_and_layer_names(found):
    figure = found.plot_alignment()
    lines = {trace.name: list(trace.y) for trace in figure.data}
    assert list(lines) == ["load", "gate mass", "gate × norm"]
    rows = found.alignment[found.alignment["layer"].notna() & (found.alignment["routing"] == "load")]
    assert lines["load"] == rows["spearman"].tolist()
    assert list(figure.layout.xaxis.ticktext) == ["L0", "L1"]
    shown = [a for a in figure.layout.annotations if a.text in lines]
    assert all(a.x <= figure.layout.xaxis.range[1] for a in shown)  # plotly hides names outside the axis
    assert len(shown) == 3


def test_a_load_matched_control_without_matches_is_not_quoted(found):
    for share, words in ((0.2, "too few for a load-matched control"), (0.9, "Ahead of load-matched sets")):
        frame = found.frame.assign(matched_share=found.frame["matched_share"].where(lambda x: x.isna(), share))
        assert words in " ".join(replace(found, frame=frame).findings())


def test_every_table_survives_a_parquet_file(found, tmp_path):
    tables = found.tables()
    assert len(tables) == 11
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        back = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert len(back) == len(table)
    assert str(tables["faithfulness"]["n_units"].dtype) == "Int64"


def test_first_tokens_predict_on_request(found):
    result = faithfulness(tiny_lens(), TEXT, modes=["zero"], bins=[0.2], include_first=True, **QUICK)
    assert result.n_tokens == found.n_tokens + 4
    assert any("First tokens predict as well" in said for said in result.findings())


def test_the_result_says_what_limits_it(found):
    said = " ".join(found.findings())
    assert "two clean passes" in said
    assert "4 documents are few" in said
    assert "p cannot fall below 0.20" in said
    assert "of like load and gate mass" in said
    assert "importance by gradient correlates" in said
    plain = found.to_dict()
    assert plain["bins"] == {
        "shares": [0.1, 0.5, 1.0], "rounding": "ceil", "include_zero": True, "aggregate": "mean",
    }  # fmt: skip
    json.dumps(plain)
    assert "<table" in found._repr_html_()
    assert "rankings" in repr(found)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rankings": ["laod"]}, "did you mean 'load'"),
        ({"modes": ["patch"]}, "unknown mode 'patch'"),
        ({"bins": "erasr"}, "did you mean 'eraser'"),
        ({"routing": "cold"}, "use live or frozen"),
        ({"universe": "layer"}, "use global or per-layer"),
        ({"axis": "mass"}, "use count or gate-mass"),
        ({"n_random": -1}, "n_random=-1"),
        ({"naopc": 99}, "at most 30"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_bad_input_is_refused_before_any_pass(options, why, monkeypatch):
    monkeypatch.setattr(Effects, "_first_pass", lambda *_: pytest.fail("a pass was run"))
    with pytest.raises(BadConfig, match=why):
        faithfulness(tiny_lens(), TEXT, progress=False, **options)


def test_models_and_texts_that_cannot_be_scored_are_refused():
    with pytest.raises(NotAnMoE, match="no routed experts"):
        faithfulness(Lens(tiny.build("llama"), None), TEXT)
    with pytest.raises(BadCorpus, match="of the split validate"):
        faithfulness(tiny_lens(), TEXT, splits=("select", "validate"), progress=False)


@pytest.mark.slow
def test_on_the_bundled_model_the_screen_finds_experts_that_matter_more_than_random_ones():
    options: dict[str, Any] = {"rankings": ["gradient", "random"], "modes": ["mean_off"], "bins": [0.1, 0.2]}
    lens = ml.load("bundled:tiny-moe", dtype="float32")
    result = faithfulness(lens, ml.corpus("bundled:"), max_tokens=1024, n_matched=0, progress=False, **options)
    rows = result.gaps[(result.gaps["quantity"] == "aopc") & result.gaps["score"].str.endswith("_kl")]
    assert (rows["low"] > 0).all()
    assert (rows["p"] < 0.05).all()
    assert result.super_experts == []


def test_the_clearest_lead_is_the_one_with_the_lowest_p_and_then_the_largest() -> None:
    leads = pd.DataFrame({"ranking": ["a", "b", "c"], "p": [0.10, 0.05, 0.05], "gap": [0.30, 0.10, 0.20]})
    assert clearest_first(leads)["ranking"].tolist() == ["c", "b", "a"]


def test_the_sentence_says_when_no_p_can_be_small(found) -> None:
    assert "no p can fall below 0.20 with 4 random sets: draw 20" in found.finding()
    more = pd.concat([found.draws.assign(draw=found.draws["draw"] + 4 * i) for i in range(5)], ignore_index=True)
    assert "p < .05 uncorrected" in replace(found, draws=more).finding()
