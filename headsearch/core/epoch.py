"""One pass over the training images: batches, views, and the steps that are made of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from headsearch.core.features import Precision
from headsearch.core.feed import batches
from headsearch.core.graphs import graphed_step
from headsearch.core.images import Split
from headsearch.core.learner import Learner
from headsearch.core.randomness import generator, set_stream_states, stream_states, streams
from headsearch.core.steps import STEPS, Batch
from headsearch.core.views import Views
from headsearch.errors import TrialFailure

CPU: Final = torch.device("cpu")


@dataclass
class Position:
    """How far an epoch has come: all that its remaining steps depend on beside the learner.

    The order of the images is drawn from seed and epoch, so the step tells which of them are left.
    """

    step: int
    """Steps made."""
    total: Tensor
    """Sum of their losses, a scalar in fp32 on the device."""
    views: Tensor
    """State of the stream that draws the views, on the CPU: uint8 of a generator, int64 (2,) of a Philox."""
    streams: list[Tensor]
    """States of the global generators that dropout draws from."""
    device: str
    """Kind of these generators (`Views.stream_kind`)."""
    seconds: float = 0.0
    """Spent on the epoch up to here."""


def train_epoch(
    learner: Learner,
    epoch: int,
    train: Split,
    views: Views,
    precision: Precision,
    *,
    warm: bool,
    start: Position | None = None,
    between: Callable[[Callable[[], Position]], None] | None = None,
) -> tuple[float, float]:
    """Make one pass over `train`; return its mean loss and its views per second.

    Waits for the device once, at the end; `warm` says that this process has trained a step before, else the
    first one is left out of the views per second, which counts the steps of this call only. `start` takes
    up an epoch where its position was told; `between` is called after each step but the last, with a
    function that tells the position. Raises TrialFailure when the loss is not finite.
    """
    config, device = learner.config, learner.device
    batch_size, steps = config.training.batch_size, len(train) // config.training.batch_size
    order = torch.randperm(len(train), generator=generator(CPU, config.seed, "shuffle", epoch))
    draws = views.stream(config.seed, "views", epoch)
    graphed = graphed_step(learner, views, precision)
    if graphed is not None:
        graphed.stream.set_state(draws.get_state())
        draws = graphed.stream
    learner.encoder.train()
    learner.head.train()
    total, first = torch.zeros((), device=device), 0
    began = started = time.perf_counter()
    with streams(device, config.seed, "dropout", epoch):
        if start is not None:
            first, total = start.step, start.total.to(device)
            if start.device == views.stream_kind:
                draws.set_state(start.views)
                set_stream_states(device, start.streams)
            else:
                # Generators of two kinds have no state in common.
                draws.set_state(views.stream(config.seed, "views", epoch, first).get_state())
        timed, made = steps - first, first

        def position() -> Position:
            seconds = time.perf_counter() - began + (start.seconds if start else 0.0)
            states = stream_states(device)
            return Position(
                made, total.detach().clone(), draws.get_state(), states, views.stream_kind, seconds
            )

        left = order[first * batch_size : steps * batch_size]
        for step, (images, labels) in enumerate(batches(train, left, batch_size, device), first):
            number = (epoch - 1) * steps + step
            if graphed is not None and isinstance(images, Tensor):  # photos have none
                total += graphed(images, labels, number, steps)
            else:
                with torch.no_grad():
                    pair = views.pair(images, draws)
                total += STEPS[config.scheme.kind](Batch(learner, precision, pair, labels, number, steps))
            if step == first and not warm and timed > 1:
                wait_for(device)
                started, timed = time.perf_counter(), timed - 1
            made = step + 1
            if between is not None and made < steps:
                between(position)
    mean = float(total) / steps
    speed = 2 * batch_size * timed / (time.perf_counter() - started)
    if not math.isfinite(mean):
        raise TrialFailure("non_finite_loss", f"epoch {epoch}: the loss is {mean}")
    return mean, speed


def wait_for(device: torch.device) -> None:
    """Return once `device` has done what it was told so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
