"""NT-Xent with its gradient written out.

Left to autograd, loss and gradient take some thirty operations and, beside the (2N, 2N) similarities, five
tensors of their size. Written out they take half the operations, which is what a small encoder waits for, and
two such tensors, which is what a large batch needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headsearch.core.directions import row_lengths


class NTXent(torch.autograd.Function):
    """Mean over all 2N anchors, of fp32 projections (2N, P) and a temperature; see `objectives.nt_xent`.

    With unit rows D, similarities S = D D^T / t without their diagonal, and P their softmax by rows, the loss
    is -mean_i log P[i, i'], where i' is i's positive. dS is (P - 1[j = i']) / 2N; its two sides meet in
    dD = (dS + dS^T) D / t; and a row's gradient is dD's part across the row, over the row's length.
    """

    @staticmethod
    def forward(ctx: Any, projections: Tensor, temperature: float) -> Tensor:
        """Compute the loss, a scalar, and where it will be asked for, the gradient."""
        count, half = len(projections), len(projections) // 2
        lengths = row_lengths(projections)
        directions = projections / lengths
        similarities = torch.mm(directions * (1 / temperature), directions.T).fill_diagonal_(-torch.inf)
        chances = similarities.softmax(1)
        # A positive's own chance may be too small for fp32. The largest of a row never is, and tells the
        # row's logsumexp: log P = S - logsumexp.
        totals = similarities.amax(1) - chances.amax(1).log_()
        alike = similarities.diagonal(half)  # of first views; the second views' are the same numbers
        loss = (totals.view(2, half) - alike).mean()
        if ctx.needs_input_grad[0]:
            for place in (half, -half):
                chances.diagonal(place).sub_(1)
            # Copied first: adding the transposed as it lies takes three times as long.
            both = similarities.copy_(chances.T).add_(chances)
            slope = torch.mm(both, directions)
            along = (slope * directions).sum(1, keepdim=True)
            slope.addcmul_(directions, along, value=-1)
            ctx.save_for_backward(slope.div_(lengths * (temperature * count)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * slope, None
