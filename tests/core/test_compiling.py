"""The encoder compiled: the same training, the same checkpoints, and no compiler needed."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from networks import finish, start, tiny_config, tiny_images, weights
from torch._dynamo.exc import BackendCompilerFailed

from headsearch.config import TrialConfig
from headsearch.core import compiling
from headsearch.core.checkpoint import CheckpointFolder

pytestmark = pytest.mark.filterwarnings("default")  # what the compiler has to say of itself


def compiled(mode: str = "default") -> TrialConfig:
    return tiny_config(training={"compile_encoder": mode})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which torch.compile needs on CPUs")
def test_a_compiled_encoder_trains_the_same(tmp_path, monkeypatch):
    calls = []
    real = torch.compile

    def counting(encoder, **options):
        made = real(encoder, **options)
        return lambda images: (calls.append(tuple(images.shape)), made(images))[1]

    monkeypatch.setattr(torch, "compile", counting)
    images = tiny_images()
    ours, pretrained = finish(start(compiled(), images, tmp_path))
    plain, reference = finish(start(tiny_config(), images, tmp_path))
    assert set(calls) == {(64, 3, 8, 8)}, "batches of training, and none of reports"
    for mine, other in zip(ours, plain, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=2e-3)
        assert mine.feature_rank == pytest.approx(other.feature_rank, rel=0.05)
    assert weights(pretrained).keys() == weights(reference).keys(), "a checkpoint knows nothing of it"


def test_where_compiling_fails_the_encoder_trains_as_it_is(tmp_path, monkeypatch, caplog):
    tried = []

    def broken(encoder, **options):
        def call(images):
            tried.append(options)
            raise BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", broken)
    images = tiny_images()
    with caplog.at_level(logging.WARNING, logger=compiling.__name__):
        ours, _ = finish(start(compiled("reduce-overhead"), images, tmp_path))
    plain, _ = finish(start(tiny_config(), images, tmp_path))
    assert [replace(report, views_per_second=0.0, train_seconds=0.0) for report in ours] == [
        replace(report, views_per_second=0.0, train_seconds=0.0) for report in plain
    ]
    assert tried == [{"mode": "reduce-overhead", "dynamic": False}], "once"
    assert ["not compiled" in record.message for record in caplog.records] == [True]


def test_a_checkpoint_of_the_other_is_not_taken_up(tmp_path, monkeypatch, caplog):
    """Compiled or not is part of the configuration: sums are rounded otherwise."""
    monkeypatch.setattr(torch, "compile", lambda encoder, **options: encoder)
    images, folder = tiny_images(), CheckpointFolder(tmp_path / "one")
    training = start(tiny_config(), images, tmp_path, folder)
    next(training)
    training.close()
    reports, _ = finish(start(compiled(), images, tmp_path, folder))
    assert [report.epoch for report in reports] == [1, 2, 3]
    assert "checkpoint of another config" in caplog.text
