"""Discretised projections (Ouyang et al. 2025, after finite scalar quantisation, Mentzer et al. 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def discretise(projections: Tensor, levels: int) -> Tensor:
    """Round each value to one of `levels` levels between -1 and 1, elementwise.

    With L levels: half = (L - 1)(1 - 1e-3) / 2, offset = 0.5 for even L, else 0, shift = tan(offset / half);
    the value is round(tanh(z + shift) half - offset) / floor(L / 2), its gradient that of the same without
    rounding (straight-through). Projector_Theory, methods/simclr.py, `forward`. Raises ValueError for fewer
    than two levels.

    Two levels learn nothing: they are -1 and 0, and -1 begins below z = -1.56, where no projection is at
    torch's initialisation. All projections are then the zero vector, and the gradient of a contrastive loss,
    a weighted sum of the other projections, is zero in the source's formula as well.
    """
    if levels < 2:
        raise ValueError(f"levels: {levels} is less than 2")
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    with torch.autocast(projections.device.type, enabled=False):
        bounded = torch.tanh(projections.float() + math.tan(offset / half)) * half - offset
        return (bounded + (bounded.round() - bounded).detach()) / (levels // 2)


class Levels(nn.Module):
    """`discretise` as the last layer of a head."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, projections: Tensor) -> Tensor:
        """Discretise projections (B, P)."""
        return discretise(projections, self.levels)

    def extra_repr(self) -> str:
        """Say how many levels."""
        return str(self.levels)
