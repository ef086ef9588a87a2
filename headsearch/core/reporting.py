"""What a trial says after an epoch: accuracy of a small probe, ranks, and the measures beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from headsearch.core import measures
from headsearch.core.bottleneck import bounds
from headsearch.core.epoch import CPU
from headsearch.core.features import Precision, arithmetic, extract_features
from headsearch.core.heads import head_layers
from headsearch.core.images import Split
from headsearch.core.learner import Learner
from headsearch.core.logistic import fit_probe
from headsearch.core.objectives import contrast, objective
from headsearch.core.randomness import generator
from headsearch.core.ranks import effective_rank
from headsearch.core.views import Views
from headsearch.errors import TrialFailure

COLLAPSED_RANK: Final = 1 + 1e-5
"""Projections of a smaller effective rank point in one direction up to rounding, which leaves the rank below
1 + 5e-6. No larger: ranks are not centred, and a sigmoid head with two outputs is at 1.002 after its first
epoch, and learns."""
PAIRED_IMAGES: Final = 256
"""Validation images of which two views are drawn for alignment, uniformity and the bounds."""


@dataclass(frozen=True)
class EpochReport:
    """What a trial says after an epoch.

    `epoch` counts from 1; `loss` is the epoch's mean; `probe_accuracy` is that of a small linear probe on the
    validation split, in [0, 1] (protocol `ouyang2025`: of the probe trained along); ranks are effective ranks
    (RankMe) of features and projections of the same validation images; `train_seconds` is cumulative over the
    trial, whoever trained it. `measures` are named in `Reporter.measure`.
    """

    epoch: int
    loss: float
    probe_accuracy: float
    feature_rank: float
    projection_rank: float
    views_per_second: float
    train_seconds: float
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One epoch's report but for loss and times."""

    probe_accuracy: float
    feature_rank: float
    projection_rank: float
    measures: dict[str, float]


class Reporter:
    """Measures a learner after each epoch, on the same images for every trial of a study.

    `train` and `validation` are the splits that reports use, `whole` is all of the validation split.
    """

    def __init__(
        self, learner: Learner, train: Split, whole: Split, views: Views, precision: Precision
    ) -> None:
        self.learner, self.config = learner, learner.config
        self.views, self.precision = views, precision
        self.whole, self.bank = whole, train
        self.train, self.validation = (
            subset(split, self.config.probe.report_images).to(learner.device) for split in (train, whole)
        )

    @torch.no_grad()
    def measure(self, epoch: int, classes: int, rank_before: float = math.inf) -> Measured:
        """Measure everything. Raises TrialFailure when values are not finite or all points collapsed.

        `rank_before` is the last report's projection rank: discretised projections have to collapse twice.
        """
        encoder, head, probe = self.learner.encoder, self.learner.head, self.config.probe
        train = extract_features(encoder, self.train.images, self.views, self.precision)
        features = extract_features(encoder, self.validation.images, self.views, self.precision)
        outputs, hidden = head_layers(head, features)
        projections = outputs["z"]
        if not all(rows.isfinite().all() for rows in (train, features, projections)):
            raise TrialFailure("non_finite_loss", f"epoch {epoch}: features or projections are not finite")
        if self.learner.online is not None and not self.learner.online.weight.isfinite().all():
            raise TrialFailure(
                "non_finite_loss",
                f"epoch {epoch}: the online probe diverged, lower probe.online_learning_rate",
            )
        ranks = effective_rank(features), effective_rank(projections)
        collapsed = projections.shape[1] > 1 and ranks[1] < COLLAPSED_RANK
        # what is rounded to few levels can coincide after one epoch and part in the next
        if collapsed and (not self.config.head.levels or rank_before < COLLAPSED_RANK):
            raise TrialFailure("collapsed", f"epoch {epoch}: all projections point in one direction")
        if bool((features == features[0]).all()):
            raise TrialFailure("collapsed", f"epoch {epoch}: all images have the same features")
        labels = self.validation.labels
        if self.learner.online is not None:
            accuracy = float((self.learner.online(features).argmax(1) == labels).double().mean())
        else:
            fitted = fit_probe(
                train,
                self.train.labels,
                classes,
                penalty=probe.report_penalty,
                iterations=probe.report_iterations,
            )
            accuracy = fitted.accuracy(features, labels)
        found: dict[str, float] = {}
        if probe.measures:
            found["knn_accuracy"] = self._knn(train, features, labels, classes)
            if hidden:
                found["dead_units"] = _mean([measures.dead_units(layer.values) for layer in hidden])
                found["saturated_units"] = _mean(
                    [measures.saturated_units(layer.values, layer.low, layer.high) for layer in hidden]
                )
            found |= self._pairs(epoch)
        if self.config.training.keep == "best_validation_loss":
            found["validation_loss"] = self._validation_loss()
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        return Measured(accuracy, *ranks, finite)

    def _knn(self, train: Tensor, features: Tensor, labels: Tensor, classes: int) -> float:
        """Score kNN among the report's training images, or among all (`probe.knn_train`)."""
        probe, known = self.config.probe, self.train.labels
        if probe.knn_train == "all":
            train = extract_features(self.learner.encoder, self.bank.images, self.views, self.precision)
            known = self.bank.labels.to(labels.device)
        return measures.knn_accuracy(
            train,
            known,
            features,
            labels,
            classes=classes,
            k=probe.knn_neighbours,
            temperature=probe.knn_temperature,
        )

    def _pairs(self, epoch: int) -> dict[str, float]:
        """Alignment, uniformity, mutual information and bounds, on two views of some validation images."""
        images = self.validation.images[:PAIRED_IMAGES]
        pair = self.views.pair(images, self.views.stream(self.config.seed, "pairs", epoch))
        with arithmetic(images.device, self.precision):
            features = self.learner.encoder(pair).float()
        projections = self.learner.head(features).float()
        found = {}
        for name, rows in (("feature", features), ("projection", projections)):
            first, second = rows.chunk(2)
            found[f"{name}_alignment"] = measures.alignment(first, second)
            found[f"{name}_uniformity"] = measures.uniformity(first)
        lower, upper = bounds(features, projections, contrast(self.config.objective, features))
        found["bound_lower"], found["bound_upper"] = float(lower), float(upper)
        return found

    def _validation_loss(self) -> float:
        """The objective on plain validation images, both views alike, over whole batches (simclr-ae)."""
        size = min(self.config.training.batch_size, len(self.whole))
        losses = []
        for start in range(0, len(self.whole) - size + 1, size):
            images = self.whole.images[start : start + size]
            features = extract_features(self.learner.encoder, images, self.views, self.precision).repeat(2, 1)
            losses.append(float(objective(self.config.objective, features, self.learner.head(features))))
        return _mean(losses)


def subset(split: Split, count: int) -> Split:
    """Pick `count` images of `split` for reports: drawn evenly, the same for every trial."""
    if len(split) <= count:
        return split
    rows = torch.randperm(len(split), generator=generator(CPU, 0, "report"))[:count]
    rows = rows.to(split.labels.device)
    return Split(split.images[rows], split.labels[rows])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
