"""Pretraining of one trial, as a generator of epoch reports.

From here: `learner` builds the networks, `epoch` makes the steps, `reporting` measures.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headsearch.config import AlternatingScheme, TrialConfig
from headsearch.core.checkpoint import Checkpoints
from headsearch.core.control import Control, EveryEpoch
from headsearch.core.encoders import feature_dim
from headsearch.core.epoch import Position, train_epoch
from headsearch.core.features import Precision, build_views, resolve_precision
from headsearch.core.heads import HeadFacts, describe_head, head_facts
from headsearch.core.identity import identities
from headsearch.core.images import ImageSet
from headsearch.core.learner import build_learner
from headsearch.core.memory import memory_checked
from headsearch.core.reporting import EpochReport, Reporter
from headsearch.errors import SpecError, TrainingStopped, TrialFailure

__all__ = ["EpochReport", "HeadFacts", "Pretrained", "describe_head", "pretrain"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """The result. `head_parameters` counts frozen ones too; `autoencoder` is a cache key."""

    encoder: nn.Module
    head: nn.Module
    feature_dim: int
    projection_dim: int
    head_parameters: int
    trainable_head_parameters: int
    train_seconds: float
    views_per_second: float
    autoencoder: str | None
    precision: Precision
    head_flops: int = 0
    """Of one image's forward pass."""
    online: nn.Linear | None = None
    """The probe that was trained along, of protocol `ouyang2025`."""
    kept_epoch: int = 0
    """Whose encoder this is; 0 where none was trained."""
    measures: dict[str, float] = field(default_factory=dict)
    """Of the kept epoch's report."""


@dataclass
class Best:
    """The epoch of the smallest validation loss so far, with its networks, for ``training.keep``."""

    loss: float = math.inf
    epoch: int = 0
    weights: dict[str, dict[str, Tensor]] | None = None


def pretrain(
    config: TrialConfig,
    images: ImageSet,
    *,
    device: torch.device,
    home: Path,
    checkpoints: Checkpoints | None = None,
    control: Control | None = None,
) -> Generator[EpochReport, None, Pretrained]:
    """Train encoder and head on two views of each image of `ImageSet.pretraining`; yield a report an epoch.

    States are given to `checkpoints.save` after every epoch, before its report is yielded, or when `control`
    says so. Where `checkpoints` writes in a thread, the report may come before its checkpoint is on the
    disk: `checkpoints.flush` waits for it. It is waited for in any case before this generator ends, whatever
    ends it, or is closed. With a checkpoint of the same config and images, the reports so far are yielded
    again, unchanged, and training goes on as if it had never stopped, be it in the middle of an epoch: all
    randomness comes from the seed, the epoch and the step. Never reads ``images.test`` and leaves torch's
    global generator as it is.

    Raises SpecError if a batch does not fit the training split; TrialFailure if the loss is not finite, the
    representation collapses or memory runs out; StorageError if checkpoint or cache cannot be used;
    TrainingStopped if `control` says to stop inside an epoch, once its checkpoint is on the disk.
    """
    training = _trained(config, images, device, home, checkpoints, control or EveryEpoch())
    if checkpoints is None:
        return (yield from training)
    try:
        pretrained = yield from training
    except GeneratorExit:
        checkpoints.flush()
        raise
    except BaseException:
        try:
            checkpoints.flush()
        except Exception as error:  # noqa: BLE001 - what ended the training is what the caller must hear
            logger.warning("the last checkpoint was not written: %s", error)
        raise
    checkpoints.flush()
    return pretrained


