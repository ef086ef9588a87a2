"""Our training beside lightly's SimCLR, in one run on the same images, encoder, batch and threads.

    pip install lightly
    python tests/core/beside_lightly.py --root cifar10 [--width 16 --width 32] [--batch 256] [--repeats 5] [--json]

`root` holds train/<class>/*. lightly has its own transforms, loss and loop (two passes through the encoder, as in
its examples/pytorch/simclr.py) and a DataLoader with two processes; its images are decoded beforehand, as ours
are, which spares it what ImageFolder would read. Twice: with our crop, jitter and grayscale, our optimizer and
our memory layout; and as its example has it, blur and contiguous layout included.

The three take turns in each repeat. lightly's loader is given two batches to start with, and as many are ready
when the clock starts as it holds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Final

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from headsearch.config import TrialConfig
from headsearch.core.encoders import build_encoder
from headsearch.core.features import Precision, arithmetic, build_views
from headsearch.core.images import ImageSet, load_images
from headsearch.core.learner import build_learner
from headsearch.core.memory import M_MMAP_THRESHOLD, M_TRIM, keep_memory
from headsearch.core.stages import Stages
from headsearch.study_file import configured

CPU = torch.device("cpu")
PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "bf16")


def usual_memory() -> None:
    """What glibc's thresholds grow to by themselves in a process with large tensors, and no more (man 3 mallopt)."""
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    library.mallopt(M_TRIM, 64 << 20)


class Decoded(Dataset):
    """PIL images in memory, each transformed when it is asked for."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], Any]) -> None:
        self.images = [to_pil_image(image) for image in images.train.images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index])


class Lightly:
    """Its example's model and loop."""

    def __init__(
        self, config: TrialConfig, images: ImageSet, *, alike: bool, precision: Precision = "fp32"
    ) -> None:
        views = config.views
        self.precision = precision
        transform = SimCLRTransform(input_size=images.image_size, normalize=None)
        if alike:
            transform = SimCLRTransform(
                input_size=images.image_size,
                cj_prob=views.jitter_probability,
                cj_strength=views.jitter_strength,
                min_scale=views.crop_scale_min,
                random_gray_scale=views.grayscale_probability,
                gaussian_blur=views.blur_probability,
                normalize=None,
            )
        self.encoder = build_encoder(config.encoder, images.image_size)
        dim = self.encoder.feature_dim
        self.head = SimCLRProjectionHead(dim, dim, config.head.projection_dim)
        self.layout = torch.channels_last if alike else torch.contiguous_format
        self.encoder.to(memory_format=self.layout)
        weights = [*self.encoder.parameters(), *self.head.parameters()]
        self.optimizer = (
            torch.optim.AdamW(weights, lr=1e-3, fused=True) if alike else torch.optim.SGD(weights, lr=0.06)
        )
        self.loss = NTXentLoss(temperature=config.objective.temperature) if alike else NTXentLoss()
        loader = DataLoader(
            Decoded(images, transform),
            batch_size=config.training.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=2,
            persistent_workers=True,
        )
        self.batches: Iterator[Any] = chain.from_iterable(repeat(loader))

    def train(self, steps: int) -> None:
        for first, second in islice(self.batches, steps):
            with arithmetic(CPU, self.precision):
                projections = [
                    self.head(self.encoder(view.to(memory_format=self.layout))) for view in (first, second)
                ]
            loss = self.loss(*(each.float() for each in projections))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def compare(config: TrialConfig, images: ImageSet, repeats: int, seconds: float) -> dict[str, Any]:
    systems: dict[str, Callable[[int], None]] = {}
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as home:
            learner = build_learner(config, images, CPU, Path(home))
        ours = Stages(learner, images.train, build_views(config, images, CPU), precision)
        systems[f"headsearch, {precision}"] = ours.epoch
        systems[f"lightly, alike, {precision}"] = Lightly(
            config, images, alike=True, precision=precision
        ).train
        systems[f"encoder alone, {precision}"] = ours.encoder
    systems["lightly, its example"] = Lightly(config, images, alike=False).train

    def run(name: str, steps: int) -> None:
        (usual_memory if name == "lightly, its example" else keep_memory)()
        systems[name](steps)

    steps = {}
    for name in systems:
        run(name, 2)
        began = time.perf_counter()
        run(name, 4)
        steps[name] = max(4, round(4 * seconds / (time.perf_counter() - began)))
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name in systems:
            time.sleep(2)  # loaders fill up, four batches each, and leave the cores
            began = time.perf_counter()
            run(name, steps[name])
            views = 2 * config.training.batch_size * steps[name]
            speeds[name].append(views / (time.perf_counter() - began))
    return {
        "encoder": config.encoder.name,
        "width": config.encoder.width,
        "steps": steps,
        "views_per_second": {
            name: [statistics.median(all_), min(all_), max(all_)] for name, all_ in speeds.items()
        },
        "ratio": {
            precision: {
                name: statistics.median(
                    a / b for a, b in zip(speeds[f"headsearch, {precision}"], all_, strict=True)
                )
                for name, all_ in speeds.items()
            }
            for precision in PRECISIONS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--encoder", default="small-resnet")
    parser.add_argument("--width", type=int, action="append")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for width in given.width or [16]:
        config = configured(
            [
                "data.name=folder", f"data.root={given.root.resolve()}", f"data.limit={given.limit}",
                f"encoder.name={given.encoder}", f"encoder.width={width}", f"training.batch_size={given.batch}",
            ]
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as home:
            images = load_images(config.data, home=Path(home))
            found = compare(config, images, given.repeats, given.seconds)
        if given.json:
            print(json.dumps(found))
            continue
        print(f"{given.encoder}, width {width}, batch {given.batch}, {torch.get_num_threads()} threads")
        for name, (median, low, high) in found["views_per_second"].items():
            ours = ", ".join(
                f"{precision} {found['ratio'][precision][name]:.2f} x" for precision in PRECISIONS
            )
            print(f"  {name:<22}{median:>9,.0f} views/s ({low:,.0f}-{high:,.0f}), ours in {ours}")


if __name__ == "__main__":
    main()
