"""Clipped LARS, decay of everything, an online probe's own rate, and the two schedules of other libraries.

The references are loops over Python floats, torch's own scheduler, and solo-learn's rule written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from references import adamw_step, fresh_generator
from torch import nn

from headsearch.config import OptimizerConfig, ProbeConfig
from headsearch.core.optimizers import (
    Lars,
    build_optimizer,
    learning_rate,
    learning_rates,
    set_rate,
    set_rates,
)

STEPS = 20
RATES = [0.0, *(0.25 * (1 + math.cos(step / 3)) + 0.004 for step in range(STEPS - 1))]
"""From 0, as a warm-up does, and up and down."""
TRUST = 0.02

Vector = list[float]


def norm(values: Vector) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


def larc_step(
    w: Vector, g: Vector, v: Vector, *, lr: float, momentum: float, decay: float, adapt: bool, clip: bool
) -> tuple[Vector, Vector, bool]:
    """v = m v + lr rate (g + decay w), w = w - v; the layer's rate is trust |w| / (|g| + decay |w|), and with
    `clip` at most 1 after division by lr. Also returns whether the clip was what bound the rate."""
    rate, clipped = 1.0, False
    if adapt and norm(w) > 0 and norm(g) + decay * norm(w) > 0:
        rate = TRUST * norm(w) / (norm(g) + decay * norm(w))
        if clip and lr > 0:
            clipped = rate / lr > 1
            rate = min(rate / lr, 1.0)
    v = [momentum * b + lr * rate * (x + decay * a) for a, x, b in zip(w, g, v, strict=True)]
    return [a - b for a, b in zip(w, v, strict=True)], v, clipped


def gradient(rng: np.random.Generator, parameter: torch.Tensor, scale: float) -> Vector:
    parameter.grad = torch.tensor(rng.normal(size=parameter.shape) * scale, dtype=torch.float32)
    return parameter.grad.double().flatten().tolist()


def flat(parameter: torch.Tensor) -> Vector:
    return parameter.detach().double().flatten().tolist()


class Small(nn.Module):
    """A convolution, a norm and a linear layer, with weights far from those of an initialisation."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.tensor(rng.normal(size=parameter.shape)))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("decay_all", [False, True])
def test_trajectory(clip: bool, momentum: float, decay: float, decay_all: bool) -> None:
    rng = fresh_generator()
    model = Small(rng)
    config = OptimizerConfig(
        name="lars", momentum=momentum, weight_decay=decay, trust_coefficient=TRUST, clip=clip,
        decay_all=decay_all,
    )  # fmt: skip
    optimizer = build_optimizer(config, model)
    wanted = {name: (flat(p), [0.0] * p.numel()) for name, p in model.named_parameters()}
    bound = []
    for step, lr in enumerate(RATES):
        set_rate(optimizer, lr)
        for name, parameter in model.named_parameters():
            g = gradient(rng, parameter, 0.05 if step % 2 else 0.5)
            weight = parameter.ndim > 1
            w, v, clipped = larc_step(
                *(wanted[name][0], g, wanted[name][1]), lr=lr, momentum=momentum, clip=clip, adapt=weight,
                decay=decay if weight or decay_all else 0.0,
            )  # fmt: skip
            wanted[name] = w, v
            bound.append(clipped)
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(flat(parameter), wanted[name][0], rtol=1e-4, atol=2e-5, err_msg=name)
    assert any(bound) == clip, "the clip binds somewhere"
    assert not all(bound)


def test_clipped_layers_move_by_no_more_than_the_learning_rate() -> None:
    """LARC in one step: a weight of length 3 and a gradient of length 1e-3, trust 0.02, want 60 |g|."""
    for clip, moved in ((True, 0.1 * 1e-3), (False, 0.1 * 60 * 1e-3)):
        weight = nn.Parameter(torch.tensor([[3.0, 0.0]]))
        weight.grad = torch.tensor([[0.0, 1e-3]])
        Lars([weight], lr=0.1, trust=TRUST, clip=clip).step()
        assert weight.detach().flatten().tolist() == pytest.approx([3.0, -moved], rel=1e-5)
    # and one whose rate stays below 1 takes the step of LARS over lr: trust |w| along the gradient
    weight = nn.Parameter(torch.tensor([[3.0, 0.0]]))
    weight.grad = torch.tensor([[0.0, 50.0]])
    Lars([weight], lr=0.1, trust=TRUST, clip=True).step()
    assert weight.detach().flatten().tolist() == pytest.approx([3.0, -0.06], rel=1e-5)


