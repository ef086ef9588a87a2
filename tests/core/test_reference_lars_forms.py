"""LARS as google-research/simclr and as solo-learn have it, through 600 steps of their warm-ups.

The references are written from the two sources' formulas, one tensor at a time in float64, on a network of
their own: both sides compute their own gradients, so that what one step does wrong, the next ones amplify.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headsearch.config import OptimizerConfig
from headsearch.core.optimizers import Lars, build_optimizer, learning_rate, set_rate

STEPS_PER_EPOCH, WARMUP, EPOCHS, BATCH = 60, 10, 200, 256
STEPS = STEPS_PER_EPOCH * WARMUP

Update = Callable[[nn.Parameter, Tensor, float], None]


class Google:
    """lars_optimizer.py with classic momentum: the rate is in the velocity; norms of g + d w."""

    def __init__(self, decay: float, eta: float) -> None:
        self.decay, self.eta, self.velocity = decay, eta, dict[nn.Parameter, Tensor]()

    def __call__(self, w: nn.Parameter, g: Tensor, lr: float) -> None:
        trust = 1.0
        if w.ndim > 1:  # neither 'bias' nor 'batch_normalization'
            g = g + self.decay * w
            w_norm, g_norm = float(w.square().sum().sqrt()), float(g.square().sum().sqrt())
            if w_norm > 0 and g_norm > 0:
                trust = self.eta * w_norm / g_norm
        v = 0.9 * self.velocity.get(w, torch.zeros_like(w)) + lr * trust * g
        self.velocity[w] = v
        w -= v


class Solo:
    """utils/lars.py with exclude_bias_n_norm: the rate is applied to the velocity; decay only where adapted."""

    def __init__(self, decay: float, eta: float, *, clip: bool) -> None:
        self.decay, self.eta, self.clip, self.buffer = decay, eta, clip, dict[nn.Parameter, Tensor]()

    def __call__(self, w: nn.Parameter, g: Tensor, lr: float) -> None:
        w_norm, g_norm = float(w.square().sum().sqrt()), float(g.square().sum().sqrt())
        if w.ndim != 1 and w_norm != 0 and g_norm != 0:
            rate = self.eta * w_norm / (g_norm + w_norm * self.decay + 1e-8)
            if self.clip:
                rate = min(rate / lr, 1) if lr else 1
            g = (g + self.decay * w) * rate
        self.buffer[w] = 0.9 * self.buffer[w] + g if w in self.buffer else g.clone()
        w -= lr * self.buffer[w]


def google_rate(step: int, peak: float) -> float:
    """model_util.learning_rate_schedule, before its cosine."""
    return step / STEPS * peak


def solo_rate(step: int, peak: float) -> float:
    """lr_scheduler.py: W - 1 equal steps from the start, so that the last of W is at the peak."""
    return 3e-5 + step * (peak - 3e-5) / (STEPS - 1)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU(),
        nn.Linear(16, 5),
    )  # fmt: skip


def distance(a: nn.Module, b: nn.Module) -> float:
    """Relative distance of all weights, as one vector."""
    ours, theirs = (torch.cat([p.detach().double().flatten() for p in net.parameters()]) for net in (a, b))
    return float((ours - theirs).norm() / theirs.norm())


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    labels = torch.randint(5, (32,), generator=draw)
    return torch.rand(32, 3, 8, 8, generator=draw) + labels[:, None, None, None] / 5, labels


def trained(
    config: OptimizerConfig, reference: Update, rate: Callable[[int, float], float], steps: int
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Start, ours and theirs after so many steps of the warm-up."""
    start = network()
    # float64: so many steps at such rates amplify float32's rounding beyond what is compared
    ours, theirs = (copy.deepcopy(start).double() for _ in range(2))
    optimizer = build_optimizer(config, ours)
    for step in range(steps):
        images, labels = batch(step)
        set_rate(
            optimizer,
            learning_rate(
                config, step=step, steps_per_epoch=STEPS_PER_EPOCH, epochs=EPOCHS, batch_size=BATCH
            ),
        )
        optimizer.zero_grad()
        F.cross_entropy(ours(images.double()), labels).backward()
        optimizer.step()
        theirs.zero_grad()
        F.cross_entropy(theirs(images.double()), labels).backward()
        with torch.no_grad():
            for parameter in theirs.parameters():
                assert parameter.grad is not None
                reference(parameter, parameter.grad, rate(step, config.learning_rate * BATCH / 256))
    return start, ours, theirs


