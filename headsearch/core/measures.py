"""What a representation is like besides its accuracy: geometry, neighbours, inactive head units."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from headsearch.core.directions import unit_rows

CONSTANT_SPREAD: Final = 1e-6
"""A unit that spreads less, relative to its largest value or 1, is constant up to rounding."""
NEAR_BOUND: Final = 0.01
"""Share of an activation's range that counts as at its bound."""
SIMILARITIES: Final = 1 << 25
"""Similarities that are in memory at once, each of 8 bytes."""
MOSTLY: Final = 0.95
"""Share of images for which a saturated unit is at a bound."""


def alignment(first: Tensor, second: Tensor) -> float:
    """Compute the mean squared distance of positive pairs, rows (N, D) scaled to unit length.

    Wang and Isola 2020, alpha = 2: 0 for views that coincide, 4 for opposite ones; smaller is better.
    """
    return float((_directions(first) - _directions(second)).square().sum(1).mean())


def uniformity(rows: Tensor) -> float:
    """Compute log mean exp(-2 |x - y|^2) over all pairs of different rows (N, D) scaled to unit length.

    Wang and Isola 2020, t = 2: 0 where all coincide, about -4 where they fill the sphere.
    """
    distances = torch.pdist(_directions(rows)).square()
    return float(torch.logsumexp(-2 * distances, 0) - torch.tensor(float(len(distances))).log())


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Classify features (M, D) by their `k` nearest rows of `train` (N, D); the share that is right.

    Cosine similarity; a neighbour votes for its class with exp(similarity / temperature) (Wu et al. 2018;
    solo-learn, utils/knn.py; lightly, utils/benchmarking/knn.py). Features are compared `SIMILARITIES` at a
    time.
    """
    bank, right = _directions(train).T, 0
    size = max(1, SIMILARITIES // len(train))
    for rows, wanted in zip(features.split(size), labels.split(size), strict=True):
        similarities, nearest = (_directions(rows) @ bank).topk(min(k, len(train)), dim=1)
        votes = similarities.new_zeros(len(rows), classes)
        # relative to the nearest one, so that no temperature overflows
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        # One neighbour of each row at a time: CUDA adds up several of one class in any order.
        for voter, weight in zip(train_labels[nearest].split(1, dim=1), weights.split(1, dim=1), strict=True):
            votes.scatter_add_(1, voter, weight)
        right += int((votes.argmax(1) == wanted).sum())
    return right / len(features)


def dead_units(hidden: Tensor) -> float:
    """Compute the share of units that are constant up to rounding over all rows (N, U)."""
    spread = hidden.amax(0) - hidden.amin(0)
    return float((spread <= CONSTANT_SPREAD * hidden.abs().amax(0).clamp(min=1.0)).double().mean())


def saturated_units(hidden: Tensor, low: float | None, high: float | None) -> float:
    """Compute the share of units that are at a bound of their activation for nearly all rows (N, U).

    At a bound is within `NEAR_BOUND` of the range from `low` to `high`; 0 for an unbounded activation.
    """
    if low is None or high is None:
        return 0.0
    margin = NEAR_BOUND * (high - low)
    outside = (hidden <= low + margin) | (hidden >= high - margin)
    return float((outside.double().mean(0) >= MOSTLY).double().mean())


def _directions(rows: Tensor) -> Tensor:
    return unit_rows(rows.double())
