"""``Steering``: what each arm wrote, how far it moved the next token, and what it scored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.causal.steering.contrast import Contrast, contrast
from moe_lens.causal.steering.direction import Direction, Push
from moe_lens.errors import BadOutput
from moe_lens.plots import number
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.capture.run import Run

TABLE = "steering"
CLEAN, STEERED = "clean", "steered"


@dataclass(frozen=True, repr=False, eq=False)
class Steering:
    """Texts and scores of a clean model, of one with steered experts, and of ones with controls steered instead.

    `frame` (steering.parquet) has one row per prompt and arm:
        arm          clean, steered, control_1, ...
        address      experts that were pushed
        strength     largest bias on their router logits; infinity where they are never chosen, or always
        kl           KL(clean || arm) of the next token along the clean text, nats
        reached      whether the arm's mean KL is the common one, within the tolerance
        matched      whether a control's first expert lies within the caliper of load and gate mass
        utmost       mean KL of the utmost push of the arm, NaN if it was not tried
        load         share of the clean texts' tokens, prompts included, that visit an expert of the arm, mean over them
        text         what was generated after `prompt_text`, `n_tokens` of it
        score        share of the text in matches of the target, or log-probability of the target text; NaN without
    """

    frame: pd.DataFrame
    curve: pd.DataFrame
    """Every strength that was tried: arm, strength, kl."""
    visits: pd.DataFrame
    """What the clean texts, prompts included, send to the experts of the layers concerned: layer, expert, load (share
    of the tokens), gate_mass."""
    settings: dict[str, Any]
    run: Run | None = field(default=None)

    @classmethod
    def of(cls, run: Run) -> Steering:
        """Read a result back from a run directory.

        Raises:
            BadOutput: the run holds none.
        """
        entry = run.manifest["commands"].get("steer")
        if entry is None or not run.has(TABLE):
            raise BadOutput(f"{run.path} holds no steering: run moe-lens steer -o {run.path} first")
        curve = pd.DataFrame(entry["curve"]).astype({"strength": float}).fillna({"strength": math.inf})
        return cls(run.frame(TABLE), curve, pd.DataFrame(entry["visits"]), entry["settings"], run)

    @property
    def direction(self) -> Direction:
        """What was done to which experts."""
        return Direction(tuple(Push(ExpertAddress.parse(e), way, v) for e, way, v in self.settings["pushes"]))

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(self.frame["arm"]))

    @property
    def side_by_side(self) -> dict[str, str]:
        """Arms to show beside each other and their titles: clean, steered, and the first control at the same KL."""
        arms = self.summary().set_index("arm")
        controls = [arm for arm in self.arms if arm not in (CLEAN, STEERED)]
        controls.sort(key=lambda arm: not arms.loc[arm, "reached"])
        return {
            arm: arm if arm == CLEAN else f"{arm}: {arms.loc[arm, 'address']}"
            for arm in [CLEAN, STEERED, *controls[:1]]
        }

    @property
    def is_scored(self) -> bool:
        return bool(self.frame["score"].notna().any())

    def text(self, prompt: int = 0, arm: str = STEERED) -> str:
        """What an arm wrote after a prompt, counted from 0."""
        at = (self.frame["prompt"] == prompt) & (self.frame["arm"] == arm)
        return str(self.frame.loc[at, "text"].iloc[0])

    @cached_property
    def _scores(self) -> pd.DataFrame:
        """Change of the score against the clean text: arms by prompts."""
        wide = self.frame.pivot(index="arm", columns="prompt", values="score").loc[self.arms]
        return wide - wide.loc[CLEAN]

    @cached_property
    def contrast(self) -> Contrast:
        """The steered change of the score beyond that of the controls that came to the KL asked for (see `contrast`).

        Without one (``kl=None``) all are pushed in the same way, and their KLs differ: see `summary`.
        """
        arms = self.summary().set_index("arm")
        compared = [arm for arm in self.arms if arm.startswith("control") and arms.loc[arm, "reached"]]
        changes = self._scores
        seed = int(self.settings["seed"])
        return contrast(changes.loc[STEERED].to_numpy(), changes.loc[compared].to_numpy(), seed=seed)

    def summary(self) -> pd.DataFrame:
        """One row per arm: experts, strength, mean KL, score and its change, prompts whose text changed."""
        clean = self.frame[self.frame["arm"] == CLEAN].set_index("prompt")["text"]
        changed = self.frame["text"] != self.frame["prompt"].map(clean)
        table = self.frame.assign(changed=changed).groupby("arm", sort=False)
        same = {name: (name, "first") for name in ("address", "load", "strength", "reached", "matched", "utmost")}
        found = table.agg(**same, kl=("kl", "mean"), changed=("changed", "sum"), score=("score", "mean")).reset_index()
        return found.assign(change=found["score"] - found.loc[found["arm"] == CLEAN, "score"].iloc[0])

    def finding(self) -> str:
        """What steering did, beside the controls, in one sentence."""
        parts = [self._moved()]
        if self.is_scored:
            parts.append(self._scored())
        else:
            arms = self.summary().set_index("arm")
            n = len(self.settings["prompts"])
            parts.append(f"the text changes for {arms.loc[STEERED, 'changed']} of {n} prompts")
        if controls := self._compared():
            parts.append(controls)
        return "; ".join(parts) + "."

    def _moved(self) -> str:
        row = self.summary().set_index("arm").to_dict("index")[STEERED]
        how = "altogether" if math.isinf(row["strength"]) else f"by {row['strength']:.2g} logits"
        said = f"with {self.direction} {how} the next token's distribution moves by {row['kl']:.2g} nats"
        kl = self.settings["kl"]
        if row["reached"] or kl is None:
            return said[0].upper() + said[1:]
        if row["utmost"] >= kl:
            return f"{said[0].upper()}{said[1:]} (it jumps past the {kl:g} that were asked for)"
        get = "gets" if len(self.direction.experts) == 1 else "get on average"
        most = max(self.visits.to_dict("records"), key=lambda visited: visited["load"])
        busiest = f"L{most['layer']}.E{most['expert']}"
        beside = "" if busiest in row["address"].split(", ") else f", {busiest} the most with {most['load']:.1%}"
        return (
            f"{said[0].upper()}{said[1:]} (no push moves it by the {kl:g} that were asked for; {row['address']} {get} "
            f"{row['load']:.1%} of the tokens{beside})"
        )

    def _scored(self) -> str:
        score = self.summary().set_index("arm")["score"]
        clean, steered = float(score[CLEAN]), float(score[STEERED])
        if self.settings["target_text"] is not None:
            return (
                f"log p of {self.settings['target_text']!r} goes from {number(clean, '.2f')} to "
                f"{number(steered, '.2f')} nats per token"
            )
        return f"matches of {self.settings['target']!r} cover {steered:.1%} of the text, {clean:.1%} of the clean one"

    def _compared(self) -> str:
        """How the controls fared, or why they cannot be compared."""
        arms = self.summary()
        controls = arms[arms["arm"].str.startswith("control")]
        if not len(controls):
            moved = float(arms.set_index("arm")["kl"][STEERED])
            why = "no other expert in its layer" if moved > 1e-5 else "nothing to compare them with"
            return f"no controls: there is {why}" if self.settings["controls"] else ""
        same = controls[controls["reached"]]
        if not len(same):
            return (
                f"none of {len(controls)} control experts moves it as much, so nothing tells these experts from others "
                f"(half of the controls come to {controls['utmost'].median():.1g} nats: ask for that KL)"
            )
        several = int((same["address"].str.count(",") + 1 > len(self.direction.experts)).sum())
        off = int((~same["matched"].astype(bool)).sum())
        notes = [f"{off} of other load"] * (off > 0) + [f"{several} of several experts"] * (several > 0)
        how = "at the same KL"
        if self.settings["kl"] is None:
            how = f"pushed in the same way, at a KL of {same['kl'].min():.2g} to {same['kl'].max():.2g}"
        who = f"{len(same)} control{'s' if len(same) > 1 else ''} {how}"
        who += f" ({', '.join(notes)})" if notes else ""
        if not self.is_scored:
            return f"{who} change it for {same['changed'].mean():.1f}"
        c = self.contrast
        interval = "" if math.isnan(c.low) else f" [{number(c.low, '+')}, {number(c.high, '+')}]"
        return (
            f"the change of {number(c.change, '+')} is {number(c.difference, '+')}{interval} beyond {who}, "
            f"rank p = {c.p:.2f} (never below {1 / (c.n_controls + 1):.2f} with {c.n_controls})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        found: dict[str, Any] = {
            "run": str(self.run.path) if self.run else None,
            "finding": self.finding(),
            "settings": self.settings,
            "arms": self.summary().to_dict("records"),
            "texts": self.frame[["prompt", "arm", "prompt_text", "text", "kl", "score"]].to_dict("records"),
        }
        if self.is_scored:
            found["contrast"] = vars(self.contrast)
        return found

    def plot(self) -> go.Figure:
        """Change of the score by arm, and KL by strength."""
        from moe_lens.causal.steering.figure import arms_and_strengths

        return arms_and_strengths(self)

    @property
    def changes(self) -> pd.DataFrame:
        """Change of the score against the clean text: one row per arm but the clean one, one column per prompt."""
        return self._scores.drop(index=CLEAN)

    def __repr__(self) -> str:
        return f"Steering({self.direction})\n{self.finding()}"

    def _repr_html_(self) -> str:
        from html import escape

        shown = self.side_by_side
        head = "".join(f"<th style='text-align:left'>{escape(title)}</th>" for title in ["prompt", *shown.values()])
        body = ""
        for at, prompt in enumerate(self.settings["prompts"]):
            cells = [prompt, *(self.text(at, arm) for arm in shown)]
            style = "white-space:pre-wrap;text-align:left;vertical-align:top"
            body += "<tr>" + "".join(f"<td dir='auto' style='{style}'>{escape(cell)}</td>" for cell in cells) + "</tr>"
        columns = ["arm", "address", "load", "strength", "kl", "changed", "score", "change"]
        table = self.summary()[columns].to_html(index=False, border=0, float_format=lambda v: f"{v:.3f}", na_rep="-")
        return f"<p>{escape(self.finding())}</p><table><tr>{head}</tr>{body}</table>{table}"
