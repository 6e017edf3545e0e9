"""Settings of the commands, the small languages they are written in, and the prompts' hashes.

One pydantic model per command serves ``--config FILE.yaml`` and the command line: a field's description is its help
text, flags override the file, the file overrides the defaults. No torch here: this loads before any model does.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from moe_lens.errors import BadConfig, nearest

_UNITS = {"": 1, "b": 1} | {
    prefix + tail: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for tail, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")
_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``4GB`` (powers of 1000), ``512MiB`` (powers of 1024) or ``1000000``.

    Raises:
        BadConfig: `text` is not a positive size.
    """
    match = _SIZE.match(str(text))
    unit = match and _UNITS.get(match.group(2).lower())
    if not match or not unit or float(match.group(1)) <= 0:
        raise BadConfig(f"cannot read the size {str(text)!r}: write it as 4GB, 512MiB or a number of bytes")
    return math.floor(float(match.group(1)) * unit)


def parse_ints(text: str | int | Iterable[Any]) -> list[int]:
    """Whole numbers of a list such as ``0,2,4-6``; order is kept, repeats are dropped.

    Raises:
        BadConfig: something else than numbers and ranges, or a range that runs backwards.
    """
    parts = [text] if isinstance(text, str | int) else list(text)
    found: list[int] = []
    for part in (piece.strip() for whole in parts for piece in str(whole).split(",")):
        match = _RANGE.match(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise BadConfig(f"cannot read the numbers {part!r}: write them as 0,2,4-6")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def parse_names(text: str | Iterable[Any]) -> list[str]:
    """Names from ``a,b`` or a list of such; empty ones are dropped."""
    parts = [text] if isinstance(text, str) else list(text)
    return list(dict.fromkeys(name.strip() for part in parts for name in str(part).split(",") if name.strip()))


def parse_biases(text: str | Mapping[Any, Any]) -> dict[str, float]:
    """Numbers by name from ``L2.E3=2.0,L4.E0=-1``.

    Raises:
        BadConfig: a part that is not a name, ``=`` and a number, or a name that comes twice.
    """
    pairs = (
        [(str(key), value) for key, value in text.items()]
        if isinstance(text, Mapping)
        else [(name.strip(), value) for name, _, value in (part.partition("=") for part in str(text).split(","))]
    )
    found: dict[str, float] = {}
    for name, value in pairs:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise BadConfig(
                f"cannot read the bias of {name!r}: write biases as L2.E3=2.0,L4.E0=-1, not {str(value)!r}"
            ) from None
        if name in found:
            raise BadConfig(f"{name} has two biases: give one")
        found[name] = number
    return found


def _named(parse: Any) -> BeforeValidator:
    """A parser of one setting whose complaint names the option."""

    def read(value: Any, info: ValidationInfo) -> Any:
        try:
            return parse(value)
        except BadConfig as error:
            raise BadConfig(f"--{str(info.field_name).replace('_', '-')}: {error}") from error

    return BeforeValidator(read)


def _optional(parse: Any) -> BeforeValidator:
    return _named(lambda value: None if value is None else parse(value))


OptionalInts = Annotated[list[int] | None, _optional(parse_ints)]
OptionalNames = Annotated[list[str] | None, _optional(parse_names)]
OptionalSize = Annotated[int | None, _optional(parse_size)]
OptionalCount = Annotated[int | None, Field(ge=1)]


class ModelConfig(BaseModel):
    """What every command that loads a model can be told.

    Field names are the option names, ``_`` for ``-``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="MoE model: a hub id, a folder, or bundled:tiny-moe")
    seed: int = Field(default=0, ge=0, description="seed of the document split and of every draw")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, mps (the best there is)")
    device_map: str | None = Field(default=None, description="auto spreads a large model over devices (accelerate)")
    dtype: str | None = Field(default=None, description="float32, bfloat16, float16 (as the checkpoint)")
    kernel: str | None = Field(default=None, description="experts' arithmetic: native, grouped_mm or eager")
    revision: str | None = Field(default=None, description="branch, tag or commit of the hub model")
    local_files_only: bool = Field(default=False, description="never ask the hub, use what its cache holds")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    output: Path | None = Field(default=None, description="run directory (runs/ and the model's name)")
    resume: bool = Field(
        default=True,
        description="go on with a command of the same settings, replace one of others; --no-resume starts anew",
    )

    def with_output(self) -> Self:
        """With the default run directory, ``runs/`` and the model's name, if none was given."""
        if self.output is not None:
            return self
        name = self.model.rstrip("/").split("/")[-1].replace(":", "-")
        return self.model_copy(update={"output": Path("runs") / name})

    @classmethod
    def build(cls, file: Path | None = None, **flags: Any) -> Self:
        """Settings from an optional YAML file, overridden by the flags that are not None.

        Raises:
            BadConfig: an unknown key, or a value that cannot be used.
        """
        values = ({} if file is None else _read_yaml(file)) | {k: v for k, v in flags.items() if v is not None}
        values = {str(key).replace("-", "_"): value for key, value in values.items()}
        for key in values.keys() - cls.model_fields.keys():
            raise BadConfig(f"unknown setting {key!r} in {file}{nearest(key, cls.model_fields) or '; see --help'}")
        if "model" not in values and cls.model_fields["model"].is_required():
            raise BadConfig("no model was named: give --model, or a line 'model: ...' in the --config file")
        try:
            return cls(**values)
        except ValidationError as error:
            raise BadConfig(_sentence(error, cls)) from error


class RunConfig(ModelConfig):
    """What every command that runs a model over a text can be told."""

    dataset: str = Field(
        default="bundled:",
        description="text or conversations: bundled:, a .jsonl, .txt or .parquet file, or a hub data set",
    )
    dataset_config: str | None = Field(default=None, description="configuration of the hub data set")
    split: str = Field(default="train", description="split of the hub data set")
    text_column: str = Field(default="text", description="column that holds the text")
    layers: OptionalInts = Field(default=None, description="decoder layers, such as 0,2,4-6 (all)")
    experts: OptionalNames = Field(
        default=None, description="L7.E12 for one, 0,2,4-6 for these of every chosen layer (all)"
    )
    limit: OptionalCount = Field(default=None, description="documents to read (all)")
    max_tokens: OptionalCount = Field(default=None, description="stop after about this many tokens")
    document_tokens: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="tokens to read of each document (all); many short texts tell more than few long ones"
    )
    max_length: int = Field(default=256, ge=4, description="tokens per window")
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="windows per forward pass"
    )

    @property
    def batch_windows(self) -> int | None:
        """`batch_size` as a number, None for ``auto``."""
        return None if self.batch_size == "auto" else self.batch_size


