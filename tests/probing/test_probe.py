"""``ml.probe`` end to end on tiny models: columns, arms, resume, refusals, memory groups, invariances."""

import numpy as np
import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.errors import BadConfig, BadOutput, MemoryLimit, OutOfRange
from moe_lens.probing import job as job_module
from moe_lens.probing import probe as probe_module
from moe_lens.probing import scan as scan_module
from moe_lens.probing.arms import LADDER

NEWER = ("larger", "n_cells")
"""Arrays of a stored null that were added later."""
CONCEPTS = ["contains_digit", "contains_capital", "contains_whitespace", "domain_up"]
PROBE_COLUMNS = (
    "model, role, protocol, seed, layer, expert, concept, category, granularity, k, neurons, sign, n_select, "
    "n_validate, n_test, n_pos_select, n_pos_validate, n_pos_test, prevalence, f1, f1_always_positive, "
    "f1_balanced, precision, recall, auroc, average_precision, balanced_accuracy, mcc, auroc_validate, "
    "f1_balanced_validate, status"
).split(", ")
COMPARISON_COLUMNS = (
    "arm, concept, k, metric, moe, dense, gap, ci_low, ci_high, p_value, null_mean, n_cells_moe, n_cells_dense, "
    "n_distinct_neurons_moe, n_distinct_neurons_dense, n_seeds, sd_seeds, status"
).split(", ")


def run(lens, corpus, **kwargs):
    return ml.probe(lens, corpus, **{"concepts": CONCEPTS, "k": (1, 4), "progress": False, **kwargs})


@pytest.fixture(scope="module")
def result(moe, dense, corpus, tmp_path_factory):
    return run(moe, corpus, baseline=dense, out=tmp_path_factory.mktemp("run"))


def test_tables_have_the_columns_of_the_contract(result):
    assert set(PROBE_COLUMNS) <= set(result.cells.columns)
    assert set(COMPARISON_COLUMNS) <= set(result.comparison.columns)
    written = result.run.frame("probe")
    assert written.select_dtypes("number").columns.isin(["f1", "auroc", "n_test"]).sum() == 3
    assert set(result.cells.status) <= {"ok", "separable", "too_few", "constant", "not_converged", "not_fitted"}


def test_every_cell_of_both_models_is_there_once_per_concept_at_k_1(result):
    first = result.cells[result.cells.k == 1]
    assert len(first[first.role == "moe"]) == 2 * 6 * len(CONCEPTS)
    assert len(first[first.role == "dense"]) == 2 * len(CONCEPTS)
    assert not first.duplicated(["role", "layer", "expert", "concept"]).any()


def test_every_cell_has_a_row_at_every_k_and_says_where_nothing_was_fitted(result):
    counts = result.cells.groupby(["role", "concept", "k"]).size().unstack("k")
    assert (counts[1] == counts[4]).all()
    rest = result.cells[result.cells.status == "not_fitted"]
    assert set(rest.k) == {4}
    assert rest.f1.isna().all()
    assert rest.neurons.map(len).eq(0).all()
    fitted = result.cells[(result.cells.k == 4) & result.cells.status.isin(["ok", "separable"])]
    assert fitted.groupby(["role", "concept"]).size().max() == 8, "the best eight"


def test_numbers_are_there_exactly_where_the_status_says_so(result):
    good = result.cells.status.isin(["ok", "separable"])
    assert good.any()
    assert result.cells.f1[good].notna().all()
    assert result.cells.f1[~good].isna().all()
    assert (result.cells.n_pos_test[good] >= 25).all()
    assert (result.cells.n_pos_select[good] >= 50).all()


def test_the_arms_come_with_the_always_positive_f1_and_intervals(result):
    assert result.arms(metric="auroc").arm.tolist() == list(LADDER)
    arms = result.arms(metric="f1")
    assert arms.moe[0] >= arms.moe[2]
    assert arms.chance_moe.between(0.1, 0.9).all()
    assert (arms.ci_low <= arms.gap + 0.05).all()
    assert (arms.ci_high >= arms.gap - 0.05).all()


def test_the_best_held_out_neuron_beats_chance(result):
    best = result.best().set_index(["role", "concept"])
    row = best.loc["moe", "contains_digit"]
    assert row.auroc > 0.6
    assert row.f1 > row.f1_always_positive


def test_the_run_directory_tells_what_was_done(result):
    entry = result.run.manifest["commands"]["probe"]
    assert entry["state"] == "done"
    assert entry["peak_memory"] > 1e6
    done = [p.get("model") or p["part"] for p in entry["passes"]]
    assert done == ["tiny-olmoe", "tiny-llama", "tiny-olmoe and tiny-llama", "neurons"]
    assert {
        "waterfall",
        "neurons",
        "neuron_layers",
        "probe",
        "comparison",
        "concepts",
        "routing",
        "routing_fields",
        "coactivation",
    } <= set(result.run.tables())
    assert not result.run.partial("probe").exists()


def test_routing_counts_every_eligible_token_once(result, corpus):
    routing = result.run.routing
    assert routing.groupby("layer").load.sum().tolist() == [120 * 59 * 2] * 2


def test_the_same_call_again_reads_the_result_back(moe, dense, corpus, result, monkeypatch):
    monkeypatch.setattr(job_module, "scan", None)
    again = run(moe, corpus, baseline=dense, out=result.run.path)
    pd.testing.assert_frame_equal(again.comparison, result.comparison, check_dtype=False)


