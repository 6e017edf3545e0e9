"""``moe-lens probe``: which concepts single neurons of experts detect, beside a dense model.

The order of work is the order of cost: settings, then configs, then text, and only then weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli.options import Json, Verbose, options_of
from moe_lens.config import ProbeConfig, parse_ints
from moe_lens.errors import BadOutput, OutOfRange
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import Spec
    from moe_lens.probing.probe import Probes


Published = Annotated[
    list[Path] | None,
    typer.Option("--from-published", metavar="FILE...", help="released probing tables to check instead; no --model"),
]
MoreFiles = Annotated[list[Path] | None, typer.Argument(metavar="FILE", hidden=True)]
"""The rest of ``--from-published a b c``, which an option cannot take."""


@options_of(ProbeConfig)
def probe(
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what a run would need, and stop")] = False,
    from_published: Published = None,
    more: MoreFiles = None,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Probe the neurons of every expert for concepts, and compare with a baseline model."""
    from moe_lens.cli import herbst, published, render

    if from_published or more:
        published.show(from_published, more, {"config": config, "dry_run": dry_run, **flags}, json=json)
        return
    settings = ProbeConfig.build(config, **{name: None if value == [] else value for name, value in flags.items()})
    if not dry_run and settings.output is None:
        name = settings.model.rstrip("/").split("/")[-1].replace(":", "-")
        settings = settings.model_copy(update={"output": Path("runs") / name})
    if settings.protocol == herbst.NAME:
        herbst.check(settings)
    specs = check_models(settings)
    check_tokenizers(settings, specs)
    text = read_corpus(settings)
    if dry_run:
        from moe_lens.cli.plan import make_plan

        plan = make_plan(settings, specs, text)
        render.print_json(plan.to_dict()) if json else render.plan(plan)
        return
    if settings.protocol == herbst.NAME:
        herbst.show(settings, text, json=json)
        return
    probes = run(settings, text)
    if json:
        render.print_json({"run": str(settings.output), "summary": probes.summary()})
        return
    render.probes(probes)
    typer.echo(str(settings.output))


def check_models(settings: ProbeConfig) -> list[Spec]:
    """Specs of the model and the baseline, from their configs alone.

    Raises:
        ModelNotFound, UnsupportedModel, NotAnMoE, OutOfRange, BadOutput: see the message.
    """
    import moe_lens
    from moe_lens.models.load import require_moe
    from moe_lens.models.source import refuse_quantised
    from moe_lens.probing.settings import check_k

    check_output(settings.output)

    def spec_of(name: str, revision: str | None) -> Spec:
        return moe_lens.inspect(
            name,
            revision=revision,
            local_files_only=settings.local_files_only,
            trust_remote_code=settings.trust_remote_code,
        )

    spec = spec_of(settings.model, settings.revision)
    require_moe(spec)
    check_layers(spec, settings.layers)
    expert_addresses(spec, settings.layers, settings.experts)
    specs = [spec]
    if settings.baseline:
        specs.append(spec_of(settings.baseline, None))
        refuse_quantised(specs[1].name, specs[1].quantisation)
    check_k(settings.k, specs)
    return specs


def check_output(output: Path | None) -> None:
    """Refuse before any work what ``create_run`` would refuse after it.

    Raises:
        BadOutput: a file, or a folder with things that no run wrote.
    """
    if output is None:
        return
    if output.exists() and not output.is_dir():
        raise BadOutput(f"{output} is a file: give -o a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / "manifest.json").exists():
        raise BadOutput(f"{output} is not empty and is no moe-lens run: give -o a new or an empty folder")


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
        entry = spec.at(at.layer)
        if entry is not None and at.expert >= entry.n_experts:
            raise OutOfRange(
                f"layer {at.layer} of {spec.name!r} has no expert {at.expert}: its experts are 0-{entry.n_experts - 1}"
            )
    return list(dict.fromkeys(map(str, found)))


def check_tokenizers(settings: ProbeConfig, specs: Sequence[Spec]) -> None:
    """Refuse tokenizers that concepts cannot be aligned with.

    Raises:
        ModelNotFound, UnsupportedModel: no tokenizer, or one without character offsets.
    """
    from moe_lens.corpus.windows import require_offsets
    from moe_lens.models import source

    for spec in specs:
        options = source.Options(spec.revision, settings.local_files_only, settings.trust_remote_code)
        require_offsets(source.read_tokenizer(source.resolve(spec.name), options))


def read_corpus(settings: ProbeConfig) -> Corpus:
    """The text, with its concepts checked.

    Raises:
        BadCorpus: empty, unreadable, or not what its suffix says.
        UnknownConcept: a name that nothing defines.
    """
    import moe_lens
    from moe_lens.corpus.checks import check_corpus
    from moe_lens.corpus.concepts import concepts_for
    from moe_lens.probing.settings import DOCUMENTS_NEEDED

    text = moe_lens.corpus(
        settings.dataset,
        dataset_config=settings.dataset_config,
        split=settings.split,
        text_column=settings.text_column,
        limit=settings.limit,
        seed=settings.seed,
    )
    check_corpus(text, concepts_for(text, settings.concepts), DOCUMENTS_NEEDED, seed=settings.seed)
    return text


def load_lens(settings: ProbeConfig, name: str, *, revision: str | None) -> Lens:
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


def run(settings: ProbeConfig, text: Corpus) -> Probes:
    """Load the models and probe them into ``settings.output``."""
    import moe_lens

    lens = load_lens(settings, settings.model, revision=settings.revision)
    baseline = load_lens(settings, settings.baseline, revision=None) if settings.baseline else None
    return moe_lens.probe(
        lens,
        text,
        baseline=baseline,
        concepts=settings.concepts,
        k=settings.k,
        layers=settings.layers,
        experts=expert_addresses(lens.spec, settings.layers, settings.experts),
        max_rows=settings.max_rows,
        max_length=settings.max_length,
        max_tokens=settings.max_tokens,
        document_tokens=settings.document_tokens,
        batch_size=settings.batch_windows,
        max_memory=settings.max_memory,
        all_cells=settings.all_cells,
        draws=settings.draws,
        permutations=settings.permutations,
        neurons=settings.neurons,
        seed=settings.seed,
        splits=settings.splits,
        out=settings.output,
        resume=settings.resume,
    )
