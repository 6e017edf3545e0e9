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
    n_problems, _, k = x.shape
    a = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=-1)
    single = a.float()
    penalty = x.new_ones(k + 1)
    penalty[-1] = 0.0
    s = c * weight
    scale = s.sum(1).clamp(min=1e-12)
    w = x.new_zeros(n_problems, k + 1)
    margin = x.new_zeros(*y.shape)
    loss = _loss(margin, y, s, w, penalty)
    converged = torch.zeros(n_problems, dtype=torch.bool)
    for _ in range(MAX_STEPS):
        p = margin.sigmoid()
        gradient = penalty * w + torch.bmm((s * (p - y))[:, None], a).squeeze(1)
        converged = gradient.abs().amax(1) <= tolerance * scale
        if converged.all():
            break
        curvature = (s * p * (1 - p)).float()[..., None] * single
        hessian = torch.diag(penalty) + torch.bmm(curvature.transpose(1, 2), single).double()
        hessian.diagonal(dim1=1, dim2=2).add_(1e-12 * scale[:, None])
        step = torch.linalg.solve(hessian, gradient)
        w, margin, loss, moved = _halving(w, step, a, y, s, penalty, loss)
        if not moved:
            break
    return LogisticFit(w[:, :k], w[:, k], converged)


def _loss(margin: Tensor, y: Tensor, s: Tensor, w: Tensor, penalty: Tensor) -> Float[Tensor, "problem"]:
    return 0.5 * (penalty * w * w).sum(-1) + (s * (softplus(margin) - y * margin)).sum(-1)


def _halving(
    w: Tensor, step: Tensor, a: Tensor, y: Tensor, s: Tensor, penalty: Tensor, loss: Tensor
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Take each problem's Newton step, halved until its loss does not rise; a problem may stay where it is."""
    t = torch.ones_like(loss)[:, None]
    slack = 1e-13 * loss.abs()
    worse = torch.ones_like(loss, dtype=torch.bool)
    for _ in range(MAX_HALVINGS):
        trial = w - t * step
        margin = torch.bmm(a, trial[..., None]).squeeze(-1)
        new = _loss(margin, y, s, trial, penalty)
        worse = ~(new <= loss + slack)
        if not worse.any():
            return trial, margin, new, True
        t = torch.where(worse[:, None], t / 2, t)
    trial = torch.where(worse[:, None], w, w - t * step)
    margin = torch.bmm(a, trial[..., None]).squeeze(-1)
    return trial, margin, _loss(margin, y, s, trial, penalty), bool((~worse).any())


def balanced_weights(
    y: Float[Tensor, "problem row"], used: Bool[Tensor, "problem row"]
) -> Float[Tensor, "problem row"]:
    """Weights ``n / (2 n_class)`` on used rows, 0 elsewhere: scikit-learn's ``class_weight="balanced"``."""
    used_ = used.to(y.dtype)
    n = used_.sum(1, keepdim=True)
    positive = (used_ * y).sum(1, keepdim=True)
    weight = torch.where(y > 0.5, n / (2 * positive), n / (2 * (n - positive)))
    return torch.where(used, weight, 0.0)
