from __future__ import annotations

import typing

import pytest
import torch
from torch import nn

from headsearch.config import (
    Activation,
    AutoencoderHead,
    EncoderConfig,
    LinearHead,
    MlpHead,
    NoHead,
    TrialConfig,
)
from headsearch.core.heads import ACTIVATIONS, HEADS, build_head, describe_head, head_facts
from headsearch.core.randomness import initialisation

ACTIVATION_NAMES = typing.get_args(Activation)


def test_every_activation_and_every_kind_has_its_module() -> None:
    assert set(ACTIVATIONS) == set(ACTIVATION_NAMES)
    assert set(HEADS) == {"mlp", "autoencoder", "sparse", "reweight", "linear", "none"}


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_activation_stands_between_the_layers_and_not_after_the_last(activation: Activation) -> None:
    heads = [
        build_head(MlpHead(width=6, projection_dim=3, activation=activation), 5),
        build_head(
            AutoencoderHead(embedding_dim=6, projection_dim=3, activation=activation), 5, nn.Linear(5, 6)
        ),
    ]
    for head in heads:
        first, _, last = head
        x = torch.randn(7, 5)
        assert torch.equal(head(x), last(ACTIVATIONS[activation]()(first(x))))


def test_batch_norm_takes_the_place_of_hidden_biases() -> None:
    head = build_head(MlpHead(depth=3, width=6, projection_dim=3, batch_norm=True), 5)
    kinds = [type(module) for module in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    linears = [module for module in head if isinstance(module, nn.Linear)]
    assert [layer.bias is not None for layer in linears] == [False, False, True]


@pytest.mark.parametrize(("dim", "frozen"), [(128, 65_664), (256, 131_328), (512, 262_656)])
def test_frozen_parameters_are_the_papers(dim: int, frozen: int) -> None:
    config = TrialConfig(
        encoder=EncoderConfig(name="resnet34"), head=AutoencoderHead(embedding_dim=dim, projection_dim=64)
    )
    facts = describe_head(config)
    assert facts.head_parameters - facts.trainable_head_parameters == frozen
    assert facts.trainable_head_parameters == dim * 64 + 64


@pytest.mark.parametrize(
    "head",
    [
        MlpHead(depth=4, width=10, projection_dim=3, batch_norm=True),
        MlpHead(depth=2, width=10, projection_dim=3),
        AutoencoderHead(embedding_dim=9, projection_dim=5),
        AutoencoderHead(embedding_dim=9, projection_dim=5, frozen=False),
        AutoencoderHead(embedding_dim=9, projection_dim=5, first_layer="random"),
        LinearHead(projection_dim=7),
        NoHead(),
    ],
    ids=repr,
)
def test_description_is_that_of_the_built_head(
    head: MlpHead | AutoencoderHead | LinearHead | NoHead,
) -> None:
    embedding = nn.Linear(128, 9)
    built = build_head(head, 128, embedding)
    facts = describe_head(TrialConfig(head=head))
    assert facts == head_facts(head, 128, built)
    assert built(torch.randn(4, 128)).shape == (4, facts.projection_dim)
    assert facts.feature_dim == 128


def test_description_needs_no_memory() -> None:
    facts = describe_head(TrialConfig(head=MlpHead(depth=8, width=1_000_000, projection_dim=64)))
    assert facts.head_parameters > 6 * 10**12


def test_first_layer_is_a_copy_of_the_embedding() -> None:
    embedding = nn.Linear(5, 6)
    head = build_head(AutoencoderHead(embedding_dim=6, projection_dim=3), 5, embedding)
    assert torch.equal(head[0].weight, embedding.weight)
    assert torch.equal(head[0].bias, embedding.bias)
    with torch.no_grad():
        head[0].weight.zero_()
    assert embedding.weight.abs().sum() > 0


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_layer_takes_no_gradient(frozen: bool) -> None:
    head = build_head(AutoencoderHead(embedding_dim=6, projection_dim=3, frozen=frozen), 5, nn.Linear(5, 6))
    head(torch.randn(4, 5, requires_grad=True)).square().sum().backward()
    assert [p.grad is None for p in head.parameters()] == [frozen, frozen, False, False]


def test_random_first_layer_is_the_trials_and_the_output_layer_is_that_of_the_pretrained() -> None:
    embedding = nn.Linear(5, 6)

    def build(first_layer: str, seed: int) -> nn.Module:
        config = AutoencoderHead(embedding_dim=6, projection_dim=3, first_layer=first_layer)
        with initialisation(seed, "head"):
            return build_head(config, 5, embedding)

    a, again, other = build("random", 0), build("random", 0), build("random", 1)
    pretrained = build("pretrained", 0)
    assert torch.equal(a[0].weight, again[0].weight)
    assert not torch.equal(a[0].weight, other[0].weight)
    assert torch.equal(a[2].weight, pretrained[2].weight)
    assert not torch.equal(a[0].weight, pretrained[0].weight)


@pytest.mark.parametrize("embedding", [None, nn.Linear(5, 7), nn.Linear(6, 6)], ids=["none", "wide", "deep"])
def test_embedding_that_does_not_fit_is_refused(embedding: nn.Linear | None) -> None:
    with pytest.raises(ValueError, match=r"embedding: weight of shape \(6, 5\) wanted"):
        build_head(AutoencoderHead(embedding_dim=6, projection_dim=3), 5, embedding)
