"""Optimizers, their parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final, overload

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from headsearch.config import LarsForm, OptimizerConfig, ProbeConfig

CPU: Final = torch.device("cpu")
OF_DEVICE: Final = ("lr", "capturable")
"""Of a parameter group: what depends on the kind of its device, and not on the training."""


class Lars(Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017) in the forms of three sources.

    For weights w with gradient g, weight decay d, learning rate r, momentum m and trust coefficient t, norms
    over a whole tensor:

    ``you2017``, algorithm 1 of the paper::

        rate = t |w| / (|g| + d |w|)            # 1 where |w| or the denominator is zero
        v = m v + r rate (g + d w)
        w = w - v

    ``google-research`` (simclr, lars_optimizer.py) takes the norm of the decayed gradient::

        rate = t |w| / |g + d w|                # 1 where either is zero

    ``solo-learn`` (utils/lars.py, after pytorch-lightning-bolts; lightly, utils/lars.py has the same order)
    applies the learning rate after the momentum, so that a velocity gathered at a low rate of a warm-up moves
    the weights at the present one::

        rate = t |w| / (|g| + d |w| + 1e-8)     # where |w| or |g| is zero: the update is g
        v = m v + rate (g + d w)
        w = w - r v

    With `clip` (LARC, solo-learn's clip_lr) the rate is ``min(rate / r, 1)``: a layer moves by at most
    r (g + d w). Groups with ``adapt=False`` have rate 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        clip: bool = False,
        form: LarsForm = "you2017",
    ) -> None:
        shared = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, shared | {"clip": clip, "adapt": True, "form": form})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all parameters that have a gradient. Never waits for the device.

        A group's `lr` may be a scalar tensor on the device of its weights.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            if group["adapt"]:
                torch._foreach_mul_(updates, self._rates(weights, gradients, updates, group))
            for weight in weights:
                if "velocity" not in self.state[weight]:
                    self.state[weight]["velocity"] = torch.zeros_like(weight)
            velocities = [self.state[weight]["velocity"] for weight in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            lr = group["lr"]
            if group["form"] == "solo-learn":
                torch._foreach_add_(velocities, updates)
                if isinstance(lr, Tensor):
                    torch._foreach_sub_(weights, torch._foreach_mul(velocities, lr))
                else:
                    torch._foreach_add_(weights, velocities, alpha=-lr)
                continue
            if isinstance(lr, Tensor):
                torch._foreach_mul_(updates, lr)
                torch._foreach_add_(velocities, updates)
            else:
                torch._foreach_add_(velocities, updates, alpha=lr)
            torch._foreach_sub_(weights, velocities)
        return loss

    @staticmethod
    def _rates(
        weights: list[Tensor], gradients: list[Tensor], updates: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        form = group["form"]
        weight_norms = torch.stack(torch._foreach_norm(weights))
        if form == "google-research":
            norms = torch.stack(torch._foreach_norm(updates))
        else:
            gradient_norms = torch.stack(torch._foreach_norm(gradients))
            norms = gradient_norms + group["weight_decay"] * weight_norms
        rates = group["trust"] * weight_norms / (norms + 1e-8 if form == "solo-learn" else norms)
        if group["clip"] and (isinstance(group["lr"], Tensor) or form == "solo-learn" or group["lr"] > 0):
            # A tensor is not read, which would wait for the device. At 0 the update is 0, whatever the rate.
            rates = (rates / group["lr"]).clamp(max=1.0)
        rates = torch.where((weight_norms > 0) & (norms > 0), rates, 1.0)
        if form == "solo-learn":  # without a gradient there is no decay either
            rates = torch.where(gradient_norms > 0, rates, 0.0)
        return list(rates.unbind())


def parameter_groups(
    modules: Iterable[nn.Module], weight_decay: float, *, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Sort trainable parameters into two groups: weights, then biases and norms.

    The latter neither decay, unless `decay_all`, nor adapt. Frozen parameters are in none, so that nothing an
    optimizer does can reach them.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {
            "params": [p for p in parameters if p.ndim <= 1],
            "weight_decay": weight_decay if decay_all else 0.0,
        },
    ]


def build_optimizer(
    config: OptimizerConfig, *modules: nn.Module, online: tuple[nn.Module, ProbeConfig] | None = None
) -> Optimizer:
    """Build the optimizer of `config` over what is trainable in `modules`; `set_rates` gives its rates.

    `online` is a probe, which has a learning rate of its own and does not decay. Its rate follows the same
    schedule, from where `online_warmup_start` says (solo-learn, methods/base.py, `learnable_params`).

    On a GPU each group's rate is a tensor there, which `set_rates` fills: a CUDA graph reads it at each
    replay, and steps with a graph and without are the same to the bit.
    """
    groups = parameter_groups(modules, config.weight_decay, decay_all=config.decay_all)
    if online is not None:
        probe, settings = online
        rate = settings.online_learning_rate
        own: dict[str, Any] = {"relative": rate / config.learning_rate}
        if settings.online_warmup_start == "same":
            own["learning_rate"] = rate
        groups += [group | own for group in parameter_groups([probe], 0.0)]
    for place, group in enumerate(groups):
        group.setdefault("relative", 1.0)
        group["adapt"] = place % 2 == 0
        device = group["params"][0].device if group["params"] else CPU
        if device.type == "cuda":
            group["lr"] = torch.tensor(config.learning_rate * group["relative"], device=device)
    if config.name == "adamw":
        on_gpu = any(isinstance(group.get("lr"), Tensor) for group in groups)
        return AdamW(groups, lr=config.learning_rate, fused=True, capturable=on_gpu)
    if config.name == "lars":
        return Lars(
            groups,
            lr=config.learning_rate,
            momentum=config.momentum,
            trust=config.trust_coefficient,
            clip=config.clip,
            form=config.lars_form,
        )
    return SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all groups `rate`, or their share of it. Never waits for the device."""
    set_rates(optimizer, [rate * group["relative"] for group in optimizer.param_groups])