@pytest.mark.parametrize(("weight", "slope"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_clip_where_a_norm_is_zero(weight: float, slope: float, decay: float) -> None:
    parameter = nn.Parameter(torch.full((2, 2), weight))
    parameter.grad = torch.full((2, 2), slope)
    Lars([parameter], lr=0.5, weight_decay=decay, trust=TRUST, clip=True).step()
    want, _, _ = larc_step(
        [weight] * 4, [slope] * 4, [0.0] * 4, lr=0.5, momentum=0.9, decay=decay, adapt=True, clip=True
    )
    np.testing.assert_allclose(flat(parameter), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_of_everything_in_the_other_optimizers(name: str) -> None:
    rng, decay = fresh_generator(), 0.2
    model = Small(rng)
    optimizer = build_optimizer(OptimizerConfig(name=name, weight_decay=decay, decay_all=True), model)
    state = {n: (np.array(flat(p)), *np.zeros((2, p.numel()))) for n, p in model.named_parameters()}
    for step, lr in enumerate(RATES[1:], start=1):
        set_rate(optimizer, lr / 10)
        for key, parameter in model.named_parameters():
            w, m, s = state[key]
            g = np.array(gradient(rng, parameter, 0.3))
            if name == "adamw":
                state[key] = adamw_step(w, g, m, s, step=step, rate=lr / 10, decay=decay)
            else:
                m = 0.9 * m + g + decay * w
                state[key] = w - lr / 10 * m, m, s
        optimizer.step()
    for key, parameter in model.named_parameters():
        np.testing.assert_allclose(flat(parameter), state[key][0], rtol=1e-4, atol=1e-4, err_msg=key)


SCHEDULE = {"steps_per_epoch": 7, "epochs": 12, "batch_size": 64}


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_online_probe_follows_the_schedule_at_its_own_rate(name: str, decay_all: bool) -> None:
    """solo-learn gives its classifier lr * batch size / 256 and no decay; SimCLR's schedule scales both."""
    config = OptimizerConfig(
        name=name, learning_rate=0.4, weight_decay=0.1, warmup_epochs=2, final_learning_rate_ratio=0.1,
        decay_all=decay_all,
    )  # fmt: skip
    rng = fresh_generator()
    model, probe = Small(rng), nn.Linear(3, 5)
    optimizer = build_optimizer(config, model, online=(probe, ProbeConfig(online_learning_rate=0.15)))
    mine = [g for g in optimizer.param_groups if any(p is q for p in g["params"] for q in probe.parameters())]
    others = [g for g in optimizer.param_groups if not any(g is own for own in mine)]
    assert [id(p) for g in mine for p in g["params"]] == [id(probe.weight), id(probe.bias)]
    assert {id(p) for g in others for p in g["params"]} == {id(p) for p in model.parameters()}
    assert all(g["weight_decay"] == 0 for g in mine)
    assert [g["adapt"] for g in mine] == [True, False], "LARS adapts its weight and not its bias"
    peak = 0.4 * (1 if name == "adamw" else 0.25)
    for step in range(84):
        rate = learning_rate(config, step=step, **SCHEDULE)
        set_rates(optimizer, learning_rates(optimizer, config, step=step, **SCHEDULE))
        factor = rate / peak  # of the schedule, up to 1
        assert 0 <= factor <= 1 + 1e-12
        own = 0.15 * (1 if name == "adamw" else 0.25)
        assert [g["lr"] for g in mine] == pytest.approx([own * factor] * 2, rel=1e-12, abs=1e-15)
        assert [g["lr"] for g in others] == [rate] * len(others)


def test_online_probe_moves_by_the_formula_beside_the_others() -> None:
    rng = fresh_generator()
    model, probe = Small(rng), nn.Linear(4, 3)
    config = OptimizerConfig(
        name="lars", learning_rate=0.4, weight_decay=0.05, trust_coefficient=TRUST, clip=True, decay_all=True
    )
    optimizer = build_optimizer(config, model, online=(probe, ProbeConfig(online_learning_rate=0.1)))
    named = {**dict(model.named_parameters()), "weight": probe.weight, "bias": probe.bias}
    wanted = {name: (flat(p), [0.0] * p.numel()) for name, p in named.items()}
    for lr in RATES:
        set_rate(optimizer, lr)
        for name, parameter in named.items():
            own = name in ("weight", "bias")
            w, v, _ = larc_step(
                *(wanted[name][0], gradient(rng, parameter, 0.3), wanted[name][1]), momentum=0.9, clip=True,
                lr=lr / 4 if own else lr, adapt=parameter.ndim > 1, decay=0.0 if own else 0.05,
            )  # fmt: skip
            wanted[name] = w, v
        optimizer.step()
    for name, parameter in named.items():
        np.testing.assert_allclose(flat(parameter), wanted[name][0], rtol=1e-4, atol=2e-5, err_msg=name)


def solo_learn(peak: float, start: float, warmup: int, total: int, end: float) -> Iterator[float]:
    """Rates of its LinearWarmupCosineAnnealingLR, one step after the other, as it makes each of the last.

    Its warm-up is at the peak one step early: it divides by `warmup` - 1.
    """
    rate = start
    for step in range(total):
        if 0 < step < warmup:
            rate += (peak - start) / (warmup - 1)
        elif step == warmup:
            rate = peak
        elif step > warmup:
            now, before = (1 + math.cos(math.pi * (s - warmup) / (total - warmup)) for s in (step, step - 1))
            rate = now / before * (rate - end) + end
        yield rate


@pytest.mark.parametrize("start", [0.0, 3e-5, 0.01])
@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_warm_up_from_a_start_that_no_batch_scales(start: float, batch_size: int) -> None:
    config = OptimizerConfig(name="lars", learning_rate=0.3, warmup_epochs=10, warmup_start=start)
    steps, epochs, peak = 40, 25, 0.3 * batch_size / 256
    warmup = 10 * steps
    reference = solo_learn(peak, start, warmup, epochs * steps, end=0.0)
    for step, theirs in enumerate(reference):
        ours = learning_rate(config, step=step, steps_per_epoch=steps, epochs=epochs, batch_size=batch_size)
        if step < warmup:
            assert ours == pytest.approx(start + (peak - start) * step / warmup, rel=1e-12)
            assert abs(ours - theirs) <= (peak - start) / (warmup - 1) + 1e-12, "one step apart at most"
        else:
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    assert learning_rate(config, step=0, steps_per_epoch=1, epochs=11, batch_size=batch_size) == start


@pytest.mark.parametrize(("form", "first"), [("same", 0.01), ("scaled", 0.0025)])
def test_where_the_online_probes_warm_up_starts(form: str, first: float) -> None:
    """solo-learn's scheduler starts all groups at one rate; `scaled` starts the probe at its share of it."""
    config = OptimizerConfig(
        name="lars", learning_rate=0.4, warmup_epochs=10, warmup_start=0.01, warmup_peak="last_step"
    )
    model, probe = nn.Linear(4, 3), nn.Linear(3, 5)
    settings = ProbeConfig.model_validate({"online_learning_rate": 0.1, "online_warmup_start": form})
    optimizer = build_optimizer(config, model, online=(probe, settings))
    restored = build_optimizer(config, model, online=(probe, settings))
    restored.load_state_dict(optimizer.state_dict())
    steps, epochs = 7, 25
    total, warmup = epochs * steps, 10 * steps
    theirs = zip(
        solo_learn(0.8, 0.01, warmup, total, end=0.0),
        solo_learn(0.2, first, warmup, total, end=0.0),
        strict=True,
    )
    for step, (rate, own) in enumerate(theirs):
        for one in (optimizer, restored):
            ours = learning_rates(
                one, config, step=step, steps_per_epoch=steps, epochs=epochs, batch_size=512
            )
            assert ours == pytest.approx([rate, rate, own, own], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("final_ratio", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("epochs", [1, 5, 150])
def test_rate_by_epoch_is_torchs_cosine(final_ratio: float, epochs: int) -> None:
    config = OptimizerConfig(learning_rate=0.3, final_learning_rate_ratio=final_ratio, schedule="epoch")
    peak, steps = 0.3 * 1280 / 256, 3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=final_ratio * peak)
    for epoch in range(epochs):
        (theirs,) = scheduler.get_last_lr()
        for step in range(epoch * steps, (epoch + 1) * steps):
            ours = learning_rate(config, step=step, steps_per_epoch=steps, epochs=epochs, batch_size=1280)
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [0.0, 2.0, 2.5])
def test_rate_by_epoch_is_that_of_the_epochs_first_step(warmup: float) -> None:
    by_step, by_epoch = (
        OptimizerConfig(warmup_epochs=warmup, warmup_start=1e-3, schedule=schedule)
        for schedule in ("step", "epoch")
    )
    for step in range(84):
        first = learning_rate(by_step, step=step - step % 7, **SCHEDULE)
        assert learning_rate(by_epoch, step=step, **SCHEDULE) == first
