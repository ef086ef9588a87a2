"""What the accuracies of a study are of, as it must be said beside every number."""

from __future__ import annotations

from typing import Final

from headsearch.config import Protocol, TrainOn
from headsearch.spec import StudySpec

SPLITS: Final[dict[Protocol, dict[str, str]]] = {
    "holdout": {"selection": "validation", "final": "test"},
    "ouyang2025": {"selection": "validation", "final": "test"},
    "schliebitz2024": {"selection": "10 % of the test split", "final": "20 % of the test split"},
}
"""Images that select, and images that are scored once."""

SELECTS: Final = (
    "validation accuracy selects; test accuracy was scored once for each trial and selects nothing"
)
SAID: Final[dict[Protocol, str]] = {
    "holdout": SELECTS,
    "ouyang2025": f"{SELECTS}; both are of the linear probe trained along with the encoder",
    "schliebitz2024": (
        "validation and test are 10 and 20 % of the official test split, whose other 70 % trained the probe, "
        "as that paper does: compare with its numbers, not with other protocols'"
    ),
}
"""A sentence on what the columns hold."""

SEEN: Final = "seen validation"
SEEN_WITH: Final[dict[Protocol, str]] = {
    "holdout": f"{SEEN}: images that the encoder was trained on, without their labels",
    "ouyang2025": f"{SEEN}: images that encoder and probe were trained on, with their labels",
}
"""What accuracy on validation images is that were trained on (`data.train_on`)."""


def validation(train_on: TrainOn) -> str:
    """How the column is called that has accuracy on validation images: `SEEN` where they were trained on."""
    return SEEN if train_on == "training+validation" else "validation"


def splits(protocol: Protocol, train_on: TrainOn) -> dict[str, str]:
    """Images of the two accuracies, which select and which are scored once, by `SPLITS`' names.

    Where validation images were trained on, they select nothing, and have the name `seen`.
    """
    names = SPLITS[protocol]
    if train_on == "training":
        return names
    return {"seen": f"{names['selection']} images that were trained on", "final": names["final"]}


def said(spec: StudySpec) -> list[str]:
    """Lines on what the columns hold."""
    if not spec.trains_on_validation:
        return [SAID[spec.protocol]]
    return [
        "encoder and final probe were trained on training and validation images together",
        SEEN_WITH[spec.protocol],
        "test: images that nothing was trained on, scored once; choose by neither",
    ]
