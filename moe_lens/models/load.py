"""Load a model: a hub id, a folder, or one of the bundled organisms, as a `Lens`."""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_lens.errors import BadConfig, ModelNotFound, NotAnMoE, UnsupportedModel
from moe_lens.models import source
from moe_lens.models.lens import Lens
from moe_lens.models.seam import KERNELS, Kernel
from moe_lens.models.sites import find_sites
from moe_lens.models.spec import Spec, empty_model

if TYPE_CHECKING:
    from torch import nn

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    kernel: Kernel = "native",
) -> Lens:
    """Load a causal language model, sparse or dense, ready to be tapped.

    Args:
        name: a hub id, a folder, or ``bundled:tiny-moe`` / ``bundled:tiny-dense``.
        dtype: None keeps the checkpoint's own; else bfloat16, float16 or float32.
        device: None means the GPU if there is one, else the CPU. Ignored with `device_map`.
        device_map: "auto", "balanced" or "sequential" spread a large model over GPUs, CPU and disk (accelerate); also
            a device, or a dict from modules to devices.
        offload_folder: where weights go that `device_map` puts on disk; None means a temporary folder, which is
            removed with the model.
        trust_remote_code: run code that the repository brings; off unless you ask.
        kernel: order of the expert computation; "native" is bit-equal to what transformers would run.

    Raises:
        ModelNotFound: no such model, tokenizer or weights, damaged weights, or the hub cannot be reached.
        UnsupportedModel: not a causal language model, quantised, a package that it needs is not installed, or
            transformers is too old.
        BadConfig: an unknown dtype, device, device map or kernel.
    """
    wanted = _dtype(dtype)
    place = _device(device) if device_map is None else None
    _check_map(device_map)
    if kernel not in KERNELS:
        raise BadConfig(f"unknown kernel {kernel!r}: use one of {', '.join(KERNELS)}")
    where = source.resolve(name)
    options = source.reachable(where, source.Options(revision, local_files_only, trust_remote_code))
    config = source.read_config(where, options)
    source.refuse_quantised(where.name, source.quantisation(config))
    find_sites(empty_model(config, trust_remote_code))
    tokenizer = source.read_tokenizer(where, options)
    source.check_weights(where)
    placed, temporary = _place(device_map, offload_folder)
    try:
        model = _weights(where, options, config, wanted, placed)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(model, shutil.rmtree, temporary, ignore_errors=True)
    if place is not None:
        model.to(place)
    model.eval()
    return Lens(model, tokenizer, name=where.name, revision=source.commit(where, revision), kernel=kernel)


def require_moe(spec: Spec) -> None:
    """Refuse, by its spec alone, a model whose experts cannot be looked into.

    Raises:
        NotAnMoE: `spec` has no layer with more than one expert.
        UnsupportedModel: its experts are quantised.
    """
    source.refuse_quantised(spec.name, spec.quantisation)
    if not spec.is_moe:
        raise NotAnMoE(
            f"{spec.name!r} is a dense model ({spec.model_type}): give a Mixture-of-Experts model here; "
            "moe-lens probe takes the dense one with --baseline"
        )


def _place(device_map: str | dict[str, Any] | None, folder: str | Path | None) -> tuple[dict[str, Any], Path | None]:
    """How transformers places weights, and a temporary folder to remove if one was made.

    Experts are fused on loading, so those that go to disk are written anew.
    """
    if device_map is None:
        return {}, None
    temporary = Path(tempfile.mkdtemp(prefix="moe-lens-offload-")) if folder is None else None
    return {"device_map": device_map, "offload_folder": temporary or folder}, temporary


def _weights(
    where: source.Source, options: source.Options, config: Any, dtype: torch.dtype | str, placed: dict[str, Any]
) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _bars_only_on_terminals():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where.location, config=config, dtype=dtype, output_loading_info=True, **placed, **options.kwargs()
            )
    except SafetensorError as error:
        raise ModelNotFound(f"the weights of {where.name!r} are damaged: download them again ({error})") from error
    except OSError as error:
        raise ModelNotFound(f"the weights of {where.name!r} cannot be read: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if "size mismatch" in str(error) or "mismatch" in str(error).lower():
            raise ModelNotFound(
                f"the weights of {where.name!r} do not fit its config.json: use both of one release"
            ) from error
        if "conversion" in str(error):  # experts are stacked on loading, which fails if one is not there
            raise ModelNotFound(
                f"the weights of {where.name!r} lack tensors of some experts or do not fit its config.json: "
                "download the checkpoint again"
            ) from error
        raise
    except ImportError as error:
        raise UnsupportedModel(source.needs_package(where.name, error)) from error
    model, info = loaded
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        count = f"{len(missing)} tensor{'s' if len(missing) > 1 else ''}"
        raise ModelNotFound(
            f"the weights of {where.name!r} lack {count} (first: {missing[0]}), "
            "which would be random: download the checkpoint again"
        )
    return model


@contextmanager
def _bars_only_on_terminals() -> Iterator[None]:
    """Keep transformers' progress bar out of logs."""
    from transformers.utils import logging as bars

    if sys.stderr.isatty() or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None or dtype == "auto":
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    known = DTYPES.get(dtype.removeprefix("torch."))
    if known is None:
        raise BadConfig(f"unknown dtype {dtype!r}: use bfloat16, float16 or float32")
    return known


def _check_map(device_map: str | dict[str, Any] | None) -> None:
    if not isinstance(device_map, str) or device_map in DEVICE_MAPS:
        return
    try:
        _device(device_map)
    except BadConfig as error:
        raise BadConfig(
            f"unknown device map {device_map!r}: use {', '.join(DEVICE_MAPS)}, or a device that is there, such as cpu"
        ) from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise BadConfig(f"unknown device {device!r}: use cpu, cuda or cuda:0") from error
    if place.type == "cuda" and (not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count()):
        raise BadConfig(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs; use cpu")
    try:
        torch.empty(1, device=place).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # meta, or a back end that is not there
        raise BadConfig(f"device {device!r} cannot hold a model here: use cpu or cuda") from error
    return place
