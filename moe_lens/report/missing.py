"""The command that would add a missing part to a run, made from what the manifest says of the run.

    command(run, "autointerp")
    # moe-lens autointerp --model allenai/OLMoE-1B-7B-0125 --dataset pile.jsonl --limit 2000 -o runs/olmoe

Model, text and seed have to be those of the run, or the command is refused. They are taken from the command line that
began the run; what began elsewhere (Python, a ``--config`` file) is described by the manifest's model and corpus.

``-o`` is the directory as it was named then, of an absolute path its last part, ``DIR`` where nobody knows: a report
is passed on and verified elsewhere, so it can depend neither on where it lies now nor on folders of one machine.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.config import AutointerpConfig, FaithfulnessConfig, ProbeConfig, RunConfig, ValidateConfig

if TYPE_CHECKING:
    from moe_lens.capture.run import Run

DENSE_MODEL = "DENSE_MODEL"
"""Stands in a command for a dense model that the reader has to choose."""
_SETTINGS: Mapping[str, type[RunConfig]] = {
    "probe": ProbeConfig, "autointerp": AutointerpConfig, "validate": ValidateConfig,
    "faithfulness": FaithfulnessConfig,
}  # fmt: skip
_PROGRAMS = ("moe-lens", "__main__.py")
_SHARED = ("dataset", "dataset_config", "split", "text_column", "layers", "limit", "document_tokens", "max_length",
           "seed", "device_map", "dtype", "kernel", "revision", "local_files_only",
           "trust_remote_code")  # fmt: skip
"""Options of one command that the next one is given too. Others are its own, or this machine's."""
_SWITCHES = ("json", "verbose", "v", "dry_run", "details")
"""Options without a value that are no settings."""
_NOT_KEPT = ("model", "output", "resume", "device", "config", *_SWITCHES)
_DENSE = {"bundled:tiny-moe": "bundled:tiny-dense"}


def command(run: Run, name: str, *, baseline: bool = False, without: Sequence[str] = ()) -> str:
    """The command line that adds to `run` what the command `name` makes.

    Args:
        name: probe, autointerp, validate (after autointerp, if the run has no labels yet) or faithfulness.
        without: options that the run was given and that this command leaves out.
        baseline: with a dense model to compare with; the bundled twin, or ``DENSE_MODEL`` to be filled in.
    """
    manifest = run.manifest
    given = dict(_given(manifest))
    is_made_anew = name in manifest["commands"]  # its results are there in part, and would be shown as they are
    if is_made_anew and _command_of(manifest) == "demo" and not without:
        return shlex.join(["moe-lens", "demo", "--no-resume", "-o", _directory(manifest, given)])
    own = _command_of(manifest) == name
    kept = {option: value for option, value in given.items() if own or option in _SHARED}
    kept = {option: value for option, value in kept.items() if option not in (*_NOT_KEPT, *without)}
    if baseline and "baseline" not in kept:
        kept["baseline"] = _DENSE.get(manifest["model"]["name"], DENSE_MODEL)
    words = ["moe-lens", name, "--model", _local(manifest["model"]["name"])]
    for option, value in kept.items():
        flag = f"--{option.replace('_', '-')}"
        words += [flag] if value is True else [flag.replace("--", "--no-", 1)] if value is False else [flag, value]
    words += ["--no-resume"] * is_made_anew
    words += ["-o", _directory(manifest, given)]
    before = f"{command(run, 'autointerp')} && " if name == "validate" and not run.has("labels") else ""
    return before + shlex.join(words)


def _command_of(manifest: Mapping[str, Any]) -> str | None:
    """The command that began the run, if its line says all that it was told."""
    line = manifest.get("command_line") or [""]
    is_ours = Path(line[0]).name in _PROGRAMS and len(line) > 1
    return line[1] if is_ours and not any(word.split("=")[0] == "--config" for word in line) else None


def _given(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options and values that give this model and text again; those of a list are joined."""
    name = _command_of(manifest)
    if name is None:
        yield from _described(manifest)
        return
    found: dict[str, Any] = {}
    for option, value in _parsed(manifest["command_line"][2:], _SETTINGS.get(name, RunConfig)):
        is_list = isinstance(value, str) and "list" in str(_field(name, option))
        found[option] = f"{found[option]},{value}" if is_list and option in found else value
    yield from found.items()


def _field(name: str, option: str) -> Any:
    field = _SETTINGS.get(name, RunConfig).model_fields.get(option)
    return field.annotation if field else None


def _parsed(words: Sequence[str], settings: type[RunConfig]) -> Iterator[tuple[str, Any]]:
    """Options of a command line as the command itself reads them."""
    rest = iter(words)
    for word in rest:
        flag, equals, value = (word[:2], "=", word[2:]) if re.match("-o.", word) else word.partition("=")
        if not flag.startswith("-"):
            continue
        option = "output" if flag == "-o" else flag.lstrip("-").replace("-", "_")
        field = settings.model_fields.get(option.removeprefix("no_"))
        if option in _SWITCHES or (field is not None and field.annotation is bool):
            yield option.removeprefix("no_"), not option.startswith("no_")
        else:
            yield option, _local(value if equals else next(rest, ""))


def _described(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Options from the manifest's model, corpus and seed. The number of documents as --limit gives the same ones."""
    model, corpus = manifest["model"], manifest["corpus"]
    kind, _, rest = str(corpus["id"]).partition(":")
    if kind == "file":
        yield "dataset", rest
    elif kind == "dataset":
        name, *config, split = rest.split(":")
        yield "dataset", name
        yield from [("dataset_config", ":".join(config))] if config else []
        yield "split", split
    elif corpus["id"] != "bundled:":
        yield "dataset", str(corpus["id"])
    yield "limit", str(corpus["n_documents"])
    if manifest.get("seed"):
        yield "seed", str(manifest["seed"])
    for name in ("revision", "dtype"):
        if model.get(name):
            yield name, str(model[name])
    if model.get("kernel", "native") != "native":
        yield "kernel", str(model["kernel"])


def _directory(manifest: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    if "output" in given:
        return given["output"]
    name = _command_of(manifest)
    if name is None:
        return "DIR"
    return str(RunConfig(model="demo" if name == "demo" else manifest["model"]["name"]).with_output().output)


def _local(text: str) -> str:
    """Of a path on this machine only the last part."""
    return Path(text).name if Path(text).is_absolute() else text
