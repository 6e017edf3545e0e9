"""Loading what a user has, and one helpful sentence for what does not load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from moe_lens.errors import BadConfig, ModelNotFound, MoELensError, NotAnMoE, UnsupportedModel
from moe_lens.models import seam, source
from moe_lens.models.lens import Lens
from moe_lens.models.load import load, require_moe
from moe_lens.models.spec import inspect
from tests.models import tiny
from tests.models.hub_cache import COMMIT, make_hub_cache


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "model"))


def test_a_saved_checkpoint_loads_with_its_weights(checkpoint):
    lens = load(str(checkpoint("olmoe")))
    original = tiny.build("olmoe")
    ids = tiny.ids(2, 8)
    with torch.no_grad():
        assert torch.equal(lens.model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert not lens.model.training
    assert lens.kernel == "native"
    assert lens.device == torch.device("cpu")
    assert lens.tokenizer("hi")["input_ids"]


def test_dtype_names_are_understood(checkpoint):
    assert load(str(checkpoint("olmoe")), dtype="bf16").model.dtype == torch.bfloat16
    assert load(str(checkpoint("olmoe")), dtype=torch.float64).model.dtype == torch.float64


HUB_SCRIPT = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
from moe_lens.models.load import load
from moe_lens.models.spec import inspect
from moe_lens.errors import MoELensError
lens = load("allenai/OLMoE-1B-7B")
try:
    load("allenai/Nothing-7B")
except MoELensError as error:
    refused = str(error)
spec = inspect("allenai/OLMoE-1B-7B-0125", local_files_only=True)
print(json.dumps({"name": lens.name, "revision": lens.revision, "layers": lens.layers,
                  "spec": [spec.name, spec.revision, spec.is_moe], "refused": refused}))
"""


