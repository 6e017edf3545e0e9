"""A trace tells the routing of one text, and its contributions sum to the logit."""

from __future__ import annotations

import pytest
import torch

from moe_lens.errors import BadCorpus, OutOfRange
from moe_lens.models import norms
from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.models import oracle, tiny

TEXT = "two cats & <b>one</b> dog"


@pytest.fixture(params=["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"])
def lens(request, lens_of) -> Lens:
    return lens_of(request.param)


def test_routing_equals_the_router(lens):
    layer = lens.layers[-1]
    record = oracle.Recorder(lens.model, [layer])
    t = lens.trace(TEXT)
    for handle in record.handles:
        handle.remove()
    logits, weights, index = record.router[layer]
    rows = t.routing[(t.routing["layer"] == layer) & (t.routing["role"] == "moe")]
    assert len(rows) == index.numel()
    for row in rows.itertuples():
        assert row.expert == index[row.position, row.slot]
        assert row.weight == pytest.approx(float(weights[row.position, row.slot]))
        others = [e for e in range(logits.shape[1]) if e not in index[row.position].tolist()]
        gap = float(logits[row.position, row.expert] - logits[row.position, others].max())
        assert row.margin == pytest.approx(gap, abs=1e-6)
        assert row.margin >= 0
    assert t.tokens == tuple(TEXT)
    assert t.n_prompt == len(TEXT)


def test_shares_of_a_block_sum_to_one_and_the_shared_expert_has_a_row(lens):
    t = lens.trace(TEXT)
    sums = t.routing.groupby(["position", "layer"])["share"].sum()
    assert sums.to_numpy() == pytest.approx(1.0, abs=1e-4)
    shared = t.routing[t.routing["role"] == "shared"]
    assert len(shared) == (len(TEXT) * 2 if lens.spec.at(1).shared_d_ff else 0)
    assert shared["expert"].isna().all()
    assert t.routing["expert"].dtype == "Int64"


def test_an_expert_is_looked_up_by_address(lens):
    t = lens.trace(TEXT)
    layer = lens.layers[-1]
    rows = t.routing[(t.routing["layer"] == layer) & (t.routing["expert"] == 2)]
    visits = t[f"L{layer}.E2"]
    assert sorted(visits.token.tolist()) == sorted(rows["position"])
    assert visits.activation.shape == (len(rows), 24)
    norm = (visits.output * visits.weight[:, None]).norm(dim=-1)
    by_position = rows.set_index("position")["weighted_norm"]
    assert [by_position[i] for i in visits.token.tolist()] == pytest.approx(norm.tolist(), rel=1e-5)
    with pytest.raises(OutOfRange, match="its experts are"):
        t[f"L{layer}.E99"]
    with pytest.raises(OutOfRange, match="not traced"):
        lens.trace(TEXT, layers=[1])["L0.E0"]


def test_contributions_and_the_rest_of_the_residual_sum_to_the_logit(lens):
    t, pos, target = lens.trace(TEXT, layers=[0, 1]), 5, 65
    frame = t.contributions(pos, target)
    record = {}
    handle = lens.blocks[1].register_forward_hook(lambda m, a, out: record.update(out=out))
    ids = torch.tensor([t.token_ids])
    with torch.no_grad():
        logit = float(lens.model(input_ids=ids).logits[0, pos, target])
        handle.remove()
        to_logit = norms.freeze(norms.final_norm(lens.model), t.residual[pos])
        written = sum((tap.output * tap.weight[:, None])[tap.token == pos].sum(0) for tap in t.taps)
        rest = t.residual[pos] - written
        rest_logit = float(to_logit(rest) @ lens.model.lm_head.weight[target])
    assert frame["logit"].sum() + rest_logit == pytest.approx(logit, abs=1e-3, rel=1e-4)
    assert len(frame) == sum(int((tap.token == pos).sum()) for tap in t.taps)


def test_a_contribution_is_what_removing_the_write_takes_from_the_logit(lens_of):
    """In the last layer, with the norm's scale held, the direct effect is the whole effect."""
    lens = lens_of("olmoe")
    t, pos, target = lens.trace(TEXT), 7, 70
    row = t.contributions(pos, target).query("layer == 1 and slot == 0").iloc[0]
    visits = t[f"L1.E{row.expert}"]
    write = (visits.output * visits.weight[:, None])[visits.token == pos][0]
    norm, x = lens.model.model.norm, t.residual[pos]
    scale = norm.weight / (x.square().mean() + norm.variance_epsilon).sqrt()
    wanted = float((((x * scale) - ((x - write) * scale)) @ lens.model.lm_head.weight[target]).detach())
    assert row.logit == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmo", "olmo2", "gpt2", "qwen3"])
