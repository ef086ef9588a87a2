"""Views of photos: speed and memory beside torchvision's, and what a smaller `data.stored_side` costs.

    python tests/benchmarks/photo_views.py [--threads 1]

A folder of 300 JPEGs of 500 x 375 is cut from scikit-learn's two photos. torchvision's transforms get photos
that are decoded already, and make one view at a time, as a loader process does.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from headsearch.config import DataConfig, ViewsConfig
from headsearch.core.images import load_images
from headsearch.core.photos import PhotoArray, Photos
from headsearch.core.views import Views

ROUNDS, BATCH, DECODED = 5, 128, 32
IDENTITY = torch.zeros(3), torch.ones(3)
LAPLACIAN = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)


def megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def folder(root: Path, photos: list[Image.Image]) -> None:
    places = np.random.default_rng(0)
    for split, count in (("train", 125), ("test", 25)):
        for label, photo in zip("ab", photos, strict=True):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                x, y = int(places.integers(141)), int(places.integers(53))
                part = photo.crop((x, y, x + 500, y + 375))
                part.save(root / split / label / f"{index}.jpg", quality=92)


def speed(photos: list[Image.Image]) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder(Path(home) / "data", photos)
        config = DataConfig(name="folder", root=f"{home}/data", image_size=128)
        images = load_images(config, home=Path(home))
        decoded = [Image.open(path).convert("RGB") for path in sorted(Path(home).rglob("*.jpg"))[:DECODED]]
        before = megabytes()
        views = Views(ViewsConfig(), 128, IDENTITY, channels_last=True)
        generator, batch = torch.Generator().manual_seed(0), images.train.images[:BATCH]
        views.pair(batch, generator)
        theirs = v2.Compose(
            [
                v2.RandomResizedCrop(128, scale=(0.2, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )
        rates: dict[str, list[float]] = {"ours": [], "torchvision": []}
        for _ in range(ROUNDS):
            began = time.perf_counter()
            views.pair(batch, generator)
            rates["ours"].append(2 * BATCH / (time.perf_counter() - began))
            began = time.perf_counter()
            for photo in decoded:
                theirs(photo), theirs(photo)
            rates["torchvision"].append(2 * DECODED / (time.perf_counter() - began))
        for name, found in rates.items():
            print(f"{name}: {statistics.median(found):,.0f} views/s ({min(found):,.0f} to {max(found):,.0f})")
        print(f"peak memory {megabytes()} MiB, before the first view {before} MiB")
        print(f"{len(images.train)} training photos take {images.train.images.nbytes >> 20} MiB of the cache")


def stored(photos: list[Image.Image], shorter: int, size: int) -> Photos:
    rows, shapes = [], []
    for photo in photos:
        scale = min(1.0, shorter / min(photo.size))
        width, height = round(photo.width * scale), round(photo.height * scale)
        kept = photo if scale == 1 else photo.resize((width, height), Image.Resampling.BICUBIC)
        rows.append(np.asarray(kept).transpose(2, 0, 1).ravel())
        shapes.append([height, width, photo.height, photo.width])
    return Photos.of(PhotoArray.packed(np.concatenate(rows), np.array(shapes, np.int32)), size)


def energy(images: torch.Tensor) -> float:
    return float(torch.nn.functional.conv2d(images, LAPLACIAN, groups=3).square().mean())


def cost_of_storing_less(photos: list[Image.Image]) -> None:
    print(
        "| view side | stored side | Laplacian energy of views, of the originals' | mean difference of plain images |"
    )
    print("| ---: | ---: | ---: | ---: |")
    for size in (128, 224):
        views = Views(ViewsConfig(jitter_strength=0.0, grayscale_probability=0.0), size, IDENTITY)
        whole = stored(photos, 10**6, size)
        draws = views.draw(200, torch.Generator().manual_seed(0), photos=whole)
        wanted = views.apply(whole, draws)
        for shorter in (128, 160, 224, 256, 320, 512):
            small = stored(photos, shorter, size)
            share = energy(views.apply(small, draws)) / energy(wanted)
            plain = float((views.plain(small) - views.plain(whole)).abs().mean())
            print(f"| {size} | {shorter} | {share:.2f} | {plain:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    photos = [Image.fromarray(array) for array in load_sample_images().images]
    speed(photos)
    cost_of_storing_less([*photos, *(photo.crop((70, 26, 570, 401)) for photo in photos)])


if __name__ == "__main__":
    main()