class ProbeConfig(RunConfig):
    """Everything that ``moe-lens probe`` can be told."""

    baseline: str | None = Field(default=None, description="dense model to compare with, or a second MoE")
    concepts: OptionalNames = Field(
        default=None, description="names or categories, comma-separated (all that the text can show)"
    )
    k: OptionalInts = Field(default=None, description="neurons per probe (1,2,4,8,16,32,64)")
    max_rows: int = Field(default=2000, ge=100, description="rows that one probe is fitted on, at most")
    max_memory: OptionalSize = Field(
        default=None, description="limit on the process, such as 4GB (60 % of what is free)"
    )
    all_cells: bool = Field(default=False, description="fit every k in every cell, not only in the best ones at k=1")
    protocol: Literal["moe-lens", "herbst2026"] = Field(
        default="moe-lens", description="herbst2026: that of arXiv 2604.02178, in tables of its own"
    )
    draws: int = Field(default=20, ge=0, description="random draws of equal cells from model and baseline, 0 for none")
    neurons: bool = Field(default=True, description="count the concept groups that single neurons serve")
    permutations: int = Field(default=999, ge=0, description="exchanges of labels behind each p-value, 0 for none")
    splits: int = Field(default=1, ge=1, description="repeat over this many document splits")


class AutointerpConfig(RunConfig):
    """Everything that ``moe-lens autointerp`` can be told."""

    model: str = Field(default="bundled:tiny-moe", description="MoE model: a hub id, a folder, or bundled:tiny-moe")
    labeller: str | None = Field(
        default=None,
        description="openai:MODEL of any compatible server, gguf:FILE, or lexical (the model that --base-url serves, "
        "else lexical)",
    )
    scorer: OptionalNames = Field(
        default=None,
        description="openai:MODEL, gguf:FILE, embedding:MODEL, rule (the labeller's model, and the rules of labels)",
    )
    labels: Path | None = Field(
        default=None, description="CSV with layer,expert,label[,rule] to score instead of a labeller's"
    )
    base_url: str | None = Field(default=None, description="address of the server, such as http://localhost:8000/v1")
    facets: int = Field(default=0, ge=0, le=5, description="ask for up to this many facets per expert, not one label")
    items: int = Field(default=20, ge=5, le=40, description="tokens of each kind that an LLM judges per expert")
    fuzz: bool = Field(default=True, description="LLM scorers also judge moved marks")
    control: bool = Field(default=True, description="LLM scorers also judge other experts' labels")
    max_calls: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="calls to servers, repetitions after an error not counted (any)"
    )
    token_budget: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="make no more calls after this many tokens of prompts and replies (any)"
    )
    concurrency: int = Field(default=16, ge=1, description="requests on their way at a time")
    timeout: float = Field(default=60, gt=0, description="seconds to wait for one reply")
    reply_tokens: OptionalCount = Field(default=None, description="longest reply to ask for (the server's own)")


