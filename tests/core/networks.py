"""Tiny image sets and configs that the tests of core's networks share."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headsearch.config import TrialConfig
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.core.images import ImageSet, Split
from headsearch.core.pretrain import EpochReport, Pretrained, pretrain

CPU = torch.device("cpu")


def tiny_images(train: int = 96, validation: int = 40, test: int = 24, size: int = 8) -> ImageSet:
    """Three classes, told apart by the place of a bright patch, in noise."""
    noise = torch.Generator().manual_seed(5)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 3
        images = torch.randint(0, 120, (count, 3, size, size), generator=noise, dtype=torch.uint8)
        for label in range(3):
            corner = label * (size // 3)
            images[labels == label, :, corner : corner + size // 3] += 100
        return Split(images, labels)

    return ImageSet(
        name="digits",
        classes=("top", "middle", "bottom"),
        train=split(train),
        validation=split(validation),
        test=split(test),
        fingerprint=f"tiny-{train}-{validation}-{size}",
    )


def tiny_config(**parts: Any) -> TrialConfig:
    """Three epochs of three steps on `tiny_images`; `parts` replace or extend tables."""
    tree: dict[str, Any] = {
        "encoder": {"width": 4},
        "head": {"kind": "mlp", "width": 8, "projection_dim": 4},
        "optimizer": {"learning_rate": 0.3},
        "autoencoder": {"epochs": 2, "batch_size": 32},
        "probe": {"report_images": 64, "report_iterations": 5, "iterations": 20},
        "training": {"epochs": 3, "batch_size": 32},
    }
    for name, part in parts.items():
        fresh = name == "head" and "kind" in part
        tree[name] = {**tree.get(name, {}), **part} if isinstance(part, dict) and not fresh else part
    return TrialConfig.model_validate(tree)


def start(
    config: TrialConfig, images: ImageSet, home: Path, checkpoints: CheckpointFolder | None = None
) -> Generator[EpochReport, None, Pretrained]:
    return pretrain(config, images, device=CPU, home=home, checkpoints=checkpoints)


def finish(training: Generator[EpochReport, None, Pretrained]) -> tuple[list[EpochReport], Pretrained]:
    """Iterate to the end."""
    reports = []
    while True:
        try:
            reports.append(next(training))
        except StopIteration as stop:
            return reports, stop.value


def without_timings(reports: list[EpochReport]) -> list[EpochReport]:
    return [replace(report, views_per_second=0.0, train_seconds=0.0) for report in reports]


def weights(pretrained: Pretrained) -> dict[str, torch.Tensor]:
    """Encoder and head, buffers included."""
    encoder = {f"encoder.{name}": value for name, value in pretrained.encoder.state_dict().items()}
    return encoder | {f"head.{name}": value for name, value in pretrained.head.state_dict().items()}


def assert_same_weights(a: Pretrained, b: Pretrained) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert not different
