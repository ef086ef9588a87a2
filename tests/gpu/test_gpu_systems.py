"""Every named system trains on a GPU, in both precisions, and begins with the loss that the CPU has."""

from __future__ import annotations

import pytest
import torch
from trainings import (
    CPU,
    KEPT,
    LATENTS,
    batch_of,
    built,
    config_of,
    differing,
    given_views,
    images_of,
    step,
    weights_of,
)

from headsearch.config import TrialConfig
from headsearch.core.learner import Learner
from headsearch.systems import SYSTEMS

PRECISIONS = ("fp32", "bf16")
STEPS = 3
TOLERANCE = {"cuda": 1e-2, "cpu": 3e-2}
"""Of a loss: absolute up to 1, relative above. In bf16, other units of a sparse head are the largest, and projections
near the middle of two levels fall to either side, which weighs more in the CPU's tiny batches."""


def of_system(name: str, device: torch.device) -> TrialConfig:
    small = {"latents": LATENTS, "k": KEPT} if SYSTEMS[name].tree["head"]["kind"] == "sparse" else {}
    return config_of(device, system=name, **({"head": small} if small else {}))


def without_dropout(learner: Learner) -> Learner:
    """Which units are dropped is drawn by the device."""
    for module in learner.head.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return learner


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_three_finite_steps_that_begin_with_the_cpus_loss(device, tmp_path, name, precision):
    config = of_system(name, device)
    images = images_of(device)
    there, _ = built(config, images, device, tmp_path)
    here, _ = built(config, images.to(CPU), CPU, tmp_path)
    if there.autoencoder is not None:  # each kind of device trains its own
        here.head.load_state_dict(there.head.state_dict())
    assert not differing(weights_of(there), weights_of(here))
    pair, labels = given_views(config, images), images.train.labels

    first = batch_of(without_dropout(here), "fp32", pair, labels)
    expected = float(first.loss(first.features()).detach())
    batch = batch_of(without_dropout(there), precision, pair, labels)
    found = float(batch.loss(batch.features()).detach())
    tolerance = TOLERANCE[device.type]
    assert abs(found - expected) <= tolerance * max(1.0, abs(expected)), f"{found} there, {expected} here"

    before = weights_of(there)
    losses = [float(step(batch_of(there, precision, pair, labels, number))) for number in range(STEPS)]
    after = weights_of(there)
    assert torch.tensor(losses).isfinite().all(), losses
    assert all(value.isfinite().all() for value in after.values())
    assert any(name.startswith("encoder.") for name in differing(before, after)), "the encoder did not move"
