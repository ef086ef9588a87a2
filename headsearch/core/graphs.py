"""A whole training step as one CUDA graph.

The kernels of a small encoder are shorter than the time that the host needs to launch them, so the GPU waits
for the host. Recorded once and replayed, all kernels of a step cost one launch. A replay runs the same
kernels on the same addresses: batch, learning rates and the counter of the views' random numbers are tensors
that are filled in before it, and the loss is a tensor that is read after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import Tensor

from headsearch.core.features import Precision
from headsearch.core.learner import Learner
from headsearch.core.optimizers import set_rates
from headsearch.core.steps import Batch, joint_steps, rates_of
from headsearch.core.views import Views, ViewStream

logger = logging.getLogger(__name__)

WARM_STEPS: Final = 3
"""Steps made before the recording: cuDNN and cuBLAS set themselves up, and optimizers make their state."""


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the stream on which graphs are recorded, one a device: cuBLAS keeps 32 MiB for each it meets."""
    return torch.cuda.Stream(device)


class CudaGraph:
    """What a function launches on `device`, recorded once and launched again at once.

    The function takes and returns tensors that stay where they are, and draws no random number on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = side_stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm(self, run: Callable[[], Tensor]) -> Tensor:
        """Call `run` on a stream of its own, as recordings do (torch's notes on CUDA graphs ask for it)."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            result = run()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        result.record_stream(torch.cuda.current_stream(self.device))
        return result

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Record what `run` launches, without running it; returns what each replay writes its result to.

        Raises RuntimeError where something of it cannot be recorded.
        """
        # Threads that write checkpoints or gather images may use CUDA meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """Launch all of it."""
        self._graph.replay()


class GraphedStep:
    """Makes the steps of a joint training: the first ones as they are, then from a graph.

    All batches have the same size. Views come from `stream`, whose state is on the device; an epoch sets it.
    """

    def __init__(
        self, learner: Learner, views: Views, precision: Precision, stream: ViewStream, graph: CudaGraph
    ) -> None:
        self.learner, self.views, self.precision, self.stream = learner, views, precision, stream
        self._graph: CudaGraph | None = graph
        self._made = 0
        self._images: Tensor | None = None
        self._labels = self._loss = torch.empty(0)

    @property
    def recorded(self) -> bool:
        """Whether steps come from the graph by now."""
        return self._images is not None

    def __call__(self, images: Tensor, labels: Tensor, number: int, steps: int) -> Tensor:
        """Make step `number` on images, uint8 (B, 3, S, S), and labels (B,); return its loss, a scalar.

        The loss is overwritten by the next step. `steps` is how many an epoch has.
        """
        optimizer, config = self.learner.optimizer, self.learner.config.optimizer
        set_rates(optimizer, rates_of(self.learner, optimizer, config, number, steps))
        graph = self._graph
        if graph is None:
            return self._step(images, labels)
        if self._made < WARM_STEPS:
            self._made += 1
            return graph.warm(lambda: self._step(images, labels))
        if self._images is None and not self._recorded(graph, images, labels):
            return self._step(images, labels)
        assert self._images is not None  # noqa: S101 - it is recorded
        self._images.copy_(images)
        self._labels.copy_(labels)
        graph.replay()
        return self._loss

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            pair = self.views.pair(images, self.stream)
        batch = Batch(self.learner, self.precision, pair, labels, 0, 1, rates_given=True)
        return joint_steps(batch)

    def _recorded(self, graph: CudaGraph, images: Tensor, labels: Tensor) -> bool:
        """Record the step; false, and never again, where that fails."""
        given, answers = images.clone(), labels.clone()
        # Gradients of earlier steps are not the graph's memory; its own are made while it is recorded.
        self.learner.optimizer.zero_grad()
        try:
            self._loss = graph.record(lambda: self._step(given, answers))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("training.cuda_graph: the step could not be recorded, %s", reason)
            self._graph = None
            return False
        self._images, self._labels = given, answers
        return True


def graphed_step(learner: Learner, views: Views, precision: Precision) -> GraphedStep | None:
    """Give the learner's step as a graph, made at the first call; None where it has none.

    That is where `training.cuda_graph` is off or the encoder is compiled, where the scheme alternates, so
    that steps are not all alike, on a CPU, and where views are not drawn by the GPU's kernel.
    """
    config = learner.config
    wanted = config.training.cuda_graph and config.training.compile_encoder == "off"
    if not wanted or config.scheme.kind != "joint" or views.stream_kind != "cuda-philox":
        return None
    if learner.graphed is None:
        stream = views.stream(learner.config.seed, "views", 0)
        learner.graphed = GraphedStep(learner, views, precision, stream, CudaGraph(learner.device))
    return learner.graphed
