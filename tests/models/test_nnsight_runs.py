"""`lens.at` with gradients, batches, generation and offloaded weights, with bad input, and outside pytest."""

from __future__ import annotations

import subprocess
import sys

import nnsight
import pytest
import torch
from accelerate import dispatch_model
from nnsight.intervention.interleaver import OutOfOrderError

from moe_lens.errors import BadConfig, ModelNotFound, NotAnMoE, OutOfRange, UnsupportedModel
from moe_lens.models.lens import Lens
from moe_lens.models.seam import Edit
from moe_lens.types import ExpertTap, Role
from tests.models import tiny
from tests.models.traced import (
    FAMILIES,
    LAYER,
    TEXT,
    build,
    ids,
    lens_of,
    rows,
    taps_of,
    visited,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_an_expert_are_those_of_autograd(family):
    lens = lens_of(family)
    kept: dict[str, torch.Tensor] = {}
    expert = visited(taps_of(lens)[LAYER, Role.MOE])

    class Keep(Edit):
        def output(self, tap):
            if (tap.layer, tap.role) == (LAYER, Role.MOE):
                kept["output"], kept["at"] = tap.output, rows(tap, expert)
                tap.output.retain_grad()

    with lens.tapping(lambda tap: None, edit=Keep()):
        lens.model(input_ids=ids()).logits.square().sum().backward()
    lens.model.zero_grad()
    with lens.nnsight.trace(TEXT):
        output = lens.at(f"L{LAYER}.E{expert}").output
        loss = lens.nnsight.output.logits.square().sum()
        with loss.backward():
            gradient = output.grad.save()
    lens.model.zero_grad()
    torch.testing.assert_close(gradient, kept["output"].grad[kept["at"]], rtol=1e-5, atol=1e-6)


def test_each_invoke_of_a_batch_has_its_own_rows_and_edits():
    lens, short, long = lens_of("olmoe"), "So is Socrates", "All men are mortal, all of them"
    batch = lens.nnsight.tokenizer([short, long], padding=True, return_tensors="pt")
    width, taps = batch["input_ids"].shape[1], []
    with torch.no_grad(), lens.tapping(taps.append, layers=[LAYER], roles=[Role.MOE]):
        lens.nnsight._module(**batch)
    tap, expert = taps[0], visited(taps[0])
    with torch.no_grad(), lens.nnsight.trace() as tracer:
        with tracer.invoke(short):
            token_0 = lens.at(f"L{LAYER}.E{expert}").token.save()
            clean = lens.nnsight.output.logits.save()
        with tracer.invoke(long):
            indices_1 = lens.at(LAYER).expert_indices.save()
            output_1 = lens.at(f"L{LAYER}.E{expert}").output.save()
            token_1 = lens.at(f"L{LAYER}.E{expert}").token.save()
    second = tap.token[rows(tap, expert)] >= width
    assert torch.equal(token_0, tap.token[rows(tap, expert)][~second])
    assert torch.equal(token_1, tap.token[rows(tap, expert)][second] - width)
    assert indices_1.shape == (width, 2)
    torch.testing.assert_close(output_1, tap.output[rows(tap, expert)][second], rtol=1e-5, atol=1e-6)
    with torch.no_grad(), lens.nnsight.trace() as tracer:
        with tracer.invoke(short):
            untouched = lens.nnsight.output.logits.save()
        with tracer.invoke(long):
            lens.at(LAYER).expert_weights = 0
            lens.at(f"L{LAYER}.E{expert}").output = 7.0
            lens.nnsight.output.logits.save()
    assert torch.equal(untouched, clean)


def test_generation_gives_the_rows_of_each_step_and_never_those_of_another():
    lens, steps = lens_of("mixtral"), 4
    taps: list[ExpertTap] = []
    with lens.tapping(taps.append, layers=[LAYER], roles=[Role.MOE]):
        ids_wanted = lens.model.generate(ids(), max_new_tokens=steps, do_sample=False)
    assert len(taps) == steps
    with lens.nnsight.generate(TEXT, max_new_tokens=steps, do_sample=False) as tracer:
        found = nnsight.save([])
        for _ in tracer.iter[:steps]:
            lens.at(LAYER).expert_indices  # noqa: B018 (reads the step's first value, so that the next one is not pinned)
            before = lens.at(f"L{LAYER}.E1").token
            output = lens.at(f"L{LAYER}.E1").output
            found.append((before, output, lens.at(f"L{LAYER}.E1").token))
        generated = tracer.result.save()
    assert torch.equal(generated, ids_wanted)
    for tap, (before, output, after) in zip(taps, found, strict=True):
        assert torch.equal(before, tap.token[rows(tap, 1)])
        assert torch.equal(after, tap.token[rows(tap, 1)])
        assert torch.equal(output, tap.output[rows(tap, 1)])


def test_a_loop_that_reads_the_token_first_waits_for_its_own_step():
    lens, taps = lens_of("mixtral"), []
    with lens.tapping(taps.append, layers=[LAYER], roles=[Role.MOE]):
        lens.model.generate(ids(), max_new_tokens=3, do_sample=False)
    with lens.nnsight.generate(TEXT, max_new_tokens=3, do_sample=False) as tracer:
        found = nnsight.save([])
        for _ in tracer.iter[:3]:
            found.append(lens.at(f"L{LAYER}.E1").token)
    assert [token.tolist() for token in found] == [tap.token[rows(tap, 1)].tolist() for tap in taps]


def test_a_module_called_by_the_block_itself_is_not_mistaken_for_the_models_pass():
    lens = lens_of("olmoe")
    wanted = taps_of(lens)[LAYER, Role.MOE].output
    with torch.no_grad(), lens.nnsight.trace(TEXT):
        x = lens.nnsight.model.layers[0].output
        lens.nnsight.model.layers[LAYER].mlp(x * 3)
        outputs = nnsight.save([lens.at(f"L{LAYER}.E{expert}").output for expert in range(6)])
    assert torch.equal(torch.cat(outputs), wanted)


def test_weights_offloaded_to_disk_read_and_set_the_same(tmp_path):
    in_memory = ["model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = {"model.embed_tokens": "disk", "model.layers.1": "disk", **dict.fromkeys(in_memory, "cpu")}
    model = dispatch_model(build("olmoe"), places, offload_dir=tmp_path, main_device="cpu", force_hooks=True)
    results = []
    for lens in (Lens(model, tiny.tokenizer()), lens_of("olmoe")):
        with torch.no_grad(), lens.nnsight.trace(TEXT):
            activation = lens.at("L1.E1").activation.save()
            lens.at("L1.E1").output = 0
            got = lens.nnsight.output.logits.save()
        results.append((activation, got))
    assert model.hf_device_map == places
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_the_model_stays_where_it_is_when_there_is_an_accelerator(monkeypatch):
    """A transformers pipeline, which nnsight builds, would move the model to the first one."""
    lens = Lens(build("olmoe"), tiny.tokenizer())
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    assert lens.nnsight.pipeline.device == lens.device == torch.device("cpu")
    assert "hf_device_map" not in vars(lens.model)


# Bad input


def test_addresses_outside_the_model_are_refused_before_the_trace():
    lens = lens_of("olmoe")
    with pytest.raises(OutOfRange, match="no layer 2"):
        lens.at("L2")
    with pytest.raises(OutOfRange, match="experts are 0 to 5"):
        lens.at("L1.E6")
    with pytest.raises(OutOfRange, match="neurons are 0 to 23"):
        lens.at("L1.E5.N24")
    with pytest.raises(OutOfRange, match="write it as"):
        lens.at("layer one")


@pytest.mark.parametrize("name", ["activation", "output", "token", "weight"])
def test_a_value_outside_a_trace_is_refused_with_the_way_in(name):
    lens = lens_of("olmoe")
    with pytest.raises(BadConfig, match=rf"L1\.E2\.{name} has a value only .* `with lens\.nnsight\.trace\(text\):`"):
        getattr(lens.at("L1.E2"), name)
    with pytest.raises(BadConfig, match="only while the model runs"):
        lens.at("L1").block_output = 0


def test_reading_backwards_names_the_order():
    lens = lens_of("olmoe")
    for first, second in (("L1.E0", "L0.E0"), ("L1.E0", "L1.E0")):
        message = f"{second}.activation was asked for after the model had passed it"
        with pytest.raises(OutOfOrderError, match=message), lens.nnsight.trace(TEXT):
            _ = lens.at(first).output, lens.at(second).activation


def test_what_a_part_does_not_have_is_refused_by_name():
    moe, dense = lens_of("olmoe"), lens_of("deepseek_v3")
    with pytest.raises(NotAnMoE, match="L1 has no shared expert"):
        _ = moe.at("L1").shared
    with pytest.raises(NotAnMoE, match="L0 is a dense layer and has no router_logits"), dense.nnsight.trace(TEXT):
        dense.at("L0").router_logits.save()
    opt = Lens(tiny.build("opt"), tiny.tokenizer())
    with pytest.raises(UnsupportedModel, match="L0 has no feed-forward module of its own"), opt.nnsight.trace(TEXT):
        opt.at("L0").block_output.save()
    with pytest.raises(BadConfig, match=r"no output of its own: use lens.at\('L1.E2'\)"):
        _ = moe.at("L1.E2.N3").output
    with pytest.raises(AttributeError, match="ouput"):
        moe.at("L1.E2").ouput = 0
    with pytest.raises(AttributeError, match="token"):
        moe.at("L1.E2").token = 0


def test_values_that_do_not_fit_are_refused():
    lens = lens_of("olmoe")
    expert = visited(taps_of(lens)[LAYER, Role.MOE])
    message = r"output has the shape .* of shape \(5, 7\) does not fit"
    with pytest.raises(BadConfig, match=message), lens.nnsight.trace(TEXT):
        lens.at(f"L{LAYER}.E{expert}").output = torch.zeros(5, 7)
    with pytest.raises(BadConfig, match="experts 0 to 5"), lens.nnsight.trace(TEXT):
        lens.at(LAYER).expert_indices = 6


def test_a_lens_without_a_tokenizer_is_refused():
    with pytest.raises(ModelNotFound, match=r"Lens\(model, tokenizer\)"):
        _ = Lens(build("olmoe"), None).nnsight


def test_without_nnsight_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "moe_lens.models.nnsight")
    monkeypatch.setitem(sys.modules, "nnsight", None)
    lens = Lens(build("olmoe"), tiny.tokenizer())
    for use in (lambda: lens.nnsight, lambda: lens.at("L0.E0")):
        with pytest.raises(UnsupportedModel, match="pip install nnsight"):
            use()


# Where it runs

PROGRAM = """
import sys
import moe_lens as ml
lens = ml.load("bundled:tiny-moe")
lens.trace("All men are mortal.")
assert "nnsight" not in sys.modules, "nnsight is imported before it is used"
with lens.nnsight.trace("All men are mortal."):
    h = lens.at(f"L{lens.layers[0]}.E0").activation.save()
assert h.shape[1] == lens.spec.at(lens.layers[0]).d_ff
print("read", tuple(h.shape))
"""


@pytest.mark.slow
def test_it_works_in_python_dash_c_and_nnsight_is_imported_only_when_used():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert "read" in done.stdout, done.stderr


@pytest.mark.slow
def test_it_works_in_jupyter_cells():
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    head, body = PROGRAM.split("with lens.nnsight")
    cells = [nbformat.v4.new_code_cell(source) for source in (head, f"with lens.nnsight{body}")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client.NotebookClient(notebook, timeout=300).execute()
    assert "read" in notebook.cells[1].outputs[0].text
