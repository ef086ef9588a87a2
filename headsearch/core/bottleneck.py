"""Mutual information of features and projections, by matrix-based Renyi entropies of order 2.

Ouyang et al. 2025, section 3 (Projector_Theory, methods/simclr.py), who penalise it and bound what features
know of labels with it. All in fp32: the paper's code computes it in 16 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headsearch.core.directions import unit_rows


def renyi_entropy(gram: Tensor) -> Tensor:
    """Compute -log(|K|_F^2 / n^2) of a Gram matrix K (n, n) with unit diagonal: between 0 and log n."""
    return 2 * math.log(len(gram)) - gram.square().sum().log()


def mutual_information(features: Tensor, projections: Tensor) -> Tensor:
    """Compute H(K1) + H(K2) - H(K1 o K2) of features (2N, F) and projections (2N, P), fp32 scalar.

    K1 and K2 are the Gram matrices of rows scaled to unit length, o is their elementwise product. Gradients
    reach both arguments. Rows of zeros, which only a collapsed head has many of, lower all three.
    """
    return _entropies(features, projections)[1]


def bounds(features: Tensor, projections: Tensor, loss_on_features: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate a lower and an upper bound on I(labels; features) up to constants (section 3.1).

    lower = -loss_on_features - MI, upper = H(K1) - MI, where `loss_on_features` is the self-supervised loss
    computed on features (2N, F) in place of projections (2N, P).
    """
    entropy, information = _entropies(features, projections)
    return -loss_on_features - information, entropy - information


def _entropies(features: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(features.device.type, enabled=False):
        first, second = (_gram(rows) for rows in (features, projections))
        entropy = renyi_entropy(first)
        return entropy, entropy + renyi_entropy(second) - renyi_entropy(first * second)


def _gram(rows: Tensor) -> Tensor:
    directions = unit_rows(rows.float())
    return directions @ directions.T