NO_NETWORK = {
    "told to be offline": {"HF_HUB_OFFLINE": "1"},
    "a hub that does not answer": {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
}


@pytest.mark.parametrize("network", NO_NETWORK)
def test_the_literal_hub_id_loads_from_a_local_hub_cache(checkpoint, tmp_path, network):
    """Without a network too, and in seconds: the hub client alone would retry every absent file for 23 s."""
    cache = tmp_path / "hub"
    make_hub_cache(cache, "allenai/OLMoE-1B-7B-0125", checkpoint("olmoe"))
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1", **NO_NETWORK[network]}
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["name"] == "allenai/OLMoE-1B-7B-0125"
    assert got["revision"] == COMMIT
    assert got["layers"] == [0, 1]
    assert got["spec"] == ["allenai/OLMoE-1B-7B-0125", COMMIT, True]
    assert "allenai/OLMoE-1B-7B is published as allenai/OLMoE-1B-7B-0125" in done.stderr
    assert "hf download allenai/Nothing-7B" in got["refused"]
    said = "the hub does not answer" in done.stderr
    assert said == (network == "a hub that does not answer")


class TestReachable:
    HUB, FOLDER = source.Source("a/b", "a/b", False), source.Source("a", "a", True)

    @pytest.fixture
    def asked(self, monkeypatch) -> list[float]:
        """Every call that reaches for the hub, which then answers."""
        import huggingface_hub

        calls: list[float] = []
        session = type("Session", (), {"head": lambda _self, _url, timeout: calls.append(timeout)})()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
        return calls

    def test_a_hub_that_answers_changes_nothing(self, asked):
        options = source.Options("v1")
        assert source.reachable(self.HUB, options) == options
        assert asked == [source.HUB_PATIENCE]

    def test_folders_and_local_files_ask_nobody(self, asked):
        source.reachable(self.FOLDER, source.Options())
        source.reachable(self.HUB, source.Options(local_files_only=True))
        assert asked == []

    def test_silence_means_the_cache_and_a_warning(self, monkeypatch, asked, caplog):
        import huggingface_hub

        def silent() -> None:
            raise TimeoutError("timed out")

        monkeypatch.setattr(huggingface_hub, "get_session", silent)
        assert source.reachable(self.HUB, source.Options("v1")) == source.Options("v1", local_files_only=True)
        assert "timed out" in caplog.text


@pytest.mark.parametrize("raises", [False, True])
def test_a_hub_model_without_a_tokenizer_is_told_from_one_that_is_damaged(monkeypatch, raises):
    """transformers raises, or makes up a tokenizer of special tokens, depending on the family."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    made_up = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), unk_token="<unk>")

    def from_pretrained(*_args, **_kwargs):
        if raises:
            raise ValueError("Couldn't instantiate the backend tokenizer")
        return made_up

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ModelNotFound, match=r"'nobody/nothing' has no tokenizer: put its tokenizer\.json"):
        source.read_tokenizer(source.Source("nobody/nothing", "nobody/nothing", False), source.Options())


def test_a_dense_model_is_refused_where_experts_are_needed(lens_of):
    require_moe(lens_of("olmoe").spec)
    with pytest.raises(NotAnMoE, match="--baseline"):
        require_moe(lens_of("llama").spec)


def refused(error: type[MoELensError], match: str, name: object, **kwargs) -> str:
    """`load` refuses `name` before reading weights, with one sentence."""
    with pytest.raises(error, match=match) as caught:
        load(str(name), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when weights are read."""

    def explode(*_args, **_kwargs):
        pytest.fail("weights were read before the input was refused")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", explode)


@pytest.mark.usefixtures("no_weights")
class TestRefusedBeforeWeightsAreRead:
    def test_unknown_bundled_name(self, monkeypatch):
        monkeypatch.setattr(source, "bundled_names", lambda: ["bundled:tiny-dense", "bundled:tiny-moe"])
        refused(ModelNotFound, "did you mean 'bundled:tiny-moe'", "bundled:tiny-mo")

    def test_hub_unreachable(self):
        refused(ModelNotFound, "hf download someone/some-moe", "someone/some-moe", local_files_only=True)

    def test_path_that_does_not_exist(self, tmp_path):
        refused(ModelNotFound, "there is no folder", tmp_path / "nothing")

    def test_folder_without_config(self, tmp_path):
        refused(ModelNotFound, "no config.json", tmp_path)

    def test_a_file_instead_of_a_folder(self, folder):
        refused(ModelNotFound, "is a file", folder / "config.json")

    def test_config_that_is_not_json(self, folder):
        (folder / "config.json").write_text("{")
        refused(ModelNotFound, "config.json", folder)

    def test_unknown_model_type(self, folder):
        edit_config(folder, model_type="from_the_future", architectures=["FutureForCausalLM"])
        refused(UnsupportedModel, "upgrade transformers", folder)

    def test_missing_tokenizer(self, folder):
        for file in folder.glob("token*"):
            file.unlink()
        refused(ModelNotFound, "has no tokenizer", folder)

    def test_damaged_tokenizer(self, folder):
        (folder / "tokenizer.json").write_text("{}")
        refused(ModelNotFound, "the tokenizer of .* is damaged: download it again", folder)

    @pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
    def test_a_tokenizer_file_that_is_no_json_is_named(self, folder, file):
        (folder / file).write_text("<html>404</html>")
        refused(ModelNotFound, f"^{file} of .* is damaged: download it again", folder)

    def test_more_experts_per_token_than_there_are(self, folder):
        edit_config(folder, num_experts_per_tok=9)
        refused(UnsupportedModel, "each token to 9 of 6 experts", folder)

    def test_a_missing_package_is_named(self, folder, monkeypatch):
        def absent(*_args, **_kwargs):
            raise ImportError("No module named 'sentencepiece'", name="sentencepiece")

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
        refused(UnsupportedModel, "tokenizer of .* needs the package sentencepiece.*: pip install", folder)

    def test_truncated_safetensors(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        refused(ModelNotFound, "model.safetensors.* is damaged: download it again", folder)

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64, b"<html>not found</html>" * 9])
    def test_safetensors_with_a_garbage_header(self, folder, content):
        (folder / "model.safetensors").write_bytes(content)
        refused(ModelNotFound, "model.safetensors.* is damaged: download it again", folder)

    def test_missing_weights(self, folder):
        (folder / "model.safetensors").unlink()
        refused(ModelNotFound, "no weights", folder)

    def test_encoder_decoder(self, folder):
        transformers.T5Config(d_model=16, num_layers=1).save_pretrained(folder)
        refused(UnsupportedModel, "encoder-decoder", folder)

    def test_no_language_model(self, folder):
        transformers.ViTConfig(hidden_size=16).save_pretrained(folder)
        refused(UnsupportedModel, "causal language model", folder)

    @pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "hqq", "from_the_future"])
    def test_any_other_quantisation(self, folder, method):
        edit_config(folder, quantization_config={"quant_method": method})
        refused(UnsupportedModel, f"with {method},.*give the original bfloat16 checkpoint", folder)
        with pytest.raises(UnsupportedModel, match=method):
            require_moe(inspect(str(folder)))

    @pytest.mark.parametrize("method", ["fp8", "mxfp4"])
    def test_quantised_experts(self, folder, method):
        edit_config(folder, quantization_config={"quant_method": method})
        refused(UnsupportedModel, "dequantise", folder)

    @pytest.mark.parametrize("method", ["fp8", "mxfp4"])
    def test_quantised_experts_by_the_spec_alone(self, folder, method):
        edit_config(folder, quantization_config={"quant_method": method})
        with pytest.raises(UnsupportedModel, match=f"{method}.*dequantise"):
            require_moe(inspect(str(folder)))

    def test_a_family_that_cannot_be_tapped(self, folder):
        transformers.DogeConfig(hidden_size=16, num_hidden_layers=1, is_moe=True).save_pretrained(folder)
        refused(UnsupportedModel, "Doge", folder)

    def test_transformers_too_old(self, folder, monkeypatch):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.6.2")
        refused(UnsupportedModel, "5.6.2 is too old: pip install", folder)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"dtype": "int3"}, {"kernel": "fast"}, {"device": "warp:9"}, {"device": "cuda:77"}, {"device": "meta"},
            {"device_map": "foo"}, {"device_map": "cuda:77"},
        ],
    )  # fmt: skip
    def test_bad_settings(self, folder, kwargs):
        refused(BadConfig, "use", folder, **kwargs)


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("part", "match"), [("model.norm", r"lack 1 tensor \(first"), ("experts", "lack|do not fit")])
def test_a_checkpoint_that_lacks_tensors_is_refused(folder, part, match):
    """transformers would fill them with random numbers and warn."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if part in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    refused(ModelNotFound, match, folder)


def test_a_checkpoint_that_lacks_several_tensors_says_how_many(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layernorm" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    refused(ModelNotFound, r"lack 4 tensors \(first: model.layers.0.input_layernorm.weight\)", folder)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_weights_that_are_dequantised_on_loading_count_as_plain(method):
    config = transformers.OlmoeConfig(quantization_config={"quant_method": method, "dequantize": True})
    assert source.quantisation(config) is None
    assert source.quantisation(transformers.OlmoeConfig(quantization_config={"quant_method": method})) == method


def test_weights_that_do_not_fit_the_config_are_refused(folder):
    edit_config(folder, intermediate_size=12)
    refused(ModelNotFound, "do not fit", folder)


def test_inspect_reads_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert inspect(str(folder)).moe_layers == (0, 1)


def test_quantised_experts_of_a_built_model_are_refused():
    model = tiny.build("olmoe")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="dequantise"):
        Lens(model, None)


def test_our_implementation_is_registered_once():
    seam.require_transformers()
    seam.require_transformers()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert seam.IMPLEMENTATION in ALL_EXPERTS_FUNCTIONS
