"""Every head's output against a NumPy forward pass, and parameter counts against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import ACTIVATIONS, batch_norm, fresh_generator, linear, mlp_parameters
from torch import nn

from headsearch.config import AutoencoderHead, EncoderConfig, LinearHead, MlpHead, NoHead, TrialConfig
from headsearch.core.heads import build_head, describe_head

FEATURES = 10


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def weights(head: nn.Module) -> list[tuple[np.ndarray, np.ndarray | None]]:
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    return [(array(m.weight), None if m.bias is None else array(m.bias)) for m in layers]


def batch() -> torch.Tensor:
    return torch.tensor(fresh_generator().normal(size=(6, FEATURES)) * 2, dtype=torch.float32)


def close(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(array(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_mlp(activation, depth):
    head = build_head(MlpHead(depth=depth, width=7, activation=activation, projection_dim=4), FEATURES)
    images = batch()
    layers = weights(head)
    assert [w.shape for w, _ in layers] == [(7, FEATURES)] + [(7, 7)] * (depth - 2) + [(4, 7)]
    y = array(images)
    for position, (weight, bias) in enumerate(layers):
        assert bias is not None
        y = linear(y, weight, bias)
        y = ACTIVATIONS[activation](y) if position < depth - 1 else y
    close(head(images), y)


@pytest.mark.parametrize("depth", [2, 4])
def test_mlp_with_batch_norm(depth):
    config = MlpHead(depth=depth, width=7, activation="silu", projection_dim=4, batch_norm=True)
    head = build_head(config, FEATURES)
    norms = [module for module in head.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    images = batch()
    *hidden, (weight, bias) = weights(head)
    y = array(images)
    for (hidden_weight, no_bias), norm in zip(hidden, norms, strict=True):
        assert no_bias is None
        y = ACTIVATIONS["silu"](
            batch_norm(linear(y, hidden_weight, None), array(norm.weight), array(norm.bias))
        )
    close(head.train()(images), linear(y, weight, bias))


def test_linear():
    head = build_head(LinearHead(projection_dim=4), FEATURES)
    images = batch()
    ((weight, bias),) = weights(head)
    assert bias is not None
    close(head(images), linear(array(images), weight, bias))


def test_no_head_passes_features_on():
    images = batch()
    assert torch.equal(build_head(NoHead(), FEATURES)(images), images)


@pytest.mark.parametrize("activation", ["relu", "silu", "sigmoid", "tanh"])
@pytest.mark.parametrize("frozen", [True, False])
def test_autoencoder_head_starts_with_the_embedding_layer(activation, frozen):
    embedding = nn.Linear(FEATURES, 5)
    config = AutoencoderHead(embedding_dim=5, frozen=frozen, activation=activation, projection_dim=3)
    head = build_head(config, FEATURES, embedding)
    images = batch()
    _, (weight, bias) = weights(head)
    hidden = linear(array(images), array(embedding.weight), array(embedding.bias))
    close(head(images), linear(ACTIVATIONS[activation](hidden), weight, bias))


def test_a_frozen_layer_gets_no_gradient_and_passes_it_on():
    embedding = nn.Linear(FEATURES, 5)
    head = build_head(AutoencoderHead(embedding_dim=5, projection_dim=3), FEATURES, embedding)
    images = batch().requires_grad_()
    head(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert [p.grad is not None for p in head.parameters()] == [False, False, True, True]


def test_the_pretrained_layer_is_a_copy():
    """A head that trains its first layer must not change the cached autoencoder."""
    embedding = nn.Linear(FEATURES, 5)
    before = embedding.weight.clone()
    head = build_head(AutoencoderHead(embedding_dim=5, frozen=False, projection_dim=3), FEATURES, embedding)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1.0)
    assert torch.equal(embedding.weight, before)


def test_a_random_first_layer_ignores_the_autoencoder():
    embedding = nn.Linear(FEATURES, 5)
    config = AutoencoderHead(embedding_dim=5, projection_dim=3, first_layer="random")
    first, *_ = weights(build_head(config, FEATURES, embedding))
    assert not np.isclose(first[0], array(embedding.weight)).any()
    assert np.abs(first[0]).max() <= FEATURES**-0.5  # nn.Linear's own initialisation


def facts(head):
    return describe_head(TrialConfig(encoder=EncoderConfig(name="resnet34"), head=head))


@pytest.mark.parametrize("width", [32, 128, 2048])
@pytest.mark.parametrize("depth", [2, 3, 6])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_parameters(width, depth, batch_norm):
    found = facts(MlpHead(depth=depth, width=width, batch_norm=batch_norm, projection_dim=64))
    want = mlp_parameters(512, depth, width, 64, batch_norm=batch_norm)
    assert (found.head_parameters, found.trainable_head_parameters) == (want, want)
    assert (found.feature_dim, found.projection_dim) == (512, 64)


@pytest.mark.parametrize(("embedding", "frozen"), [(128, 65_664), (256, 131_328), (512, 262_656)])
@pytest.mark.parametrize("first_layer", ["pretrained", "random"])
def test_frozen_parameters_are_those_of_the_papers_results(embedding, frozen, first_layer):
    """simclr-ae, results: simclr_non_trainable_params."""
    head = AutoencoderHead(embedding_dim=embedding, projection_dim=32, first_layer=first_layer)
    found = facts(head)
    output = (embedding + 1) * 32
    assert (found.head_parameters, found.trainable_head_parameters) == (frozen + output, output)
    assert facts(head.model_copy(update={"frozen": False})).trainable_head_parameters == frozen + output


def test_parameters_of_linear_and_none():
    found = facts(LinearHead(projection_dim=16))
    assert (found.head_parameters, found.projection_dim) == (513 * 16, 16)
    found = facts(NoHead())
    assert (found.head_parameters, found.trainable_head_parameters, found.projection_dim) == (0, 0, 512)


def test_small_resnet_has_eight_times_its_width():
    found = describe_head(TrialConfig(encoder=EncoderConfig(width=6), head=NoHead()))
    assert (found.feature_dim, found.projection_dim) == (48, 48)
