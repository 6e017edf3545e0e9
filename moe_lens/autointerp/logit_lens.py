"""``logit_lens(...)``: the tokens that an expert's writes promote and suppress.

A visit writes ``w = weight * output``, and what that adds to the logits is ``W_U N(w)``, `N` the final norm as a
linear map. Of `N` only the learned gain (and the centring of a LayerNorm) is applied: its scale ``1 / rms(residual)``
is one positive number per token, it changes no order among the logits of a token, and the residual of an exemplar
is not kept. A norm on the FFN's output (OLMo-2) is treated alike. Values are therefore comparable within a token,
not between tokens; ``Trace.contributions`` gives those of one text in nats. arXiv 2604.02178 leaves out norm and
router weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from moe_lens.errors import BadConfig, UnsupportedModel
from moe_lens.models import families, norms
from moe_lens.types import Role, Split

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from moe_lens.capture.exemplars import TopExemplars
    from moe_lens.models.lens import Lens

_ROWS_AT_ONCE = 256
_PLACE = ["expert", "document", "window_char", "position"]


def logit_lens(
    lens: Lens, kept: TopExemplars, exemplars: pd.DataFrame, *, n_tokens: int = 5, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """Promoted and suppressed tokens of every select exemplar, and of the mean write of each expert's exemplars.

    Columns: ``layer, expert, document, window_char, position`` (missing in an expert's own row), ``n_exemplars``
    (1 but in an expert's own row), and lists from the strongest on: ``promoted, promoted_logits, suppressed,
    suppressed_logits``.

    Args:
        exemplars: from `exemplar_table` on `kept`; only positives of the select split are read.

    Raises:
        UnsupportedModel: expert outputs do not reach the residual stream as they are (a few families).
        BadConfig: `kept` holds no directions.
        OutOfRange: a layer that was not captured.

    A direct effect only: what later layers make of a write is not in it, and early experts rarely write tokens.
    """
    if not kept.directions:
        raise BadConfig("the capture kept no directions: make TopExemplars(directions=True) for the logit lens")
    wanted = exemplars[(exemplars["split"] == str(Split.SELECT)) & ~exemplars["kind"].str.startswith("negative")]
    frames = []
    for layer in kept.check_layers(layers):
        places, writes = _writes(kept, layer, wanted[wanted["layer"] == layer])
        groups = places.groupby("expert").indices
        means = [writes[torch.tensor(rows)].mean(0) for rows in groups.values()]
        mean = torch.stack(means) if means else writes[:0]
        own = pd.DataFrame({"expert": list(groups), "n_exemplars": [len(rows) for rows in groups.values()]})
        rows = pd.concat([own, places.assign(n_exemplars=1)], ignore_index=True)
        lists = _extremes(lens, to_logits(lens, layer), torch.cat([mean, writes]), n_tokens)
        frames.append(pd.concat([rows.assign(layer=layer), lists], axis=1))
    columns = ["layer", *_PLACE, "n_exemplars", "promoted", "promoted_logits", "suppressed", "suppressed_logits"]
    if not frames:
        return pd.DataFrame(columns=columns)
    whole = dict.fromkeys(["layer", *_PLACE, "n_exemplars"], "Int64")
    return pd.concat(frames, ignore_index=True)[columns].astype(whole)


def to_logits(lens: Lens, layer: int) -> Callable[[Float[Tensor, "row d_model"]], Float[Tensor, "row vocab"]]:
    """The map from what the experts of `layer` write, router weight applied, to logits, as this module defines it.

    Raises:
        UnsupportedModel: expert outputs do not reach the residual stream as they are (a few families).
    """
    config = lens.model.config
    if (reason := families.indirect_writes(config)) is not None:
        raise UnsupportedModel(
            f"{families.text_config(config).model_type} {reason}, so a logit lens on its experts is not defined: use "
            "lens.edit to measure effects"
        )
    site = next(site for site in lens.sites if (site.layer, site.role) == (layer, Role.MOE))
    factor = site.block_scale * families.residual_scale(config) / families.logit_divisor(config)
    unembed = lens.model.get_output_embeddings().weight.detach().float().cpu()
    unit = torch.ones(unembed.shape[1])
    unit[1::2] = -1  # mean 0 and mean square 1, so a norm frozen here has its gain and no scale
    final = norms.freeze(norms.final_norm(lens.model), unit)
    after = norms.post_ffn_norm(lens.blocks[layer])
    first = norms.freeze(after, unit) if after is not None else lambda write: write
    return lambda write: final(first(write.float() * factor)) @ unembed.T


def _writes(kept: TopExemplars, layer: int, wanted: pd.DataFrame) -> tuple[pd.DataFrame, Float[Tensor, "row d_model"]]:
    """Where the wanted visits stand, and what they wrote."""
    v = kept.visits(layer, Split.SELECT)
    columns = zip(_PLACE, (v.expert, v.document, v.first_char, v.position), strict=True)
    stored = pd.DataFrame({name: value.numpy() for name, value in columns})
    places = stored.assign(row=range(len(v))).merge(wanted[_PLACE].astype("int64"), on=_PLACE)
    at = torch.tensor(places.pop("row").tolist(), dtype=torch.long)
    return places, v.direction[at].float() * v.score[at, None]


def _extremes(
    lens: Lens, to_logit: Callable[[Tensor], Tensor], writes: Float[Tensor, "row d_model"], n_tokens: int
) -> pd.DataFrame:
    found: dict[str, list[Any]] = {n: [] for n in ("promoted", "promoted_logits", "suppressed", "suppressed_logits")}
    for part in writes.split(_ROWS_AT_ONCE):
        logits = to_logit(part)[:, : len(lens.tokenizer)]  # rows beyond are padding of the vocabulary
        for name, largest in (("promoted", True), ("suppressed", False)):
            best = logits.topk(min(n_tokens, logits.shape[1]), dim=1, largest=largest)
            found[name] += [[lens.tokenizer.decode([i]) for i in ids] for ids in best.indices.tolist()]
            found[f"{name}_logits"] += best.values.tolist()
    return pd.DataFrame(found)
