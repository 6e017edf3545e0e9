"""``herbst2026(lens, corpus, baseline=dense)``: the source's protocol for one model and its baseline.

1. Sample the tokens of every concept (`sampling`), with each model's own tokenizer.
2. Run the model over the texts they are in, once for each group of layers that fits the memory limit.
3. Split, rank, fit and score in every cell (`cells`), a layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.corpus.chat import rendered
from moe_lens.corpus.concepts import Concept, concepts_for
from moe_lens.errors import BadConcept, BadConfig, BadCorpus, OutOfRange, UnsupportedModel
from moe_lens.probing.herbst2026.cells import MINIMUM, SampledTokens, gather, probe_cell
from moe_lens.probing.herbst2026.result import PROTOCOL, Herbst2026
from moe_lens.probing.herbst2026.sampling import Sample, Sampler
from moe_lens.probing.memory import layer_groups
from moe_lens.probing.settings import DEFAULT_K, ProbeSettings
from moe_lens.types import ExpertAddress, Granularity, Role

if TYPE_CHECKING:
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens

COLLECTION = "source58"
_FIRST = ["model", "role", "protocol", "concept", "layer", "expert", "k", "f1", "recall", "precision"]
COLUMNS = [*_FIRST, "num_positive", "num_negative", "neurons", "status"]


def herbst2026(
    lens: Lens,
    corpus: Corpus,
    *,
    baseline: Lens | None = None,
    concepts: Sequence[str | Concept] | None = None,
    k: Sequence[int] = DEFAULT_K,
    num_tokens: int = 5000,
    layers: Sequence[int] | None = None,
    experts: Sequence[str | ExpertAddress] | None = None,
    seed: int = 42,
    batch_size: int = 1,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    max_memory: int | None = None,
    progress: bool = True,
) -> Herbst2026:
    """Probe as the released code of arXiv 2604.02178 does: its texts, token split, features and choice of cell.

    Args:
        baseline: scored in the same way, in all of its layers.
        concepts: names, categories, YAML paths or Concept objects; by default those of the source's 58 that the
            corpus can show.
        k: numbers of neurons.
        num_tokens: tokens of a concept, positives and negatives, after which sampling stops.
        layers: layers of `lens` to probe, all that have routed experts by default.
        experts: addresses such as ``L7.E12`` in these layers.
        seed: of the negatives and of the token split.
        batch_size: the source's: copies of texts between two looks at `num_tokens`, which decides where sampling
            stops and the order of tokens in a cell. 1 is its default; the released tables do not say theirs.
        max_length: tokens read of a text, all by default; never more than the model can read.
        batch_tokens: tokens in one of our batches; changes nothing but speed and memory.
        max_memory: limit on the resident set of the process, in bytes.

    Raises:
        BadConfig, BadConcept, UnknownConcept, BadCorpus, OutOfRange, UnsupportedModel, MemoryLimit: the message
            names the fix.

    Does not show that a model is less polysemantic than another: the cell is chosen by the score that is reported,
    tokens of one text stand on both sides of the split, and cells differ in number, size and class balance.
    """
    models = [lens] if baseline is None else [lens, baseline]
    ks = _checked(models, k, num_tokens=num_tokens, batch_size=batch_size, batch_tokens=batch_tokens)
    chosen = [lens.check_layers(layers)]
    cells: list[set[tuple[int, int]] | None] = [_cells(lens, experts, chosen[0])]
    if cells[0] is not None:
        chosen[0] = tuple(sorted({layer for layer, _ in cells[0]}))
    if baseline is not None:
        chosen.append(baseline.layers)
        cells.append(None)
    wanted = _concepts(corpus, concepts)
    frames, sampled = [], []
    for model, name, at, only in zip(models, _names(models), chosen, cells, strict=True):
        sampler = Sampler(
            rendered(corpus, model.tokenizer, range(len(corpus))), model.tokenizer, num_tokens=num_tokens,
            batch_size=batch_size, max_length=_most(model, max_length), seed=seed,
        )  # fmt: skip
        samples = [sampler.sample(concept) for concept in wanted]
        if not sampler.texts:
            raise BadCorpus(f"{corpus.name} shows none of the {len(wanted)} concepts: give other text or --concepts")
        scan = _Scan(model, sampler, samples, at, only, ks, seed, batch_tokens, max_memory, progress)
        frame = scan.frame().assign(model=name, protocol=PROTOCOL)
        frame["concept"] = [wanted[i].name for i in frame["concept"]]
        frames.append(frame[COLUMNS].sort_values(["concept", "layer", "expert", "k"], kind="stable"))
        sampled += [_account(name, c, s, sampler, num_tokens) for c, s in zip(wanted, samples, strict=True)]
    return Herbst2026(pd.concat(frames, ignore_index=True), pd.DataFrame(sampled), seed)


class _Scan:
    """One model over the sampled texts."""

    def __init__(
        self, lens: Lens, sampler: Sampler, samples: list[Sample], layers: Sequence[int],
        only: set[tuple[int, int]] | None, ks: Sequence[int], seed: int, batch_tokens: int, max_memory: int | None,
        progress: bool,
    ) -> None:  # fmt: skip
        self.lens, self.texts, self.layers, self.only, self.ks, self.seed = lens, sampler.texts, layers, only, ks, seed
        self.batch_tokens, self.max_memory, self.progress = batch_tokens, max_memory, progress
        self.wanted = SampledTokens.of(sampler.texts, samples)

    def frame(self) -> pd.DataFrame:
        """One row per (layer, expert, concept, k); concepts by number."""
        from tqdm.auto import tqdm

        role = (Role.MOE if self.lens.spec.is_moe else Role.DENSE).value
        specs = {layer.layer: layer for layer in self.lens.spec.layers}
        rows: list[dict[str, Any]] = []
        groups = self._groups()
        for number, group in enumerate(groups):
            tag = f"{PROTOCOL} {self.lens.name} {number + 1}/{len(groups)}"
            gathered = gather(
                self.lens, self.texts, self.wanted, group, batch_tokens=self.batch_tokens, progress=self.progress,
                describe=tag,
            )  # fmt: skip
            for layer in tqdm(group, desc=f"{tag}: fit", unit="layer", disable=None if self.progress else True):
                for expert, mine in gathered.pop(layer).cells(specs[layer].n_experts):
                    if self.only is None or (layer, expert) in self.only:
                        found = probe_cell(mine, self.wanted, self.ks, seed=self.seed)
                        rows += [{"role": role, "layer": layer, "expert": expert, **row} for row in found]
        return pd.DataFrame(rows)

    def _groups(self) -> list[list[int]]:
        """Layers that are captured together: what one holds is its rows of the sampled tokens, and no moments."""
        n = self.wanted.n_tokens
        return layer_groups(
            [layer for layer in self.lens.spec.layers if layer.layer in self.layers],
            n_classes=0,
            n_rows=n,
            d_model=self.lens.spec.d_model,
            settings=ProbeSettings(max_rows=n, batch_tokens=self.batch_tokens),
            itemsize=self.lens.model.dtype.itemsize,
            max_memory=self.max_memory,
        )


def _account(name: str, concept: Concept, sample: Sample, sampler: Sampler, num_tokens: int) -> dict[str, Any]:
    """What was sampled for one concept."""
    texts = [sampler.texts[i] for i in sorted(set(sample.text.tolist()))]
    n_pos = int(sample.positive.sum())
    return {
        "model": name, "concept": concept.name, "category": concept.category, "n_texts": len(texts),
        "num_positive": n_pos, "num_negative": len(sample) - n_pos, "n_texts_cut": sum(t.is_cut for t in texts),
        "corpus_ended": len(sample) < num_tokens,
    }  # fmt: skip


def _checked(
    models: Sequence[Lens], k: Sequence[int], *, num_tokens: int, batch_size: int, batch_tokens: int
) -> tuple[int, ...]:
    ks = tuple(sorted({int(n) for n in k}))
    if not ks or ks[0] < 1:
        raise BadConfig(f"--k is {list(k)}: give positive numbers of neurons, such as 1,2,4,8")
    for model in models:
        width = min(layer.d_ff for layer in model.spec.layers)
        if ks[-1] > width:
            raise BadConfig(f"--k {ks[-1]} is more than the {width} neurons of an expert of {model.name}: lower --k")
        if not getattr(model.tokenizer, "is_fast", False):
            raise UnsupportedModel(
                f"{type(model.tokenizer).__name__} reports no character offsets, which concept labels need: "
                "use the model's fast tokenizer (a tokenizer.json beside the weights)"
            )
    if num_tokens < 2 * MINIMUM:
        raise BadConfig(f"num_tokens={num_tokens}: a probe needs {MINIMUM} tokens of each class, give 5000")
    if batch_size < 1 or batch_tokens < 1:
        raise BadConfig(f"batch_size={batch_size}, batch_tokens={batch_tokens}: give positive numbers")
    return ks


def _cells(
    lens: Lens, experts: Sequence[str | ExpertAddress] | None, layers: Sequence[int]
) -> set[tuple[int, int]] | None:
    if experts is None:
        return None
    found = [lens.address(text) for text in experts]
    for address in found:
        if address.layer not in layers:
            raise OutOfRange(f"{address} is not in the chosen layers {list(layers)}: add its layer to --layers")
    return {(address.layer, address.expert) for address in found}


def _concepts(corpus: Corpus, concepts: Sequence[str | Concept] | None) -> list[Concept]:
    found = concepts_for(corpus, [COLLECTION] if concepts is None else concepts)
    if not found:
        raise BadConfig("no concept was chosen: name some with --concepts, or leave it out for the source's")
    for concept in found:
        if concept.granularity is Granularity.DOCUMENT:
            raise BadConcept(
                f"concept {concept.name!r} holds for whole documents, and {PROTOCOL} takes negatives from the same "
                f"text: leave it out, or probe it with the moe-lens protocol"
            )
    return found


def _most(lens: Lens, max_length: int | None) -> int | None:
    limits = [n for n in (max_length, lens.spec.max_positions) if n]
    return min(limits) if limits else None


def _names(models: Sequence[Lens]) -> list[str]:
    """Names in the tables; a model that is its own baseline is told apart."""
    names = [model.name for model in models]
    return names if len(set(names)) == len(names) else [names[0], f"{names[1]} (baseline)"]
