"""Step 6: beside lightly's SimCLR, with its transforms in a DataLoader, on the same device, encoder and batch."""

from __future__ import annotations

import os

from setting import Clock, LeftOut, Say, Setting

LOADERS_SECONDS = 0.5
"""For a DataLoader's processes to fill their queues again before each measurement."""


def run(setting: Setting, say: Say, clock: Clock) -> None:
    """Measure both in turns, on images of noise: what is on them changes neither's speed."""
    try:
        import beside_lightly
    except ModuleNotFoundError as error:
        raise LeftOut(f"lightly cannot be imported: no module {error.name}") from error
    from headsearch.core.benchmark import noise
    from headsearch.core.device import pick_device
    from headsearch.study_file import configured

    encoders = ["small-resnet"] if setting.smoke else ["resnet18", "small-resnet"]
    count, size, batch = (100, 8, 16) if setting.smoke else (10_000, 32, 512)
    repeats, seconds = (1, 0.0) if setting.smoke else (2, 0.5)
    images, workers = noise(count, size), 1 if setting.smoke else len(os.sched_getaffinity(0))
    for encoder in encoders:
        chosen = [f"encoder.name={encoder}", f"training.batch_size={batch}"]
        found = beside_lightly.compare(
            configured([*chosen, *(["encoder.width=4"] if setting.smoke else [])]),
            images,
            repeats,
            seconds,
            device=pick_device(setting.device),
            precisions=("bf16",),
            workers=workers,
            rest=0.0 if setting.smoke else LOADERS_SECONDS,
        )
        speeds = {name: median for name, (median, _, _) in found["views_per_second"].items()}
        say(
            f"lightly: {encoder}, batch {batch}, bf16",
            {"views_per_second": speeds, "ours_over": found["ratio"]["bf16"], "loader_processes": workers},
        )