def _trained(
    config: TrialConfig,
    images: ImageSet,
    device: torch.device,
    home: Path,
    checkpoints: Checkpoints | None,
    control: Control,
) -> Generator[EpochReport, None, Pretrained]:
    """The training itself; a checkpoint may still be being written when it ends."""
    check_steps(config, images)
    precision = resolve_precision(config.training, device)
    with memory_checked():
        learner = build_learner(config, images, device, home)
        views = build_views(config, images, device)
        train = images.pretraining
        reporter = Reporter(learner, images.train, images.validation, views, precision)

    ours = identities(config, images)
    state = checkpoints.load() if checkpoints else None
    if state and state.get("identity") not in ours:
        assert checkpoints is not None  # noqa: S101 - it gave the state
        # Else it would pass for newer than ours; it is kept, for it may be the other images that are right.
        where = checkpoints.set_aside(str(state.get("identity")))
        logger.warning("checkpoint of another config or image set: kept as %s", where)
        taken_back = (checkpoints.take_back(identity) for identity in ours)
        state = next((one for one in taken_back if one), None)
        if state is None or state.get("identity") not in ours:
            logger.warning("training starts at epoch 1")
            state = None
    reports: list[EpochReport] = []
    best, start = Best(), None
    if state:
        learner.load(state)
        reports = [EpochReport(**report) for report in state["reports"]]
        best = Best(**state["best"])
        start = Position(**state["position"]) if state.get("position") else None
    yield from reports

    def save(position: Position | None = None) -> None:
        if checkpoints:
            checkpoints.save(
                {
                    "identity": ours[0],
                    "epoch": len(reports),
                    "position": vars(position) if position else None,
                    **learner.state(),
                    "reports": [asdict(report) for report in reports],
                    "best": vars(best),
                }
            )

    def between(tell: Callable[[], Position]) -> None:
        verdict = control.at_step()
        if verdict != "go on":
            position = tell()
            save(position)
            if verdict == "stop":
                if checkpoints:
                    checkpoints.flush()
                raise TrainingStopped(f"in epoch {len(reports) + 1} after {position.step} steps")

    warm = False
    for epoch in range(len(reports) + 1, config.training.epochs + 1):
        with memory_checked():
            started = time.perf_counter()
            before = start.seconds if start else 0.0
            control.at_epoch(epoch)
            loss, speed = train_epoch(
                learner, epoch, train, views, precision, warm=warm, start=start, between=between
            )
            warm, start = True, None
            control.at_report(epoch)
            rank = reports[-1].projection_rank if reports else math.inf
            found = reporter.measure(epoch, len(images.classes), rank)
            before += reports[-1].train_seconds if reports else 0.0
            seconds = before + time.perf_counter() - started
            reports.append(
                EpochReport(
                    epoch=epoch, loss=loss, views_per_second=speed, train_seconds=seconds, **vars(found)
                )
            )
            if found.measures.get("validation_loss", math.inf) < best.loss:
                parts = {"encoder": learner.encoder, "head": learner.head, "online": learner.online}
                weights = {
                    name: copied(part.state_dict()) for name, part in parts.items() if part is not None
                }
                best = Best(found.measures["validation_loss"], epoch, weights)
            if control.save_after(epoch) or epoch == config.training.epochs:
                save()
        yield reports[-1]

    learner.graphed = None  # its memory is the probe's
    if best.weights is not None:
        for part, state_of_part in best.weights.items():
            getattr(learner, part).load_state_dict(state_of_part)
    elif config.training.keep != "last" and reports:
        raise TrialFailure("non_finite_loss", "no epoch had a finite validation loss")
    kept = best.epoch or len(reports)
    for network in (learner.encoder, learner.head):
        network.zero_grad()  # gradients take as much memory as weights
    return Pretrained(
        encoder=learner.encoder,
        head=learner.head,
        online=learner.online,
        kept_epoch=kept,
        **asdict(head_facts(config.head, feature_dim(config.encoder), learner.head)),
        train_seconds=reports[-1].train_seconds if reports else 0.0,
        views_per_second=math.fsum(r.views_per_second for r in reports) / max(1, len(reports)),
        autoencoder=learner.autoencoder,
        precision=precision,
        measures=reports[kept - 1].measures if reports else {},
    )


def check_steps(config: TrialConfig, images: ImageSet) -> None:
    """Raise SpecError unless the encoder gets a step."""
    training, scheme = config.training, config.scheme
    count = len(images.pretraining)
    if training.epochs and count < training.batch_size:
        raise SpecError(
            f"training.batch_size: {training.batch_size} is more than the {count} "
            f"training images of {config.data.name}"
        )
    steps = training.epochs * (count // training.batch_size)
    if isinstance(scheme, AlternatingScheme) and scheme.batches == "fresh" and 0 < steps <= scheme.head_steps:
        raise SpecError(
            f"scheme.head_steps: {scheme.head_steps} steps of the head come before the encoder's first, and "
            f"the training has only {steps}; it can be at most {steps - 1}"
        )


def copied(weights: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of tensors that training goes on to change."""
    return {name: value.detach().clone() for name, value in weights.items()}
