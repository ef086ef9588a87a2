from __future__ import annotations

from pathlib import Path

import pytest

from headsearch.errors import InputError, SpecError
from headsearch.runtime.single import SinglePoint, point_of, train

STUDY = """
name = "tiny"
[budget]
trials = 4
epochs = 2
[base]
data = { name = "digits", limit = 100 }
encoder.width = 4
training = { batch_size = 50, precision = "fp32" }
probe = { report_images = 100, report_iterations = 3, iterations = 5, penalties = [1e-2] }
[space]
"head.kind" = ["linear", "mlp"]
"head.projection_dim" = [2, 4]
"head.width" = { choices = [8, 16], when = { "head.kind" = "mlp" } }
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return path


def finish(config, home: Path) -> tuple[list, SinglePoint]:
    training, reports = train(config, home=home, device="cpu"), []
    while True:
        try:
            reports.append(next(training))
        except StopIteration as stop:
            return reports, stop.value


def test_overrides_reach_the_study_and_the_trial(study: Path) -> None:
    config = point_of(study, ["budget.epochs=5", "head.kind=mlp", "head.width=16", "data.limit=60"], seed=7)
    assert (config.training.epochs, config.head.kind, config.head.width) == (5, "mlp", 16)
    assert (config.data.limit, config.seed, config.head.projection_dim) == (60, 7, 2)
    assert point_of(study, ["training.epochs=0"]).training.epochs == 0
    with pytest.raises(SpecError, match=r"budget\.epoch"):
        point_of(study, ["budget.epoch=5"])
    with pytest.raises(SpecError, match="head"):
        point_of(study, ["head.widht=5"])


def test_a_point_is_trained_and_measured(study: Path, headsearch_home: Path) -> None:
    reports, point = finish(point_of(study, []), headsearch_home)
    assert [report.epoch for report in reports] == [1, 2]
    assert list(point.reports) == reports
    data = point.to_json()
    assert data["validation_accuracy"] == point.evaluation.probe_accuracy
    assert data["test_images"] == 359
    assert (data["projection_dim"], data["feature_dim"]) == (2, 32)
    assert finish(point_of(study, []), headsearch_home)[1].to_json()["test_accuracy"] == data["test_accuracy"]


def test_an_untrained_encoder_is_measured(study: Path, headsearch_home: Path) -> None:
    reports, point = finish(point_of(study, ["training.epochs=0"]), headsearch_home)
    assert reports == []
    assert 0.0 < point.evaluation.probe_accuracy <= 1.0


def test_a_batch_that_does_not_fit_and_a_device_that_is_not_there(study: Path, headsearch_home: Path) -> None:
    with pytest.raises(SpecError, match=r"training\.batch_size: 500 is more than the 100 training images"):
        finish(point_of(study, ["training.batch_size=500"]), headsearch_home)
    with pytest.raises(InputError, match="device"):
        next(train(point_of(study, []), home=headsearch_home, device="tpu"))
