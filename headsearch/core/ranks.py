"""Effective ranks of features and projections."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(rows: Tensor) -> float:
    """Compute RankMe (Garrido et al. 2023, equation 1; Roy and Vetterli 2007).

    exp of the entropy of the singular values of `rows` (N, D), normalised to sum 1: between 1 and
    min(N, D); 1 for a matrix of zeros. Rows are not centred.
    """
    values = torch.linalg.svdvals(rows.double())
    total = values.sum()
    shares = values / torch.where(total > 0, total, 1.0)
    return float(torch.special.entr(shares).sum().exp())
