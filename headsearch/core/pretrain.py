"""Contrastive pretraining of one trial, as a generator of epoch reports.

From top to bottom: what a report and a result hold, `pretrain`, and the steps that it is made of.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headsearch.config import AutoencoderHead, TrialConfig
from headsearch.core.autoencoder import pretrained_embedding
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.encoders import build_encoder, feature_dim
from headsearch.core.features import Precision, arithmetic, build_views, extract_features, resolve_precision
from headsearch.core.heads import HeadFacts, build_head, describe_head, head_facts
from headsearch.core.images import ImageSet, Split
from headsearch.core.logistic import fit_probe
from headsearch.core.memory import memory_checked
from headsearch.core.objectives import nt_xent
from headsearch.core.optimizers import build_optimizer, learning_rate
from headsearch.core.randomness import generator, initialisation
from headsearch.core.ranks import effective_rank
from headsearch.core.views import Views
from headsearch.errors import SpecError, TrialFailure

__all__ = ["EpochReport", "HeadFacts", "Pretrained", "describe_head", "pretrain"]

logger = logging.getLogger(__name__)

COLLAPSED_RANK: Final = 1 + 1e-5
"""Projections of a smaller effective rank point in one direction up to rounding. No larger: ranks are not
centred, and a sigmoid head with two outputs is at 1.002 after its first epoch, and learns."""
CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class EpochReport:
    """What a trial says after an epoch.

    `epoch` counts from 1; `loss` is the epoch's mean; `probe_accuracy` is that of a small linear probe on the
    validation split, in [0, 1]; ranks are effective ranks (RankMe) of features and projections of the same
    validation images; `train_seconds` is cumulative over the trial, whoever trained it.
    """

    epoch: int
    loss: float
    probe_accuracy: float
    feature_rank: float
    projection_rank: float
    views_per_second: float
    train_seconds: float


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


def pretrain(
    config: TrialConfig,
    images: ImageSet,
    *,
    device: torch.device,
    home: Path,
    checkpoints: CheckpointFolder | None = None,
) -> Generator[EpochReport, None, Pretrained]:
    """Train encoder and head on two views of each training image; yield a report after every epoch.

    The checkpoint is saved before its report is yielded. With a checkpoint of the same config and images, the
    reports so far are yielded again, unchanged, and training goes on as if it had never stopped: all
    randomness comes from the seed, the epoch and the step. Never reads ``images.test`` and leaves torch's
    global generator as it is.

    Raises SpecError if a batch does not fit the training split; TrialFailure if the loss is not finite, the
    representation collapses or memory runs out; StorageError if checkpoint or cache cannot be used.
    """
    steps = len(images.train) // config.training.batch_size
    if config.training.epochs and not steps:
        raise SpecError(
            f"training.batch_size: {config.training.batch_size} is more than the {len(images.train)} "
            f"training images of {config.data.name}"
        )
    precision = resolve_precision(config.training, device)
    with memory_checked():
        encoder, head, autoencoder = build_networks(config, images, device, home)
        views = build_views(config, images, device)
        train = images.train.to(device)
        probed = subset(train, config), subset(images.validation, config).to(device)
        optimizer = build_optimizer(config.optimizer, encoder, head)

    identity = identify(config, images)
    state = checkpoints.load() if checkpoints else None
    if state and state.get("identity") != identity:
        logger.warning("checkpoint of another config or image set ignored; training starts at epoch 1")
        state = None
    reports: list[EpochReport] = []
    if state:
        encoder.load_state_dict(state["encoder"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        reports = [EpochReport(**report) for report in state["reports"]]
    yield from reports

    warm = False
    for epoch in range(len(reports) + 1, config.training.epochs + 1):
        with memory_checked():
            started = time.perf_counter()
            loss, speed = train_epoch(
                config, epoch, train.images, views, encoder, head, optimizer, precision, warm=warm
            )
            warm = True
            accuracy, ranks = measure(
                config, epoch, probed, len(images.classes), views, encoder, head, precision
            )
            spent = reports[-1].train_seconds if reports else 0.0
            seconds = spent + time.perf_counter() - started
        reports.append(EpochReport(epoch, loss, accuracy, *ranks, speed, seconds))
        if checkpoints:
            checkpoints.save(
                {
                    "identity": identity,
                    "epoch": epoch,
                    "encoder": encoder.state_dict(),
                    "head": head.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "reports": [asdict(report) for report in reports],
                    "train_seconds": seconds,
                }
            )
        yield reports[-1]

    facts = head_facts(config.head, feature_dim(config.encoder), head)
    return Pretrained(
        encoder=encoder,
        head=head,
        **asdict(facts),
        train_seconds=reports[-1].train_seconds if reports else 0.0,
        views_per_second=math.fsum(r.views_per_second for r in reports) / max(1, len(reports)),
        autoencoder=autoencoder,
        precision=precision,
    )


def train_epoch(
    config: TrialConfig,
    epoch: int,
    images: Tensor,
    views: Views,
    encoder: nn.Module,
    head: nn.Module,
    optimizer: Optimizer,
    precision: Precision,
    *,
    warm: bool,
) -> tuple[float, float]:
    """Make one pass over `images`, uint8 (N, 3, H, W); return its mean loss and its views per second.

    Waits for the device once, at the end; `warm` says that this process has trained a step before, else the
    first one is left out of the views per second.
    """
    batch_size, steps = config.training.batch_size, len(images) // config.training.batch_size
    order = torch.randperm(len(images), generator=generator(CPU, config.seed, "shuffle", epoch))
    order = order.to(images.device)
    draws = generator(images.device, config.seed, "views", epoch)
    encoder.train()
    head.train()
    total = torch.zeros((), device=images.device)
    started, timed = time.perf_counter(), steps
    for step in range(steps):
        rows = order[step * batch_size : (step + 1) * batch_size]
        with torch.no_grad():
            pair = views.pair(images[rows], draws)
        with arithmetic(images.device, precision):
            projections = head(encoder(pair))
        loss = nt_xent(projections, config.objective.temperature)
        rate = learning_rate(
            config.optimizer,
            step=(epoch - 1) * steps + step,
            steps_per_epoch=steps,
            epochs=config.training.epochs,
            batch_size=batch_size,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if step == 0 and not warm and steps > 1:
            wait_for(images.device)
            started, timed = time.perf_counter(), steps - 1
    mean = float(total) / steps
    speed = 2 * batch_size * timed / (time.perf_counter() - started)
    if not math.isfinite(mean):
        raise TrialFailure("non_finite_loss", f"epoch {epoch}: the loss is {mean}")
    return mean, speed


@torch.no_grad()
def measure(
    config: TrialConfig,
    epoch: int,
    probed: tuple[Split, Split],
    classes: int,
    views: Views,
    encoder: nn.Module,
    head: nn.Module,
    precision: Precision,
) -> tuple[float, tuple[float, float]]:
    """Measure the probe's accuracy, and the effective ranks of validation features and projections."""
    train, validation = probed
    train_features = extract_features(encoder, train.images, views, precision)
    features = extract_features(encoder, validation.images, views, precision)
    head.eval()
    projections = head(features)
    if not (train_features.isfinite().all() and projections.isfinite().all()):
        raise TrialFailure("non_finite_loss", f"epoch {epoch}: features or projections are not finite")
    ranks = effective_rank(features), effective_rank(projections)
    if projections.shape[1] > 1 and ranks[1] < COLLAPSED_RANK:
        raise TrialFailure("collapsed", f"epoch {epoch}: all projections point in one direction")
    if bool((features == features[0]).all()):
        raise TrialFailure("collapsed", f"epoch {epoch}: all images have the same features")
    probe = fit_probe(
        train_features,
        train.labels,
        classes,
        penalty=config.probe.report_penalty,
        iterations=config.probe.report_iterations,
    )
    return probe.accuracy(features, validation.labels), ranks