def test_other_settings_in_the_same_directory_are_refused(moe, dense, corpus, result):
    with pytest.raises(BadOutput, match=r"other settings \(k\).*--no-resume"):
        run(moe, corpus, baseline=dense, out=result.run.path, k=(1, 2))
    with pytest.raises(BadOutput, match="another run"):
        run(moe, corpus, baseline=dense, out=result.run.path, seed=1)


def test_a_killed_run_resumes_without_repeating_the_finished_model(moe, dense, corpus, result, tmp_path, monkeypatch):
    calls = []
    real = scan_module.scan

    def dies_on_the_second(lens, *args, **kwargs):
        calls.append(lens.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(lens, *args, **kwargs)

    monkeypatch.setattr(job_module, "scan", dies_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(moe, corpus, baseline=dense, out=tmp_path / "r")
    resumed = run(moe, corpus, baseline=dense, out=tmp_path / "r")
    assert calls == ["tiny-olmoe", "tiny-llama", "tiny-llama"]
    pd.testing.assert_frame_equal(resumed.comparison, result.comparison)
    pd.testing.assert_frame_equal(resumed.cells, result.cells)


def test_a_part_stored_before_there_was_a_null_at_larger_k_is_read(moe, corpus, tmp_path):
    """Then the comparison has a null at k = 1 only, as it had."""
    stored = ml.probe(moe, corpus, concepts=CONCEPTS, k=(1, 4), neurons=False, progress=False).comparison
    path = tmp_path / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_module, "comparison_table", None)
        with pytest.raises(TypeError):
            run(moe, corpus, neurons=False, out=path)
    (part,) = path.rglob("model-0.null.npz")
    with np.load(part) as found:
        old = {name: value for name, value in found.items() if not name.endswith("_4") and name not in NEWER}
        assert len(old) < len(found.files)
    np.savez(part, **old)
    resumed = run(moe, corpus, neurons=False, out=path).comparison
    expected = stored[(stored.arm != "null") | (stored.k == 1)].reset_index(drop=True)
    expected.loc[expected.k > 1, "null_mean"] = np.nan
    pd.testing.assert_frame_equal(resumed, expected)


def test_layer_groups_give_the_same_tables_as_one_pass(moe, corpus, monkeypatch):
    one = run(moe, corpus)
    monkeypatch.setattr(scan_module, "layer_groups", lambda layers, **_: [[layer.layer] for layer in layers])
    two = run(moe, corpus)
    pd.testing.assert_frame_equal(one.cells, two.cells)
    pd.testing.assert_frame_equal(one.comparison, two.comparison)


def test_a_memory_limit_too_small_for_one_layer_is_refused(moe, corpus):
    with pytest.raises(MemoryLimit, match="raise --max-memory"):
        run(moe, corpus, max_memory=1_000_000)


def test_batch_size_changes_nothing_beyond_rounding(moe, corpus):
    one, two = run(moe, corpus, batch_size=3), run(moe, corpus)
    same = one.cells.neurons.map(list) == two.cells.neurons.map(list)
    assert same.mean() > 0.98
    np.testing.assert_allclose(one.cells.auroc[same], two.cells.auroc[same], atol=1e-3)


def test_a_dense_model_against_itself_has_no_gap(dense, corpus):
    table = run(dense, corpus, baseline=dense).comparison
    table = table[table.status == "ok"]
    assert len(table)
    assert (table.gap == 0).all()
    assert (table.ci_low == 0).all()


def test_more_splits_give_more_seeds(moe, corpus):
    result = run(moe, corpus, splits=2, k=(1,))
    assert set(result.cells.seed) == {0, 1}
    assert result.comparison.n_seeds.max() == 2


def test_layers_and_experts_can_be_chosen(moe, corpus):
    cells = run(moe, corpus, layers=[1], experts=["L1.E3", "1:0"], k=(1,)).cells
    assert set(zip(cells.layer, cells.expert, strict=True)) == {(1, 0), (1, 3)}


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"k": (1, 4000)}, BadConfig, "neurons"),
        ({"k": (0,)}, BadConfig, "positive"),
        ({"layers": [7]}, OutOfRange, "no layer 7"),
        ({"experts": ["L0.E99"]}, OutOfRange, "no expert 99"),
        ({"layers": [0], "experts": ["L1.E0"]}, OutOfRange, "--layers"),
        ({"splits": 0}, BadConfig, "--splits"),
        ({"rank": "magic"}, BadConfig, "ranking"),
        ({"protocol": "magic"}, BadConfig, "protocol"),
        ({"max_rows": 3}, BadConfig, "--max-rows"),
        ({"concepts": []}, BadConfig, "concept"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(moe, corpus, tmp_path, kwargs, error, says):
    with pytest.raises(error, match=says):
        run(moe, corpus, out=tmp_path / "r", **kwargs)
    assert not (tmp_path / "r").exists()


def test_result_objects_show_themselves(result):
    assert "held" in result._repr_html_() or "other documents" in result._repr_html_()
    assert "is left" in result.plot().layout.title.text
    assert {"MoE held out", "dense held out"} <= {trace.name for trace in result.against_k().data}
    assert len(result.scatter().data)
    assert result.summary()["arms"]["raw"]["f1"]["moe"] > 0
    assert "zero" in result.finding()
    assert "probe" in repr(result.run)
    assert "tiny-olmoe" in result.run._repr_html_()
    assert {"address", "load", "top_domain"} <= set(result.run.experts().columns)
    assert (result.run.coactivation(0).layer == 0).all()
