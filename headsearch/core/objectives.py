"""Losses on the projections of two views."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Compute normalised temperature-scaled cross entropy (Chen et al. 2020, equation 1), fp32 scalar.

    `projections` is (2N, P): the first views of N images, then their second views. Every row is an anchor
    whose positive is its image's other view and whose negatives are the other 2N - 2 rows; the loss is the
    mean over all 2N anchors. (google-research/simclr, objective.py, adds up two means of N: twice this.)
    """
    with torch.autocast(projections.device.type, enabled=False):
        directions = F.normalize(projections.float(), dim=1)
        similarities = directions @ directions.T / temperature
        similarities = similarities.fill_diagonal_(-torch.inf)
        anchors = torch.arange(len(projections), device=projections.device)
        return F.cross_entropy(similarities, anchors.roll(len(projections) // 2))
