"""Rows scaled to unit length."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(rows: Tensor) -> Tensor:
    """Scale each row of (N, D) to length 1; a row of zeros stays one.

    torch's ``normalize`` divides such a row by 1e-12, and its gradient with it. Discretised projections have
    rows of zeros, since zero is among their levels: 1e10 in one row's gradient ends a training.
    """
    return rows / row_lengths(rows)


def row_lengths(rows: Tensor) -> Tensor:
    """Lengths (N, 1) of rows (N, D); 1 of a row of zeros."""
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.where(lengths > 0, lengths, 1.0)
