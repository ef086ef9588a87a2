"""Multinomial logistic regression on standardised features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

CONSTANT_SPREAD: Final = 1e-6
"""Features whose standard deviation is below this share of their mean are constant up to rounding."""


@dataclass(frozen=True)
class LinearProbe:
    """logits (N, K) = (features - mean) / scale @ weight.T + bias, all float64."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Predict classes, int64 (N,), of features (N, D)."""
        standardised = (features.double() - self.mean) / self.scale
        return F.linear(standardised, self.weight, self.bias).argmax(1)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Compute the share of features (N, D) whose class is predicted."""
        return float((self.predict(features) == labels).double().mean())


def fit_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    penalty: float,
    iterations: int,
    start: LinearProbe | None = None,
) -> LinearProbe:
    """Fit the probe W (K, D), b (K,).

    It minimises::

        mean over rows of cross_entropy(W x + b, y)  +  penalty / 2 * |W|^2

    where x are the features (N, D) standardised with their own mean and population standard deviation (1
    where a feature is constant); the bias is not penalised. scikit-learn's LogisticRegression minimises the
    same at ``C = 1 / (penalty * N)``. Full-batch L-BFGS with strong Wolfe line search in float64, at most
    `iterations`, from `start` or zeros.

    Loss and gradient are computed where the features are. L-BFGS itself works on the CPU: it looks at some
    twenty numbers an iteration, and at two more for each step that it remembers, up to a hundred. On a GPU,
    the host would wait for each of them; this way it waits once an evaluation.
    """
    rows = features.double()
    mean, scale = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(scale > CONSTANT_SPREAD * mean.abs(), scale, 1.0)
    rows = (rows - mean) / scale
    weight = torch.zeros(classes, rows.shape[1], dtype=rows.dtype)
    bias = torch.zeros(classes, dtype=rows.dtype)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=2 * iterations + 10,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        here = [part.to(rows.device, copy=True).requires_grad_() for part in (weight, bias)]
        loss = F.cross_entropy(F.linear(rows, *here), labels) + penalty / 2 * here[0].square().sum()
        of_weight, of_bias = torch.autograd.grad(loss, here)
        found = torch.cat([of_weight.flatten(), of_bias, loss.detach()[None]]).cpu()  # one read of the device
        weight.grad, bias.grad = found[: weight.numel()].view_as(weight), found[weight.numel() : -1]
        return found[-1]

    optimizer.step(objective)
    return LinearProbe(mean, scale, *(part.detach().to(rows.device) for part in (weight, bias)))
