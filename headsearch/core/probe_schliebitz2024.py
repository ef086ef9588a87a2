"""Protocol `schliebitz2024`: the linear evaluation of Schliebitz et al. 2024 (simclr-ae), on test images.

The labels of the training split are never used: the probe is trained, selected and scored on parts of the
official test split. Its figures are therefore not comparable to those of other protocols, and a search must
not be steered by them.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Subset, random_split

from headsearch.config import TrialConfig
from headsearch.core.evaluation import Evaluation, Labelled
from headsearch.core.features import build_views, extract_features
from headsearch.core.images import ImageSet
from headsearch.core.randomness import generator, initialisation
from headsearch.errors import DataError, TrialFailure

if TYPE_CHECKING:
    from headsearch.core.pretrain import Pretrained

PARTS: Final = {"train": 0.7, "validation": 0.1, "test": 0.2}
SPLIT_SEED: Final = 42
"""Whatever the trial's: the parts are the same for all."""
EPOCHS: Final = 50
BATCH: Final = 32
LEARNING_RATE: Final = 1e-3


def evaluate_schliebitz2024(
    pretrained: Pretrained, images: ImageSet, config: TrialConfig, device: torch.device
) -> Evaluation:
    """Train a linear layer on 70 % of the test images' features, select its epoch on 10 %, score it on 20 %.

    Features are those of plain images, normalised with the test split's own statistics where
    `data.normalization` is the paper's. The parts are torch's ``random_split`` with a generator of seed 42
    (simclr-ae, ``logreg_datamodule.py``); it permutes our order of the images, so that the images in each
    part are not the paper's. Raises DataError if a part would be empty, TrialFailure if the probe diverges.
    """
    train, validation, test = split_rows(len(images.test))
    views = build_views(config, images, device, split="test")
    encoder = pretrained.encoder.to(device)
    features = extract_features(encoder, images.test.images, views, pretrained.precision)
    labels = images.test.labels.to(device)

    def part(rows: Tensor) -> Labelled:
        return features[rows.to(device)], labels[rows.to(device)]

    probe, epoch, loss = train_linear(part(train), part(validation), len(images.classes), config.seed)
    return Evaluation(
        probe_accuracy=accuracy(probe, *part(validation)),
        test_accuracy=accuracy(probe, *part(test)),
        train_images=len(train),
        validation_images=len(validation),
        test_images=len(test),
        details={"split_of": "test", "best_epoch": epoch, "validation_loss": loss},
    )


def split_rows(count: int) -> list[Tensor]:
    """Rows of each of the three parts of `count` images. Raises DataError if one would be empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is an error here
        parts: list[Subset[int]] = random_split(
            range(count),  # type: ignore[arg-type]
            list(PARTS.values()),
            generator=torch.Generator().manual_seed(SPLIT_SEED),
        )
    for name, part in zip(PARTS, parts, strict=True):
        if not len(part):
            raise DataError(
                f"data: {count} test images leave none for the {name} part of protocol schliebitz2024, which "
                f"trains, selects and scores its probe on 70, 10 and 20 % of them"
            )
    return [torch.tensor(part.indices) for part in parts]


@torch.no_grad()
def train_linear(
    train: Labelled, validation: Labelled, classes: int, seed: int
) -> tuple[nn.Linear, int, float]:
    """Train Linear(F, classes); return it at its lowest validation loss, with that epoch, from 1, and loss.

    Plain SGD on the mean cross entropy, 50 epochs of batches of 32, the last, smaller one included
    (simclr-ae, ``models/logreg/module.py``). The learning rate falls tenfold on a plateau of the loss of an
    epoch's last batch, not of the epoch's mean: that module logs its loss per step, and Lightning 2.2 hands
    the scheduler the latest value. Raises TrialFailure if no validation loss is finite.
    """
    features, labels = train
    device = features.device
    with initialisation(seed, "schliebitz2024"):
        probe = nn.Linear(features.shape[1], classes).to(device)
    weight, bias = probe.weight, probe.bias
    holder = torch.optim.SGD(probe.parameters(), lr=LEARNING_RATE)  # of the rate, for the scheduler
    scheduler = ReduceLROnPlateau(holder)
    wanted = F.one_hot(labels, classes).float()
    best, best_epoch, weights = math.inf, 0, {}
    for epoch in range(1, EPOCHS + 1):
        draws = generator(torch.device("cpu"), seed, "schliebitz2024", epoch)
        order = torch.randperm(len(labels), generator=draws).to(device)
        rate = holder.param_groups[0]["lr"]
        # Copied once an epoch, so that a batch is a slice; gradients in closed form, since autograd and an
        # optimizer would take many times as long as the arithmetic of so small a step.
        for rows, targets in zip(features[order].split(BATCH), wanted[order].split(BATCH), strict=True):
            logits = torch.addmm(bias, rows, weight.T)
            slopes = logits.softmax(1).sub_(targets)
            weight.addmm_(slopes.T, rows, alpha=-rate / len(rows))
            bias.sub_(slopes.sum(0), alpha=rate / len(rows))
        scheduler.step(float(F.cross_entropy(logits, targets)))
        loss = float(F.cross_entropy(probe(validation[0]), validation[1]))
        if loss < best:
            best, best_epoch = loss, epoch
            weights = {name: value.clone() for name, value in probe.state_dict().items()}
    if not weights:
        raise TrialFailure("non_finite_loss", "no epoch of protocol schliebitz2024's probe had a finite loss")
    probe.load_state_dict(weights)
    return probe, best_epoch, best


@torch.no_grad()
def accuracy(probe: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Compute the share of features (N, F) whose class `probe` predicts."""
    return float((probe(features).argmax(1) == labels).double().mean())
