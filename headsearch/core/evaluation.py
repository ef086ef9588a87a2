"""What a final probe says, whatever the protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
