"""One pass over the training images: batches, views, and the steps that a scheme makes of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from headsearch.config import AlternatingScheme, JointScheme, OptimizerConfig
from headsearch.core.features import Precision, arithmetic
from headsearch.core.feed import batches
from headsearch.core.images import Split
from headsearch.core.learner import Learner
from headsearch.core.objectives import objective
from headsearch.core.optimizers import learning_rate, set_rate
from headsearch.core.randomness import generator, set_stream_states, stream_states, streams
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
    """State of the generator that draws the views, uint8 on the CPU."""
    streams: list[Tensor]
    """States of the global generators that dropout draws from."""
    device: str
    """Kind of the device whose generators these are."""
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
    draws = generator(device, config.seed, "views", epoch)
    learner.encoder.train()
    learner.head.train()
    total, first = torch.zeros((), device=device), 0
    began = started = time.perf_counter()
    with streams(device, config.seed, "dropout", epoch):
        if start is not None:
            first, total = start.step, start.total.to(device)
            if start.device == device.type:
                draws.set_state(start.views)
                set_stream_states(device, start.streams)
            else:
                # Generators of two kinds of device have no state in common.
                draws = generator(device, config.seed, "views", epoch, first)
        timed, made = steps - first, first

        def position() -> Position:
            seconds = time.perf_counter() - began + (start.seconds if start else 0.0)
            states = stream_states(device)
            return Position(made, total.detach().clone(), draws.get_state(), states, device.type, seconds)

        left = order[first * batch_size : steps * batch_size]
        for step, (images, labels) in enumerate(batches(train, left, batch_size, device), first):
            with torch.no_grad():
                pair = views.pair(images, draws)
            batch = Batch(learner, precision, pair, labels, (epoch - 1) * steps + step, steps)
            total += STEPS[config.scheme.kind](batch)
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


class Batch:
    """Two views (2B, 3, S, S) of a batch, first views first, and the means to make steps with them."""

    def __init__(
        self, learner: Learner, precision: Precision, pair: Tensor, labels: Tensor, number: int, steps: int
    ) -> None:
        self.learner, self.precision = learner, precision
        self.pair, self.labels = pair, labels
        self.number, self.steps = number, steps

    def features(self) -> Tensor:
        """Encode the views."""
        return self._encoded(self.learner.encode, self.pair)

    def loss(self, features: Tensor) -> Tensor:
        """Compute the objective on the head's projections of features (2B, F)."""
        projections = self._encoded(self.learner.head, features)
        return objective(self.learner.config.objective, features, projections)

    def _encoded(self, network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """Apply `network` to the rows of both views, together or one view after the other."""
        with arithmetic(self.pair.device, self.precision):
            if self.learner.config.training.encode_views == "apart":
                return torch.cat([network(view) for view in rows.chunk(2)])
            return network(rows)

    def online_loss(self, features: Tensor) -> Tensor:
        """Compute the online probe's cross entropy on both views; no gradient reaches the features.

        Zero where there is no probe.
        """
        if self.learner.online is None:
            return features.new_zeros(())
        logits = self.learner.online(features.detach().float())
        return F.cross_entropy(logits, self.labels.repeat(2))

    def descend(self, optimizer: Optimizer, config: OptimizerConfig, loss: Tensor) -> None:
        """Step along the gradient of `loss`, at the learning rate of this batch."""
        training = self.learner.config.training
        rate = learning_rate(
            config,
            step=self.number,
            steps_per_epoch=self.steps,
            epochs=training.epochs,
            batch_size=training.batch_size,
        )
        set_rate(optimizer, rate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def joint_steps(batch: Batch) -> Tensor:
    """Move encoder and head together; return the first step's loss."""
    learner = batch.learner
    scheme = learner.config.scheme
    assert isinstance(scheme, JointScheme)  # noqa: S101
    first = None
    for _ in range(scheme.steps_per_batch):
        features = batch.features()
        loss = batch.loss(features)
        probed = batch.online_loss(features) if first is None else 0.0
        batch.descend(learner.optimizer, learner.config.optimizer, loss + probed)
        first = loss.detach() if first is None else first
    assert first is not None  # noqa: S101
    return first


def alternating_steps(batch: Batch) -> Tensor:
    """Move the head at fixed features, then the encoder at a fixed head; return the last loss.

    Our reading of Gupta et al. 2022 (see AlternatingScheme). With `fresh` batches, one in K + 1 moves the
    encoder.
    """
    learner = batch.learner
    scheme = learner.config.scheme
    assert isinstance(scheme, AlternatingScheme)  # noqa: S101
    period = 1 if scheme.batches == "same" else scheme.head_steps + 1
    rounds, turn = divmod(batch.number, period)
    if scheme.reset_steps and rounds and turn == 0 and rounds % scheme.reset_steps == 0:
        learner.redraw_head(rounds // scheme.reset_steps)
    if scheme.batches == "fresh":
        if turn < scheme.head_steps:
            with torch.no_grad():
                features = batch.features()
            if learner.online is not None:
                # The encoder has no gradient and stays.
                batch.descend(learner.optimizer, learner.config.optimizer, batch.online_loss(features))
            return _move_head(batch, features, steps=1)
        return _move_encoder(batch, batch.features())
    features = batch.features()
    if scheme.encoder_uses == "updated":
        _move_head(batch, features.detach(), steps=scheme.head_steps)
        return _move_encoder(batch, features)
    loss = _move_encoder(batch, features)
    _move_head(batch, features.detach(), steps=scheme.head_steps)
    return loss


def _move_head(batch: Batch, features: Tensor, *, steps: int) -> Tensor:
    learner, scheme = batch.learner, batch.learner.config.scheme
    assert learner.head_optimizer is not None and isinstance(scheme, AlternatingScheme)  # noqa: S101, PT018
    config = scheme.head_optimizer or learner.config.optimizer
    for _ in range(steps):
        loss = batch.loss(features)
        batch.descend(learner.head_optimizer, config, loss)
    return loss.detach()


def _move_encoder(batch: Batch, features: Tensor) -> Tensor:
    """One step of the encoder; what the head's parameters gather is dropped before its own next step."""
    learner = batch.learner
    loss = batch.loss(features)
    batch.descend(learner.optimizer, learner.config.optimizer, loss + batch.online_loss(features))
    return loss.detach()


STEPS: Final[dict[str, Callable[[Batch], Tensor]]] = {
    "joint": joint_steps,
    "alternating": alternating_steps,
}


def wait_for(device: torch.device) -> None:
    """Return once `device` has done what it was told so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
