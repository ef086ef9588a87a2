"""A training takes the memory that `headsearch bench` says."""

from __future__ import annotations

import gc

import pytest
from trainings import CPU, Sizes

from headsearch.config import TrialConfig
from headsearch.core.benchmark import measure, noise
from headsearch.core.feed import placed
from headsearch.core.memory import PeakMemory
from headsearch.core.pretrain import pretrain

SIZES = {
    "cpu": Sizes(batch=256, side=32, width=16, steps=2),
    "cuda": Sizes(batch=256, side=32, width=16, steps=4),
}
AGREEMENT = 0.15
"""bench keeps a batch's views and features beside what a training has, and measures no fresh process."""


@pytest.mark.parametrize("encoder", ["small-resnet", "resnet18"])
def test_the_peak_of_a_training_is_what_bench_says(device, tmp_path, encoder):
    if device == CPU and encoder == "resnet18":
        pytest.skip("minutes on a CPU")
    size = SIZES[device.type]
    config = TrialConfig.model_validate(
        {
            "encoder": {"name": encoder},
            "training": {"batch_size": size.batch, "epochs": 1},
            "probe": {"report_images": 128, "report_iterations": 2},
        }
    )
    images = placed(noise(size.steps * size.batch, size.side), device)
    said = measure(
        config, images, device=device, home=tmp_path, repeats=1, seconds=0.0, probe=False
    ).peak_bytes
    gc.collect()
    with PeakMemory(device) as peak:
        for _ in pretrain(config, images, device=device, home=tmp_path):
            pass
    assert said is not None
    assert peak.found is not None
    assert (1 - AGREEMENT) * said <= peak.found <= (1 + AGREEMENT) * said, f"{peak.found / said:.2f} of it"
    # What is kept for the backward pass is in it: the stem's output alone, in two bytes a value.
    channels, side = (16, size.side // 2) if encoder == "small-resnet" else (64, size.side)
    assert said > 2 * 2 * size.batch * channels * side * side
