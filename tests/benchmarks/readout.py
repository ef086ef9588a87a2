"""Accuracy of frozen features as dkobak/simclr-cifar10 measures it: a linear readout and nearest neighbours.

Features are those before the head, of whole images, in evaluation mode; they are not scaled. All on one device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headsearch.core.randomness import generator, initialisation

RATE, DECAY, EPOCHS, BATCH = 0.01, 5e-6, 500, 1000
"""Of the readout: Adam with L2 decay, a cosine that steps once an epoch, rows in random order."""
NEIGHBOURS = 10
CHUNK = 1000
"""Rows whose similarities to all others are in memory at once."""


def linear_accuracy(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> float:
    """Train Linear(F, classes) on features (N, F) and labels (N,); the share of `test` that it gets right.

    The last, smaller batch of an epoch is left out, unless it is the only one; of 50,000 rows there is none.
    """
    features, labels = train
    device = features.device
    with initialisation(seed, "readout"):
        readout = nn.Linear(features.shape[1], classes).to(device)
    optimizer = torch.optim.Adam(readout.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    draws = generator(device, seed, "readout order")
    size = min(BATCH, len(labels))
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(len(labels), generator=draws, device=device)
        for rows in order[: len(labels) // size * size].split(size):
            loss = F.cross_entropy(readout(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float((readout(test[0]).argmax(1) == test[1]).double().mean())


@torch.no_grad()
def knn_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, classes: int, k: int = NEIGHBOURS
) -> float:
    """Classify by the `k` rows of `train` with the largest cosine similarity; the share that is right.

    Each has one vote, and of classes with equal votes the first wins: scikit-learn's KNeighborsClassifier with
    metric="cosine".
    """
    known = F.normalize(train[0].double()).T
    right = 0
    for features, labels in zip(test[0].split(CHUNK), test[1].split(CHUNK), strict=True):
        nearest = (F.normalize(features.double()) @ known).topk(k, dim=1).indices
        votes = F.one_hot(train[1][nearest], classes).sum(1)
        # argmax takes any of equals
        first = torch.arange(classes, 0, -1, device=votes.device)
        right += int(((votes * (classes + 1) + first).argmax(1) == labels).sum())
    return right / len(test[1])
