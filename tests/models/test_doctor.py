"""The doctor passes what is right and fails what is wrong: every fault here is planted in the seam or the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import moe_lens as ml
from moe_lens.errors import BadConfig, BadCorpus, NotAnMoE, OutOfRange
from moe_lens.models import evidence, reruns, seam
from moe_lens.models.checks import Outcome
from moe_lens.models.doctor import Diagnosis, doctor, to_ablate
from moe_lens.models.lens import Lens
from moe_lens.models.load import load
from moe_lens.models.spec import spec_of
from moe_lens.types import ExpertTap
from tests.conformance import zoo
from tests.models import tiny

CHECKS = [
    "loading", "tokenizer", "finite", "widths", "logits, grouped_mm", "logits, eager", "logits, bfloat16",
    "block output", "row by row", "router", "choice", "ablation L0", "ablation L1", "restored",
]  # fmt: skip


def lens_of(family: str = "olmoe", **changes: Any) -> Lens:
    return Lens(tiny.build(family, **changes), tiny.tokenizer(), name=family)


def zoo_lens(family: str) -> Lens:
    return Lens(zoo.build(zoo.ZOO[family]), tiny.tokenizer(), name=family)


def failing(found: Diagnosis) -> set[str]:
    return {check.check.split(" L")[0] for check in found.failed}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_sound_model_passes_every_check_by_name():
    found = doctor(lens_of())
    assert found.ok
    assert [line.check.split(".")[0] for line in found.checks] == CHECKS
    assert {line.status for line in found.checks} == {Outcome.OK}
    assert found.verdict.startswith("all 14 checks passed")


@pytest.mark.parametrize("family", zoo.ZOO)
def test_every_family_passes(family):
    found = doctor(zoo_lens(family))
    assert [f"{line.check}: {line.detail}" for line in found.failed] == []
    assert {line.check for line in found.checks if line.status is Outcome.SKIPPED} <= {"logits, bfloat16"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["native", "eager"])
def test_half_precision_passes_with_equal_bits(dtype, kernel):
    model = tiny.build("qwen3_moe", dtype=dtype)
    found = doctor(Lens(model, tiny.tokenizer(), kernel=kernel))
    assert found.ok
    exact = found.frame[found.frame["check"].str.match("logits|ablation|restored")].dropna()
    assert len(exact) == 4
    assert set(exact["value"]) == {0.0}


def test_the_model_and_its_weights_are_left_as_they_were():
    lens = lens_of("qwen2_moe")
    lens.model.set_experts_implementation("eager")
    before, requires = weights(lens.model), [p.requires_grad for p in lens.model.parameters()]
    state = evidence.State.of(lens.model)
    doctor(lens, experts=["L0.E1", "L1.E5"])
    assert evidence.State.of(lens.model) == state
    assert [p.requires_grad for p in lens.model.parameters()] == requires
    assert all(p.grad is None for p in lens.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lens.model.state_dict().items())


def test_surgery_is_undone_when_the_model_raises():
    model = tiny.build("olmoe")
    before = weights(model)
    site = Lens(model, None).sites[0]

    def fail() -> None:
        with evidence.down_projection_zeroed(site, 1):
            assert not site.module.down_proj[1].any()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


Change = Callable[[ExpertTap], ExpertTap]


def plant(monkeypatch: pytest.MonkeyPatch, *, change: Change | None = None, **fault: Any) -> None:
    """Let `seam.tapping` deliver changed taps, drop edits, or leave something behind."""
    sound = seam.tapping

    @contextmanager
    def faulty(model: Any, sites: Any, on_tap: Any, *, kernel: Any = "native", edit: Any = None) -> Iterator[Any]:
        deliver = on_tap if change is None else lambda tap: on_tap(change(tap))
        with sound(model, sites, deliver, kernel=kernel, edit=None if "no_edit" in fault else edit) as current:
            yield current
        if "implementation" in fault:
            model.set_experts_implementation(fault["implementation"])
        if "hook" in fault:
            sites[0].module.register_forward_hook(lambda *_: None)
        if "weight" in fault:
            sites[0].module.down_proj.data.mul_(1.001)

    monkeypatch.setattr(seam, "tapping", faulty)


def scaled_output(tap: ExpertTap) -> ExpertTap:
    return dataclasses.replace(tap, make_output=lambda: tap.output * 1.01)


def one_output_missing(tap: ExpertTap) -> ExpertTap:
    output = tap.output.clone()
    output[0] = 0
    return dataclasses.replace(tap, make_output=lambda: output)


def swapped_weights(tap: ExpertTap) -> ExpertTap:
    order = torch.arange(len(tap.weight))
    order[[0, -1]] = order[[-1, 0]]
    return dataclasses.replace(tap, weight=tap.weight[order])


def activations_of_other_rows(tap: ExpertTap) -> ExpertTap:
    return dataclasses.replace(tap, activation=tap.activation.roll(1, 0))


def logits_of_other_experts(tap: ExpertTap) -> ExpertTap:
    logits = tap.router_logits
    return tap if logits is None else dataclasses.replace(tap, router_logits=logits.roll(1, -1))


def experts_shifted(tap: ExpertTap) -> ExpertTap:
    counts = tap.offsets.diff().roll(1)
    return dataclasses.replace(tap, offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (scaled_output, {"block output", "row by row"}),
        (one_output_missing, {"block output", "row by row"}),
        (swapped_weights, {"block output", "router"}),
        (activations_of_other_rows, {"row by row"}),
        (logits_of_other_experts, {"router", "choice"}),
        (experts_shifted, {"row by row", "router", "choice"}),
    ],
)
def test_wrong_taps_fail_the_lines_they_concern_and_no_other(monkeypatch, change, expected):
    plant(monkeypatch, change=change)
    assert failing(doctor(lens_of())) == expected


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"no_edit": True}, {"ablation"}),
        ({"implementation": "eager"}, {"restored"}),
        ({"hook": True}, {"restored"}),
    ],
)
def test_a_seam_that_forgets_fails_the_line_it_concerns(monkeypatch, fault, expected):
    plant(monkeypatch, **fault)
    assert failing(doctor(lens_of())) == expected


def test_a_model_changed_by_tapping_is_noticed(monkeypatch):
    plant(monkeypatch, weight=True)
    assert "restored" in failing(doctor(lens_of()))


def test_another_order_of_operations_fails_the_line_of_that_kernel(monkeypatch):
    """A loop over experts sums in another order: the last bit differs, and so does the verdict."""
    monkeypatch.setattr(seam, "resolve_kernel", lambda *_: "eager")
    found = doctor(lens_of("qwen3_moe"))
    assert failing(found) == {"logits, grouped_mm"}
    assert 0 < found.failed[0].value < 1e-4
    assert "at token" in found.failed[0].detail


def test_an_unstable_sort_in_other_order_is_noticed(monkeypatch):
    sound = seam.sort_rows

    def reversed_slots(index: Any, n_experts: int, kernel: str, sentinels: bool) -> Any:
        rows = sound(index, n_experts, kernel, sentinels)
        return rows._replace(order=rows.token * index.shape[1] + index.shape[1] - 1 - rows.slot)

    monkeypatch.setattr(seam, "sort_rows", reversed_slots)  # the sum over slots then runs backwards
    assert failing(doctor(lens_of("qwen3_moe"))) == {"logits, grouped_mm", "ablation"}


def test_a_router_that_reports_the_logits_of_other_experts_is_noticed():
    lens = lens_of()
    router = lens.model.model.layers[0].mlp.gate
    sound = router.forward

    def permuted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weight, index = sound(x)
        return logits.roll(1, -1), weight, index

    router.forward = permuted
    found = doctor(lens)
    assert failing(found) == {"choice"}
    assert "layer 0" in found.failed[0].detail


def test_a_config_that_says_something_else_than_the_model_is_noticed():
    lens = lens_of()
    lens.model.config.num_experts = 7
    found = doctor(lens)
    assert failing(found) == {"widths"}
    assert "experts 6, config 7" in found.failed[0].detail


def test_nan_is_found_and_named():
    lens = lens_of()
    lens.model.model.layers[1].mlp.experts.down_proj.data[:, 0, 0] = float("nan")
    found = doctor(lens)
    assert failing(found) == {"finite"}
    assert found.failed[0].value > 0
    assert "first: model.layers.1.mlp.experts.down_proj), so download" in found.failed[0].advice
    skipped = {line.check: line.detail for line in found.checks if line.status is Outcome.SKIPPED}
    assert len(skipped) == 9
    assert set(skipped.values()) == {"needs finite numbers"}
    assert [line.check.split(".")[0] for line in found.checks] == CHECKS
    assert found.verdict.startswith("1 of 5 checks failed (9 skipped): finite")
    offers = found.capabilities
    assert offers["gate"] == offers["choice"] == offers["generation"] == "not tried: needs finite numbers"


def test_numbers_that_overflow_are_no_fault_of_the_weights():
    lens = lens_of(dtype=torch.float16)
    lens.model.model.layers[1].mlp.experts.down_proj.data.fill_(6e4)
    found = doctor(lens)
    assert failing(found) == {"finite"}
    assert found.failed[0].advice.endswith("load with another --dtype (bfloat16 instead of float16)")


def test_a_model_left_changed_is_noticed_without_finite_numbers_too(monkeypatch):
    lens = lens_of()
    lens.model.model.norm.weight.data[0] = float("nan")
    plant(monkeypatch, hook=True)
    assert failing(doctor(lens)) == {"finite", "restored"}


def test_a_tokenizer_of_another_model_is_noticed():
    for n_known in (100, 20):
        small = tiny.build("olmoe", vocab_size=n_known, pad_token_id=1, bos_token_id=2, eos_token_id=3)
        found = doctor(Lens(small, tiny.tokenizer()))
        assert failing(found) == {"tokenizer"}
        assert " 0 unknown ids" not in found.failed[0].detail
        assert "use both of one release" in found.failed[0].advice
    lens = lens_of()
    lens.tokenizer.decode = lambda *_args, **_kwargs: "something else"
    assert failing(doctor(lens)) == {"tokenizer"}


def test_a_failing_line_says_what_it_means_and_what_to_do(monkeypatch):
    plant(monkeypatch, change=scaled_output)
    for line in doctor(lens_of()).failed:
        assert line.value > line.threshold
        assert ": " in line.advice
    assert "2 of 14 checks failed: block output, row by row" in doctor(lens_of()).verdict


class TestCapabilities:
    def offers(self, family: str, **changes: Any) -> dict[str, str]:
        return doctor(lens_of(family, **changes)).capabilities

    def test_gates_are_told_apart_by_what_they_compute(self):
        assert self.offers("olmoe")["gate"].startswith("softmax over all experts, then top-k")
        assert self.offers("qwen3_moe")["gate"].startswith("softmax over the chosen experts")
        deepseek = doctor(zoo_lens("deepseek_v3")).capabilities
        assert deepseek["gate"] == "sigmoid, then top-k, divided by the sum of the chosen, times 1.5"
        assert deepseek["choice"] == "the top-k of sigmoid(logits) + selection bias in 2 of 4 groups"

    def test_quirks_of_a_family_are_named(self):
        experts = doctor(zoo_lens("gpt_oss")).capabilities["experts"]
        for word in ("gated", "biases", "transposed", "interleaved"):
            assert word in experts
        assert "shared expert in 2" in self.offers("qwen2_moe")["layers"]
        assert self.offers("qwen3_moe")["layers"] == "1 MoE, 1 dense; no shared expert"

    def test_uses_are_tried(self):
        offers = self.offers("olmoe")
        assert (offers["gradients"], offers["generation"]) == ("yes", "yes, with a cache")
        assert (offers["chat template"], offers["context"], offers["dtype"]) == ("no", "64 tokens", "float32")

    def test_a_dead_gradient_is_reported(self):
        lens = lens_of()
        lens.model.lm_head.weight.data.zero_()
        assert doctor(lens).capabilities["gradients"].startswith("no: ")


@pytest.mark.filterwarnings("ignore")
def test_offloaded_weights_are_examined_without_surgery(tmp_path):
    folder = tiny.save(tiny.build("olmoe"), tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk")
    lens = load(str(folder), device_map=places)
    found = doctor(lens, experts=["L0.E1", "L1.E1"])
    status = {line.check: line.status for line in found.checks}
    assert found.ok
    assert status["ablation L0.E1"] is Outcome.OK
    assert status["ablation L1.E1"] is Outcome.SKIPPED
    assert found.capabilities["gradients"] == "no: weights are offloaded"
    assert "disk: 3 modules" in found.capabilities["devices"]


def test_the_folder_of_offloaded_weights_goes_with_the_model(tmp_path, monkeypatch):
    import gc
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = tiny.save(tiny.build("olmoe"), tmp_path / "model")
    places = {"model": "cpu", "lm_head": "disk"}
    lens = load(str(folder), device_map=places)
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del lens
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_slow_model_is_examined_without_the_optional_passes(monkeypatch):
    monkeypatch.setattr(reruns, "SLOW_PASS", 0.0)
    found = doctor(lens_of())
    skipped = {line.check for line in found.checks if line.status is Outcome.SKIPPED}
    assert found.ok
    assert skipped == {"logits, eager", "logits, bfloat16"}
    assert found.capabilities["gradients"].startswith("not tried: a pass takes")
    monkeypatch.undo()
    monkeypatch.setattr(reruns, "OPTIONAL_UNTIL", 0.0)
    assert {line.check for line in doctor(lens_of()).checks if line.status is Outcome.SKIPPED} == skipped


class TestInput:
    def test_a_name_is_loaded(self, checkpoint):
        assert ml.doctor(str(checkpoint("olmoe")), progress=False).ok

    def test_a_lens_without_a_tokenizer_skips_that_line(self):
        found = doctor(Lens(tiny.build("olmoe"), None))
        assert found.ok
        assert found.checks[1].status is Outcome.SKIPPED

    def test_a_text_for_a_lens_without_a_tokenizer_is_refused(self):
        with pytest.raises(BadConfig, match=r"no tokenizer.*leave the text out"):
            doctor(Lens(tiny.build("olmoe"), None), text="two words")

    def test_an_edited_model_is_refused(self):
        lens = lens_of()
        with lens.edit(ml.zero("L0.E1")), pytest.raises(BadConfig, match=r"leave the lens\.edit block first"):
            ml.doctor(lens)
        assert ml.doctor(lens, progress=False).ok

    def test_a_dense_model_is_refused(self):
        with pytest.raises(NotAnMoE, match="--baseline"):
            doctor(lens_of("llama"))

    def test_a_text_of_one_token_is_refused(self):
        with pytest.raises(BadCorpus, match="two tokens"):
            doctor(lens_of(), text="a")

    @pytest.mark.parametrize(
        ("family", "experts", "error", "match"),
        [
            ("olmoe", ["L9.E0"], OutOfRange, "no experts in layer 9: give --experts in one of 0, 1"),
            ("olmoe", ["L0.E99"], OutOfRange, "no expert 99: give --experts from L0.E0 to L0.E5"),
            ("olmoe", ["seven"], OutOfRange, "write it as L7.E12"),
            ("olmoe", ["L0.E1.N3"], OutOfRange, "is a neuron"),
            ("olmoe", [], BadConfig, "names no expert"),
            ("qwen3_moe", ["L0.E0"], OutOfRange, "no experts in layer 0"),
            ("mixtral", [f"L1.E{e}" for e in range(4)], BadConfig, "all 4 experts of layer 1.*leave at least one out"),
        ],
    )
    def test_addresses_that_cannot_be_ablated_are_refused(self, family, experts, error, match):
        with pytest.raises(error, match=match):
            to_ablate(spec_of(tiny.build(family), name=family), experts)


class TestResult:
    def test_the_frame_has_a_row_per_check(self):
        found = doctor(lens_of())
        assert list(found.frame) == ["check", "status", "value", "threshold", "detail"]
        assert set(found.frame["status"]) == {"ok"}
        assert found.frame["value"].dtype == float

    def test_json_holds_checks_and_capabilities(self):
        import json

        found = json.loads(json.dumps(doctor(lens_of()).to_dict()))
        assert found["ok"]
        assert {line["status"] for line in found["checks"]} == {"ok"}
        assert found["capabilities"]["gradients"] == "yes"

    def test_html_escapes_names(self):
        assert "<script>" not in doctor(Lens(tiny.build("olmoe"), None, name="<script>"))._repr_html_()
