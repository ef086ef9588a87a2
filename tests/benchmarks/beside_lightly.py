"""Our training beside lightly's SimCLR, in one run on the same images, encoder, batch and threads.

    pip install lightly
    python tests/benchmarks/beside_lightly.py --root cifar10 [--width 16 --width 32] [--batch 256] [--device cuda]
        [--workers 2] [--repeats 5] [--json]

`root` holds train/<class>/*. lightly has its own transforms, loss and loop (two passes through the encoder, as in
its examples/pytorch/simclr.py) and a DataLoader with two processes, or as many as `workers`; its images are decoded
beforehand, as ours are, which spares it what ImageFolder would read. Twice: with our crop, jitter and grayscale, our
optimizer and our memory layout; and as its example has it, blur and contiguous layout included. On a GPU its batches
come through pinned memory, and its example too is measured in the first of the precisions.

All take turns in each repeat. lightly's loader is given two batches to start with, and as many are ready when the
clock starts as it holds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from headsearch.core.device import pick_device
from headsearch.core.encoders import build_encoder
from headsearch.core.features import Precision, arithmetic, build_views
from headsearch.core.feed import placed
from headsearch.core.images import ImageSet, load_images
from headsearch.core.learner import build_learner
from headsearch.core.memory import M_MMAP_THRESHOLD, M_TRIM, keep_memory
from headsearch.core.optimizers import build_optimizer, set_rate
from headsearch.core.stages import Stages, seconds_of
from headsearch.study_file import configured

PRECISIONS: Final[tuple[Precision, ...]] = ("fp32", "bf16")
EXAMPLE: Final = "lightly, its example"


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
        self,
        config: TrialConfig,
        images: ImageSet,
        *,
        alike: bool,
        precision: Precision,
        device: torch.device,
        workers: int,
    ) -> None:
        views = config.views
        self.precision, self.device = precision, device
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
        self.encoder.to(device, memory_format=self.layout)
        self.head.to(device)
        self.optimizer: torch.optim.Optimizer
        if alike:
            self.optimizer = build_optimizer(config.optimizer, self.encoder, self.head)
            set_rate(self.optimizer, 0.01)
        else:
            weights = [*self.encoder.parameters(), *self.head.parameters()]
            self.optimizer = torch.optim.SGD(weights, lr=0.06)
        self.loss = NTXentLoss(temperature=config.objective.temperature) if alike else NTXentLoss()
        loader = DataLoader(
            Decoded(images, transform),
            batch_size=config.training.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )
        self.batches: Iterator[Any] = chain.from_iterable(repeat(loader))

    def train(self, steps: int) -> None:
        for first, second in islice(self.batches, steps):
            views = [
                view.to(self.device, non_blocking=True, memory_format=self.layout) for view in (first, second)
            ]
            with arithmetic(self.device, self.precision):
                projections = [self.head(self.encoder(view)) for view in views]
            loss = self.loss(*(each.float() for each in projections))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def compare(
    config: TrialConfig,
    images: ImageSet,
    repeats: int,
    seconds: float,
    *,
    device: torch.device,
    precisions: Sequence[Precision] = PRECISIONS,
    workers: int = 2,
    rest: float = 2.0,
) -> dict[str, Any]:
    """Views per second of each, with the smallest and largest, and ours over them.

    `rest` seconds before each measurement lets loaders fill up, four batches each, and leave the cores. Our images
    are on the device, lightly's on the host.
    """
    systems: dict[str, Callable[[int], None]] = {}
    there = placed(images, device)
    lightly = partial(Lightly, config, images, device=device, workers=workers)
    for precision in precisions:
        with tempfile.TemporaryDirectory() as home:
            learner = build_learner(config, there, device, Path(home))
        ours = Stages(learner, there.train, build_views(config, there, device), precision)
        systems[f"headsearch, {precision}"] = ours.epoch
        systems[f"lightly, alike, {precision}"] = lightly(alike=True, precision=precision).train
        systems[f"encoder alone, {precision}"] = ours.encoder
    usual: Precision = precisions[0] if device.type == "cuda" else "fp32"
    systems[EXAMPLE] = lightly(alike=False, precision=usual).train

    def seconds_for(name: str, steps: int) -> float:
        (usual_memory if name == EXAMPLE else keep_memory)()
        return seconds_of(lambda: systems[name](steps), device)

    steps = {}
    for name in systems:
        seconds_for(name, 2)
        steps[name] = max(4, round(4 * seconds / seconds_for(name, 4)))
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name in systems:
            time.sleep(rest)
            views = 2 * config.training.batch_size * steps[name]
            speeds[name].append(views / seconds_for(name, steps[name]))
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
            for precision in precisions
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--encoder", default="small-resnet")
    parser.add_argument("--width", type=int, action="append")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
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
            found = compare(
                config,
                images,
                given.repeats,
                given.seconds,
                device=pick_device(given.device),
                workers=given.workers,
            )
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