class ValidateConfig(RunConfig):
    """Everything that ``moe-lens validate`` can be told."""

    model: str = Field(default="bundled:tiny-moe", description="MoE model: a hub id, a folder, or bundled:tiny-moe")
    experts: OptionalNames = Field(
        default=None, description="all, or some such as L7.E12 (a sample of --n-labels that holds all loads)"
    )
    max_tokens: OptionalCount = Field(default=16_384, description="tokens of test documents that effects are read at")
    labels: Path | None = Field(
        default=None, description="CSV with layer,expert,label[,rule,concept] (labels.parquet of the run directory)"
    )
    labeller: str | None = Field(
        default=None, description="whose labels of the run directory (those that were written last)"
    )
    judge: str = Field(
        default="rule", description="who says where a label holds: rule (its rule or concept), openai:MODEL, gguf:FILE"
    )
    second_judge: str | None = Field(default=None, description="judges a tenth again, for Cohen's kappa (nobody)")
    base_url: str | None = Field(default=None, description="address of the judge's server")
    judge_positions: int = Field(
        default=200, ge=1, description="visits that an LLM judge reads for each label, and as many other tokens"
    )
    max_calls: Annotated[int, Field(ge=0)] | None = Field(default=None, description="calls to each LLM judge (any)")
    token_budget: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="call an LLM judge no more after this many tokens of prompts and replies (any)"
    )
    concurrency: int = Field(default=16, ge=1, description="requests to an LLM judge on their way at a time")
    timeout: float = Field(default=60, gt=0, description="seconds to wait for one reply")
    n_labels: int = Field(default=32, ge=1, description="labels to try, drawn so that experts of all loads are there")
    modes: Annotated[list[str], _named(parse_names)] = Field(
        default=["zero", "mean_off"], description="ablation modes: these two give the verdict, others add columns"
    )
    nulls: OptionalNames = Field(
        default=None,
        description="kinds of false labels to try beside them, or none (all; shuffled only if that asks no LLM)",
    )
    matched: Literal["trial", "layer"] = Field(
        default="trial", description="load-matched controls: experts on trial, or all of the layer (more passes)"
    )
    positions: Literal["all", "focal"] = Field(
        default="all", description="focal edits every visit on its own: slow, to check all against"
    )
    horizon: int = Field(default=1, ge=1, description="predictions over which an effect is averaged")
    draws: int = Field(default=2000, ge=100, description="bootstrap samples of documents")
    triggers: Path | None = Field(
        default=None, description="folder of trigger-target cases (JSON) to test in place of labels"
    )


