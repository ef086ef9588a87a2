"""Projection heads: one class per kind, so that no field can be set that means nothing for the head."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from headsearch.config.part import Config, Dim

Activation = Literal["identity", "relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "mish"]
Width = Dim | Literal["features"]


class Head(Config):
    """What all heads share."""

    levels: int = Field(default=0, ge=0, le=10_000)
    """Discretise the projections to this many levels per dim before the loss (Ouyang et al. 2025); 0 leaves
    them as they are. Small projections all round to zero: few levels need a head whose outputs are near 1,
    and 2 levels learn nothing from torch's initialisation: all projections are 0, and so is the gradient."""

    @model_validator(mode="after")
    def _two_levels(self) -> Self:
        if self.levels == 1:
            raise ValueError("head.levels: 1 level holds no information; 0 turns it off, else 2 or more")
        return self


class MlpHead(Head):
    """Linear layers with an activation between them; SimCLR's head at depth 2."""

    kind: Literal["mlp"] = "mlp"
    """Multi-layer perceptron."""
    depth: int = Field(default=2, ge=2, le=8)
    """Number of linear layers; a head of one layer is kind `linear`."""
    width: Width = 128
    """Units of each hidden layer (projector width); `features` is the encoder's feature dim."""
    activation: Activation = "relu"
    """Between layers, never after the last."""
    batch_norm: bool = False
    """Batch normalisation after each hidden layer, whose bias is then left out."""
    output_norm: Literal["none", "batch_norm", "batch_norm_no_offset"] = "none"
    """Batch normalisation after the last layer, whose bias is then left out; google-research/simclr's has no
    offset."""
    weight_std: float | None = Field(default=None, gt=0.0)
    """Draw weights from N(0, weight_std^2), as google-research/simclr does with 0.01; none keeps torch's
    default."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability that a hidden unit is dropped in a training step: a control of capacity."""
    normalize_input: bool = False
    """Scale features to unit length before the first layer."""
    frozen: bool = False
    """Keep the whole head at its random initialisation: a control."""
    projection_dim: Dim = 64
    """Output size."""


class AutoencoderHead(Head):
    """Linear(features, E), activation, Linear(E, projection dim), the first layer an autoencoder's.

    The autoencoder is shallow and trained on the raw images (Schliebitz et al. 2024; code: simclr-ae,
    models/simclr/utils.py).
    """

    kind: Literal["autoencoder"] = "autoencoder"
    """Head with an autoencoder's embedding layer."""
    embedding_dim: Dim = 128
    """E, the autoencoder's embedding dim."""
    frozen: bool = True
    """Keep the first layer as it was pretrained; false lets it train with the rest."""
    first_layer: Literal["pretrained", "random"] = "pretrained"
    """`random` is the control that the paper lacks: the same layer at random initialisation."""
    activation: Activation = "relu"
    """Between the two layers."""
    projection_dim: Dim = 64
    """Output size."""


class SparseHead(Head):
    """A top-k autoencoder whose reconstruction is the projection (Ouyang et al. 2025).

    Trained by the loss on projections alone: there is no reconstruction loss. The projection dim is that of
    its input, the feature dim or `block_width`.
    """

    kind: Literal["sparse"] = "sparse"
    """Sparse projector."""
    latents: int = Field(default=4096, ge=1, le=10_000_000)
    """d, units of the hidden layer. The paper's code ships 100,000."""
    k: int = Field(default=64, ge=1)
    """Units that stay active per image. Reviews give 0.001 d for SimCLR and 0.2 d for Barlow Twins, the
    shipped configurations 0.01 d."""
    block_width: Dim | None = None
    """Put Linear(features, block_width), batch norm and ReLU before it, as in their Barlow Twins."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.latents:
            raise ValueError(f"head.k: {self.k} is more than head.latents = {self.latents}")
        return self


class ReweightHead(Head):
    """Feature i times kappa^-i, fixed: a head without parameters (Xue et al. 2024)."""

    kind: Literal["reweight"] = "reweight"
    """Fixed reweighting of features; the projection dim is the feature dim."""
    kappa: float = Field(default=1.05, gt=1.0, le=1e6)
    """Ratio of neighbouring weights. The default is ours."""


class LinearHead(Head):
    """One linear layer with bias."""

    kind: Literal["linear"] = "linear"
    """Linear projection."""
    normalize_input: bool = False
    """Scale features to unit length before the layer."""
    frozen: bool = False
    """Keep the layer at its random initialisation: a control."""
    projection_dim: Dim = 64
    """Output size."""


class NoHead(Head):
    """The loss sees the features themselves; the projection dim is the feature dim."""

    kind: Literal["none"] = "none"
    """No projection head."""


HeadConfig = Annotated[
    MlpHead | AutoencoderHead | SparseHead | ReweightHead | LinearHead | NoHead, Field(discriminator="kind")
]
