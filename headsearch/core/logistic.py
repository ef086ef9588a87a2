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
    """
    rows = features.double()
    mean, scale = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(scale > CONSTANT_SPREAD * mean.abs(), scale, 1.0)
    rows = (rows - mean) / scale
    if start is None:
        weight, bias = rows.new_zeros(classes, rows.shape[1]), rows.new_zeros(classes)
    else:
        weight, bias = start.weight.clone(), start.bias.clone()
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=iterations,
        max_eval=2 * iterations + 10,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(rows, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearProbe(mean, scale, weight.detach(), bias.detach())
