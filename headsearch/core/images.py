"""Image sets in memory: training, validation and test split of one data set."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from headsearch.config import DataConfig
from headsearch.core.datasets import find_source
from headsearch.core.folder import check_skipped
from headsearch.core.imagecache import cache_key, cached
from headsearch.core.splits import limited, validation_size


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, 3, H, W), and labels, int64 (N,).

    Rows stand in stratified order: every contiguous range holds the classes in their overall proportions.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Return the split on `device`; itself if it is there already."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSet:
    """One data set, split.

    `fingerprint` is a hash of pixels, labels and splits: the same on every machine. `skipped` names the
    unreadable files that were left out, relative to the root.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    skipped: tuple[str, ...] = ()

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return int(self.train.images.shape[-1])

    def to(self, device: torch.device) -> ImageSet:
        """Return the set with all splits on `device`."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )

    def normalization(self, kind: Literal["none", "zscore"]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel, each float32 (3,) in [0, 1] pixel units.

        ``zscore`` pools all pixels of the training split (population standard deviation); a constant channel
        has 1. This is ours: Schliebitz et al. (2024), simclr-ae ``dataset.calculate_dataset_stats``, average
        each image's own standard deviation over images instead, which is smaller, and take the test split's
        statistics for the test split. ``none`` is zeros and ones.
        """
        device = self.train.images.device
        if kind == "none":
            return torch.zeros(3, device=device), torch.ones(3, device=device)
        count = self.train.images.numel() // 3
        mean, std = [], []
        for channel in range(3):
            histogram = torch.zeros(256, dtype=torch.int64, device=device)
            for images in torch.split(self.train.images, 4096):
                histogram += torch.bincount(images[:, channel].flatten(), minlength=256)
            # In Python's integers, which neither round nor overflow.
            pixels = histogram.tolist()
            total = sum(value * n for value, n in enumerate(pixels))
            squares = sum(value**2 * n for value, n in enumerate(pixels))
            mean.append(total / count / 255)
            std.append(math.sqrt(count * squares - total**2) / count / 255 or 1.0)
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def load_images(config: DataConfig, *, home: Path) -> ImageSet:
    """Return the image set that `config` describes, on the CPU, memory-mapped from the cache in `home`.

    Images are decoded once per content, however many processes ask. The validation split is the share
    `validation_fraction` of each class of the original training data and depends on the data only;
    `limit` then thins the training split alone.

    Raises DataError if data are missing, damaged or do not fit the splits, StorageError if the cache cannot
    be written, WorldError if a download fails.
    """
    source = find_source(config, home)
    data, content = cached(home / "cache" / "images", cache_key(source.identity), source.read)
    check_skipped(data.skipped, data.total, config.max_unreadable_fraction)
    size = validation_size(data.train.labels, config.validation_fraction, data.classes)
    images, labels = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels)
    train = Split(images[size:], labels[size:])
    rows = limited(data.train.labels[size:], config.limit, data.classes)
    if rows is not None:
        kept = torch.from_numpy(rows)
        train = Split(train.images[kept], train.labels[kept])
    identity = json.dumps([content, size, len(train)])
    return ImageSet(
        name=config.name,
        classes=data.classes,
        train=train,
        validation=Split(images[:size], labels[:size]),
        test=Split(torch.from_numpy(data.test.images), torch.from_numpy(data.test.labels)),
        fingerprint=hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
        skipped=data.skipped,
    )
