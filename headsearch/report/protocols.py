"""What the accuracies of each protocol are of, as it must be said beside every number."""

from __future__ import annotations

from typing import Final

from headsearch.config import Protocol

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