SOLO = OptimizerConfig(
    name="lars", lars_form="solo-learn", learning_rate=0.4, weight_decay=1e-4, trust_coefficient=0.02, clip=True,
    warmup_epochs=WARMUP, warmup_start=3e-5, warmup_peak="last_step",
)  # fmt: skip
GOOGLE = OptimizerConfig(
    name="lars", lars_form="google-research", learning_rate=1.0, weight_decay=1e-4, trust_coefficient=1e-3,
    warmup_epochs=WARMUP,
)  # fmt: skip


@pytest.mark.parametrize("steps", [10, 200, STEPS])
@pytest.mark.parametrize("clip", [True, False])
def test_solo_learns_warm_up(steps: int, clip: bool) -> None:
    config = SOLO.model_copy(update={"clip": clip})
    start, ours, theirs = trained(config, Solo(1e-4, 0.02, clip=clip), solo_rate, steps)
    assert distance(ours, theirs) < 1e-3
    assert distance(start, theirs) > 10 * distance(ours, theirs)


@pytest.mark.parametrize("steps", [10, 200, STEPS])
@pytest.mark.parametrize("decay", [1e-4, 0.5])
def test_google_researchs_warm_up(steps: int, decay: float) -> None:
    config = GOOGLE.model_copy(update={"weight_decay": decay})
    start, ours, theirs = trained(config, Google(decay, 1e-3), google_rate, steps)
    assert distance(ours, theirs) < 1e-3
    assert distance(start, theirs) > 10 * distance(ours, theirs)


def test_the_papers_form_moves_less_through_solo_learns_warm_up() -> None:
    """Velocity that was scaled by the low rates of its past lags behind (measured: 0.6 after 10 steps)."""
    former = SOLO.model_copy(update={"lars_form": "you2017"})
    start, ours, theirs = trained(former, Solo(1e-4, 0.02, clip=True), solo_rate, 10)
    assert distance(start, ours) < 0.75 * distance(start, theirs)


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 0.3), (2.0, 0.0), (0.0, 0.0)])
def test_where_a_norm_is_zero(weight: float, gradient: float) -> None:
    """google-research: rate 1 and decay; solo-learn: the gradient alone, without decay."""
    for form, update in (("solo-learn", gradient), ("google-research", None)):
        w = nn.Parameter(torch.full((2, 2), weight))
        w.grad = torch.full((2, 2), gradient)
        Lars([w], lr=0.5, weight_decay=0.1, form=form).step()  # type: ignore[arg-type]
        decayed = gradient + 0.1 * weight
        if update is None:
            trust = 1e-3 * weight / decayed if weight and decayed else 1.0
            update = trust * decayed
        assert w.detach().flatten().tolist() == pytest.approx([weight - 0.5 * update] * 4, rel=1e-6)


@pytest.mark.parametrize("form", ["you2017", "google-research", "solo-learn"])
def test_a_rate_that_is_a_tensor_gives_the_same_steps(form: str) -> None:
    nets = [network() for _ in range(2)]
    config = SOLO.model_copy(update={"lars_form": form})
    optimizers = [build_optimizer(config, net) for net in nets]
    for step in range(5):
        for net, optimizer, kind in zip(nets, optimizers, (float, torch.tensor), strict=True):
            images, labels = batch(step)
            for group in optimizer.param_groups:
                group["lr"] = kind(0.1 * (step + 1))
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    assert distance(*nets) < 1e-6


def test_the_warm_ups_last_step() -> None:
    for peak, last in (("next_step", 0.4 * 599 / 600), ("last_step", 0.4)):
        config = OptimizerConfig(learning_rate=0.4, warmup_epochs=WARMUP, warmup_peak=peak)  # type: ignore[arg-type]
        rates = [
            learning_rate(config, step=step, steps_per_epoch=60, epochs=EPOCHS, batch_size=256)
            for step in (599, 600, 601)
        ]
        assert rates[0] == pytest.approx(last)
        assert rates[1] == pytest.approx(0.4)
        assert math.isclose(rates[2], 0.2 * (1 + math.cos(math.pi / (190 * 60))))
