"""Image sets in memory: training, validation and test split of one data set."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from headsearch.config import DataConfig, Normalization
from headsearch.core.datasets import find_source
from headsearch.core.decoding import Decoded, Stored
from headsearch.core.folder import check_skipped
from headsearch.core.imagecache import cache_key, cached
from headsearch.core.photos import Images, PhotoArray, Photos, squares
from headsearch.core.splits import limited, validation_size

STATISTICS_VALUES: Final = 1 << 18
"""Pixel values that are made float64 at once."""

Statistics = tuple[float, float, float]
IMAGENET: Final[tuple[Statistics, Statistics]] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SOLO_PRETRAIN: Final[dict[str, tuple[Statistics, Statistics]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
}
SOLO_PROBE: Final[dict[str, tuple[Statistics, Statistics]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
}


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, 3, S, S), or photos, and labels, int64 (N,), -1 for an image without one.

    Rows stand in stratified order: every contiguous range holds the classes in their overall proportions.
    """

    images: Images
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Return the split on `device`; itself if it is there already."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSet:
    """One data set, split. `train`, `validation` and `test` are labelled; `pretraining` may hold more.

    `fingerprint` is a hash of pixels, labels and splits: the same on every machine. `skipped` names the
    unreadable files that were left out, relative to the root. `notes` are lines for people: what was found
    and ignored, how values were scaled.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    skipped: tuple[str, ...] = ()
    mixed: Split | None = None
    """The images of `train`, then the unlabelled ones; None where there are none."""
    notes: tuple[str, ...] = ()

    @property
    def pretraining(self) -> Split:
        """What encoder, head and autoencoder are trained on: all training images, labelled or not."""
        return self.train if self.mixed is None else self.mixed

    @property
    def unlabelled(self) -> int:
        """How many images of `pretraining` have no label; they come last."""
        return len(self.pretraining) - len(self.train)

    @property
    def counts(self) -> dict[str, int]:
        """Images by use."""
        return {
            "training": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "unlabelled": self.unlabelled,
        }

    @property
    def image_size(self) -> int:
        """Side of views and plain images, in pixels."""
        return int(self.train.images.shape[-1])

    def to(self, device: torch.device) -> ImageSet:
        """Return the set with all splits on `device`."""
        mixed = None if self.mixed is None else self.mixed.to(device)
        return replace(
            self,
            mixed=mixed,
            train=self.train.to(device) if mixed is None else _first(mixed, len(self.train)),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )

    def normalization(
        self, kind: Normalization, split: Literal["train", "test", "probe"] = "train"
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel, each float32 (3,) in [0, 1] pixel units.

        ``none`` is zeros and ones. ``zscore`` pools all pixels that are trained on (population standard
        deviation); this is ours. ``zscore-schliebitz2024`` averages each image's own mean and sample standard
        deviation over images, which is smaller (simclr-ae, ``dataset.calculate_dataset_stats``): over
        training and validation images together, or with `split` ``test`` over the test images, which that
        paper normalises with their own. They take it before resizing, we at the decoded size. A channel
        without deviation has 1. ``imagenet`` and ``solo-learn`` are constants (`constants`); the latter's are
        others for the images of its linear probe, with `split` ``probe``. Other kinds ignore `split`.
        """
        if kind in ("imagenet", "solo-learn"):
            given = torch.tensor(constants(kind, self.name, probe=split == "probe"))
            return tuple(given.to(self.train.images.device))
        if kind == "zscore-schliebitz2024":
            splits = (self.test,) if split == "test" else (self.pretraining, self.validation)
            return average_statistics([part.images for part in splits])
        train = self.pretraining
        device = train.images.device
        if kind == "none":
            return torch.zeros(3, device=device), torch.ones(3, device=device)
        count = math.prod(train.images.shape) // 3
        histograms = torch.zeros(3, 256, dtype=torch.int64, device=device)
        for images in train.images.split(4096):
            plain = squares(images)
            for channel, histogram in enumerate(histograms):
                histogram += torch.bincount(plain[:, channel].flatten(), minlength=256)
        mean, std = [], []
        for pixels in histograms.tolist():
            # In Python's integers, which neither round nor overflow.
            total = sum(value * n for value, n in enumerate(pixels))
            second = sum(value**2 * n for value, n in enumerate(pixels))
            mean.append(total / count / 255)
            std.append(math.sqrt(count * second - total**2) / count / 255 or 1.0)
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def constants(
    kind: Literal["imagenet", "solo-learn"], name: str, *, probe: bool
) -> tuple[Statistics, Statistics]:
    """Look up the mean and standard deviation that a library writes down for the images called `name`.

    solo-learn has one table for pretraining (data/pretrain_dataloader.py) and one for its linear `probe` and
    for validation (data/classification_dataloader.py), which has CIFAR-10's mean for CIFAR-100 too.
    """
    if kind == "imagenet":
        return IMAGENET
    return (SOLO_PROBE if probe else SOLO_PRETRAIN).get(name, IMAGENET)


