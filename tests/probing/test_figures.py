"""What the figures show is what the tables say."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from moe_lens.errors import BadConfig
from moe_lens.plots import compact, spread
from moe_lens.probing import figures
from moe_lens.probing.waterfall import MEAN, waterfall
from moe_lens.stats import Bootstrap

STEPS = ("raw", "search", "reuse", "candidates", "routing", "left")
MEANS = {
    "raw": 0.20, "search": 0.08, "held_out": 0.15, "equal_random_tokens": 0.06, "equal_router_tokens": 0.01,
    "equal_random_tokens_raw": 0.09, "equal_router_tokens_raw": 0.03,
}  # fmt: skip
COUNTS = {
    "raw": {"n_cells_moe": 1024, "n_cells_dense": 16, "n_tokens_moe": 412, "n_tokens_dense": 12345},
    "held_out": {"n_documents": 105},
}


def ladder(means=MEANS, groups=8, sign=1.0, **more):
    """A waterfall table: reuse adds to the gap, and groups differ."""
    r = np.random.default_rng(0)
    gaps = {}
    for arm, mean in means.items():
        estimates = sign * (mean + 0.05 * (np.arange(groups) - (groups - 1) / 2))
        noise = r.normal(0, 0.02, (groups, 300))
        leave_one = r.normal(0, 0.001, (groups, 40))
        gaps[arm] = {
            f"concept_{g}": Bootstrap(estimates[g], estimates[g] + noise[g], (estimates[g] + leave_one[g],))
            for g in range(groups)
        }
    return waterfall(gaps, group_of={}, **more)


def short(*arms):
    return {arm: MEANS[arm] for arm in ("raw", "search", "held_out", *arms)}


def trace(figure, name):
    (found,) = [t for t in figure.data if t.name == name]
    return found


def bars_of(table):
    return table[(table.order == "forward") & (table.group == MEAN) & (table.kind != "null")].reset_index(drop=True)


def texts(figure):
    """Every word that a reader could see, on hover too."""
    layout = figure.layout
    out = [layout.title.text, layout.title.subtitle.text]
    out += [a.text for a in layout.annotations]
    for axis in (figure.layout.xaxis, figure.layout.yaxis):
        out += [axis.title.text, *(axis.ticktext or ())]
    for t in figure.data:
        out += [t.name, t.hovertemplate, *(t.hovertext if isinstance(t.hovertext, (list, tuple)) else [t.hovertext])]
    return [text for text in out if text]


def all_figures():
    table = comparison()
    yield figures.waterfall(ladder(null=np.linspace(-0.02, 0.02, 99), counts=COUNTS))
    yield figures.waterfall(ladder(short()))
    yield figures.waterfall(ladder(groups=1))
    yield figures.waterfall(ladder(dict.fromkeys(MEANS, np.nan)))
    for one in (table, table[table.k == 1], without_baseline(table)):
        yield figures.against_k(one)
        yield figures.scatter(one)
    yield figures.scatter(table.assign(moe=np.nan))
    yield figures.against_k(table.assign(moe=np.nan, dense=np.nan))


def test_bars_are_as_high_as_the_table_says_and_start_where_the_last_one_ended():
    table = ladder()
    bars, drawn = bars_of(table), trace(figures.waterfall(table), "gap")
    assert list(bars.step) == list(STEPS)
    for i, row in bars.iterrows():
        end = drawn.base[i] + drawn.y[i]
        assert end == pytest.approx(row.after), row.step
        assert abs(drawn.y[i]) == pytest.approx(abs(row.value)), row.step
        assert drawn.base[i] == pytest.approx(0 if row.kind == "level" else bars.after[i - 1])


def test_a_step_that_adds_to_the_gap_is_drawn_and_written_as_an_increase():
    figure = figures.waterfall(ladder())
    reuse = STEPS.index("reuse")
    assert trace(figure, "gap").y[reuse] == pytest.approx(0.03)
    above = [a.text for a in figure.layout.annotations if a.y == 1]
    assert "<b>+0.030</b>" in above[reuse]
    assert "<b>−0.080</b>" in above[STEPS.index("search")]


def test_whiskers_hold_the_interval_of_the_step_at_the_end_of_its_bar():
    table = ladder()
    bars, figure = bars_of(table), figures.waterfall(table)
    for drawn in (t for t in figure.data if t.name == "interval"):
        low, high = drawn.y - drawn.error_y.arrayminus, drawn.y + drawn.error_y.array
        raw, search = bars.iloc[0], bars.iloc[1]
        assert (low[0], high[0]) == pytest.approx((raw.ci_low, raw.ci_high))
        assert (low[1], high[1]) == pytest.approx((raw.value - search.ci_high, raw.value - search.ci_low))
        assert (drawn.error_y.array > 0).all()
        assert (drawn.error_y.arrayminus > 0).all()


def test_every_group_has_a_named_dot_at_every_bar_and_dots_average_to_its_end():
    table = ladder()
    drawn = trace(figures.waterfall(table), "concept groups")
    bars = bars_of(table)
    at = np.round(np.asarray(drawn.x, float)).astype(int)
    for i, row in bars.iterrows():
        names = [re.search("<b>(.*)</b>", text).group(1) for text, x in zip(drawn.hovertext, at, strict=True) if x == i]
        assert sorted(names) == [f"concept_{g}" for g in range(8)]
        assert np.mean(np.asarray(drawn.y)[at == i]) == pytest.approx(row.after)
    assert set(drawn.marker.symbol) == {"circle"}


def test_a_dot_far_off_is_a_triangle_at_the_edge_with_its_value_on_hover():
    table = ladder()
    far = (table.order == "forward") & (table.step == "raw") & (table.group == "concept_3")
    table.loc[far, "value"] = 5.0
    figure = figures.waterfall(table)
    drawn = trace(figure, "concept groups")
    (i,) = np.flatnonzero(np.asarray(drawn.marker.symbol) == "triangle-up")
    assert drawn.y[i] == figure.layout.yaxis.range[1] < 1
    assert "concept_3" in drawn.hovertext[i]
    assert "+5.000" in drawn.hovertext[i]


def test_the_null_is_a_band_behind_the_bar_that_ends_at_the_held_out_gap():
    figure = figures.waterfall(ladder(null=np.linspace(-0.03, 0.02, 201)))
    drawn = trace(figure, "null")
    assert list(drawn.x) == [STEPS.index("reuse")]
    assert drawn.base[0] == pytest.approx(-0.02875)
    assert drawn.base[0] + drawn.y[0] == pytest.approx(0.01875)
    assert figure.data[0].name == "null", "drawn first, so that it lies behind the bar"
    assert not [t for t in figures.waterfall(ladder()).data if t.name == "null"]


def test_hollow_marks_stand_where_the_bars_would_end_in_the_reverse_order():
    table = ladder()
    drawn = trace(figures.waterfall(table), "reverse order")
    place = dict(zip(np.floor(np.asarray(drawn.x, float)).astype(int), drawn.y, strict=True))
    # forward levels .20 .12 .15 .06 .01; reverse takes .11 (candidates, search included), .06 (routing), .02 (reuse)
    assert place == {
        STEPS.index("reuse"): pytest.approx(0.12 - 0.02),
        STEPS.index("candidates"): pytest.approx(0.15 + 0.08 - 0.11),
        STEPS.index("routing"): pytest.approx(0.06 - 0.06),
    }
    assert drawn.marker.color == "#FFFFFF"
    without = {arm: mean for arm, mean in MEANS.items() if not arm.endswith("_raw")}
    assert not [t for t in figures.waterfall(ladder(without)).data if t.name == "reverse order"]


def test_counts_stand_under_their_bars():
    figure = figures.waterfall(ladder(counts=COUNTS))
    under = [(a.x, a.text) for a in figure.layout.annotations if a.y == 0 and a.xref is None]
    assert (0, "1,024 | 16") in under
    assert (0, "412 | 12.3k") in under
    assert (STEPS.index("reuse"), "105") in under
    assert (STEPS.index("left"), "–") in under
    headings = {a.text for a in figure.layout.annotations if a.xref == "paper"}
    assert {"cells", "tokens", "documents"} <= headings
    plain = {a.text for a in figures.waterfall(ladder()).layout.annotations}
    assert not plain & {"cells", "tokens", "documents"}, "nothing to count, no empty rows"


@pytest.mark.parametrize(
    ("arms", "steps", "said"),
    [
        ((), ("raw", "search", "reuse", "left"), "with token counts and routing still in it"),
        (("equal_random_tokens",), ("raw", "search", "reuse", "candidates", "left"), "with routing still in it"),
    ],
)
def test_a_short_ladder_is_drawn_and_not_ascribed_to_the_neurons(arms, steps, said):
    figure = figures.waterfall(ladder(short(*arms)))
    assert len(trace(figure, "gap").y) == len(steps)
    words = " ".join(texts(figure)).replace("<br>", " ")
    assert said in words
    assert "<b>left for the neurons</b>" not in words
    assert trace(figure, "gap").marker.color[-1] != trace(figures.waterfall(ladder()), "gap").marker.color[-1]


def test_the_title_states_the_finding():
    title = figures.waterfall(ladder()).layout.title.text.replace("<br>", " ")
    assert "of +0.200, +0.010 is left for the neurons" in title
    flipped = figures.waterfall(ladder(sign=-1)).layout.title.text.replace("<br>", " ")
    assert "of −0.200, −0.010 is left for the neurons" in flipped


def test_text_fits_when_the_figure_is_700_wide():
    figure = figures.waterfall(ladder(counts=COUNTS, null=np.linspace(-0.03, 0.02, 99)))
    lines = re.sub("<(?!br)[^>]*>", "", figure.layout.title.text).split("<br>")
    assert max(map(len, lines)) * 17 * 0.58 < 700 - 40
    margin = figure.layout.margin
    per_bar = (700 - margin.l - margin.r) / (figure.layout.xaxis.range[1] - figure.layout.xaxis.range[0])
    for note in (a for a in figure.layout.annotations if a.xref is None and a.y in (0, 1)):
        for line in re.sub("<(?!br)[^>]*>", "", note.text).split("<br>"):
            assert len(line) * 6 < per_bar, line


def test_one_metric_and_k_is_drawn_of_several():
    other = ladder(sign=-1, metric="auroc", k=8)
    both = pd.concat([other, ladder()])
    assert trace(figures.waterfall(both), "gap").y[0] == pytest.approx(0.20)
    assert trace(figures.waterfall(both, metric="auroc", k=8), "gap").y[0] == pytest.approx(-0.20)
    with pytest.raises(BadConfig, match="k=3"):
        figures.waterfall(both, k=3)


def comparison(ks=(1, 2, 8), concepts=9):
    """A comparison table in which raw is above held out and the MoE above the dense model, most of the time."""
    r = np.random.default_rng(1)
    rows = []
    for arm, lift in (("raw", 0.1), ("held_out", 0.0)):
        for metric in ("f1_balanced", "auroc"):
            for k in ks:
                for name in (MEAN, *(f"c{i}" for i in range(concepts))):
                    noise = {MEAN: 0.0, "c1": -0.4}.get(name, r.normal(0, 0.1))
                    moe, dense = 0.7 + lift + 0.02 * k + noise, 0.6 + lift / 2 + 0.02 * k
                    rows.append({
                        "arm": arm, "metric": metric, "k": k, "concept": name, "moe": moe, "moe_low": moe - 0.02,
                        "moe_high": moe + 0.03, "dense": dense, "dense_low": dense - 0.04, "dense_high": dense + 0.01,
                        "chance_moe": 0.5, "chance_dense": 0.5, "gap": moe - dense, "ci_low": moe - dense - 0.05,
                        "ci_high": moe - dense + 0.05, "status": "ok",
                    })  # fmt: skip
    for metric in ("f1_balanced", "auroc"):
        rows.append({"arm": "null", "metric": metric, "k": 1, "concept": MEAN, "moe": 0.5, "moe_low": 0.48,
                     "moe_high": 0.53, "dense": 0.5, "dense_low": 0.46, "dense_high": 0.52})  # fmt: skip
    return pd.DataFrame(rows)


def without_baseline(table):
    columns = [name for name in table if "dense" in name] + ["gap", "ci_low", "ci_high"]
    return table.assign(**dict.fromkeys(columns, np.nan))


@pytest.mark.parametrize("column", [1, 2])
def test_lines_against_k_are_the_means_of_the_table(column):
    table, figure = comparison(), figures.against_k(comparison())
    means = table[(table.concept == MEAN) & (table.metric == ("f1_balanced", "auroc")[column - 1])]
    axis = "x" if column == 1 else "x2"
    drawn = {t.name: t for t in figure.data if t.xaxis == axis}
    for role, label in (("moe", "MoE"), ("dense", "dense")):
        for arm in ("raw", "held_out"):
            rows, name = means[means.arm == arm], f"{label} {arm.replace('_', ' ')}"
            assert list(drawn[name].x) == [1, 2, 8]
            assert list(drawn[name].y) == list(rows[role])
            band = drawn[f"{name} interval"]
            assert list(band.y) == [*rows[f"{role}_high"], *rows[f"{role}_low"][::-1]]
        null = drawn[f"null {label}"]
        assert list(null.y) == list(means[means.arm == "null"][[f"{role}_low", f"{role}_high"]].iloc[0])
        assert set(null.x) == {null.x[0]}
        assert null.x[0] == pytest.approx(1, abs=0.05)
    assert list(drawn["chance" if column == 2 else "always positive"].y) == [0.5] * 3
    assert drawn["MoE held out"].line.width > drawn["MoE raw"].line.width
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext) == ["1", "2", "8"]


def test_the_null_and_every_name_of_a_line_are_written():
    notes = [a.text for a in figures.against_k(comparison()).layout.annotations]
    assert notes.count("null") == 2
    for name in ("<b>MoE held out</b>", "MoE raw", "<b>dense held out</b>", "dense raw"):
        assert notes.count(name) == 2


def test_a_null_at_every_k_is_a_band_with_its_mean():
    table = comparison()
    null = pd.concat([table[table.arm == "null"].assign(k=k) for k in (8, 1, 2)])
    values = ["moe", "moe_low", "moe_high", "dense", "dense_low", "dense_high"]
    null[values] = null[values].add(0.01 * null.k, axis=0)
    figure = figures.against_k(pd.concat([table[table.arm != "null"], null]))
    for column, metric in ((1, "f1_balanced"), (2, "auroc")):
        drawn = {t.name: t for t in figure.data if t.xaxis == f"x{'' if column == 1 else column}"}
        rows = null[null.metric == metric].sort_values("k")
        for role, label in (("moe", "MoE"), ("dense", "dense")):
            assert list(drawn[f"{label} null"].x) == [1, 2, 8]
            assert list(drawn[f"{label} null"].y) == list(rows[role])
            band = drawn[f"{label} null band"]
            assert list(band.x) == [1, 2, 8, 8, 2, 1]
            assert list(band.y) == [*rows[f"{role}_high"], *rows[f"{role}_low"][::-1]]
        assert not {"null MoE", "null dense"} & set(drawn), "no bars beside bands"
        low, high = figure.layout["yaxis" if column == 1 else "yaxis2"].range
        assert low < null[values].min(axis=None) < null[values].max(axis=None) < high
    notes = [a.text for a in figure.layout.annotations]
    assert (notes.count("MoE null"), notes.count("dense null"), notes.count("null")) == (2, 2, 0)
    assert "labels exchanged" in figure.layout.title.subtitle.text


def test_a_model_without_a_null_has_no_band():
    null = pd.concat([comparison()[lambda t: t.arm == "null"].assign(k=k) for k in (1, 2, 8)])
    table = without_baseline(pd.concat([comparison()[lambda t: t.arm != "null"], null]))
    names = {t.name for t in figures.against_k(table).data}
    assert "MoE null band" in names
    assert not {"dense null", "dense null band"} & names


def test_chance_that_differs_between_the_models_is_two_lines():
    table = comparison()
    table.loc[table.metric == "f1_balanced", "chance_moe"] = 0.6
    names = [t.name for t in figures.against_k(table).data]
    assert {"MoE always positive", "dense always positive", "chance"} <= set(names)


def test_auroc_alone_is_one_panel_and_an_unknown_metric_is_refused():
    assert {t.xaxis for t in figures.against_k(comparison(), metric="auroc").data} == {"x"}
    with pytest.raises(BadConfig, match="'f2'"):
        figures.against_k(comparison(), metric="f2")


def test_one_dot_per_concept_in_the_colour_of_its_category():
    table = comparison()
    category_of = {f"c{i}": "even" if i % 2 == 0 else "odd" for i in range(9)}
    figure = figures.scatter(table, arm="raw", metric="auroc", k=2, category_of=category_of)
    rows = table[(table.arm == "raw") & (table.metric == "auroc") & (table.k == 2)].set_index("concept")
    seen = {}
    for t in figure.data:
        for x, y, text in zip(t.x, t.y, t.hovertext, strict=True):
            name = re.search("<b>(.*)</b>", text).group(1)
            assert t.name == category_of[name]
            seen[name] = (x, y)
    assert seen == {name: (rows.dense[name], rows.moe[name]) for name in category_of}
    even, odd = (trace(figure, name) for name in ("even", "odd"))
    assert even.marker.color != odd.marker.color
    assert (even.y + even.error_y.array).tolist() == pytest.approx([rows.moe_high[f"c{i}"] for i in (0, 2, 4, 6, 8)])
    assert figure.layout.showlegend


def test_the_six_concepts_farthest_from_the_diagonal_are_named_without_overlap():
    table = comparison(concepts=12)
    figure = figures.scatter(table)
    rows = table[(table.arm == "held_out") & (table.metric == "f1_balanced") & (table.k == 1)].iloc[1:]
    far = rows.assign(off=(rows.moe - rows.dense).abs()).nlargest(6, "off")
    assert {a.text for a in figure.layout.annotations} == set(far.concept) > {"c1"}, "c1 is far below"
    low, high = figure.layout.xaxis.range
    scale = 516 / (high - low)
    boxes = [
        (a.x * scale + a.ax, a.y * scale - a.ay, len(a.text) * 6.3) for a in figure.layout.annotations
    ]  # fmt: skip
    for i, (x, y, width) in enumerate(boxes):
        for u, v, other in boxes[:i]:
            assert abs(x - u) >= (width + other) / 2 - 1e-6 or abs(y - v) >= 15 - 1e-6


def test_the_title_counts_concepts_above_the_diagonal_and_beyond_their_interval():
    table = comparison()
    rows = table[(table.arm == "held_out") & (table.metric == "f1_balanced") & (table.k == 1) & (table.concept != MEAN)]
    title = figures.scatter(table).layout.title
    assert f"higher in {(rows.moe > rows.dense).sum()} of 9" in title.text
    assert f"above zero in {(rows.ci_low > 0).sum()}, below in {(rows.ci_high < 0).sum()}" in title.subtitle.text


def test_without_a_baseline_the_probe_without_a_neuron_is_on_x():
    figure = figures.scatter(without_baseline(comparison()))
    assert set(np.concatenate([t.x for t in figure.data])) == {0.5}
    assert "without a neuron" in figure.layout.xaxis.title.text
    names = {t.name for t in figures.against_k(without_baseline(comparison())).data}
    assert not any("dense" in name for name in names)


def test_scores_that_were_not_computed_are_refused_by_what_there_is():
    with pytest.raises(BadConfig, match=r"equal_router_tokens.*held_out"):
        figures.scatter(comparison(), arm="equal_router_tokens")


def test_no_figure_writes_nan_and_every_one_can_be_saved():
    for figure in all_figures():
        assert not [text for text in texts(figure) if re.search(r"\bnan\b", text, re.IGNORECASE)]
        assert figure.layout.title.text
        json.loads(figure.to_json())


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (9801, "9,801"), (12345, "12.3k"), (4.2e6, "4.2M"), (np.nan, "–"), (104.6, "105")]
)
def test_counts_are_short(value, text):
    assert compact(value) == text


def test_labels_are_pushed_apart_no_more_than_needed():
    assert spread([0.0, 5.0], 1) == [0.0, 5.0]
    assert spread([0.0, 0.0], 1) == [-0.5, 0.5]
    assert spread([3.0, 0.1, 0.0], 1) == [3.0, 0.55, -0.45]
    placed = sorted(spread([0, 0.2, 0.9, 1.0, 4], 1))
    assert min(np.diff(placed)) >= 1 - 1e-9
