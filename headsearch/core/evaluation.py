"""What a final probe says, whatever the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headsearch.config import TrialConfig
from headsearch.core.measures import knn_accuracy

Labelled = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] of a final probe, and the images that it was trained, selected and scored on."""

    probe_accuracy: float
    """On the split that selects: the protocol's validation images."""
    test_accuracy: float
    """On the images that are scored once."""
    train_images: int
    validation_images: int
    test_images: int
    details: dict[str, Any] = field(default_factory=dict)
    """What else the protocol measured, as JSON values; named, and the same at every trial of a study."""


def knn_details(
    train: Labelled, validation: Labelled, test: Labelled, classes: int, config: TrialConfig
) -> dict[str, float]:
    """Score kNN among all training images on the validation and on the test split, as `probe.knn_*` say."""
    return {
        f"knn_{name}_accuracy": knn_accuracy(
            *train,
            *split,
            classes=classes,
            k=config.probe.knn_neighbours,
            temperature=config.probe.knn_temperature,
        )
        for name, split in (("validation", validation), ("test", test))
    }
