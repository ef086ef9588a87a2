"""The final linear probe: what an encoder's accuracy is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headsearch.config import TrialConfig
from headsearch.core.features import build_views, extract_features
from headsearch.core.images import ImageSet, Split
from headsearch.core.logistic import LinearProbe, fit_probe
from headsearch.core.pretrain import Pretrained
from headsearch.errors import DataError


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] of the final probe. `penalty` is the one that the validation split chose."""

    probe_accuracy: float
    test_accuracy: float
    penalty: float
    train_images: int
    validation_images: int
    test_images: int


def evaluate(
    pretrained: Pretrained, images: ImageSet, config: TrialConfig, *, device: torch.device
) -> Evaluation:
    """Fit the final probe on the training split and score it once on the test split.

    The validation split chooses its penalty, of equals the largest; penalties are tried from the largest
    down, each starting at the solution of the one before. The only place that reads ``images.test``. Raises
    DataError without test images.
    """
    if not len(images.test):
        raise DataError(f"data: {images.name} has no test images to score the final probe on")
    views = build_views(config, images, device)
    encoder = pretrained.encoder.to(device)

    def featurise(split: Split) -> tuple[Tensor, Tensor]:
        features = extract_features(encoder, split.images.to(device), views, pretrained.precision)
        return features, split.labels.to(device)

    train, validation = featurise(images.train), featurise(images.validation)
    probe: LinearProbe | None = None
    best: tuple[float, float, LinearProbe] | None = None
    for penalty in sorted(config.probe.penalties, reverse=True):
        probe = fit_probe(
            *train,
            len(images.classes),
            penalty=penalty,
            iterations=config.probe.iterations,
            start=probe,
        )
        accuracy = probe.accuracy(*validation)
        if best is None or accuracy > best[0]:
            best = accuracy, penalty, probe
    assert best is not None  # noqa: S101
    accuracy, penalty, probe = best
    return Evaluation(
        probe_accuracy=accuracy,
        test_accuracy=probe.accuracy(*featurise(images.test)),
        penalty=penalty,
        train_images=len(images.train),
        validation_images=len(images.validation),
        test_images=len(images.test),
    )