def build_networks(
    config: TrialConfig, images: ImageSet, device: torch.device, home: Path
) -> tuple[nn.Module, nn.Module, str | None]:
    """Build encoder and head on `device`, initialised from the seed, and the key of the head's autoencoder.

    Drawn on the CPU, each from its own stream: the same weights on every device, and the same encoder
    whatever the head is.
    """
    with initialisation(config.seed, "encoder"):
        encoder = build_encoder(config.encoder, images.image_size)
    embedding, key = None, None
    if isinstance(config.head, AutoencoderHead) and config.head.first_layer == "pretrained":
        embedding, key = pretrained_embedding(config, images, encoder.feature_dim, device=device, home=home)
    with initialisation(config.seed, "head"):
        head = build_head(config.head, encoder.feature_dim, embedding)
    layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
    return encoder.to(device).to(memory_format=layout), head.to(device), key


def subset(split: Split, config: TrialConfig) -> Split:
    """Pick the images of `split` that reports are made on: drawn evenly, the same for every trial."""
    if len(split) <= config.probe.report_images:
        return split
    rows = torch.randperm(len(split), generator=generator(CPU, 0, "report"))[: config.probe.report_images]
    rows = rows.to(split.labels.device)
    return Split(split.images[rows], split.labels[rows])


def identify(config: TrialConfig, images: ImageSet) -> str:
    """Hash what a checkpoint belongs to."""
    text = json.dumps([config.model_dump(mode="json"), images.fingerprint], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def wait_for(device: torch.device) -> None:
    """Return once `device` has done what it was told so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