def test_contributions_of_dense_models_sum_to_what_the_ffns_write(family, lens_of):
    """Checked by autograd: the gradient of the logit with a frozen norm, dotted with the write."""
    lens = lens_of(family)
    t, pos, target = lens.trace(TEXT), 4, 65
    frame = t.contributions(pos, target)
    assert list(frame["role"]) == ["dense", "dense"]
    writes = {}
    blocks = lens.blocks
    handles = []
    for layer, block in enumerate(blocks):
        module = norms.post_ffn_norm(block) or block.mlp
        handles.append(module.register_forward_hook(lambda m, a, out, k=layer: writes.__setitem__(k, out[0, pos])))
    with torch.no_grad():
        lens.model(input_ids=torch.tensor([t.token_ids]))
        for handle in handles:
            handle.remove()
        norm, x = norms.final_norm(lens.model), t.residual[pos].clone()
        bias = norm(torch.zeros_like(x))
        for layer in (0, 1):
            w = writes[layer]
            if family in ("gpt_neox", "gpt2", "olmo"):
                w, centred = w - w.mean(), x - x.mean()
            else:
                centred = x
            scale = (norm(x) - bias) / centred
            wanted = float((w * scale) @ lens.model.get_output_embeddings().weight[target])
            ffn_bias_missing = frame["logit"][layer]
            assert ffn_bias_missing == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_paths_have_one_row_per_token(lens):
    t = lens.trace(TEXT, layers=[0, 1])
    paths = t.paths()
    assert list(paths.columns) == ["position", "token", "L0", "L1"]
    assert list(paths["token"]) == list(TEXT)
    assert len(paths["L1"][0]) == lens.spec.at(1).top_k


def test_generated_tokens_are_traced_too(lens_of):
    lens = lens_of("olmoe")
    t = lens.trace("abc", generate=4)
    assert t.n_prompt == 3
    assert 4 <= len(t.tokens) <= 7
    assert set(t.routing["position"]) == set(range(len(t.tokens)))
    with torch.no_grad():
        greedy = lens.model(input_ids=torch.tensor([t.token_ids[:3]])).logits[0, -1].argmax()
    assert t.token_ids[3] == int(greedy)


def test_token_text_is_escaped(lens_of):
    t = lens_of("olmoe").trace("<b>&")
    assert "<td>&lt;</td>" in t._repr_html_()
    assert "<td><</td>" not in t._repr_html_()
    assert list(t.plot().layout.xaxis.ticktext) == ["&lt;", "b", "&gt;", "&amp;"]


def test_a_trace_leaves_the_model_as_it_was(lens):
    ids = tiny.ids(1, 6)
    with torch.no_grad():
        clean = lens.model(input_ids=ids).logits
        lens.trace(TEXT)
        assert torch.equal(lens.model(input_ids=ids).logits, clean)


@pytest.mark.parametrize("bad", [["a"], None, [{"role": "user", "content": "hi"}]])
def test_only_text_is_traced(lens_of, bad):
    with pytest.raises(BadCorpus, match="one text"):
        lens_of("olmoe").trace(bad)


def test_impossible_requests_are_refused(lens_of):
    lens = lens_of("olmoe")
    with pytest.raises(BadCorpus, match="no tokens"):
        lens.trace("")
    with pytest.raises(OutOfRange, match="context holds 64"):
        lens.trace("x" * 65)
    t = lens.trace("abc")
    with pytest.raises(OutOfRange, match="positions are 0 to 2"):
        t.contributions(3, 65)
    with pytest.raises(OutOfRange, match="2 tokens"):
        t.contributions(0, "ab")
    with pytest.raises(OutOfRange, match="ids are 0 to 259"):
        t.contributions(0, 260)
    with pytest.raises(OutOfRange, match="no shared expert"):
        t.shared(0)


def test_the_shared_expert_can_be_looked_at(lens_of):
    t = lens_of("qwen2_moe").trace("abc")
    assert t.shared(0).activation.shape == (3, 20)
    assert (t.routing["role"] == str(Role.SHARED)).sum() == 6
