"""Losses on the projections of two views."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from headsearch.config import BarlowTwinsObjective, ObjectiveConfig
from headsearch.core.bottleneck import mutual_information
from headsearch.core.ntxent import NTXent

NORM_EPS: Final = 1e-5
"""Of the batch normalisation inside Barlow Twins, torch's default."""


def nt_xent(projections: Tensor, temperature: float, scale: float = 1.0) -> Tensor:
    """Compute normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1), fp32 scalar.

    `projections` is (2N, P): the first views of N images, then their second views. Every row is an anchor
    whose positive is its image's other view and whose negatives are the other 2N - 2 rows; the loss is
    `scale` times the mean over all 2N anchors. (google-research/simclr, objective.py, adds up two means of N:
    `scale` 2.)
    """
    with torch.autocast(projections.device.type, enabled=False):
        loss: Tensor = NTXent.apply(projections.float(), temperature)
        return scale * loss


def barlow_twins(projections: Tensor, redundancy_weight: float, scale: float) -> Tensor:
    """Compute the Barlow Twins loss (Zbontar et al. 2021, equation 1), fp32 scalar.

    `projections` is (2N, P) as in `nt_xent`. Each view's N rows are normalised per dim with their own mean
    and population variance; C (P, P) is their cross-correlation over N. The loss is `scale` times (sum of
    (C_ii - 1)^2 + `redundancy_weight` * sum of C_ij^2 for i != j), as in solo-learn, losses/barlow.py.
    """
    with torch.autocast(projections.device.type, enabled=False):
        first, second = (
            F.batch_norm(rows, None, None, training=True, eps=NORM_EPS)
            for rows in projections.float().chunk(2)
        )
        correlation = first.T @ second / len(first)
        diagonal = correlation.diagonal()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return scale * ((diagonal - 1).square().sum() + redundancy_weight * redundancy)


def contrast(config: ObjectiveConfig, projections: Tensor) -> Tensor:
    """Compute the loss of `config` on projections (2N, P), without its penalty."""
    if isinstance(config, BarlowTwinsObjective):
        return barlow_twins(projections, config.redundancy_weight, config.scale)
    return nt_xent(projections, config.temperature, config.scale)


def objective(config: ObjectiveConfig, features: Tensor, projections: Tensor) -> Tensor:
    """Compute what is minimised: the loss on projections (2N, P), and the penalty with features (2N, F)."""
    loss = contrast(config, projections)
    if config.bottleneck_weight:
        loss = loss + config.bottleneck_weight * mutual_information(features, projections)
    return loss
