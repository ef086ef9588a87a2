"""Trajectories of 20 steps and the learning-rate schedule against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references import adamw_step, fresh_generator, lars_step, sgd_step, warmup_cosine
from torch import nn

from headsearch.config import OptimizerConfig
from headsearch.core.optimizers import Lars, build_optimizer, learning_rate

STEPS = 20
RATES = [0.2 * (1 + math.cos(step / 4)) + 0.01 for step in range(STEPS)]


class Bent(nn.Module):
    """A weight, a bias, a norm's scale and shift, and a frozen layer."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.tensor(rng.normal(size=parameter.shape)))


def trajectories(config: OptimizerConfig, rng: np.random.Generator):
    """20 steps with random gradients: names, start, gradients and end of what is trainable."""
    model = Bent(rng)
    optimizer = build_optimizer(config, model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in named.values()}
    start = {name: p.detach().double().numpy().copy() for name, p in named.items()}
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in named}
    for rate in RATES:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in named.items():
            parameter.grad = torch.tensor(rng.normal(size=parameter.shape) * 0.3, dtype=torch.float32)
            gradients[name].append(parameter.grad.double().numpy().copy())
        optimizer.step()
    for name, before in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], before), name
    return named, start, gradients


def is_weight(name: str) -> bool:
    return name == "linear.weight"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_momentum_methods(name, momentum, weight_decay):
    config = OptimizerConfig(name=name, momentum=momentum, weight_decay=weight_decay)
    named, start, gradients = trajectories(config, fresh_generator())
    for key, parameter in named.items():
        w, v = start[key], None
        for rate, gradient in zip(RATES, gradients[key], strict=True):
            decay = weight_decay if is_weight(key) else 0.0
            if name == "sgd":
                w, v = sgd_step(w, gradient, v, rate=rate, momentum=momentum, decay=decay)
            else:
                w, v = lars_step(
                    w, gradient, v, rate=rate, momentum=momentum, decay=decay, adapt=is_weight(key)
                )
        np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-4, atol=1e-5, err_msg=key)
        assert np.abs(w - start[key]).max() > 1e-4, "it moved"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw(weight_decay):
    config = OptimizerConfig(name="adamw", weight_decay=weight_decay)
    named, start, gradients = trajectories(config, fresh_generator())
    for key, parameter in named.items():
        w, m, s = start[key], np.zeros_like(start[key]), np.zeros_like(start[key])
        for step, (rate, gradient) in enumerate(zip(RATES, gradients[key], strict=True), start=1):
            decay = weight_decay if is_weight(key) else 0.0
            w, m, s = adamw_step(w, gradient, m, s, step=step, rate=rate, decay=decay)
        np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-4, atol=1e-4, err_msg=key)


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_where_a_norm_is_zero(weight, gradient, decay):
    parameter = nn.Parameter(torch.full((2, 2), weight))
    parameter.grad = torch.full((2, 2), gradient)
    Lars([parameter], lr=0.5, momentum=0.9, weight_decay=decay).step()
    w, g = np.full((2, 2), weight), np.full((2, 2), gradient)
    want, _ = lars_step(w, g, None, rate=0.5, momentum=0.9, decay=decay)
    np.testing.assert_allclose(parameter.detach().numpy(), want, rtol=1e-6)


def test_lars_sees_one_norm_per_tensor_and_no_other_tensor():
    rng = fresh_generator()
    alone, beside = nn.Parameter(torch.tensor(rng.normal(size=(3, 4, 2, 2)))), nn.Parameter(torch.ones(5, 5))
    want, _ = lars_step(
        alone.detach().numpy().copy(), np.ones((3, 4, 2, 2)), None, rate=0.7, momentum=0.9, decay=0.01
    )
    alone.grad, beside.grad = torch.ones_like(alone), 1e3 * torch.ones_like(beside)
    Lars([alone, beside], lr=0.7, momentum=0.9, weight_decay=0.01).step()
    np.testing.assert_allclose(alone.detach().numpy(), want, rtol=1e-12)


def rate_at(config: OptimizerConfig, step: int, *, batch_size: int = 512) -> float:
    return learning_rate(config, step=step, steps_per_epoch=7, epochs=12, batch_size=batch_size)


@pytest.mark.parametrize("warmup_epochs", [0.0, 1.5, 10.0])
@pytest.mark.parametrize("final_ratio", [0.0, 0.02])
@pytest.mark.parametrize(("name", "scale"), [("sgd", 2.0), ("lars", 2.0), ("adamw", 1.0)])
def test_schedule(name, scale, warmup_epochs, final_ratio):
    config = OptimizerConfig(
        name=name, learning_rate=0.3, warmup_epochs=warmup_epochs, final_learning_rate_ratio=final_ratio
    )
    for step in range(7 * 12 + 1):
        want = warmup_cosine(
            step, peak=0.3 * scale, warmup=7 * warmup_epochs, total=7 * 12, final_ratio=final_ratio
        )
        assert rate_at(config, step) == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_schedule_by_hand():
    config = OptimizerConfig(learning_rate=0.3, warmup_epochs=2, final_learning_rate_ratio=0.1)
    assert rate_at(config, 0, batch_size=256) == 0.0
    assert rate_at(config, 7, batch_size=256) == pytest.approx(0.15)  # half of the warm-up
    assert rate_at(config, 14, batch_size=256) == pytest.approx(0.3)  # peak
    assert rate_at(config, 49, batch_size=256) == pytest.approx(0.165)  # half of the cosine
    assert rate_at(config, 84, batch_size=256) == pytest.approx(0.03)  # end
    assert rate_at(config, 14, batch_size=64) == pytest.approx(0.075)
