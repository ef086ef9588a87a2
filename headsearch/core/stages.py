"""The parts of a training, each run by itself on the same batch, so that their times compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from headsearch.core import graphs
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.epoch import CPU, train_epoch
from headsearch.core.features import Precision
from headsearch.core.feed import batches
from headsearch.core.images import Split
from headsearch.core.learner import Learner
from headsearch.core.optimizers import set_rate
from headsearch.core.photos import Images
from headsearch.core.randomness import generator
from headsearch.core.steps import Batch
from headsearch.core.views import Views

WARM_STEPS: Final = 2
"""Before anything is timed: allocators, oneDNN's and cuDNN's choices, and the optimizer's state."""


@dataclass(frozen=True)
class Measure:
    """Repeated measurements of one thing: the median, and the smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measure:
        """Summarise `values`."""
        return cls(statistics.median(values), min(values), max(values))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time `call`, with all that it makes the device do."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    # Events are in the device's own time: the wait for the host to hear of the end is in none of them.
    began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)  # the default is the current device's, which may be another
    began_at.record(stream)
    call()
    ended_at.record(stream)
    ended_at.synchronize()
    return float(began_at.elapsed_time(ended_at)) / 1000


class Stages:
    """One learner and one batch: whole epochs, the bare encoder, and what an epoch adds to it.

    Each method does the work of `steps` steps. `encoder` is the limit: the passes through the encoder that
    an epoch makes of views that are there already, forward and backward, and nothing else. Where the steps
    of an epoch are a CUDA graph, each part is one as well.
    """

    def __init__(self, learner: Learner, train: Split, views: Views, precision: Precision) -> None:
        self.learner, self.views, self.precision, self.train = learner, views, precision, train
        config = learner.config
        self.batch_size = config.training.batch_size
        self.draws = views.stream(config.seed, "views", 0)
        self.passes = config.scheme.steps_per_batch if config.scheme.kind == "joint" else 1
        with torch.no_grad():
            self.images, labels = next(self._batches(1))
            pair = views.pair(self.images, self.draws)
        self.batch = Batch(learner, precision, pair, labels, 0, len(train) // self.batch_size)
        self.epochs = 0
        self.graphs: dict[Callable[[], Tensor], graphs.CudaGraph] = {}
        self.epoch(WARM_STEPS + (graphs.WARM_STEPS if config.training.cuda_graph else 0))
        # Copied: what a compiled encoder returns may be memory that its next call uses again (CUDA graphs).
        self.features = self.batch.features().detach().clone().requires_grad_()
        self.gradient = torch.full_like(self.features, 1.0 / self.features.numel())
        self.encoder(WARM_STEPS)
        if learner.graphed is not None and learner.graphed.recorded:
            self.draws = learner.graphed.stream  # its state is on the device, where a replay moves it on
            for part in (self._pass_encoder, self._pass_views, self._pass_head, self._pass_optimizers):
                graph = graphs.CudaGraph(learner.device)
                graph.warm(part)
                graph.record(part)
                self.graphs[part] = graph

    def epoch(self, steps: int) -> None:
        """Train as a trial does: whole epochs, and of the last the steps that are left."""
        whole = len(self.train) // self.batch_size
        while steps > 0:
            count = min(steps, whole) * self.batch_size
            split = Split(self.train.images[:count], self.train.labels[:count])
            # Another number each time: an epoch of the same number has the same views.
            self.epochs += 1
            train_epoch(self.learner, self.epochs, split, self.views, self.precision, warm=True)
            steps -= whole

    def encoder(self, steps: int) -> None:
        """Forward and backward of the encoder alone."""
        self.learner.encoder.train()
        self._repeat(self._pass_encoder, steps * self.passes)

    def make_views(self, steps: int) -> None:
        """Bring batches to the device and make two views of each image."""
        for images, _ in self._batches(steps):
            if self.graphs and isinstance(images, Tensor) and isinstance(self.images, Tensor):
                self.images.copy_(images)  # a graph reads them where they were
            else:
                self.images = images
            self._repeat(self._pass_views, 1)

    def head(self, steps: int) -> None:
        """Forward and backward of head and objective, and of the online probe, from fixed features."""
        self.learner.head.train()
        self._repeat(self._pass_head, steps * self.passes)

    def optimizer(self, steps: int) -> None:
        """Steps of the optimizers, which change nothing: their rate is 0."""
        for optimizer in self._optimizers():
            set_rate(optimizer, 0.0)
        self._repeat(self._pass_optimizers, steps * self.passes)

    def _repeat(self, part: Callable[[], Tensor], times: int) -> None:
        graph = self.graphs.get(part)
        for _ in range(times):
            if graph is not None:
                graph.replay()
            else:
                part()

    def _pass_encoder(self) -> Tensor:
        self.learner.encoder.zero_grad()
        features = self.batch.features()
        features.backward(self.gradient)
        return features.detach()

    @torch.no_grad()
    def _pass_views(self) -> Tensor:
        return self.views.pair(self.images, self.draws)

    def _pass_head(self) -> Tensor:
        self.features.grad = None
        self.learner.head.zero_grad()
        loss = self.batch.loss(self.features) + self.batch.online_loss(self.features)
        loss.backward()
        return loss.detach()

    def _pass_optimizers(self) -> Tensor:
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
            optimizer.step()
        return self.gradient

    def _optimizers(self) -> list[Optimizer]:
        both = (self.learner.optimizer, self.learner.head_optimizer)
        return [optimizer for optimizer in both if optimizer is not None]

    def _batches(self, steps: int) -> Iterator[tuple[Images, Tensor]]:
        order = torch.arange(self.batch_size).repeat(steps)
        return batches(self.train, order, self.batch_size, self.learner.device)

    def save(self, folder: CheckpointFolder) -> None:
        """Write a checkpoint of the learner."""
        folder.save({"epoch": 0, **self.learner.state()})


def random_images(count: int, image_size: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of noise, uint8 (count, 3, S, S), and labels, int64 (count,).

    What a training costs does not depend on what is on its images.
    """
    draw = generator(CPU, seed, "noise")
    shape = (count, 3, image_size, image_size)
    return (
        torch.randint(256, shape, dtype=torch.uint8, generator=draw),
        torch.arange(count) % classes,
    )
