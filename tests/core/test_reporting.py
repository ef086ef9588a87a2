"""What ends a trial when its epoch is measured, though its loss was finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import CPU, tiny_config, tiny_images

from headsearch.core import reporting
from headsearch.core.features import build_views, extract_features
from headsearch.core.learner import build_learner
from headsearch.core.reporting import Measured, Reporter
from headsearch.errors import TrialFailure

IMAGES = tiny_images()


def measured(home: Path, **parts: object) -> Measured:
    config = tiny_config(**parts)
    learner = build_learner(config, IMAGES, CPU, home)
    views = build_views(config, IMAGES, CPU)
    return Reporter(learner, IMAGES.train, IMAGES.validation, views, "fp32").measure(1, len(IMAGES.classes))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["train", "validation"])
def test_features_that_are_not_finite_end_a_trial(
    place: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though projections are: infinite features saturate a head that is discretised."""
    calls = iter(("train", "validation"))

    def extracted(*arguments: object) -> torch.Tensor:
        features = extract_features(*arguments)
        if next(calls) == place:
            features[3, 0] = value
        return features

    monkeypatch.setattr(reporting, "extract_features", extracted)
    head = {"kind": "linear", "projection_dim": 4, "levels": 5}
    with pytest.raises(TrialFailure, match="not finite") as failed:
        measured(tmp_path, head=head)
    assert failed.value.reason == "non_finite_loss"


def test_a_fresh_encoder_is_measured(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert 1 < found.projection_rank <= 4 * (1 + 1e-9)
    assert 1 < found.feature_rank <= 32 * (1 + 1e-9)
    assert 0 <= found.probe_accuracy <= 1
