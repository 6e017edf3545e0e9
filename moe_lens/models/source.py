"""Where a model's files are, and one sentence about what to do when they are not usable.

Everything here runs before weights are read, so a wrong name or a broken file costs a second.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from moe_lens.errors import ModelNotFound, UnsupportedModel, nearest
from moe_lens.models import families
from moe_lens.models.seam import require_transformers

log = logging.getLogger("moe_lens")

BUNDLED = "bundled:"
DEQUANTISERS = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "metal": "MetalConfig",
}
"""quant_method -> the transformers class whose `dequantize=True` gives plain weights on loading."""
N_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
HUB_PATIENCE = 5.0
"""Seconds to wait for the hub's answer before its cache is used instead."""


@dataclass(frozen=True)
class Source:
    """A resolved model name."""

    name: str
    """As shown to the user, aliases applied."""
    location: str
    """Folder or hub id that transformers can open."""
    is_folder: bool


@dataclass(frozen=True)
class Options:
    """How transformers may fetch files."""

    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False

    def kwargs(self) -> dict[str, Any]:
        return {
            "revision": self.revision or "main",
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }


def bundled_names() -> list[str]:
    """Names of the models shipped in the wheel."""
    folder = resources.files("moe_lens") / "bundled"
    if not folder.is_dir():
        return []
    return sorted(BUNDLED + entry.name for entry in folder.iterdir() if (entry / "config.json").is_file())


def resolve(name: str) -> Source:
    """Find what `name` means without touching the network.

    Raises:
        ModelNotFound: an unknown bundled name, or a path that is not a model folder.
    """
    name = str(name).strip()
    if name.startswith(BUNDLED):
        known = bundled_names()
        if name not in known:
            listing = ", ".join(known) or "none in this installation"
            raise ModelNotFound(f"unknown bundled model {name!r}{nearest(name, known)} (bundled: {listing})")
        folder = resources.files("moe_lens") / "bundled" / name.removeprefix(BUNDLED)
        return Source(name, str(folder), True)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"the folder {name!r} has no config.json: give a folder that save_pretrained wrote")
        return Source(name, str(path), True)
    if path.is_file():
        raise ModelNotFound(f"{name!r} is a file: give the model folder that holds config.json")
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep == "\\" and os.sep in name):
        raise ModelNotFound(
            f"there is no folder {name!r}: check the path, or give a hub id such as allenai/OLMoE-1B-7B-0125"
        )
    hub_id = families.HUB_ALIASES.get(name, name)
    if hub_id != name:
        log.warning("%s is published as %s; using that", name, hub_id)
    return Source(hub_id, hub_id, False)


def reachable(source: Source, options: Options) -> Options:
    """`options` that keep to the local cache if the hub does not answer.

    Without this, every file that a cached repository lacks costs five retries of the hub client: minutes of
    waiting for a model that is there.
    """
    from huggingface_hub import constants, get_session

    if source.is_folder or options.local_files_only or constants.is_offline_mode():
        return options
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception as error:  # the client's errors belong to whichever HTTP library the hub client uses
        log.warning(
            "the hub does not answer (%s): using only what the local cache holds of %s",
            _first_line(error), source.name,
        )  # fmt: skip
        return replace(options, local_files_only=True)
    return options


