"""Projection heads: features (B, F) in, projections (B, P) out.

One builder per kind in `HEADS`. F is the encoder's feature dim, P the projection dim. A head is a sequence of
layers, so that each can be probed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from headsearch.config import (
    Activation,
    AutoencoderHead,
    HeadConfig,
    LinearHead,
    MlpHead,
    ReweightHead,
    SparseHead,
    TrialConfig,
)
from headsearch.core.directions import unit_rows
from headsearch.core.encoders import feature_dim
from headsearch.core.levels import Levels
from headsearch.core.sparse import TopKAutoencoder

ACTIVATIONS: Final[Mapping[Activation, Callable[[], nn.Module]]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "mish": nn.Mish,
}


class UnitLength(nn.Module):
    """Scales each row to unit length."""

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (B, F) of length 1."""
        return unit_rows(rows.float())


class Reweighting(nn.Module):
    """Fixed weights kappa^-i, i from 0, on features (Xue et al. 2024; their ReweightProjectionHead)."""

    weights: Tensor

    def __init__(self, features: int, kappa: float) -> None:
        super().__init__()
        exponents = torch.arange(features, dtype=torch.float64)
        self.register_buffer("weights", (kappa**-exponents).float())

    def forward(self, features: Tensor) -> Tensor:
        """Weigh features (B, F)."""
        return features * self.weights


def mlp(config: HeadConfig, features: int, _: nn.Linear | None) -> list[nn.Module]:
    """Build a multi-layer perceptron (SimCLR, Chen et al. 2020, section 2.1; deeper in SimCLRv2).

    Linear(F, W), activation, [Linear(W, W), activation] * (depth - 2), Linear(W, P); with batch norm between
    each hidden layer and its activation if asked, and after the output layer if asked, and then without that
    layer's bias, which the norm's shift replaces. Parameters: F W + (depth - 2) W^2 + W P + (depth - 1) W *
    (2 if batch norm else 1) + P * (1, with output norm 2, or 1 where that has no offset).
    """
    assert isinstance(config, MlpHead)  # noqa: S101
    layers: list[nn.Module] = [UnitLength()] if config.normalize_input else []
    size = features
    width = features if config.width == "features" else config.width
    for _layer in range(config.depth - 1):
        layers.append(_linear(size, width, config.weight_std, bias=not config.batch_norm))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[config.activation]())
        if config.dropout:
            layers.append(nn.Dropout(config.dropout))
        size = width
    plain = config.output_norm == "none"
    layers.append(_linear(size, config.projection_dim, config.weight_std, bias=plain))
    if not plain:
        layers.append(_output_norm(config.projection_dim, offset=config.output_norm == "batch_norm"))
    return layers