def average_statistics(splits: Sequence[Images]) -> tuple[Tensor, Tensor]:
    """Average over all images, uint8 (N, 3, S, S) each, of each one's channel means and deviations.

    Of photos, those of plain images.
    """
    total = torch.zeros(2, 3, dtype=torch.float64, device=splits[0].device)
    for images in splits:
        for chunk in images.split(max(1, STATISTICS_VALUES // math.prod(images.shape[1:]))):
            pixels = squares(chunk).flatten(2).double()
            mean = pixels.mean(2)
            # torch.std makes one pass after Welford, which takes twenty times as long
            norm = torch.linalg.vector_norm(pixels - mean[:, :, None], dim=2)
            total[0] += mean.sum(0)
            total[1] += norm.sum(0) / math.sqrt(pixels.shape[2] - 1)
    mean, deviation = total / (255 * sum(len(images) for images in splits))
    return mean.float(), torch.where(deviation > 0, deviation, 1.0).float()


def load_images(config: DataConfig, *, home: Path) -> ImageSet:
    """Return the image set that `config` describes, on the CPU, memory-mapped from the cache in `home`.

    Images are decoded once per content, however many processes ask. The validation split is the share
    `validation_fraction` of each class of the original training data and depends on the data only;
    `limit` then thins the training split, and the unlabelled images likewise.

    Raises DataError if data are missing, damaged or do not fit the splits, StorageError if the cache cannot
    be written, WorldError if a download fails.
    """
    source = find_source(config, home)
    data, content = cached(home / "cache" / "images", cache_key(source.identity), source.read)
    check_skipped(data.skipped, data.total, config.max_unreadable_fraction)
    size = validation_size(data.train.labels, config.validation_fraction, data.classes)
    known = _tensor(data.train.images, data, config), torch.from_numpy(data.train.labels)
    train = Split(known[0][size:], known[1][size:])
    rows = limited(data.train.labels[size:], config.limit, data.classes)
    if rows is not None:
        kept = torch.from_numpy(rows)
        train = Split(train.images[kept], train.labels[kept])
    mixed = None if data.unlabelled is None else _mixed(train, data, size, config)
    identity: list[object] = [content, size, len(train)]
    if mixed is not None:
        identity.append(len(mixed))
    if isinstance(train.images, Photos):
        # Pixels of views and plain images follow from these, too.
        identity.append([data.view_side, config.resize, config.center_share])
    return ImageSet(
        name=config.name,
        classes=data.classes,
        train=train if mixed is None else _first(mixed, len(train)),
        validation=Split(known[0][:size], known[1][:size]),
        test=Split(_tensor(data.test.images, data, config), torch.from_numpy(data.test.labels)),
        fingerprint=hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest(),
        skipped=data.skipped,
        mixed=mixed,
        notes=(*source.notes(data.skipped), *data.notes),
    )


def _tensor(images: Stored, data: Decoded, config: DataConfig) -> Images:
    if isinstance(images, PhotoArray):
        squeeze = config.resize == "squeeze"
        return Photos.of(images, data.view_side, squeeze=squeeze, center_share=config.center_share)
    return torch.from_numpy(images)


def _mixed(train: Split, data: Decoded, held: int, config: DataConfig) -> Split:
    """The training images and, after them, at most `limit` unlabelled ones.

    Without a limit a range of the cache's file, in which they stand in this order.
    """
    assert data.unlabelled is not None  # noqa: S101
    count = len(data.unlabelled) if config.limit is None else min(config.limit, len(data.unlabelled))
    labels = torch.cat([train.labels, torch.full((count,), -1)])
    loose = _tensor(data.unlabelled[:count], data, config)
    if isinstance(loose, Photos):
        assert isinstance(train.images, Photos)  # noqa: S101
        return Split(train.images.followed_by(loose), labels)
    assert isinstance(train.images, Tensor)  # noqa: S101
    if len(train) == len(data.train.labels) - held and data.whole is not None:
        return Split(_tensor(data.whole[held : len(data.train.labels) + count], data, config), labels)
    return Split(torch.cat([train.images, loose]), labels)


def _first(split: Split, count: int) -> Split:
    """The first rows of a split; shares its memory."""
    return Split(split.images[:count], split.labels[:count])
