"""Many small logistic regressions at once: damped Newton on the selected columns, batched over problems.

Each problem minimises ``1/2 |w|^2 + C sum_i s_i log(1 + exp(-y_i (w x_i + b)))``, the objective of
scikit-learn's ``LogisticRegression`` with an unpenalised intercept; ``s_i`` are sample weights. With at most
64 columns the Hessian is tiny, so Newton's method with step halving finds the exact optimum in a few steps,
and a batch of problems shares every step. Gradient and loss are float64, which fixes the optimum; the Hessian
only steers the step and is summed in float32, which halves the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

MAX_STEPS = 50
MAX_HALVINGS = 20


@dataclass(frozen=True)
class LogisticFit:
    """Coefficients on the scale of the features that were passed in."""

    coef: Float[Tensor, "problem k"]
    intercept: Float[Tensor, "problem"]
    converged: Bool[Tensor, "problem"]


def fit_logistic(
    x: Float[Tensor, "problem row k"],
    y: Float[Tensor, "problem row"],
    weight: Float[Tensor, "problem row"],
    *,
    c: float = 1.0,
    tolerance: float = 1e-9,
) -> LogisticFit:
    """Fit every problem of the batch to its exact optimum.

    Args:
        x: features, in float64 for an exact answer.
        y: 0 or 1.
        weight: sample weights; 0 for padding rows.
        c: inverse regularisation strength, as in scikit-learn.
        tolerance: on the gradient, relative to ``c`` times the total weight.
    """
    n_problems, n_rows, k = x.shape
    a = torch.cat([x.transpose(1, 2), x.new_ones(n_problems, 1, n_rows)], dim=1)
    work = _Batch(a, a.float(), y, c * weight, x.new_zeros(n_problems, k + 1))
    solution = x.new_zeros(n_problems, k + 1)
    converged = torch.zeros(n_problems, dtype=torch.bool)
    left = torch.arange(n_problems)  # which problems `work` still holds
    for _ in range(MAX_STEPS):
        gradient, probability = work.gradient()
        done = gradient.abs().amax(1) <= tolerance * work.scale
        solution[left] = work.w
        converged[left] = done
        if done.all():
            break
        if 2 * int(done.sum()) >= len(done):
            work, left = work.keep(~done), left[~done]
            gradient, probability = gradient[~done], probability[~done]
        if not work.step(gradient, probability):
            break
    return LogisticFit(solution[:, :k], solution[:, k], converged)


@dataclass(frozen=True)
class StandardisedFit:
    """Fits of standardised features, on the scale of the raw ones: ``logit = x @ coef + intercept``."""

    coef: Float[Tensor, "problem k"]
    intercept: Float[Tensor, "problem"]
    sd: Float[Tensor, "problem k"]
    """Of the raw features over the used rows; 0 where a feature is constant, whose coefficient is then 0."""
    converged: Bool[Tensor, "problem"]
    logit: Float[Tensor, "problem row"]
    """Of the rows that were fitted; without meaning on rows that were not used."""


def fit_standardised(
    x: Float[Tensor, "problem row k"],
    y: Float[Tensor, "problem row"],
    used: Bool[Tensor, "problem row"],
    weight: Float[Tensor, "problem row"] | None = None,
) -> StandardisedFit:
    """Standardise every feature over the used rows of its problem and fit (METRICS 1.1).

    Args:
        x: raw features in float64; any numbers in rows that are not used.
        y: 0 or 1.
        weight: sample weights, 0 where not used; balanced classes by default.

    The steps of the solver are fastest where ``problem * row * (k + 1)`` doubles fit the cache: a few megabytes.
    """
    n = used.sum(1)[:, None].clamp(min=1)
    x = x.transpose(1, 2)
    inside = used[:, None]
    mean = (x * inside).sum(2) / n
    centred = (x - mean[..., None]) * inside
    sd = ((centred * centred).sum(2) / n).sqrt()
    scale = torch.where(sd > 0, sd, 1.0)
    standard = (centred / scale[..., None]).transpose(1, 2)
    fit = fit_logistic(standard, y, balanced_weights(y, used) if weight is None else weight)
    logit = torch.bmm(standard, fit.coef[..., None]).squeeze(-1) + fit.intercept[:, None]
    coef = fit.coef / scale
    return StandardisedFit(coef, fit.intercept - (coef * mean).sum(1), sd, fit.converged, logit)


@dataclass
class _Batch:
    """Problems that are still being solved; the last feature of `a` is the intercept's.

    Rows lie along the last axis: every elementwise step then runs over long stretches of memory.
    """

    a: Float[Tensor, "problem k+1 row"]
    single: Float[Tensor, "problem k+1 row"]
    y: Float[Tensor, "problem row"]
    s: Float[Tensor, "problem row"]
    w: Float[Tensor, "problem k+1"]

    def __post_init__(self) -> None:
        self.penalty = self.a.new_ones(self.a.shape[1])
        self.penalty[-1] = 0.0
        self.scale = self.s.sum(1).clamp(min=1e-12)
        self.margin = torch.bmm(self.w[:, None], self.a).squeeze(1)
        self.loss = self._loss(self.margin, self.w)

    def keep(self, which: Bool[Tensor, "problem"]) -> _Batch:
        return _Batch(*(t[which] for t in (self.a, self.single, self.y, self.s, self.w)))

    def _loss(self, margin: Tensor, w: Tensor) -> Float[Tensor, "problem"]:
        return 0.5 * (self.penalty * w * w).sum(-1) + (self.s * (softplus(margin) - self.y * margin)).sum(-1)

    def gradient(self) -> tuple[Float[Tensor, "problem k+1"], Float[Tensor, "problem row"]]:
        p = self.margin.sigmoid()
        return self.penalty * self.w + torch.bmm(self.a, (self.s * (p - self.y))[..., None]).squeeze(-1), p

    def step(self, gradient: Float[Tensor, "problem k+1"], p: Float[Tensor, "problem row"]) -> bool:
        """One Newton step each, halved until the loss does not rise; False when no problem could move."""
        curvature = (self.s * p * (1 - p)).float()[:, None] * self.single
        hessian = torch.diag(self.penalty) + torch.bmm(curvature, self.single.transpose(1, 2)).double()
        hessian.diagonal(dim1=1, dim2=2).add_(1e-12 * self.scale[:, None])
        step = torch.linalg.solve(hessian, gradient)
        t = torch.ones_like(self.loss)[:, None]
        for halving in range(MAX_HALVINGS + 1):
            trial = self.w - t * step
            margin = torch.bmm(trial[:, None], self.a).squeeze(1)
            loss = self._loss(margin, trial)
            worse = ~(loss <= self.loss + 1e-13 * self.loss.abs())
            if not worse.any() or halving == MAX_HALVINGS:
                break
            t = torch.where(worse[:, None], t / 2, t)
        self.w = torch.where(worse[:, None], self.w, trial)
        self.margin = torch.where(worse[:, None], self.margin, margin)
        self.loss = torch.where(worse, self.loss, loss)
        return not bool(worse.all())


def balanced_weights(
    y: Float[Tensor, "problem row"], used: Bool[Tensor, "problem row"]
) -> Float[Tensor, "problem row"]:
    """Weights ``n / (2 n_class)`` on used rows, 0 elsewhere: scikit-learn's ``class_weight="balanced"``."""
    used_ = used.to(y.dtype)
    n = used_.sum(1, keepdim=True)
    positive = (used_ * y).sum(1, keepdim=True)
    weight = torch.where(y > 0.5, n / (2 * positive), n / (2 * (n - positive)))
    return torch.where(used, weight, 0.0)
