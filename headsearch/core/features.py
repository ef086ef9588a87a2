"""From images to features: arithmetic, views and the encoder in evaluation mode."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final, Literal

import torch
from torch import Tensor, nn

from headsearch.config import TrainingConfig, TrialConfig
from headsearch.core.images import ImageSet
from headsearch.core.photos import Images, Photos
from headsearch.core.views import Views

Precision = Literal["bf16", "fp32"]

FEATURE_PIXELS: Final = 1 << 20
"""Pixels that go through the encoder at once when features are extracted."""
GPU_PIXELS: Final = 1 << 23
GPU_IMAGES: Final = 1024
"""On a GPU, which 20 images of 224 pixels do not fill, as many images as both of these allow, and at least
what `FEATURE_PIXELS` allows."""


def resolve_precision(config: TrainingConfig, device: torch.device) -> Precision:
    """Decide what ``auto`` means on `device`: bf16 on GPUs of compute capability 8.0 on, else fp32.

    Not on CPUs, though two cores with AVX-512 BF16 train small-resnet 1.2 (width 16) to 1.5 (width 32) and
    resnet18 1.9 times as fast in it (`headsearch bench --precision bf16`): a study's hosts may have unlike
    CPUs, and a trial that another one adopts is to go on as it began. Nor is it free: over 13 seeds of eight
    epochs the probe accuracy was 0.46 points lower, with a standard error of 0.28. Without
    `memory.keep_memory` bf16 is no faster there.
    """
    if config.precision != "auto":
        return config.precision
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if native else "fp32"


def arithmetic(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Within: networks on `device` compute in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def views_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Decide what views on `device` come in: on a GPU, what the first convolution would make of them.

    The same numbers reach it, without an operation that casts them and in half the memory. On a CPU, they
    are fp32.
    """
    return torch.bfloat16 if device.type == "cuda" and precision == "bf16" else torch.float32


def build_views(
    config: TrialConfig,
    images: ImageSet,
    device: torch.device,
    *,
    split: Literal["train", "test", "probe"] = "train",
) -> Views:
    """Build the views of `config` on `device`, normalised with the statistics that `split` has.

    They come in `views_dtype`.
    """
    mean, std = images.normalization(config.data.normalization, split)
    return Views(
        config.views,
        images.image_size,
        (mean.to(device), std.to(device)),
        dtype=views_dtype(device, resolve_precision(config.training, device)),
        channels_last=config.training.channels_last,
        photos=isinstance(images.train.images, Photos),
    )


@torch.no_grad()
def extract_features(encoder: nn.Module, images: Images, views: Views, precision: Precision) -> Tensor:
    """Compute features, fp32 (N, D), of plain images, uint8 (N, 3, S, S), or photos, in evaluation mode.

    On the device of `views`; images from elsewhere are moved there as they are needed.
    """
    encoder.eval()
    batches = []
    for part in images.split(images_at_once(images.shape[-2] * images.shape[-1], views.device)):
        batch = part.to(views.device)
        with arithmetic(batch.device, precision):
            batches.append(encoder(views.plain(batch)).float())
    return torch.cat(batches)


def images_at_once(pixels: int, device: torch.device) -> int:
    """Count the images, of `pixels` each, that go through an encoder on `device` at once."""
    count = max(1, FEATURE_PIXELS // pixels)
    return max(count, min(GPU_IMAGES, GPU_PIXELS // pixels)) if device.type == "cuda" else count