class FaithfulnessConfig(RunConfig):
    """Everything that ``moe-lens faithfulness`` can be told."""

    rankings: OptionalNames = Field(
        default=None,
        description="load, gate_mass, gate_norm, reap, ean, max_activation, esft_gate, esft_token, gradient, "
        "leave_one_out, a CSV with layer,expert,score; random is their control (load,gate_norm,gradient,random)",
    )
    modes: OptionalNames = Field(
        default=None,
        description="how experts are taken away: zero, mean, mean_off, resample, drop_renorm, mask_refill, "
        "mask_refill_keep, noise (mean_off,mask_refill_keep)",
    )
    routing: Literal["live", "frozen"] = Field(
        default="live", description="whether later layers choose experts anew: live or frozen"
    )
    universe: Literal["global", "per-layer"] = Field(
        default="global", description="a bin is a share of all experts, or of each layer's: global or per-layer"
    )
    axis: Literal["count", "gate-mass"] = Field(
        default="count", description="a bin is a share of the experts, or of their gate mass: count or gate-mass"
    )
    bins: OptionalNames = Field(
        default=None, description="percent of the experts such as 1,5,10,20, or eraser, seed, mib (1,5,10,20)"
    )
    n_random: int = Field(default=20, ge=0, description="random control sets for each set, 0 for none")
    n_matched: int = Field(default=5, ge=0, description="load-matched control sets for each set, 0 for none")
    naopc: int = Field(
        default=0, ge=0, le=30, description="experts, drawn by lot, over whose orders AOPC is normalised, at most 30"
    )
    draws: int = Field(default=1000, ge=0, description="bootstrap samples of documents behind the intervals")
    max_tokens: Annotated[int, Field(ge=1)] = Field(  # type: ignore[assignment]
        default=2048, description="tokens to score on; rankings are made from twice as many others"
    )
    document_tokens: Annotated[int, Field(ge=2)] = Field(  # type: ignore[assignment]
        default=64, description="tokens to read of each document; many short texts tell more than few long ones"
    )
    include_first: bool = Field(default=False, description="count predictions at the first token of a window too")

    @property
    def shares(self) -> str | list[float]:
        """`bins` as a preset's name or as shares of 1.

        Raises:
            BadConfig: neither percentages nor one name.
        """
        words = self.bins or ["default"]
        if len(words) == 1 and words[0][:1].isalpha():
            return words[0]
        try:
            found = sorted({float(word.removesuffix("%")) / 100 for word in words})
        except ValueError:
            found = [math.nan]
        if not all(0 < share <= 1 for share in found):
            raise BadConfig(
                f"--bins {','.join(words)}: give percentages above 0 and up to 100 such as 1,5,10,20, or one of "
                "eraser, seed, mib"
            )
        return found


class SteerConfig(ModelConfig):
    """Everything that ``moe-lens steer`` can be told."""

    model: str = Field(default="bundled:tiny-moe", description="MoE model: a hub id, a folder, or bundled:tiny-moe")
    prompt: Annotated[list[str] | None, BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = Field(
        default=None, description="a text to go on from; may be given again"
    )
    prompts: Path | None = Field(
        default=None, description="file of more: a .txt with one a line, or a .jsonl of texts or lists of messages"
    )
    suppress: OptionalNames = Field(default=None, description="experts to keep out, such as L2.E3,L4.E0")
    force: OptionalNames = Field(default=None, description="experts to bring in, such as L2.E3")
    bias: Annotated[dict[str, float] | None, _optional(parse_biases)] = Field(
        default=None, description="what to add to router logits, such as L2.E3=2,L4.E0=-1 (--kl sets their size)"
    )
    kl: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(lambda v: None if v == "none" else v)] = Field(
        default=1.0,
        description="nats by which the next token is to move, mean over the clean texts; none takes biases as they are "
        "and suppresses or forces altogether",
    )
    controls: int = Field(default=5, ge=0, description="control experts of like load, steered to the same KL")
    max_new_tokens: int = Field(default=32, ge=1, description="tokens to generate")
    target: str | None = Field(
        default=None, description="regular expression: the score is the share of the text that it covers"
    )
    target_text: str | None = Field(
        default=None, description="text: the score is its log-probability right after the prompt"
    )
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy; above it all arms draw with the same seed")
    seed: int = Field(default=0, ge=0, description="seed of every draw")
    output: Path | None = Field(default=None, description="run directory to write steering.parquet to (none)")
    resume: bool = Field(default=True, description="show a run of the same settings; --no-resume makes it anew")


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"cannot read --config {file}: {error.strerror or error}; give a readable YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        at = f" at line {where.line + 1}" if where else ""
        raise BadConfig(f"--config {file} is not YAML{at}: write one 'name: value' a line") from error
    if values is not None and not isinstance(values, dict):
        raise BadConfig(f"--config {file} is a {type(values).__name__}: write one 'name: value' a line")
    return values or {}


def _sentence(error: ValidationError, settings: type[BaseModel]) -> str:
    """First problem of a pydantic error, in the user's words."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    help_text = settings.model_fields[name].description if name in settings.model_fields else ""
    what = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"--{name.replace('_', '-')} cannot be {str(first['input'])!r}: give {what} ({help_text})"


def prompts_dir() -> Path:
    """Folder of the prompt files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return package / "prompts" if (package / "prompts").is_dir() else package.parent / "prompts"


@lru_cache(maxsize=1)
def prompt_hashes() -> dict[str, str]:
    """sha256 of every prompt file by file name; every manifest holds them."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(prompts_dir().glob("*.md"))}
