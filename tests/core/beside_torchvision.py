"""Training with our views beside training with torchvision's transforms, and bf16 beside fp32: probe accuracy.

    python tests/core/beside_torchvision.py --root cifar10 [--seeds 3] [--epochs 8] [--limit 5000] [--json]

`root` holds train/<class>/* and test/<class>/*. Everything but the views, or the precision, is the same, seeds
included. Accuracies are of the final linear probe on the validation split, with their standard error over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torchvision.transforms import v2

from headsearch.config import TrialConfig
from headsearch.core import pretrain as pretrain_module
from headsearch.core.features import build_views
from headsearch.core.images import ImageSet, load_images
from headsearch.core.memory import keep_memory
from headsearch.core.pretrain import pretrain
from headsearch.core.probe import evaluate
from headsearch.core.views import Views
from headsearch.study_file import configured

CPU = torch.device("cpu")


class TorchvisionViews:
    """The same distribution of views, by torchvision, one image at a time."""

    def __init__(self, ours: Views) -> None:
        self.ours, config = ours, ours.config
        strength = config.jitter_strength
        jitter = v2.ColorJitter(
            config.brightness * strength,
            config.contrast * strength,
            config.saturation * strength,
            config.hue * strength,
        )
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(ours.image_size, scale=(config.crop_scale_min, 1.0), antialias=True),
                v2.RandomHorizontalFlip(config.flip_probability),
                v2.RandomApply([jitter], config.jitter_probability),
                v2.RandomGrayscale(config.grayscale_probability),
            ]
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ours, name)

    def pair(self, images: Tensor, generator: Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # As floats, as ours are made: in uint8 each operation would round.
            views = [self.transform(image) for image in torch.cat([images, images]).float() / 255]
        stacked = torch.stack(views).mul_(self.ours._scale).add_(self.ours._shift)
        return stacked.to(memory_format=self.ours.memory_format)


def train(config: TrialConfig, images: ImageSet, home: Path, *, torchvisions: bool) -> tuple[float, float]:
    """Validation accuracy and views per second of the last epoch."""
    made = (
        (lambda *args, **kwargs: TorchvisionViews(build_views(*args, **kwargs)))
        if torchvisions
        else build_views
    )
    pretrain_module.build_views = made  # type: ignore[assignment]
    training = pretrain(config, images, device=CPU, home=home)
    speed = 0.0
    while True:
        try:
            speed = next(training).views_per_second
        except StopIteration as stop:
            return evaluate(stop.value, images, config, device=CPU).probe_accuracy, speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=5000)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    keep_memory()  # as workers do; without it, bf16 is no faster
    base = [
        "data.name=folder", f"data.root={given.root.resolve()}", f"data.limit={given.limit}",
        f"training.epochs={given.epochs}", "training.batch_size=128",
        "optimizer.name=adamw", "optimizer.learning_rate=0.002",
    ]  # fmt: skip
    kinds = {
        "ours, fp32": (["training.precision=fp32"], False),
        "torchvision's, fp32": (["training.precision=fp32"], True),
        "ours, bf16": (["training.precision=bf16"], False),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as home:
        images = load_images(configured(base).data, home=Path(home))
        for seed in range(given.seeds):
            for name, (changes, torchvisions) in kinds.items():
                began = time.perf_counter()
                config = configured([*base, *changes, f"seed={seed}"])
                found[name].append(train(config, images, Path(home), torchvisions=torchvisions))
                if not given.json:
                    accuracy, speed = found[name][-1]
                    seconds = time.perf_counter() - began
                    print(
                        f"seed {seed} {name:<20} {accuracy:.4f} {speed:9,.0f} views/s {seconds:5.0f} s",
                        flush=True,
                    )
    if given.json:
        print(json.dumps(found))
        return
    for name, runs in found.items():
        accuracies, speeds = zip(*runs, strict=True)
        error = statistics.stdev(accuracies) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
        print(
            f"{name:<20} {statistics.mean(accuracies):.4f} ± {error:.4f} (n = {len(runs)} seeds, standard error), "
            f"{statistics.median(speeds):,.0f} views/s"
        )


if __name__ == "__main__":
    main()
