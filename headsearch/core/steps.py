"""The gradient steps that a training makes of one batch, by its scheme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from headsearch.config import AlternatingScheme, JointScheme, OptimizerConfig
from headsearch.core.features import Precision, arithmetic
from headsearch.core.learner import Learner
from headsearch.core.objectives import objective
from headsearch.core.optimizers import learning_rates, set_rates

UNLABELLED: Final = -1
"""Label of an image that has none."""


class Batch:
    """Two views (2B, 3, S, S) of a batch, first views first, and the means to make steps with them.

    With `rates_given` the caller has set the learning rates; a step that is being recorded must not.
    """

    def __init__(
        self,
        learner: Learner,
        precision: Precision,
        pair: Tensor,
        labels: Tensor,
        number: int,
        steps: int,
        *,
        rates_given: bool = False,
    ) -> None:
        self.learner, self.precision = learner, precision
        self.pair, self.labels = pair, labels
        self.number, self.steps = number, steps
        self.rates_given = rates_given

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

        Zero where there is no probe. Images without a label do not count, nor does a batch of such images.
        """
        if self.learner.online is None:
            return features.new_zeros(())
        logits = self.learner.online(features.detach().float())
        labels = self.labels.repeat(2)
        if not self.learner.partly_labelled:
            return F.cross_entropy(logits, labels)
        known = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
        return known / (labels != UNLABELLED).sum().clamp(min=1)

    def descend(self, optimizer: Optimizer, config: OptimizerConfig, loss: Tensor) -> None:
        """Step along the gradient of `loss`, at the learning rates of this batch."""
        if not self.rates_given:
            set_rates(optimizer, rates_of(self.learner, optimizer, config, self.number, self.steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def rates_of(
    learner: Learner, optimizer: Optimizer, config: OptimizerConfig, number: int, steps: int
) -> list[float]:
    """Compute each group's learning rate for batch `number`, counted from 0; an epoch has `steps`."""
    training = learner.config.training
    return learning_rates(
        optimizer,
        config,
        step=number,
        steps_per_epoch=steps,
        epochs=training.epochs,
        batch_size=training.batch_size,
    )


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
