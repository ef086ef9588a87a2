"""Trainings on either device: their images, sizes, steps, and what must not happen inside a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headsearch.config import TrialConfig
from headsearch.core.benchmark import noise
from headsearch.core.features import Precision, build_views
from headsearch.core.feed import placed
from headsearch.core.images import ImageSet
from headsearch.core.learner import Learner, build_learner
from headsearch.core.steps import STEPS, Batch
from headsearch.core.views import Views

CPU = torch.device("cpu")
LATENTS, KEPT = 2048, 64
"""Of sparse heads, whose own sizes are for machines with time: the weights are drawn on the CPU."""


@dataclass(frozen=True)
class Sizes:
    """How much a test computes."""

    batch: int
    side: int
    width: int
    steps: int


SIZES = {"cpu": Sizes(16, 8, 4, 3), "cuda": Sizes(64, 32, 16, 8)}


def config_of(device: torch.device, **parts: Any) -> TrialConfig:
    """Two epochs on `images_of`; `parts` replace or extend tables."""
    size = SIZES[device.type]
    tree: dict[str, Any] = {
        "encoder": {"name": "small-resnet", "width": size.width},
        "optimizer": {"learning_rate": 0.1},
        "autoencoder": {"epochs": 1, "batch_size": 32},
        "probe": {"report_images": 64, "report_iterations": 5},
        "training": {"epochs": 2, "batch_size": size.batch},
    }
    for name, part in parts.items():
        tree[name] = {**tree.get(name, {}), **part} if isinstance(part, dict) else part
    return TrialConfig.model_validate(tree)


def images_of(device: torch.device, steps: int | None = None) -> ImageSet:
    """Noise for so many steps an epoch, on `device`."""
    size = SIZES[device.type]
    return placed(noise((steps or size.steps) * size.batch, size.side), device)


def built(config: TrialConfig, images: ImageSet, device: torch.device, home: Path) -> tuple[Learner, Views]:
    """A learner in training mode, and its views."""
    learner = build_learner(config, images, device, home)
    learner.encoder.train()
    learner.head.train()
    return learner, build_views(config, images, device)


def given_views(config: TrialConfig, images: ImageSet) -> Tensor:
    """Two views of each image of the first batch, made on the CPU."""
    views = build_views(config, images.to(CPU), CPU)
    first = images.train.images[: config.training.batch_size].to(CPU)
    return views.pair(first, views.stream(config.seed, "given"))


def batch_of(learner: Learner, precision: Precision, pair: Tensor, labels: Tensor, number: int = 0) -> Batch:
    """Step `number` of a long training on these views, brought to the learner's device."""
    there = pair.to(learner.device, memory_format=torch.channels_last)
    return Batch(learner, precision, there, labels[: len(pair) // 2].to(learner.device), number, 100)


def step(batch: Batch) -> Tensor:
    """What the scheme makes of a batch; its loss."""
    return STEPS[batch.learner.config.scheme.kind](batch)


def weights_of(learner: Learner) -> dict[str, Tensor]:
    """Copies of weights and statistics, on the CPU."""
    networks = {"encoder": learner.encoder, "head": learner.head, "online": learner.online}
    return {
        f"{part}.{name}": value.detach().to("cpu", copy=True)
        for part, network in networks.items()
        if network is not None
        for name, value in network.state_dict().items()
    }


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of weights that are not equal to the bit."""
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


@contextmanager
def no_host_reads(device: torch.device) -> Iterator[None]:
    """Within: RuntimeError where the host waits for a value of the device.

    On a GPU torch's own check; on a CPU, where nothing waits, each read of a tensor as a Python number.
    """
    if device.type != "cuda":
        with NoNumbers():
            yield
        return
    with warnings.catch_warnings():
        # It says each time that it is a prototype.
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class NoNumbers(TorchDispatchMode):
    """Refuses what makes a Python number of a tensor, or a shape of its values."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS:
            raise RuntimeError(f"the host reads the device: {func}")
        return func(*args, **(kwargs or {}))
