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

from headsearch.config import DataConfig, Normalization, TrainOn
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
    """One data set, split. `train`, `validation` and `test` are labelled and share no image.

    `pretraining` and `labelled` are what is trained on, with and without labels: `train` and, where
    `train_on` says so, `validation`; the former also unlabelled images.

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
    """All that is pretrained on where that is more than `train`: the images of `validation` (if they are
    trained on), of `train`, then the unlabelled ones."""
    notes: tuple[str, ...] = ()
    train_on: TrainOn = "training"
    """`data.train_on`."""

    @property
    def trains_on_validation(self) -> bool:
        """Whether the validation images are in `pretraining` and `labelled`."""
        return self.train_on == "training+validation"

    @property
    def pretraining(self) -> Split:
        """What encoder, head and autoencoder are trained on: all training images, labelled or not."""
        return self.train if self.mixed is None else self.mixed

    @property
    def labelled(self) -> Split:
        """Those of `pretraining` that have a label: what probes are trained on in the end."""
        if not self.trains_on_validation:
            return self.train
        return _rows(self.pretraining, 0, len(self.validation) + len(self.train))

    @property
    def unlabelled(self) -> int:
        """How many images of `pretraining` have no label; they come last."""
        return len(self.pretraining) - len(self.labelled)

    @property
    def before_test(self) -> tuple[Split, ...]:
        """All images but the test split's, each once."""
        return (self.pretraining,) if self.trains_on_validation else (self.pretraining, self.validation)

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
        test = self.test.to(device)
        if self.mixed is None:
            return replace(
                self, train=self.train.to(device), validation=self.validation.to(device), test=test
            )
        mixed, held = self.mixed.to(device), len(self.validation) if self.trains_on_validation else 0
        return replace(
            self,
            mixed=mixed,
            train=_rows(mixed, held, len(self.train)),
            validation=_rows(mixed, 0, held) if held else self.validation.to(device),
            test=test,
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
            splits = (self.test,) if split == "test" else self.before_test
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
    `limit` then thins the training split, and the unlabelled images likewise. The fingerprint is of images
    and splits, whichever of them `train_on` says to train on.

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
    validation = Split(known[0][:size], known[1][:size])
    loose = 0 if data.unlabelled is None else min(len(data.unlabelled), config.limit or len(data.unlabelled))
    identity: list[object] = [content, size, len(train)]
    if data.unlabelled is not None:
        identity.append(len(train) + loose)
    mixed = None
    if config.trains_on_validation or data.unlabelled is not None:
        parts = [validation, train] if config.trains_on_validation else [train]
        mixed = _mixed(parts, loose, data, config, to_the_end=rows is None)
        if config.trains_on_validation:
            validation = _rows(mixed, 0, size)
        train = _rows(mixed, len(mixed) - loose - len(train), len(train))
    if isinstance(train.images, Photos):
        # Pixels of views and plain images follow from these, too.
        identity.append([data.view_side, config.resize, config.center_share])
    return ImageSet(
        name=config.name,
        classes=data.classes,
        train=train,
        validation=validation,
        test=Split(_tensor(data.test.images, data, config), torch.from_numpy(data.test.labels)),
        fingerprint=hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest(),
        skipped=data.skipped,
        mixed=mixed,
        notes=(*source.notes(data.skipped), *data.notes),
        train_on=config.train_on,
    )


def _tensor(images: Stored, data: Decoded, config: DataConfig) -> Images:
    if isinstance(images, PhotoArray):
        squeeze = config.resize == "squeeze"
        return Photos.of(images, data.view_side, squeeze=squeeze, center_share=config.center_share)
    return torch.from_numpy(images)


def _mixed(
    parts: Sequence[Split], loose: int, data: Decoded, config: DataConfig, *, to_the_end: bool
) -> Split:
    """The labelled images of `parts` and, after them, the first `loose` unlabelled ones.

    In the cache's file all stand in this order: `parts` that reach `to_the_end` of the labelled images are a
    range of it.
    """
    labels = torch.cat([*(part.labels for part in parts), torch.full((loose,), -1)])
    if to_the_end and data.whole is not None:
        end = len(data.train.labels) + loose
        return Split(_tensor(data.whole[end - len(labels) : end], data, config), labels)
    pictures = [part.images for part in parts]
    if data.unlabelled is not None:
        pictures.append(_tensor(data.unlabelled[:loose], data, config))
    return Split(_joined(pictures), labels)


def _joined(parts: Sequence[Images]) -> Images:
    """One after the other; photos are rows of one array in any case."""
    first = parts[0]
    if isinstance(first, Photos):
        for other in parts[1:]:
            assert isinstance(other, Photos)  # noqa: S101
            first = first.followed_by(other)
        return first
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _rows(split: Split, start: int, count: int) -> Split:
    """`count` rows of a split from `start` on; shares its memory."""
    return Split(split.images[start : start + count], split.labels[start : start + count])
