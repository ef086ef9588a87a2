"""Projection heads: features (B, F) in, projections (B, P) out.

One builder per kind in `HEADS`. F is the encoder's feature dim, P the projection dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from headsearch.config import (
    Activation,
    AutoencoderHead,
    HeadConfig,
    LinearHead,
    MlpHead,
    NoHead,
    TrialConfig,
)
from headsearch.core.encoders import feature_dim

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


def mlp(config: HeadConfig, features: int, _: nn.Linear | None) -> nn.Sequential:
    """Build a multi-layer perceptron (SimCLR, Chen et al. 2020, section 2.1; deeper in SimCLRv2).

    Linear(F, W), activation, [Linear(W, W), activation] * (depth - 2), Linear(W, P); with batch norm between
    each hidden layer and its activation if asked, and then without that layer's bias, which the norm's shift
    replaces. Parameters: F W + (depth - 2) W^2 + W P + P + (depth - 1) W * (2 if batch norm else 1).
    """
    assert isinstance(config, MlpHead)  # noqa: S101
    layers: list[nn.Module] = []
    size = features
    for _layer in range(config.depth - 1):
        layers.append(nn.Linear(size, config.width, bias=not config.batch_norm))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(config.width))
        layers.append(ACTIVATIONS[config.activation]())
        size = config.width
    return nn.Sequential(*layers, nn.Linear(size, config.projection_dim))


def autoencoder(config: HeadConfig, features: int, embedding: nn.Linear | None) -> nn.Sequential:
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
    return nn.Sequential(first, ACTIVATIONS[config.activation](), output)


def linear(config: HeadConfig, features: int, _: nn.Linear | None) -> nn.Linear:
    """Build Linear(F, P) with bias (Chen et al. 2020, section 4.2). Parameters: F P + P."""
    assert isinstance(config, LinearHead)  # noqa: S101
    return nn.Linear(features, config.projection_dim)


def none(config: HeadConfig, features: int, _: nn.Linear | None) -> nn.Identity:  # noqa: ARG001
    """Build no head: the loss sees the features, P = F (Chen et al. 2020, section 4.2). Parameters: 0."""
    return nn.Identity()


Builder = Callable[[HeadConfig, int, nn.Linear | None], nn.Module]
HEADS: Final[Mapping[str, Builder]] = {
    "mlp": mlp,
    "autoencoder": autoencoder,
    "linear": linear,
    "none": none,
}


def build_head(config: HeadConfig, features: int, embedding: nn.Linear | None = None) -> nn.Module:
    """Build the head of `config` for `features` features, with weights from the default generator.

    `embedding` is Linear(features, E) of a pretrained autoencoder; only a pretrained ``autoencoder`` head
    needs it, and raises ValueError without it or if it has another shape.
    """
    return HEADS[config.kind](config, features, embedding)


@dataclass(frozen=True)
class HeadFacts:
    """What is known of a head before it is trained. Parameters include the frozen ones."""

    projection_dim: int
    feature_dim: int
    head_parameters: int
    trainable_head_parameters: int


def head_facts(config: HeadConfig, features: int, head: nn.Module) -> HeadFacts:
    """Count the parameters of a head that has been built."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in head.parameters()]
    return HeadFacts(
        projection_dim=features if isinstance(config, NoHead) else config.projection_dim,
        feature_dim=features,
        head_parameters=sum(count for count, _ in counts),
        trainable_head_parameters=sum(count for count, trainable in counts if trainable),
    )


def describe_head(config: TrialConfig) -> HeadFacts:
    """Describe the head of `config`, without weights, images or memory."""
    features = feature_dim(config.encoder)
    with torch.device("meta"):
        embedding = None
        if isinstance(config.head, AutoencoderHead):
            embedding = nn.Linear(features, config.head.embedding_dim)
        head = build_head(config.head, features, embedding)
    return head_facts(config.head, features, head)
