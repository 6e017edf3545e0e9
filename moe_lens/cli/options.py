"""Options that several commands share, and options made from the fields of a settings model."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moe_lens.config import ModelConfig

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def set_verbosity(verbose: bool) -> bool:
    """Silence other libraries unless `verbose`. Must run before they are imported, so it is a callback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
    return verbose


Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
Details = Annotated[bool, typer.Option("--details", help="print every table and sentence, not only the first")]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", callback=set_verbosity, is_eager=True, help="show other libraries' messages"),
]
Revision = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit of the hub model")]
LocalOnly = Annotated[bool, typer.Option("--local-files-only", help="never ask the hub, use what its cache holds")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="show or continue a run of the same settings, or start it anew")
]


_METAVARS = {"output": "DIR", "baseline": "MODEL", "max_memory": "SIZE", "max_tokens": "N", "limit": "N", "seed": "N"}
_METAVARS |= dict.fromkeys(
    ("draws", "permutations", "splits", "items", "facets", "max_calls", "token_budget", "concurrency", "reply_tokens"),
    "N",
)
_METAVARS |= dict.fromkeys(("n_random", "n_matched", "naopc", "document_tokens"), "N") | {"bins": "PERCENT"}
_METAVARS |= {"timeout": "SECONDS", "labels": "FILE", "triggers": "DIR"}
_METAVARS |= dict.fromkeys(("n_labels", "judge_positions", "horizon"), "N")
_METAVARS |= {"prompt": "TEXT", "prompts": "FILE", "suppress": "EXPERTS", "force": "EXPERTS", "bias": "EXPERT=NUMBER"}
_METAVARS |= {"kl": "NATS", "max_new_tokens": "N", "target": "REGEX", "temperature": "NUMBER"}


def options_of(model: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command ``f(**flags)`` one option per field of `model`; a flag not given arrives as None."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = ModelConfig.model_fields.keys() - {"model"}  # said of every command, so they are listed last
        fields = sorted(model.model_fields.items(), key=lambda item: item[0] in shared)
        made = [_parameter(name, field) for name, field in fields]
        parameters = made + [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Values travel as text: the model parses them, so the shell and the YAML file share one grammar."""
    flag = "--" + name.replace("_", "-")
    is_flag, is_list = field.annotation is bool, "list" in str(field.annotation)
    declared = f"{flag}/--no-{flag[2:]}" if is_flag and field.default is True else flag
    names = ["-o", declared] if name == "output" else [declared]
    text = field.description or ""
    if not (is_flag or field.is_required() or field.default is None):
        default = ",".join(map(str, field.default)) if isinstance(field.default, list) else field.default
        text += f" [{default}]"
    kind: Any = bool if is_flag else list[str] if is_list else str
    metavar = None if is_flag else _METAVARS.get(name, name.split("_")[-1].upper())
    annotation = Annotated[kind | None, typer.Option(*names, help=text, metavar=metavar, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
