"""Trainings that are stopped, moved between devices, or fed from the host go on as if nothing had happened."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import replayed
import torch
from networks import finish, without_timings
from trainings import CPU, config_of, images_of

from headsearch.core import epoch
from headsearch.core.checkpoint import AsyncCheckpoints, CheckpointFolder
from headsearch.core.control import EveryEpoch
from headsearch.core.feed import batches, streamed
from headsearch.core.pretrain import pretrain
from headsearch.errors import TrainingStopped

MEASURES_TOLERANCE = 1e-6
"""Of what reports measure, relative: kNN votes and probes may add up in any order on a GPU. Losses and weights are
equal to the bit."""
CONFIGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "lars": {"optimizer": {"name": "lars"}},
    "adamw": {"optimizer": {"name": "adamw", "learning_rate": 1e-3}},
    "dropout": {"system": "dropout"},
    "online probe": {"protocol": "ouyang2025"},
    "from the head's own steps": {"scheme": {"kind": "alternating"}},
}


class StopAt(EveryEpoch):
    """Stops before this step, counted from 1 over the process."""

    def __init__(self, at: int) -> None:
        self.left = at

    def at_step(self) -> Any:
        self.left -= 1
        return "go on" if self.left else "stop"


def trained(config, images, device, home, folder=None, control=None):
    """Reports and networks of a whole training."""
    checkpoints = AsyncCheckpoints(CheckpointFolder(folder)) if folder else None
    return finish(
        pretrain(config, images, device=device, home=home, checkpoints=checkpoints, control=control)
    )


def one_more_epoch(config, images, device, home, folder) -> None:
    """Take up the checkpoint, train one epoch, save and leave."""
    done = CheckpointFolder(folder).peek()
    training = pretrain(
        config, images, device=device, home=home, checkpoints=AsyncCheckpoints(CheckpointFolder(folder))
    )
    for _ in range((done["epoch"] if done else 0) + 1):
        next(training)
    training.close()


def assert_equal_trainings(ours, theirs) -> None:
    """To the bit, but for what reports measure."""
    for mine, other in zip(without_timings(ours[0]), without_timings(theirs[0]), strict=True):
        assert mine.loss == other.loss
        ours_told, others_told = asdict(mine), asdict(other)
        assert ours_told.pop("measures") == pytest.approx(others_told.pop("measures"), rel=MEASURES_TOLERANCE)
        assert ours_told == pytest.approx(others_told, rel=MEASURES_TOLERANCE)
    for network in ("encoder", "head"):
        mine, other = (getattr(one[1], network).state_dict() for one in (ours, theirs))
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_stopped_and_resumed_it_is_equal_to_an_undisturbed_one(device, tmp_path, name):
    config, images = config_of(device, **CONFIGS[name]), images_of(device)
    undisturbed = trained(config, images, device, tmp_path)
    folder = tmp_path / "checkpoint"
    # After two steps of the first epoch, and, resumed, after one step of the second.
    for stop in (2, len(images.train) // config.training.batch_size - 2):
        with pytest.raises(TrainingStopped):
            trained(config, images, device, tmp_path, folder, StopAt(stop))
        torch.manual_seed(stop)  # of nobody's concern
    assert_equal_trainings(trained(config, images, device, tmp_path, folder), undisturbed)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "dropout"])
def test_a_recorded_training_goes_on_to_the_bit(device, tmp_path, monkeypatch, name):
    """Other steps come from the graph then."""
    if device.type == "cpu":
        replayed.install(monkeypatch)
    config = config_of(device, **CONFIGS[name], training={"cuda_graph": True})
    images = images_of(device)
    undisturbed = trained(config, images, device, tmp_path)
    folder = tmp_path / "checkpoint"
    with pytest.raises(TrainingStopped):
        trained(config, images, device, tmp_path, folder, StopAt(2))
    assert_equal_trainings(trained(config, images, device, tmp_path, folder), undisturbed)


@pytest.mark.parametrize("inside", [False, True], ids=["between epochs", "inside an epoch"])
def test_a_checkpoint_of_the_cpu_goes_on_on_the_device_and_back(device, tmp_path, inside):
    """In fp32 its losses stay near those of a training on the CPU alone, though the views are others' draws."""
    config = config_of(device, training={"epochs": 3, "precision": "fp32"})
    there, here = images_of(device), images_of(device).to(CPU)
    expected, _ = trained(config, here, CPU, tmp_path)
    folder = tmp_path / "checkpoint"
    steps = len(here.train) // config.training.batch_size
    # Inside: after one step of the first epoch, and, resumed, after one of the second.
    for images, place, stop in ((here, CPU, 1), (there, device, steps - 1)):
        if inside:
            with pytest.raises(TrainingStopped):
                trained(config, images, place, tmp_path, folder, StopAt(stop))
        else:
            one_more_epoch(config, images, place, tmp_path, folder)
        state = CheckpointFolder(folder).peek()
        assert state is not None
        assert all(value.device == CPU for value in state["encoder"].values())
    found, pretrained = trained(config, here, CPU, tmp_path, folder)
    assert len(found) == 3
    assert [one.loss for one in found] == pytest.approx([one.loss for one in expected], rel=0.1)
    assert next(pretrained.encoder.parameters()).device == CPU


def test_a_training_fed_from_the_host_is_equal_to_one_from_the_device(device, tmp_path, monkeypatch):
    config, images = config_of(device), images_of(device)
    resident = trained(config, images, device, tmp_path / "resident")
    monkeypatch.setattr(epoch, "batches", streamed)
    assert_equal_trainings(trained(config, images.to(CPU), device, tmp_path / "streamed"), resident)


def test_streamed_batches_are_the_rows_in_order_while_the_device_works(device):
    """Buffers are used again while earlier copies and their readers may still wait for the device."""
    images = images_of(device)
    host = images.to(CPU).train
    draws = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(host), generator=draws) for _ in range(4)])
    side = 4096 if device.type == "cuda" else 64
    load = torch.rand(side, side, device=device)
    taken = []
    for pixels, labels in streamed(host, order, 7, device):
        load = (load @ load).clamp_(0, 1)
        taken.append((pixels.float() + 0 * load[0, 0], labels))
    resident = list(batches(images.train, order, 7, device))
    assert len(taken) == len(resident)
    for (pixels, labels), (expected, expected_labels) in zip(taken, resident, strict=True):
        assert torch.equal(pixels, expected.float())
        assert torch.equal(labels, expected_labels)
