"""One text, token by token: which experts it visits, how much they write, and what that does to a logit.

1. messages through the chat template, every token with its role (see `chat`)
2. greedy continuation, if asked for (untapped)
3. one forward pass over the whole text with taps, keeping the residual stream at the final norm
4. everything else is arithmetic on the taps, done when it is asked for
"""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from moe_lens.errors import BadConfig, BadCorpus, OutOfRange, UnknownConcept, UnsupportedModel, nearest
from moe_lens.models import chat, families, norms
from moe_lens.models.spans import Span, decode_reply, encode, mark_reply, spans_of
from moe_lens.types import ExpertAddress, ExpertTap, Role

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float, Int

    from moe_lens.models.lens import Lens

Messages = Sequence[Mapping[str, Any]]

log = logging.getLogger("moe_lens")


@dataclass(frozen=True)
class Visits:
    """The tokens that one expert saw, and what it did with them."""

    address: ExpertAddress
    token: Int[Tensor, "row"]
    """Position of each visiting token."""
    weight: Float[Tensor, "row"]
    activation: Float[Tensor, "row d_ff"]
    output: Float[Tensor, "row d_model"]
    """Unweighted; the expert writes `weight * output`."""


@dataclass(frozen=True)
class Trace:
    """One text followed through the model. `routing` has one row per (token, layer, expert)."""

    text: str
    """As given; of messages, what the chat template makes of them and then what was generated."""
    token_ids: tuple[int, ...] = field(repr=False)
    tokens: tuple[str, ...] = field(repr=False)
    n_prompt: int
    """Tokens of the text; later ones were generated."""
    taps: tuple[ExpertTap, ...] = field(repr=False)
    lens: Lens = field(repr=False)
    residual: Float[Tensor, "token d_model"] | None = field(repr=False)
    """Residual stream that the final norm reads; None in families whose writes reach it indirectly."""
    post_norm_inputs: dict[int, Float[Tensor, "token d_model"]] = field(repr=False)
    """Input of a layer's post-FFN norm, for families that have one."""
    token_spans: tuple[Span, ...] = field(default=(), repr=False)
    """Every token of a conversation by its role, in order; empty for a text. `spans` is the frame of it."""

    @cached_property
    def routing(self) -> pd.DataFrame:
        """One row per visit: position, token, layer, role, slot, expert, weight, margin, weighted_norm, share, span.

        `margin` is the router logit of the expert minus the largest logit among experts not chosen; with a
        selection bias (DeepSeek-V3) it can be negative. `weighted_norm` is `weight * ||output||`. `share` is
        the projection of the weighted output on the block's whole write, shared expert included, over the
        squared norm of that write: the shares of a token in a layer sum to 1. `expert` and `slot` are
        missing in rows of a shared expert. `span` is the role of the token in the conversation (`role` is that of
        the expert), missing for a text.
        """
        import pandas as pd

        frames = [self._routing_of(tap) for tap in self.taps]
        frame = pd.concat(frames, ignore_index=True)
        roles: list[str | None] = [None] * len(self.tokens)
        for span in self.token_spans:
            roles[span.start : span.stop] = [span.role] * (span.stop - span.start)
        frame["span"] = pd.array([roles[i] for i in frame["position"]], dtype="object")
        return frame.sort_values(["position", "layer", "role", "slot"], ignore_index=True)

    @property
    def frame(self) -> pd.DataFrame:
        return self.routing

    @cached_property
    def spans(self) -> pd.DataFrame:
        """Who says what: one row per run of tokens with one role; no rows if a text was traced.

        Columns: role (system, user, assistant, thinking, tool or template; missing where it cannot be told), start
        and stop (token positions, half-open), char_start and char_stop (in `text`), generated, message (its number;
        missing for the template and for what was generated). Markers, headers and delimiters of thoughts are
        template, also where they were generated. The rows follow each other without a gap.
        """
        import pandas as pd

        kinds = {"role": "object", "generated": "bool", "message": "Int64"}
        columns = {f.name: [getattr(span, f.name) for span in self.token_spans] for f in fields(Span)}
        return pd.DataFrame({name: pd.Series(v, dtype=kinds.get(name, "int64")) for name, v in columns.items()})

    def concept(self, role: str) -> Bool[Tensor, "token"]:
        """Which tokens have a role, ``t.concept("assistant")``; none if nobody has it in this conversation.

        Raises:
            UnknownConcept: no such role, or a text was traced, which has none.
        """
        known = get_args(chat.SpanRole)
        if role not in known:
            raise UnknownConcept(f"no role is named {role!r}{nearest(role, known)}: use one of {', '.join(known)}")
        if not self.token_spans:
            raise UnknownConcept(f"a text has no {role!r} tokens: trace messages to know who says what")
        out = torch.zeros(len(self.tokens), dtype=torch.bool)
        for span in self.token_spans:
            if span.role == role:
                out[span.start : span.stop] = True
        return out

    def paths(self) -> pd.DataFrame:
        """One row per token; column ``L7`` lists the experts it visits in layer 7, heaviest slot first."""
        routed = self.routing[self.routing["role"] != str(Role.SHARED)]
        lists = routed.groupby(["position", "layer"])["expert"].agg(list).unstack("layer")
        lists.columns = [f"L{layer}" for layer in lists.columns]
        lists.insert(0, "token", list(self.tokens))
        return lists.reset_index()

    def __getitem__(self, address: str | ExpertAddress) -> Visits:
        """The visits of one expert, ``t["L7.E12"]``; empty tensors if no token chose it.

        Raises:
            OutOfRange: the model has no such expert, or its layer was not traced.
        """
        found = self.lens.address(address)
        tap = self._tap(found.layer, shared=False)
        rows = slice(int(tap.offsets[found.expert]), int(tap.offsets[found.expert + 1]))
        return Visits(found, tap.token[rows], tap.weight[rows], tap.activation[rows], tap.output[rows])

    def shared(self, layer: int) -> Visits:
        """What the shared expert of `layer` did.

        Raises:
            OutOfRange: the layer has no shared expert or was not traced.
        """
        tap = self._tap(layer, shared=True)
        return Visits(ExpertAddress(layer, 0), tap.token, tap.weight, tap.activation, tap.output)

    def contributions(self, pos: int, target: int | str) -> pd.DataFrame:
        """Direct contribution of every visited expert to the logit of `target` after position `pos`.

        `logit = weight * output . W_U[target]`, with the scale of the final norm frozen (see `norms`).

        Args:
            pos: position of the token whose next-token logit is meant; negative counts from the end.
            target: token id, or a text that is exactly one token.

        Raises:
            OutOfRange: no such position or token.
            UnsupportedModel: expert outputs do not reach the residual stream as they are (a few families).
        """
        import pandas as pd

        config = self.lens.model.config
        if (reason := families.indirect_writes(config)) is not None:
            raise UnsupportedModel(
                f"{families.text_config(config).model_type} {reason}, so direct contributions to a logit are not "
                "defined for it: use lens.edit to measure effects"
            )
        assert self.residual is not None
        position = self._position(pos)
        direction = self._target(target)
        to_logit = norms.freeze(norms.final_norm(self.lens.model), self.residual[position])
        factor = families.residual_scale(config) / families.logit_divisor(config)
        rows: list[dict[str, Any]] = []
        for tap in self.taps:
            chosen = (tap.token == position).nonzero().flatten()
            write = self._write(tap)[chosen]
            block_norm = norms.post_ffn_norm(self.lens.blocks[tap.layer])
            if block_norm is not None and tap.layer in self.post_norm_inputs:
                write = norms.freeze(block_norm, self.post_norm_inputs[tap.layer][position])(write)
            values = to_logit(write) @ direction * factor
            for row, value in zip(chosen.tolist(), values.tolist(), strict=True):
                rows.append({**_names(tap, row), "weight": float(tap.weight[row]), "logit": value})
        frame = pd.DataFrame(rows).astype({"expert": "Int64", "slot": "Int64"})
        return frame.sort_values(["layer", "role", "slot"], ignore_index=True)

    def plot(self) -> Any:
        """Heat map of the first-choice expert by token and layer (plotly)."""
        import plotly.graph_objects as go

        first = self.routing[(self.routing["role"] != str(Role.SHARED)) & (self.routing["slot"] == 0)]
        grid = first.pivot(index="layer", columns="position", values="expert").astype(float)
        labels = [html.escape(token) for token in self.tokens]
        figure = go.Figure(
            go.Heatmap(
                z=grid.to_numpy(), x=list(grid.columns), y=[f"L{layer}" for layer in grid.index],
                colorscale="Turbo", colorbar_title="expert",
                customdata=[labels] * len(grid),
                hovertemplate="token %{customdata}<br>%{y}.E%{z}<extra></extra>",
            )
        )  # fmt: skip
        figure.update_xaxes(title="token", tickmode="array", tickvals=list(grid.columns), ticktext=labels)
        figure.update_yaxes(title="layer", autorange="reversed", type="category")
        figure.update_layout(title="First-choice expert of each token")
        return figure

    def _repr_html_(self) -> str:
        return self.paths().to_html(index=False, escape=True)

    def _routing_of(self, tap: ExpertTap) -> pd.DataFrame:
        import pandas as pd

        write = self._write(tap)
        block = self._block_write(tap.layer, write.shape[1])[tap.token]
        missing = tap.role is Role.SHARED
        n_rows = len(tap.token)
        return pd.DataFrame(
            {
                "position": tap.token.numpy(),
                "token": [self.tokens[i] for i in tap.token.tolist()],
                "layer": tap.layer,
                "role": str(tap.role),
                "slot": pd.array([pd.NA] * n_rows if missing else tap.slot.tolist(), dtype="Int64"),
                "expert": pd.array([pd.NA] * n_rows if missing else tap.expert.tolist(), dtype="Int64"),
                "weight": tap.weight.float().numpy(),
                "margin": _margin(tap).numpy(),
                "weighted_norm": write.norm(dim=-1).numpy(),
                "share": ((write * block).sum(-1) / block.square().sum(-1)).numpy(),
            }
        )

    def _write(self, tap: ExpertTap) -> Float[Tensor, "row d_model"]:
        """What each visit adds: output times weight, times the block's own factor on the sum."""
        site = next(site for site in self.lens.sites if (site.layer, site.role) == (tap.layer, tap.role))
        return tap.output.float() * tap.weight.float().unsqueeze(-1) * site.block_scale

    def _block_write(self, layer: int, width: int) -> Float[Tensor, "token d_model"]:
        """Sum of what the visits of a layer add; latent experts (Nemotron 3) and a full-width shared one apart."""
        total = torch.zeros(len(self.tokens), width)
        for tap in self.taps:
            if tap.layer == layer and tap.output.shape[1] == width:
                total.index_add_(0, tap.token, self._write(tap))
        return total

    def _tap(self, layer: int, *, shared: bool) -> ExpertTap:
        for tap in self.taps:
            if tap.layer == layer and (tap.role is Role.SHARED) == shared:
                return tap
        traced = sorted({tap.layer for tap in self.taps})
        what = "no shared expert in layer" if shared and layer in traced else "not traced: layer"
        raise OutOfRange(f"{what} {layer} (traced layers: {', '.join(map(str, traced))})")

    def _position(self, pos: int) -> int:
        n_tokens = len(self.tokens)
        if not -n_tokens <= pos < n_tokens:
            raise OutOfRange(f"there is no token {pos}: positions are 0 to {n_tokens - 1}")
        return pos % n_tokens

    def _target(self, target: int | str) -> Float[Tensor, "d_model"]:
        unembed = self.lens.model.get_output_embeddings().weight
        if isinstance(target, str):
            ids = self.lens.tokenizer(target, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise OutOfRange(f"{target!r} is {len(ids)} tokens: give a text that is one token, or a token id")
            target = int(ids[0])
        if not 0 <= target < len(unembed):
            raise OutOfRange(f"there is no token id {target}: ids are 0 to {len(unembed) - 1}")
        return unembed[target].detach().float().cpu()


def trace(lens: Lens, text: str | Messages, *, layers: Sequence[int] | None, generate: int) -> Trace:
    """See `Lens.trace`."""
    if not isinstance(generate, int) or generate < 0:
        raise OutOfRange(f"generate is {generate!r}: give the number of tokens to generate, 0 or more")
    chosen = lens.check_layers(layers)
    if lens.tokenizer is None:
        raise BadConfig("this lens has no tokenizer to read text with: make it as Lens(model, tokenizer)")
    conversation = None
    if isinstance(text, str):
        prompt = list(lens.tokenizer(text, verbose=False)["input_ids"])
    elif isinstance(text, Sequence) and all(isinstance(message, Mapping) for message in text):
        conversation = _Conversation(lens.tokenizer, text, generate > 0)
        prompt = conversation.token_ids
    else:
        raise BadCorpus(f"trace takes one text or a list of messages (dicts), not {type(text).__name__}")
    if not prompt:
        raise BadCorpus("the text has no tokens: give at least one character")
    limit = lens.spec.max_positions
    if limit is not None and len(prompt) + generate > limit:
        raise OutOfRange(
            f"the text has {len(prompt)} tokens, with {generate} generated, and the context holds {limit}: "
            "give a shorter one or generate less"
        )
    taps: list[ExpertTap] = []
    kept: dict[int, Tensor] = {}
    ids = torch.tensor([prompt], dtype=torch.long, device=lens.device)
    with torch.no_grad(), ExitStack() as stack:
        if generate > 0:
            ids = lens.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=generate, do_sample=False,
                pad_token_id=lens.tokenizer.pad_token_id,
            )  # fmt: skip
        _keep_inputs(lens, chosen, kept, stack)
        stack.enter_context(lens.tapping(lambda tap: taps.append(_to_cpu(tap)), layers=chosen))
        lens.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    token_ids = tuple(ids[0].tolist())
    tokens = tuple(lens.tokenizer.decode([token]) for token in token_ids)
    whole, said = (text, ()) if conversation is None else conversation.with_reply(token_ids[len(prompt) :])
    return Trace(str(whole), token_ids, tokens, len(prompt), tuple(taps), lens, kept.pop(-1, None), kept, said)


