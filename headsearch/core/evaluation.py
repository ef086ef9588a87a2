"""What a final probe says, whatever the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headsearch.config import TrialConfig
from headsearch.core.measures import knn_accuracy

Labelled = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] of a final probe, and the images that it was trained, selected and scored on."""

    probe_accuracy: float
    """On the split that selects: the protocol's validation images. Where `data.train_on` has them trained on,
    it is of images that encoder (and online probe) were trained on."""
    test_accuracy: float
    """On the images that are scored once."""
    train_images: int
    validation_images: int
    test_images: int
    details: dict[str, Any] = field(default_factory=dict)
    """What else the protocol measured, as JSON values; named, and the same at every trial of a study."""


def fitted_on(train: Labelled, validation: Labelled, config: TrialConfig) -> Labelled:
    """What a classifier is fitted on that is scored on test images: `train`, or both (`data.train_on`)."""
    if not config.data.trains_on_validation:
        return train
    return torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])


def knn_details(
    train: Labelled, validation: Labelled, test: Labelled, classes: int, config: TrialConfig
) -> dict[str, float]:
    """Score kNN on the validation and on the test split, as `probe.knn_*` say.

    Neighbours of validation images are among all training images; of test images among all labelled images
    that are trained on, validation images with them where `data.train_on` says so (`fitted_on`).
    """
    scored = {
        "validation": (train, validation),
        "test": (fitted_on(train, validation, config), test),
    }
    return {
        f"knn_{name}_accuracy": knn_accuracy(
            *bank,
            *split,
            classes=classes,
            k=config.probe.knn_neighbours,
            temperature=config.probe.knn_temperature,
        )
        for name, (bank, split) in scored.items()
    }
