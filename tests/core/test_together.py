"""Trainings at once, in real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch
from networks import CPU, tiny_config, tiny_images

from headsearch.core.together import Job, train_together
from headsearch.errors import StorageError, TrialFailure

pytestmark = pytest.mark.slow


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def unreadable():
    raise StorageError("the disk is away")


def job(tmp_path, load=tiny_images, **tree):
    return Job(tiny_config(**tree), load, CPU, tmp_path)


def test_each_count_and_one_alone_are_measured_and_threads_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    alone, two, three = train_together(job(tmp_path), [3, 2], repeats=2, seconds=0.02)
    assert [(one.trainings, one.threads) for one in (alone, two, three)] == [(1, 2), (2, 1), (3, 1)]
    assert (alone.gain.low, alone.gain.median, alone.gain.high) == (1.0, 1.0, 1.0)
    for several in (two, three):
        assert 0 < several.total.low <= several.total.median <= several.total.high
        assert several.gain.low <= several.total.high / alone.total.low
    assert multiprocessing.active_children() == []


def test_a_training_that_fails_ends_them_all(tmp_path):
    hot = {"optimizer": {"learning_rate": 1e4, "momentum": 0.99, "weight_decay": 1e4}}
    with pytest.raises(TrialFailure, match=r"loss is .* \(one of several trainings at once\)") as caught:
        train_together(job(tmp_path, **hot), [2], repeats=1, seconds=60.0)
    assert caught.value.reason == "non_finite_loss"
    assert multiprocessing.active_children() == []


def test_what_a_training_says_of_the_world_is_said(tmp_path):
    with pytest.raises(TrialFailure, match=r"the disk is away \(one of several"):
        train_together(job(tmp_path, load=partial(unreadable)), [2], repeats=1, seconds=0.0)


def test_a_training_that_dies_is_told_of(tmp_path):
    with pytest.raises(TrialFailure, match="ended with exit code -9"):
        train_together(job(tmp_path, load=partial(killed)), [2], repeats=1, seconds=0.0)
    assert multiprocessing.active_children() == []
