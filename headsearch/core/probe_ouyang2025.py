"""Protocol `ouyang2025`: solo-learn's two linear probes, as Ouyang et al. 2025 have them.

Which of the two fed the paper's tables is not known (its script for SimCLR on CIFAR also fine-tunes the
encoder, which is no linear probe). We take the online probe, which is there at no cost, and give the offline
one beside it. Both are selected by nothing: the last epoch counts, as theirs does; the paper scores CIFAR's
test split after every epoch, we only here. studies/README.md has each setting beside the source's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headsearch.config import OptimizerConfig, ProbeConfig, TrialConfig, ViewsConfig
from headsearch.core.evaluation import Evaluation, knn_details
from headsearch.core.features import arithmetic, build_views, extract_features, views_dtype
from headsearch.core.feed import batches
from headsearch.core.images import ImageSet, Split
from headsearch.core.optimizers import build_optimizer, learning_rate, set_rate
from headsearch.core.photos import Photos
from headsearch.core.randomness import generator, initialisation
from headsearch.core.views import Views

if TYPE_CHECKING:
    from headsearch.core.pretrain import Pretrained

TRUST: Final = 0.02
"""LARS's eta, solo-learn's."""
WARMUP_EPOCHS: Final = 10.0
WARMUP_START: Final = 3e-5
DECAYS: Final = (0.6, 0.8)
"""Shares of the epochs after which the rate of `sgd` is a tenth."""
CROPS: Final = ViewsConfig(crop_scale_min=0.08, jitter_strength=0.0, grayscale_probability=0.0)
"""Its training images are cropped and flipped."""


def evaluate_ouyang2025(
    pretrained: Pretrained, images: ImageSet, config: TrialConfig, device: torch.device
) -> Evaluation:
    """Score the probe that was trained along, and one trained on the frozen encoder afterwards.

    Both are trained on `ImageSet.labelled`; where that has the validation images, accuracy on these is a
    training accuracy.
    """
    views = build_views(config, images, device, split="probe")
    encoder = pretrained.encoder.to(device)
    online = pretrained.online
    assert online is not None  # noqa: S101

    def featurise(split: Split) -> tuple[Tensor, Tensor]:
        features = extract_features(encoder, split.images, views, pretrained.precision)
        return features, split.labels.to(device)

    validation, test = featurise(images.validation), featurise(images.test)
    offline = train_offline(pretrained, images, config, device)
    train = featurise(images.train) if config.probe.knn_train == "all" else None
    return Evaluation(
        probe_accuracy=accuracy(online, *validation),
        test_accuracy=accuracy(online, *test),
        train_images=len(images.labelled),
        validation_images=len(images.validation),
        test_images=len(images.test),
        details={
            "probe": "online",
            "offline_validation_accuracy": accuracy(offline, *validation),
            "offline_test_accuracy": accuracy(offline, *test),
            **(knn_details(train, validation, test, len(images.classes), config) if train else {}),
        },
    )


def train_offline(
    pretrained: Pretrained, images: ImageSet, config: TrialConfig, device: torch.device
) -> nn.Linear:
    """Train Linear(F, classes) on the frozen encoder's features of cropped and flipped labelled images.

    As `offline_recipe` says, `probe.offline_epochs` epochs; the last, smaller batch of an epoch is dropped
    unless it is the only one.
    """
    split = images.labelled
    with initialisation(config.seed, "offline probe"):
        probe = nn.Linear(pretrained.feature_dim, len(images.classes)).to(device)
    recipe = offline_recipe(config.probe)
    optimizer = build_optimizer(recipe, probe)
    crops = Views(
        CROPS,
        images.image_size,
        tuple(part.to(device) for part in images.normalization(config.data.normalization, "probe")),  # type: ignore[arg-type]
        dtype=views_dtype(device, pretrained.precision),
        channels_last=config.training.channels_last,
        photos=isinstance(split.images, Photos),
    )
    encoder = pretrained.encoder.eval()
    size = min(config.probe.offline_batch_size, len(split))
    steps, epochs = len(split) // size, config.probe.offline_epochs
    for epoch in range(epochs):
        order = torch.randperm(
            len(split), generator=generator(torch.device("cpu"), config.seed, "offline order", epoch)
        )
        draws = crops.stream(config.seed, "offline views", epoch)
        for step, (pixels, labels) in enumerate(batches(split, order[: steps * size], size, device)):
            with torch.no_grad(), arithmetic(device, pretrained.precision):
                features = encoder(crops(pixels, draws)).float()
            loss = F.cross_entropy(probe(features), labels)
            at = epoch * steps + step
            rate = (
                recipe.learning_rate * size / 256 * decayed(epoch, epochs)
                if config.probe.offline == "sgd"
                else learning_rate(recipe, step=at, steps_per_epoch=steps, epochs=epochs, batch_size=size)
            )
            set_rate(optimizer, rate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probe


def offline_recipe(probe: ProbeConfig) -> OptimizerConfig:
    """Describe the optimizer of the offline probe, with its warm-up where it has one.

    Sources: Projector_Theory, scripts/linear/cifar/barlow_twins.yaml and scripts/linear/imagenet-100;
    solo-learn, methods/linear.py and args/linear.py for what these leave out.
    """
    if probe.offline == "sgd":
        return OptimizerConfig(
            name="sgd", learning_rate=probe.offline_learning_rate, momentum=0.9, weight_decay=0.0
        )
    if probe.offline == "lars-without-warmup":
        return OptimizerConfig(
            name="lars",
            learning_rate=probe.offline_learning_rate,
            trust_coefficient=TRUST,
            weight_decay=0.0,
        )
    return OptimizerConfig(
        name="lars",
        lars_form="solo-learn",
        learning_rate=probe.offline_learning_rate,
        momentum=0.9,
        weight_decay=1e-4,
        trust_coefficient=TRUST,
        clip=True,
        warmup_epochs=min(WARMUP_EPOCHS, probe.offline_epochs / 5),
        warmup_start=WARMUP_START,
        warmup_peak="last_step",
    )


def decayed(epoch: int, epochs: int) -> float:
    """Compute the factor of the rate in `epoch`, from 0, as torch's MultiStepLR with milestones `DECAYS`."""
    return float(0.1 ** sum(epoch >= round(share * epochs) for share in DECAYS))


@torch.no_grad()
def accuracy(probe: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Compute the share of features (N, F) whose class `probe` predicts."""
    return float((probe(features).argmax(1) == labels).double().mean())
