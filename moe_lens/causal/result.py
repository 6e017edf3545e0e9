"""Effects of one edit, one row per prediction: ``TokenEffects``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.causal.evaluation import Evaluation
    from moe_lens.causal.scoring import Wanted
    from moe_lens.models.edits import EditRecord


@dataclass(frozen=True, eq=False)
class TokenEffects:
    """What an edit does to each prediction. Nats; a positive `delta` means that the edit hurts.

    It says what the model loses without a part, not what the part contributes when others could stand in for it
    (two experts that do the same show nothing one at a time), and under ``zero`` it mixes lost information with an
    input that later layers have never seen. Tokens of a document are not independent: intervals are over documents.
    """

    edit: str
    """Modes and experts, as in ``zero(L1.E3)``."""
    routing: str
    text: Evaluation = field(repr=False)
    touched: Bool[ndarray, "prediction"] = field(repr=False)
    """Whether the predicting token itself visits an edited expert in the clean pass, within scope. Effects at other
    tokens come through attention."""
    nll_clean: Float[ndarray, "prediction"] = field(repr=False)
    """Negative log-likelihood of the next token."""
    nll: Float[ndarray, "prediction"] = field(repr=False)
    """The same under the edit."""
    kl: Float[ndarray, "prediction"] = field(repr=False)
    """KL(full || ablated) of the prediction; NaN if not asked for."""
    top1_clean: Int[ndarray, "prediction"] = field(repr=False)
    """Most likely next token; -1 if not asked for."""
    top1: Int[ndarray, "prediction"] = field(repr=False)
    logit_difference_clean: Float[ndarray, "prediction pair"] = field(repr=False)
    """Logit of a minus logit of b for each pair that was asked for."""
    logit_difference: Float[ndarray, "prediction pair"] = field(repr=False)
    record: EditRecord = field(repr=False)
    """What was changed, over all passes."""
    wanted: Wanted = field(repr=False)

    @property
    def delta(self) -> Float[ndarray, "prediction"]:
        """Rise of the NLL: minus the change of the target's log-probability."""
        return self.nll - self.nll_clean

    @property
    def log_p(self) -> Float[ndarray, "prediction"]:
        """Log-probability of the next token under the edit."""
        return -self.nll

    def __len__(self) -> int:
        return len(self.nll)

    @property
    def mean(self) -> float:
        """Mean rise of the NLL, nats per token."""
        return float(self.delta.mean(dtype=np.float64))

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per prediction: document, window, position, touched, nll_clean, nll, delta, and what was asked for.

        ``agrees`` is whether the most likely token stays; ``logit_difference_i`` the change for pair i.
        """
        import pandas as pd

        frame = pd.DataFrame({
            "document": self.text.document, "window": self.text.window, "position": self.text.position,
            "touched": self.touched, "nll_clean": self.nll_clean, "nll": self.nll, "delta": self.delta,
        })  # fmt: skip
        if self.wanted.kl:
            frame["kl"] = self.kl
        if self.wanted.top1:
            frame["agrees"] = self.top1 == self.top1_clean
        for pair, change in enumerate((self.logit_difference - self.logit_difference_clean).T):
            frame[f"logit_difference_{pair}"] = change
        return frame

    @cached_property
    def documents(self) -> pd.DataFrame:
        """One row per document: tokens and touched tokens, and sums over tokens of everything else in `frame`.

        Cluster bootstraps and sign-flip tests start here (METRICS 2.5).
        """
        frame = self.frame.drop(columns=["window", "position"])
        frame = frame.astype({name: np.float64 for name in frame if frame[name].dtype == np.float32})
        sums = frame.groupby("document", sort=True).sum()
        sums.insert(0, "tokens", frame.groupby("document", sort=True).size())
        return sums.reset_index()

    def _repr_html_(self) -> str:
        head = f"{self.edit}, {self.routing} routing: {self.mean:+.4f} nats per token over {len(self):,} tokens"
        return f"<p>{head}</p>{self.documents.head(12).to_html(index=False)}"
