"""The sparse projector: an overcomplete autoencoder of which k latents a row stay.

Of Ouyang et al. 2025 ("Projection Head is Secretly an Information Bottleneck", arXiv 2503.00507). It is built
to train at d = 100,000 latents: a (B, d) matrix appears neither in the decoder nor in the backward pass. That
pays while few latents stay. On a CPU, F = 512, a step with 1 % of them takes a third of the time of dense
matrices, one with 20 % up to 1.6 times as long as they do.

B rows, F features, d latents, k of which a row keeps.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Rows encoded at once. Their activations take CHUNK / F of the memory of a weight, whatever d is; with fewer
# rows the matrix product is slower, with more it is no faster.
CHUNK: Final = 256


class Selection:
    """Which latents each row keeps: the places of the k nonzero entries a row of a (B, d) matrix S.

    S itself is never built. Its products read and write what is kept, and add up in an order fixed by the
    indices, without atomics: one selection gives the same bits every time.
    """

    def __init__(self, indices: Tensor, latents: int) -> None:
        """`indices` is (B, k) int64, distinct within a row and smaller than `latents` (d)."""
        self.indices = indices
        self.latents = latents

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries latent by latent: their places in `indices`, their rows, where each latent starts."""
        latents, order = self.indices.flatten().sort(stable=True)
        starts = torch.searchsorted(latents, torch.arange(self.latents, device=latents.device))
        return order, order // self.indices.shape[1], starts

    def spread(self, values: Tensor, table: Tensor) -> Tensor:
        """Compute S @ table, (B, F), for S with entries `values` (B, k) and `table` (d, F)."""
        return F.embedding_bag(self.indices, table, per_sample_weights=values, mode="sum")

    def collect(self, values: Tensor, rows: Tensor) -> Tensor:
        """Compute S.T @ rows, (d, F), for S with entries `values` (B, k) and `rows` (B, F).

        This is the gradient of `spread` in its table. It goes through the latents in order, so each row of
        the result is written once; embedding_bag's own backward scatters, which takes up to twice as long.
        """
        return self._collect(self._in_order(values), rows)

    def collect_and_match(self, values: Tensor, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `collect` and, for every kept entry, the product of its row with its latent's.

        `rows` is (B, F), `table` (d, F). The products, (B, k), are the gradient of `spread` in its values
        where `rows` is that of its result. They are also the gradient of <table, collect(values, rows)>, and
        taken as that, every row of `table` is read once and `rows` stays in the cache: fetching the rows of
        `table` in the order of `indices` takes two (k = 100) to eight times (k = 1,000) as long.
        """
        with torch.enable_grad():
            ordered = self._in_order(values.detach()).requires_grad_()
            collected = self._collect(ordered, rows.detach())
        (matched,) = torch.autograd.grad(collected, ordered, table.detach())
        # `order` is a permutation: each product goes to one place. Differentiating through an index would add
        # them up there instead, for which CUDA sorts all B k places.
        products = torch.empty_like(matched).index_copy_(0, self._by_latent[0], matched)
        return collected.detach(), products.view_as(values)

    def _in_order(self, values: Tensor) -> Tensor:
        """Values (B, k) latent by latent, (B k,)."""
        return values.flatten().index_select(0, self._by_latent[0])

    def _collect(self, ordered: Tensor, rows: Tensor) -> Tensor:
        _, sources, starts = self._by_latent
        return F.embedding_bag(sources, rows, starts, per_sample_weights=ordered, mode="sum")


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Selection]:
        # The order decides how the CPU rounds sums of latents. CUDA need not sort B k values for it.
        ordered = rows.device.type == "cpu"
        chunks = [
            torch.addmm(bias, chunk, weight.T).topk(k, dim=1, sorted=ordered) for chunk in rows.split(CHUNK)
        ]
        kept = torch.cat([values for values, _ in chunks])
        ctx.selection = Selection(torch.cat([indices for _, indices in chunks]), len(weight))
        ctx.save_for_backward(rows, weight)
        return kept, ctx.selection

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        selection: Selection = ctx.selection
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = selection.spread(gradient, weight)
        if ctx.needs_input_grad[1]:
            of_weight = selection.collect(gradient, rows)
        if ctx.needs_input_grad[2]:
            of_bias = selection.collect(gradient, rows.new_ones(len(rows), 1)).squeeze(1)
        return of_rows, of_weight, of_bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, selection: Selection) -> Tensor:
        ctx.selection = selection
        ctx.save_for_backward(values, weight)
        return selection.spread(values, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        of_weight, of_values = ctx.selection.collect_and_match(values, gradient.contiguous(), weight)
        return of_values, of_weight, None


def encode(rows: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Selection]:
    """Compute ``rows @ weight.T + bias`` and keep the k largest of each row, (B, k).

    `rows` is (B, F), `weight` (d, F), `bias` (d,); all three get gradients through what is kept. Among equals
    it is open which are. On a CPU the largest come first, elsewhere they come in any order.
    """
    kept, selection = _Encode.apply(rows, weight, bias, k)
    return kept, selection


def decode(values: Tensor, selection: Selection, weight: Tensor) -> Tensor:
    """Compute the sum of each row's kept latents of `weight` (d, F), times their `values` (B, k): (B, F)."""
    result: Tensor = _Decode.apply(values, weight, selection)
    return result


class TopKAutoencoder(nn.Module):
    """A head that reconstructs nothing: a top-k autoencoder trained by the contrastive loss alone.

    Ouyang et al. 2025, arXiv 2503.00507, with the parts of Gao et al. 2024, arXiv 2406.04093: untied weights
    and one bias b before and after::

        z = topk(relu((x - b) @ encoder_weight.T + encoder_bias), k) @ decoder_weight + decoder_bias + b

    topk leaves the k largest and sets the others to zero; gradients pass through those that are left and
    positive. Both weights are (d, F), the decoder's that is transposed, so that a latent's direction is a
    contiguous row. Linear maps start as nn.Linear's do, b at zero. Parameters: 2 d F + d + 2 F.
    """

    def __init__(self, features: int, latents: int, k: int) -> None:
        """Draw weights from the default generator. Raises ValueError unless 1 <= `k` <= `latents`."""
        super().__init__()
        if not 1 <= k <= latents:
            raise ValueError(f"k: between 1 and {latents} (the latents) wanted, {k} given")
        self.k = k
        self.pre_bias = nn.Parameter(torch.zeros(features))
        self.encoder_weight = nn.Parameter(torch.empty(latents, features))
        self.encoder_bias = nn.Parameter(torch.empty(latents))
        self.decoder_weight = nn.Parameter(torch.empty(latents, features))
        self.decoder_bias = nn.Parameter(torch.empty(features))
        for parameter in (self.encoder_weight, self.encoder_bias):
            nn.init.uniform_(parameter, -(features**-0.5), features**-0.5)
        for parameter in (self.decoder_weight, self.decoder_bias):
            nn.init.uniform_(parameter, -(latents**-0.5), latents**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Project `features` (B, F) to (B, F), in the precision of the weights also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            rows = features.to(self.pre_bias.dtype) - self.pre_bias
            kept, selection = encode(rows, self.encoder_weight, self.encoder_bias, self.k)
            # relu keeps the order, so that k of all pre-activations are k of the activations; and the rows
            # with fewer positives than k choose their zeros without sorting through ties
            decoded = decode(F.relu(kept), selection, self.decoder_weight)
            return decoded + self.decoder_bias + self.pre_bias

    def extra_repr(self) -> str:
        """Show what the constructor was given."""
        latents, features = self.encoder_weight.shape
        return f"features={features}, latents={latents}, k={self.k}"