def set_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Give each group its rate, as `learning_rates` computed them. Never waits for the device."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_of(optimizer: Optimizer) -> dict[str, Any]:
    """Give its state for a checkpoint. A rate that is on a device is left as 0: each step sets its own."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        if isinstance(group["lr"], Tensor):
            group["lr"] = 0.0
    return state


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take up a state of `state_of`, also one of another kind of device."""
    kept: list[dict[str, Any]] = [
        {name: group[name] for name in OF_DEVICE if name in group} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)


def learning_rates(
    optimizer: Optimizer,
    config: OptimizerConfig,
    *,
    step: int,
    steps_per_epoch: int,
    epochs: int,
    batch_size: int,
) -> list[float]:
    """Compute the learning rate of each of the optimizer's groups at `step`; see `learning_rate`.

    A group has its share of the common rate, or a schedule of its own from `warmup_start` to its own peak.
    The latter is solo-learn's: its scheduler starts all groups at `warmup_start_lr`, whatever their base
    rates are (utils/lr_scheduler.py, `LinearWarmupCosineAnnealingLR.get_lr`).
    """
    times = {"step": step, "steps_per_epoch": steps_per_epoch, "epochs": epochs, "batch_size": batch_size}
    common = learning_rate(config, **times)
    return [
        learning_rate(config, base=group["learning_rate"], **times)
        if "learning_rate" in group
        else common * group["relative"]
        for group in optimizer.param_groups
    ]


def learning_rate(
    config: OptimizerConfig,
    *,
    step: int,
    steps_per_epoch: int,
    epochs: int,
    batch_size: int,
    base: float | None = None,
) -> float:
    """Compute the learning rate of `step`, counted from 0 over the whole training.

    Linear from `warmup_start` over `warmup_epochs`, then half a cosine that would reach the final ratio at
    the step after the last; with the schedule ``epoch``, each step has the rate of its epoch's first. With
    `warmup_peak` ``last_step`` the warm-up's last step has the peak already, as the cosine's first has. The
    peak is ``learning_rate * batch_size / 256`` for ``sgd`` and ``lars`` (linear scaling, Goyal et al. 2017),
    where batch_size counts images and not views, and ``learning_rate`` for ``adamw``. `base` is taken in
    place of ``learning_rate``.
    """
    peak = (config.learning_rate if base is None else base) * (
        1.0 if config.name == "adamw" else batch_size / 256
    )
    if config.schedule == "epoch":
        step -= step % steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        rising = max(1.0, warmup - 1) if config.warmup_peak == "last_step" else warmup
        return config.warmup_start + (peak - config.warmup_start) * step / rising
    progress = (step - warmup) / (epochs * steps_per_epoch - warmup)
    floor = config.final_learning_rate_ratio
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