class _Conversation:
    """Messages as the model reads them, and what it replies."""

    def __init__(self, tokenizer: Any, messages: Messages, reply: bool) -> None:
        asked = reply or (len(messages) > 0 and chat.ROLES.get(str(messages[-1].get("role"))) == "user")
        self.tokenizer = tokenizer
        self.rendered = chat.render(tokenizer, messages, add_generation_prompt=asked)
        self.token_ids, self.extents = encode(tokenizer, self.rendered.text)
        for what in self.rendered.missing:
            log.warning("%s", what)

    def with_reply(self, reply: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        """The text of the messages and the reply, and the spans of all their tokens."""
        text, extents = decode_reply(self.tokenizer, self.token_ids, reply)
        offset, inside = len(self.rendered.text), chat.open_thought(self.rendered)
        marks = [*self.rendered.marks, *mark_reply(self.tokenizer, text, offset=offset, inside=inside)]
        extents = [*self.extents, *((offset + a, offset + b) for a, b in extents)]
        return self.rendered.text + text, spans_of(marks, extents, n_prompt=len(self.token_ids))


def _keep_inputs(lens: Lens, layers: Sequence[int], kept: dict[int, Tensor], stack: ExitStack) -> None:
    """Keep what the final norm (key -1) and the post-FFN norms of `layers` read."""
    watched: dict[int, nn.Module] = {}
    if families.indirect_writes(lens.model.config) is None:
        watched[-1] = norms.final_norm(lens.model)
    for layer in layers:
        norm = norms.post_ffn_norm(lens.blocks[layer])
        if norm is not None:
            watched[layer] = norm
    for key, module in watched.items():

        def keep(_module: Any, args: tuple[Tensor, ...], key: int = key) -> None:
            kept[key] = args[0].reshape(-1, args[0].shape[-1]).cpu()

        stack.callback(module.register_forward_pre_hook(keep).remove)


def _to_cpu(tap: ExpertTap) -> ExpertTap:
    output, logits = tap.output.cpu(), tap.router_logits
    return ExpertTap(
        tap.layer, tap.role, tap.token.cpu(), tap.slot.cpu(), tap.weight.cpu(), tap.offsets.cpu(),
        tap.activation.cpu(), None if logits is None else logits.cpu(), tap.n_tokens, lambda: output,
    )  # fmt: skip


def _margin(tap: ExpertTap) -> Float[Tensor, "row"]:
    if tap.router_logits is None:
        return torch.full((len(tap.token),), float("nan"))
    logits = tap.router_logits.float()
    rest = logits.clone()
    rest[tap.token, tap.expert] = float("-inf")
    return logits[tap.token, tap.expert] - rest.max(dim=-1).values[tap.token]


def _names(tap: ExpertTap, row: int) -> dict[str, Any]:
    shared = tap.role is Role.SHARED
    return {
        "layer": tap.layer,
        "role": str(tap.role),
        "slot": None if shared else int(tap.slot[row]),
        "expert": None if shared else int(tap.expert[row]),
    }
