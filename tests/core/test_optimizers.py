from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from headsearch.config import OptimizerConfig
from headsearch.core.optimizers import Lars, build_optimizer, learning_rate, parameter_groups

NAMES = ["sgd", "lars", "adamw"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    model(torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def test_biases_and_norms_stand_apart_and_frozen_parameters_nowhere() -> None:
    model = network()
    model[3].weight.requires_grad_(False)
    weights, rest = parameter_groups([model], 0.1)
    assert [id(p) for p in weights["params"]] == [id(model[0].weight)]
    assert weights["weight_decay"] == 0.1
    expected = [model[0].bias, model[1].weight, model[1].bias, model[3].bias]
    assert [id(p) for p in rest["params"]] == [id(p) for p in expected]
    assert rest["weight_decay"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_without_gradient_only_weights_decay(name: str) -> None:
    model = network()
    before = copy.deepcopy(model)
    optimizer = build_optimizer(OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert (new.norm() < old.norm()) if new.ndim > 1 else torch.equal(new, old)


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_continues_bit_for_bit(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.01)
    model = network()
    optimizer = build_optimizer(config, model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    twin = copy.deepcopy(model)
    resumed = build_optimizer(config, twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in [(model, optimizer), (twin, resumed)]:
        for step in range(3, 6):
            backward(net, step)
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_lars_survives_zero_weights_and_zero_gradients() -> None:
    weight, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    weight.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    Lars([weight, still], lr=0.1, momentum=0.0).step()
    assert torch.allclose(weight, torch.full((2, 2), -0.1))
    assert torch.equal(still, torch.ones(2, 2))


def test_lars_step_does_not_depend_on_the_gradients_scale() -> None:
    results = []
    for scale in (1.0, 1000.0):
        weight = nn.Parameter(torch.ones(3, 2))
        weight.grad = torch.full((3, 2), scale)
        Lars([weight], lr=1.0).step()
        results.append(weight.detach())
    assert torch.allclose(results[0], results[1])
    assert torch.allclose(results[0], torch.full((3, 2), 1 - 1e-3))


def rate(config: OptimizerConfig, step: int, batch_size: int = 256) -> float:
    return learning_rate(config, step=step, steps_per_epoch=10, epochs=5, batch_size=batch_size)


def test_rate_warms_up_from_zero_to_the_peak_then_falls_to_the_floor() -> None:
    config = OptimizerConfig(learning_rate=0.4, warmup_epochs=2, final_learning_rate_ratio=0.1)
    rates = [rate(config, step) for step in range(51)]
    assert rates[0] == 0.0
    assert rates[10] == pytest.approx(0.2)
    assert rates[20] == max(rates) == pytest.approx(0.4)
    assert rates[35] == pytest.approx((0.4 + 0.04) / 2)
    assert rates[50] == pytest.approx(0.04)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_rate_starts_at_the_peak_without_warm_up() -> None:
    assert rate(OptimizerConfig(learning_rate=0.4), 0) == pytest.approx(0.4)


@pytest.mark.parametrize(("name", "factor"), [("sgd", 2.0), ("lars", 2.0), ("adamw", 1.0)])
def test_rate_scales_with_the_batch_except_for_adamw(name: str, factor: float) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.3)
    assert rate(config, 7, batch_size=512) == pytest.approx(factor * rate(config, 7))