def _linear(size: int, out: int, weight_std: float | None, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(size, out, bias=bias)
    if weight_std is not None:
        nn.init.normal_(layer.weight, std=weight_std)
        if bias:
            nn.init.zeros_(layer.bias)
    return layer


def _output_norm(size: int, *, offset: bool) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(size)
    if not offset:
        norm.register_parameter("bias", None)
    return norm


def autoencoder(config: HeadConfig, features: int, embedding: nn.Linear | None) -> list[nn.Module]:
    """Build a head on an autoencoder's embedding layer (Schliebitz et al. 2024, section 3).

    Linear(F, E), activation, Linear(E, P), no batch norm (simclr-ae, models/simclr/utils.py). The first layer
    starts as a copy of `embedding`, or at nn.Linear's own initialisation where `config.first_layer` is
    ``random``. Frozen, it takes no gradient and belongs to no optimizer group. Parameters: F E + E + E P + P,
    of which F E + E are frozen (65,664, 131,328, 262,656 for F = 512 and E = 128, 256, 512).
    """
    assert isinstance(config, AutoencoderHead)  # noqa: S101
    # drawn in any case, so that the output layer starts the same whatever the first one is
    first = nn.Linear(features, config.embedding_dim)
    if config.first_layer == "pretrained":
        if embedding is None or embedding.weight.shape != first.weight.shape:
            given = "none" if embedding is None else tuple(embedding.weight.shape)
            raise ValueError(f"embedding: weight of shape {tuple(first.weight.shape)} wanted, {given} given")
        with torch.no_grad():
            first.weight.copy_(embedding.weight)
            first.bias.copy_(embedding.bias)
    first.requires_grad_(not config.frozen)
    output = nn.Linear(config.embedding_dim, config.projection_dim)
    return [first, ACTIVATIONS[config.activation](), output]


def sparse(config: HeadConfig, features: int, _: nn.Linear | None) -> list[nn.Module]:
    """Build a top-k autoencoder as the head (Ouyang et al. 2025, section 4; Projector_Theory).

    [Linear(F, W), batch norm, ReLU,] then the autoencoder from W, or F, to d latents and back; P = W or F.
    Parameters, with w = W or F: 2 w d + d + 2 w [+ F W + W + 2 W].
    """
    assert isinstance(config, SparseHead)  # noqa: S101
    width = config.block_width
    layers: list[nn.Module] = []
    if width is not None:
        layers = [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]
    return [*layers, TopKAutoencoder(width or features, config.latents, config.k)]


def reweight(config: HeadConfig, features: int, _: nn.Linear | None) -> list[nn.Module]:
    """Build fixed weights on features, P = F (Xue et al. 2024). Parameters: 0."""
    assert isinstance(config, ReweightHead)  # noqa: S101
    return [Reweighting(features, config.kappa)]


def linear(config: HeadConfig, features: int, _: nn.Linear | None) -> list[nn.Module]:
    """Build Linear(F, P) with bias (Chen et al. 2020, section 4.2). Parameters: F P + P."""
    assert isinstance(config, LinearHead)  # noqa: S101
    return [*([UnitLength()] if config.normalize_input else []), nn.Linear(features, config.projection_dim)]


def none(config: HeadConfig, features: int, _: nn.Linear | None) -> list[nn.Module]:  # noqa: ARG001
    """Build no head: the loss sees the features, P = F (Chen et al. 2020, section 4.2). Parameters: 0."""
    return []


Builder = Callable[[HeadConfig, int, nn.Linear | None], list[nn.Module]]
HEADS: Final[Mapping[str, Builder]] = {
    "mlp": mlp,
    "autoencoder": autoencoder,
    "sparse": sparse,
    "reweight": reweight,
    "linear": linear,
    "none": none,
}


def build_head(config: HeadConfig, features: int, embedding: nn.Linear | None = None) -> nn.Sequential:
    """Build the head of `config` for `features` features, with weights from the default generator.

    `embedding` is Linear(features, E) of a pretrained autoencoder; only a pretrained ``autoencoder`` head
    needs it, and raises ValueError without it or if it has another shape.
    """
    head = nn.Sequential(*HEADS[config.kind](config, features, embedding))
    if isinstance(config, MlpHead | LinearHead) and config.frozen:
        head.requires_grad_(requires_grad=False)
    if config.levels:
        head.append(Levels(config.levels))
    return head


def projection_dim(config: HeadConfig, features: int) -> int:
    """Compute the head's output size."""
    if isinstance(config, SparseHead):
        return config.block_width or features
    return getattr(config, "projection_dim", features)


@dataclass(frozen=True)
class HeadFacts:
    """What is known of a head before it is trained. Parameters include the frozen ones."""

    projection_dim: int
    feature_dim: int
    head_parameters: int
    trainable_head_parameters: int
    head_flops: int
    """Of one image's forward pass: two per weight that is used."""


def head_facts(config: HeadConfig, features: int, head: nn.Module) -> HeadFacts:
    """Count the parameters of a head that has been built."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in head.parameters()]
    return HeadFacts(
        projection_dim=projection_dim(config, features),
        feature_dim=features,
        head_parameters=sum(count for count, _ in counts),
        trainable_head_parameters=sum(count for count, trainable in counts if trainable),
        head_flops=sum(_flops(layer) for layer in head.modules()),
    )


def _flops(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return 2 * layer.weight.numel()
    if isinstance(layer, TopKAutoencoder):
        # the decoder reads only the active latents' rows
        return 2 * layer.encoder_weight.numel() + 2 * layer.k * layer.encoder_weight.shape[1]
    return layer.weights.numel() if isinstance(layer, Reweighting) else 0


def describe_head(config: TrialConfig) -> HeadFacts:
    """Describe the head of `config`, without weights, images or memory."""
    features = feature_dim(config.encoder)
    with torch.device("meta"):
        embedding = None
        if isinstance(config.head, AutoencoderHead):
            embedding = nn.Linear(features, config.head.embedding_dim)
        head = build_head(config.head, features, embedding)
    return head_facts(config.head, features, head)


@dataclass(frozen=True)
class HiddenLayer:
    """What a head's hidden units say, (N, U), and the bounds of their activation."""

    values: Tensor
    low: float | None
    high: float | None


BOUNDS: Final[Mapping[type[nn.Module], tuple[float, float]]] = {nn.Sigmoid: (0.0, 1.0), nn.Tanh: (-1.0, 1.0)}


@torch.no_grad()
def head_layers(head: nn.Module, features: Tensor) -> tuple[dict[str, Tensor], list[HiddenLayer]]:
    """Run features (N, F) through a head in evaluation mode, layer by layer.

    Returns:
        Outputs by name, ``h`` (the features), ``hidden1``, ..., ``z`` (the projections); and the hidden
        layers. A sparse head's latents are in neither: they are too many.
    """
    head.eval()
    activations = tuple(make for make in ACTIVATIONS.values() if isinstance(make, type))
    outputs, hidden, rows = {"h": features}, [], features
    for layer in head.children():
        rows = layer(rows)
        if isinstance(layer, activations):
            hidden.append(HiddenLayer(rows, *BOUNDS.get(type(layer), (None, None))))
            outputs[f"hidden{len(hidden)}"] = rows
    return {**outputs, "z": rows}, hidden