def read_config(source: Source, options: Options) -> Any:
    """The model's config, checked for what moe-lens can describe.

    Raises:
        ModelNotFound: no such repository or revision, or the hub cannot be reached.
        UnsupportedModel: an encoder-decoder, not a causal language model, or a model type that the installed
            transformers does not know.
    """
    require_transformers()
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.location, **options.kwargs())
    except OSError as error:
        raise ModelNotFound(_not_found(source, options, error)) from error
    except (ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModel(
                f"{source.name!r} needs its own code: pass trust_remote_code if you trust it"
            ) from error
        raise UnsupportedModel(
            f"transformers {transformers.__version__} cannot read the config of {source.name!r}: "
            f"upgrade transformers or check config.json ({_first_line(error)})"
        ) from error
    except ImportError as error:
        raise UnsupportedModel(needs_package(source.name, error)) from error
    check_config(config, source.name)
    return config


def check_config(config: Any, name: str) -> None:
    """Refuse what cannot be tapped, by its config alone.

    Raises:
        UnsupportedModel: see `read_config`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (refusal := families.refusal(config)) is not None:
        raise UnsupportedModel(refusal)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name!r} is an encoder-decoder: give a decoder-only (causal) language model")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        raise UnsupportedModel(
            f"transformers loads {name!r} ({config.model_type}) as no causal language model: give a decoder-only one, "
            "or build the model yourself and pass it to moe_lens.Lens(model, tokenizer)"
        )
    text = families.text_config(config)
    top_k, counts = families.first_key(text, families.TOP_K_KEYS), numbers(text, N_EXPERTS_KEYS)
    n_experts = max(counts, default=0) + (getattr(text, "zero_expert_num", 0) or 0)
    if top_k is not None and n_experts > 1 and top_k > n_experts:
        raise UnsupportedModel(
            f"the config of {name!r} sends each token to {top_k} of {n_experts} experts: correct the number of experts "
            "per token in config.json"
        )


def numbers(config: Any, keys: Iterable[str]) -> set[int]:
    """Whole numbers that `config` sets any of `keys` to, those of per-layer lists included."""
    values = [getattr(config, key, None) for key in keys]
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return {v for v in flat if isinstance(v, int) and not isinstance(v, bool)}


def needs_package(name: str, error: ImportError) -> str:
    """The sentence for a model whose code imports what is not installed."""
    named = re.search(r"pip install ['\"]?(?:-U )?([A-Za-z0-9_.\-]+)", str(error))
    package = named.group(1) if named else error.name
    if package is None:
        return f"{name!r} needs a package that is not installed: {_first_line(error)}"
    return f"{name!r} needs the package {package}, which is not installed: pip install {package}"


def quantisation(config: Any) -> str | None:
    """Method that the checkpoint's weights are quantised with, None if they are plain or are dequantised on loading."""
    holders = (config, families.text_config(config))
    found = next((c for h in holders if (c := getattr(h, "quantization_config", None)) is not None), None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    method = settings.get("quant_method") or ("bitsandbytes" if bitsandbytes else "an unnamed method")
    method = str(getattr(method, "value", method))
    return None if settings.get("dequantize") and method in DEQUANTISERS else method


def refuse_quantised(name: str, method: str | None) -> None:
    """Refuse weights that are no plain matrices.

    Raises:
        UnsupportedModel: there is a `method`, so the weights are stored in a form that cannot be tapped.
    """
    if method is None:
        return
    how = "give the original bfloat16 checkpoint"
    if (quantiser := DEQUANTISERS.get(method)) is not None:
        how = (
            f"dequantise it once with transformers (from_pretrained with quantization_config={quantiser}"
            "(dequantize=True), then save_pretrained) and give that folder"
        )
    raise UnsupportedModel(f"{name!r} is quantised with {method}, and its neurons cannot be tapped in that form: {how}")


def read_tokenizer(source: Source, options: Options) -> Any:
    """The model's tokenizer.

    Raises:
        ModelNotFound: there is none beside the model, or it is damaged.
        UnsupportedModel: it needs a package that is not installed.
    """
    from transformers import AutoTokenizer

    missing = f"{source.name!r} has no tokenizer: put its tokenizer.json and tokenizer_config.json beside the weights"
    if source.is_folder and not _has_tokenizer(source, options):
        raise ModelNotFound(missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options.kwargs())
    except ImportError as error:
        raise UnsupportedModel(needs_package(f"the tokenizer of {source.name}", error)) from error
    except Exception as error:  # tokenizer back ends raise anything
        if not _has_tokenizer(source, options):
            raise ModelNotFound(f"{missing} ({_first_line(error)})") from error
        file = _damaged_json(source)
        what = f"the tokenizer of {source.name!r}" if file is None else f"{file} of {source.name!r}"
        raise ModelNotFound(f"{what} is damaged: download it again ({_first_line(error)})") from error
    if not tokenizer or len(tokenizer) <= len(tokenizer.get_added_vocab()):  # special tokens only
        raise ModelNotFound(missing)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _has_tokenizer(source: Source, options: Options) -> bool:
    """Whether a file that holds a vocabulary is in the folder, or in the cache after a try to fetch it."""
    if source.is_folder:
        return any((Path(source.location) / file).is_file() for file in TOKENIZER_FILES)
    from huggingface_hub import try_to_load_from_cache

    revision = options.revision or "main"
    cached = (try_to_load_from_cache(source.location, file, revision=revision) for file in TOKENIZER_FILES)
    return any(isinstance(path, str) for path in cached)


def _damaged_json(source: Source) -> str | None:
    """The first tokenizer file of a folder that is no JSON."""
    for file in sorted(Path(source.location).glob("*token*.json")) if source.is_folder else ():
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return file.name
    return None


def check_weights(source: Source) -> None:
    """Read the header of every local safetensors file: a truncated download is found before loading.

    Raises:
        ModelNotFound: a damaged file, or a folder without weights.
    """
    if not source.is_folder:
        return
    from safetensors import SafetensorError, safe_open

    folder = Path(source.location)
    files = sorted(folder.glob("*.safetensors"))
    if not files and not list(folder.glob("pytorch_model*.bin")):
        raise ModelNotFound(f"the folder {source.name!r} has a config but no weights: add its *.safetensors files")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelNotFound(f"{file.name} in {source.name!r} is damaged: download it again ({error})") from error


def commit(source: Source, revision: str | None) -> str | None:
    """The commit that was read, or what the user asked for when the files are not in the hub cache."""
    if source.is_folder:
        return revision
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.location, "config.json", revision=revision or "main")
    return Path(config).parent.name if isinstance(config, str) else revision


def _not_found(source: Source, options: Options, error: Exception) -> str:
    if source.is_folder:
        return f"the config.json of {source.name!r} cannot be read: {_first_line(error)}"
    offline = options.local_files_only or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    text = str(error).lower()
    if "gated" in text:
        return f"{source.name!r} is gated: accept its terms on the hub, then run `hf auth login`"
    if offline or "connect" in text or "resolve" in text or "offline" in text:
        return (
            f"{source.name!r} is not in the local cache and the hub cannot be reached: run `hf download {source.name}` "
            f"where there is a network, or pass the path of a folder{nearest(source.name, bundled_names())}"
        )
    if options.revision and "revision" in text:
        return f"{source.name!r} has no revision {options.revision!r}: give a branch, tag or commit of that repository"
    known = [*bundled_names(), *families.HUB_ALIASES.values()]
    hint = nearest(source.name, known) or f" (bundled: {', '.join(bundled_names()) or 'none'})"
    return f"no model {source.name!r}: it is neither a folder, nor bundled, nor a repository on the hub{hint}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
