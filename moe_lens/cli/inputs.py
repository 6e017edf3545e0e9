"""What commands that run a model over a text check before any work, in the order of cost: configs, then text."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.config import parse_ints
from moe_lens.errors import BadOutput, MoELensError, OutOfRange, WriteFailed
from moe_lens.types import ExpertAddress

MANIFEST = "manifest.json"

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moe_lens.config import ModelConfig, RunConfig
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import Spec


def read_spec(settings: ModelConfig, name: str, *, revision: str | None) -> Spec:
    """Spec of one model from its config alone."""
    import moe_lens

    return moe_lens.inspect(
        name,
        revision=revision,
        local_files_only=settings.local_files_only,
        trust_remote_code=settings.trust_remote_code,
    )


def check_moe(settings: ModelConfig) -> Spec:
    """Spec of the model, after a look at the output folder.

    Raises:
        ModelNotFound, UnsupportedModel, NotAnMoE, BadOutput: see the message.
    """
    from moe_lens.models.load import require_moe

    check_output(settings.output)
    spec = read_spec(settings, settings.model, revision=settings.revision)
    require_moe(spec)
    return spec


def check_model(settings: RunConfig) -> Spec:
    """Spec of the model, after a look at output folder, layers and experts.

    Raises:
        ModelNotFound, UnsupportedModel, NotAnMoE, OutOfRange, BadOutput: see the message.
    """
    spec = check_moe(settings)
    check_layers(spec, settings.layers)
    expert_addresses(spec, settings.layers, settings.experts)
    return spec


def check_output(output: Path | None) -> None:
    """Refuse before any work what ``create_run`` would refuse after it.

    Raises:
        BadOutput: a file, or a folder with things that no run wrote.
    """
    if output is None:
        return
    if output.exists() and not output.is_dir():
        raise BadOutput(f"{output} is a file: give -o a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).exists():
        raise BadOutput(f"{output} is not empty and is no moe-lens run: give -o a new or an empty folder")


@contextmanager
def refusal_leaves_nothing(output: Path | None) -> Iterator[None]:
    """Take a run directory away again that was made only to hold the manifest of a command that was then refused.

    Some input shows only once the model runs, such as a ``--max-memory`` that no layer fits. Finished parts stay.
    """
    is_new = output is not None and not (output.is_dir() and any(output.iterdir()))
    had_folder = output is not None and output.is_dir()
    try:
        yield
    except WriteFailed:  # the disk, not the input: what there is stays
        raise
    except MoELensError:
        if output is not None and is_new and output.is_dir():
            files = [path for path in output.rglob("*") if not path.is_dir()]
            if [path.name for path in files] == [MANIFEST]:
                _empty(output)
                if not had_folder:
                    output.rmdir()
        raise


def _empty(folder: Path) -> None:
    """Delete everything in `folder`."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        path.rmdir() if path.is_dir() else path.unlink()


def check_layers(spec: Spec, layers: Sequence[int] | None) -> None:
    """Refuse layers that the model does not have.

    Raises:
        OutOfRange: the message names the valid ones.
    """
    known = [entry.layer for entry in spec.layers]
    for layer in layers or ():
        if layer not in known:
            span = ",".join(map(str, known)) if len(known) < 4 else f"{known[0]}-{known[-1]}"
            raise OutOfRange(f"{spec.name!r} has no layer {layer}: give --layers from {span}")


def expert_addresses(spec: Spec, layers: Sequence[int] | None, experts: Sequence[str] | None) -> list[str] | None:
    """Addresses such as ``L7.E12`` of ``--experts``; a plain number stands for that expert of every chosen layer.

    Raises:
        OutOfRange: unreadable, or an expert that the model does not have.
    """
    if experts is None:
        return None
    chosen = sorted(layers or spec.moe_layers)
    found = []
    for word in experts:
        if word.replace("-", "").isdigit():
            found += [ExpertAddress(layer, expert) for expert in parse_ints(word) for layer in chosen]
        else:
            found.append(ExpertAddress.parse(word))
    for at in found:
        check_layers(spec, [at.layer])
        if at.layer not in chosen:
            raise OutOfRange(f"{at} is not in the chosen layers {chosen}: add its layer to --layers")
        entry = spec.at(at.layer)
        if entry is not None and at.expert >= entry.n_experts:
            raise OutOfRange(
                f"layer {at.layer} of {spec.name!r} has no expert {at.expert}: its experts are 0-{entry.n_experts - 1}"
            )
    return list(dict.fromkeys(map(str, found)))


def check_tokenizers(settings: RunConfig, specs: Sequence[Spec]) -> None:
    """Refuse tokenizers that concepts cannot be aligned with.

    Raises:
        ModelNotFound, UnsupportedModel: no tokenizer, or one without character offsets.
    """
    from moe_lens.corpus.windows import require_offsets
    from moe_lens.models import source

    for spec in specs:
        options = source.Options(spec.revision, settings.local_files_only, settings.trust_remote_code)
        require_offsets(source.read_tokenizer(source.resolve(spec.name), options))


def read_text(settings: RunConfig) -> Corpus:
    """The text.

    Raises:
        BadCorpus: empty, unreadable, or not what its suffix says.
    """
    import moe_lens

    return moe_lens.corpus(
        settings.dataset,
        dataset_config=settings.dataset_config,
        split=settings.split,
        text_column=settings.text_column,
        limit=settings.limit,
        seed=settings.seed,
    )


def load_lens(settings: ModelConfig, name: str, *, revision: str | None) -> Lens:
    """Load one of the two models with the placement settings."""
    import moe_lens

    return moe_lens.load(
        name,
        revision=revision,
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        local_files_only=settings.local_files_only,
        trust_remote_code=settings.trust_remote_code,
        kernel=settings.kernel or "native",  # type: ignore[arg-type]
    )
