"""A step never waits for the device, is the same each time, and the same as one CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import replayed
import torch
from trainings import batch_of, built, config_of, differing, images_of, no_host_reads, step, weights_of

from headsearch.core.epoch import train_epoch

CONFIGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "lars": {"optimizer": {"name": "lars", "clip": True}},
    "adamw": {"optimizer": {"name": "adamw", "learning_rate": 1e-3}},
    "alternating": {"scheme": {"kind": "alternating"}},
    "fresh batches": {"scheme": {"kind": "alternating", "batches": "fresh"}},
    "two steps a batch": {"scheme": {"kind": "joint", "steps_per_batch": 2}},
    "views apart": {"training": {"encode_views": "apart"}},
    "online probe": {"protocol": "ouyang2025"},
    "barlow twins": {"system": "barlow-twins"},
    "sparse": {"system": "ouyang2025-simclr-sparse", "head": {"latents": 2048, "k": 64}},
    "levels": {"system": "ouyang2025-simclr-discretised"},
    "penalty": {"system": "ouyang2025-simclr-regularised"},
    "dropout": {"system": "dropout"},
    "blur and solarisation": {"views": {"blur_probability": 0.5, "solarize_probability": 0.2}},
}
LARGE = {"encoder": {"name": "resnet18"}}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_never_waits_for_the_device(device, tmp_path, name):
    config, images = config_of(device, **CONFIGS[name]), images_of(device)
    learner, views = built(config, images, device, tmp_path)
    size, labels = config.training.batch_size, images.train.labels
    stream = views.stream(config.seed, "views", 1)

    def whole_step(number: int) -> torch.Tensor:
        with torch.no_grad():
            pair = views.pair(images.train.images[:size], stream)
        return step(batch_of(learner, "bf16", pair, labels, number))

    for number in range(2):  # libraries set themselves up, optimizers make their state
        whole_step(number)
    with no_host_reads(device):
        losses = [whole_step(number) for number in range(2, 5)]
    assert torch.stack(losses).isfinite().all()


def test_what_waits_is_caught(device):
    with no_host_reads(device), pytest.raises(RuntimeError):
        float(torch.ones(3, device=device).sum())


@pytest.mark.parametrize("parts", [{}, LARGE], ids=["small-resnet", "resnet18"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_same_epoch_twice_is_equal_to_the_bit(device, tmp_path, parts, precision):
    config, images = config_of(device, **parts, training={"precision": precision}), images_of(device)
    found = []
    for _ in range(2):
        learner, views = built(config, images, device, tmp_path)
        loss, _ = train_epoch(learner, 1, images.train, views, precision, warm=True)
        found.append((loss, weights_of(learner)))
    assert found[0][0] == found[1][0]
    assert not differing(found[0][1], found[1][1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["sgd", "lars", "adamw", "views apart", "two steps a batch", "online probe", "dropout"]
)
def test_steps_from_a_cuda_graph_are_equal_to_the_bit(device, tmp_path, monkeypatch, name, precision):
    if device.type == "cpu":
        replayed.install(monkeypatch)
    images, found = images_of(device, steps=10), {}
    for graphed in (False, True):
        parts = dict(CONFIGS[name])
        parts["training"] = {**parts.get("training", {}), "cuda_graph": graphed, "precision": precision}
        config = config_of(device, **parts)
        learner, views = built(config, images, device, tmp_path)
        losses = [
            train_epoch(learner, epoch, images.train, views, precision, warm=True)[0] for epoch in (1, 2)
        ]
        found[graphed] = losses, weights_of(learner)
        assert (learner.graphed is not None and learner.graphed.recorded) == graphed
    assert found[True][0] == found[False][0]
    assert not differing(found[True][1], found[False][1])


def read_by_the_host(module: torch.nn.Module, given: Any, projections: torch.Tensor) -> None:
    assert bool(projections.isfinite().all())


def test_a_step_that_cannot_be_recorded_is_made_without_a_graph(device, tmp_path, monkeypatch, caplog):
    """A hook that reads the device: allowed in a step, not in a recording."""
    if device.type == "cpu":
        replayed.install(monkeypatch, fails=True)
    images, found = images_of(device, steps=10), []
    for graphed in (False, True):
        config = config_of(device, training={"cuda_graph": graphed, "precision": "fp32"})
        learner, views = built(config, images, device, tmp_path)
        learner.head.register_forward_hook(read_by_the_host)
        loss, _ = train_epoch(learner, 1, images.train, views, "fp32", warm=True)
        found.append((loss, weights_of(learner)))
    assert found[0][0] == found[1][0]
    assert not differing(found[0][1], found[1][1])
    assert [record.message for record in caplog.records if "could not be recorded" in record.message]
